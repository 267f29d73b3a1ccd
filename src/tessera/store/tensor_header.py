"""The header of a safetensors file, read before a library is let near the file.

    u64 length of the header | header, a JSON object | data

    {"__metadata__": {...}, "lm_head.weight": {"dtype": "F32", "shape": [64, 8], "data_offsets": [0, 2048]}, ...}

Checked is that the tensors lie one after another and fill the file, each with the bytes that its shape needs, so that
no size is believed that the file itself does not bear out. Nothing is allocated by a number in the file.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tessera.recipe import UserError
from tessera.store.files import regular_size, unreadable
from tessera.store.json_text import parse_object

ITEM_BYTES = {"F32": 4, "BF16": 2}  # the dtypes that checkpoints hold
METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """What a file holds: dtype and shape of each tensor, and the text that its writer added."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read_header(path: Path, largest: int) -> Header:
    """The header of a file, of at most `largest` bytes; raises UserError for a file that is not sound."""
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= min(size - 8, largest):
                raise UserError(f"{path}: cannot be read: its header does not fit into its {size} bytes")
            content = parse_object(path, file.read(length))
    except OSError as error:
        raise unreadable(path, error) from error
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: cannot be read: {METADATA} must be texts by name")
    placed = {name: _placed(path, name, facts) for name, facts in content.items()}
    end = 0
    for name, (_, _, begins, ends) in sorted(placed.items(), key=lambda item: item[1][2:]):
        if begins != end:
            raise UserError(f"{path}: cannot be read: {name} begins at byte {begins} of the data, not at {end}")
        end = ends
    if 8 + length + end != size:
        raise UserError(f"{path}: cannot be read: has {size} bytes, but its header says {8 + length + end}")
    return Header({name: (dtype, shape) for name, (dtype, shape, _, _) in placed.items()}, metadata)


def _placed(path: Path, name: str, facts: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, and first and last byte of one tensor; the two are those that the shape asks for."""
    try:
        dtype, shape, (begins, ends) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        item = ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: cannot be read: {name} must have a dtype, a shape and data_offsets") from None
    numbers = (*shape, begins, ends)
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise UserError(f"{path}: cannot be read: shape and data_offsets of {name} must be whole numbers of 63 bits")
    if ends - begins != item * prod(shape):
        raise UserError(f"{path}: cannot be read: {name} has {ends - begins} bytes, but its shape says another number")
    return dtype, shape, begins, ends


_MOST_AXES = 8
