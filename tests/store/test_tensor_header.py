"""The header of a tensor file is believed only as far as the file bears it out."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tessera.recipe import UserError
from tessera.store.tensor_header import read_header

LARGEST = 10_000
SOUND: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "F32", "shape": [0, 5], "data_offsets": [26, 26]},
}


def write(path: Path, header: Any, data: int = 26) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_the_header_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(4, 2), "m": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "file", metadata={"made": "here"})
    header = read_header(tmp_path / "file", LARGEST)
    assert header.tensors == {"w": ("F32", (4, 2)), "m": ("BF16", (3,)), "s": ("F32", ())}
    assert header.metadata == {"made": "here"}
    assert read_header(write(tmp_path / "mine", SOUND), LARGEST).tensors["c"] == ("F32", (0, 5))


def changed(name: str, **facts: Any) -> dict[str, Any]:
    return SOUND | {name: SOUND[name] | facts}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 5_000, "nested too deeply"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "stands in an object twice"),
        (SOUND | {"__metadata__": {"a": 1}}, "must be texts by name"),
        (SOUND | {"__metadata__": []}, "must be texts by name"),
        (SOUND | {"d": None}, "d must have a dtype"),
        (changed("a", dtype="F64"), "a must have a dtype"),
        (changed("a", dtype=[]), "a must have a dtype"),
        (changed("a", shape=7), "a must have a dtype"),
        (changed("a", data_offsets=[0]), "a must have a dtype"),
        (changed("a", shape=[2.0, 3]), "whole numbers"),
        (changed("a", shape=[True, 6]), "whole numbers"),
        (changed("a", shape=[-2, -3]), "whole numbers"),
        (changed("a", shape=[2**63]), "whole numbers"),
        (changed("a", shape=[1] * 9), "whole numbers"),
        (changed("a", shape=[2, 4]), "its shape says another number"),
        (changed("a", shape=[2**62, 2**62]), "its shape says another number"),
        (changed("b", data_offsets=[20, 22]), "b begins at byte 20 of the data, not at 24"),
        (changed("b", data_offsets=[26, 28]), "begins at byte 26 of the data, not at 24"),
        (changed("c", shape=[1, 5], data_offsets=[26, 46]), "but its header says"),
        ({}, "but its header says"),
    ],
)
def test_a_header_that_the_file_does_not_bear_out_is_refused_with_the_file(
    header: Any, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "file", header)
    with pytest.raises(UserError, match=words) as error:
        read_header(path, LARGEST)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10_001, 500])
def test_no_more_is_read_than_the_file_holds_and_a_header_may_have(length: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(struct.pack("<Q", length) + b" " * (20_000 if length == 10_001 else 100))
    with pytest.raises(UserError, match="its header does not fit"):
        read_header(tmp_path / "file", LARGEST)
    write(tmp_path / "file", b" " * (LARGEST - 2) + b"{}", 0)
    assert read_header(tmp_path / "file", LARGEST).tensors == {}


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_a_length_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(UserError, match="its header does not fit"):
        read_header(tmp_path / "file", LARGEST)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "file", SOUND)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="link: is a symbolic link, which is not followed here"):
        read_header(tmp_path / "link", LARGEST)
