"""Numbers of a run as JSON that every reader accepts.

JSON knows neither NaN nor infinity, but Python writes them all the same, and then a browser refuses the whole
file. Here they become null. Arrays and scalars of numpy and torch are written as the numbers they hold; they are
known by their `tolist`, so that neither library is imported.
"""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from tessera.recipe import UserError
from tessera.store.files import read_small, unreadable, unwritable, write_atomic


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text in ASCII; raises TypeError for what JSON has no form for.

    ASCII, because a line of text may hold U+2028, at which some readers of lines would break it.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file, in one step (`write_atomic`); folders above it are made. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    write_atomic(path, dumps(value, indent=2) + "\n")


def read_object(path: Path, largest: int | None = None) -> dict[str, Any]:
    """The JSON object in a file; raises UserError if it is missing, unreadable or something else.

    With `largest` the file need not be trusted: see `files.read_small`.
    """
    try:
        content = path.read_bytes() if largest is None else read_small(path, largest)
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_object(path, content)


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in `content`, which stands in `path`; raises UserError."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique)
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def check_schema(path: Path, found: Any, known: int) -> None:
    """Raise UserError for a file that a newer tessera wrote, or one without a version."""
    if type(found) is not int:
        raise UserError(f"{path}: schema = {found!r}: must be an integer; was this file written by tessera?")
    if found < 1:
        raise UserError(f"{path}: schema = {found}: there is no such version; this tessera reads 1 to {known}")
    if found > known:
        raise UserError(f"{path}: schema = {found}: this tessera reads up to schema {known}; upgrade tessera")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take different ones of two equal names, so that neither is taken."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in an object twice")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value
