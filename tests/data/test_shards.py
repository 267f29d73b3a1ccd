"""Documents come back from the files as they were written, whatever files they fell into."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.shards import ShardWriter, open_documents, token_type
from tessera.recipe import UserError


def written(folder: Path, documents: list[list[int]], dtype: np.dtype, shard_tokens: int):
    with ShardWriter(folder, "train", dtype, shard_tokens) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.uint32))
    return open_documents(folder, "train", dtype)


@given(
    st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), min_size=1, max_size=20),
    st.integers(1, 30),
    st.sampled_from(["<u2", "<u4"]),
)
@settings(deadline=None)
def test_documents_come_back(tmp_path_factory, documents, shard_tokens, dtype) -> None:
    folder = tmp_path_factory.mktemp("shards")
    opened = written(folder, documents, np.dtype(dtype), shard_tokens)
    assert opened.num_documents == len(documents) and opened.num_tokens == sum(map(len, documents))
    for i, document in enumerate(documents):
        assert opened.read(i, 0, len(document)).tolist() == document
        assert opened.read(i, 1, len(document)).tolist() == document[1:]
    sizes = [path.stat().st_size // np.dtype(dtype).itemsize for path in folder.glob("*.bin")]
    longest = max(map(len, documents))
    assert all(size <= max(shard_tokens, longest) for size in sizes)


def test_files_are_little_endian_and_mapped(tmp_path) -> None:
    opened = written(tmp_path, [[1, 0x0203]], np.dtype("<u2"), 100)
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\x01\x00\x03\x02"
    assert isinstance(opened.shards[0], np.memmap) and not opened.shards[0].flags.writeable


def test_the_type_holds_every_id() -> None:
    assert token_type(65_536) == np.uint16 and token_type(65_537) == np.uint32


def test_an_index_that_does_not_fit_is_refused(tmp_path) -> None:
    written(tmp_path, [[1, 2], [3]], np.dtype("<u2"), 100)
    for bounds in ([0, 2], [0, 3, 3], [0, 2, 4], [1, 3]):
        np.save(tmp_path / "train-documents.npy", np.array(bounds, dtype=np.int64))
        with pytest.raises(UserError, match="does not fit"):
            open_documents(tmp_path, "train", np.dtype("<u2"))
