"""Token shards: a split's documents as one long line of ids in memory-mapped files, and where each one ends.

    train-00000.bin, ...      ids in document order, little-endian uint16, or uint32 for a larger vocabulary
    train-documents.npy       int64 [n + 1]: document i is the tokens bounds[i] .. bounds[i + 1] of the split

A document never straddles two files. Files are written once, in a folder that is renamed when complete
(`tessera.store.publish_folder`), and its manifest holds their SHA-256. Reading maps them: a page comes from the disk
when a batch needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from tessera.recipe import UserError

SHARD_TOKENS = 1 << 28  # a file of 512 MiB or 1 GiB


def token_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The smallest of the two types that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class TokenDocuments:
    """The documents of a split: bounds int64 [n + 1] from 0, and the shards that hold the tokens one after another."""

    bounds: NDArray[np.int64]
    shards: Sequence[NDArray[np.unsignedinteger]]

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [n]."""
        return np.diff(self.bounds)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Tokens start .. stop of a document, a view into its shard."""
        first = int(self.bounds[document])
        offset = 0
        for shard in self.shards:
            if first < offset + len(shard):
                return shard[first - offset + start : first - offset + stop]
            offset += len(shard)
        raise IndexError(f"document {document} lies behind the last shard")


class ShardWriter:
    """Writes the shards of one split into a folder; used as a context, which writes the index at its end."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.num_tokens = 0
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, shard_tokens
        self._bounds = [0]
        self._file: BinaryIO | None = None
        self._in_file = self._files = 0

    def append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        """Write one document; a file that it would overfill is closed first. Raises OSError."""
        if self._file is None or (self._in_file and self._in_file + len(tokens) > self._limit):
            self._next_file()
        assert self._file is not None
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._in_file += len(tokens)
        self.num_tokens += len(tokens)
        self._bounds.append(self.num_tokens)

    def _next_file(self) -> None:
        if self._file:
            self._file.close()
        self._file = open(self._folder / f"{self._split}-{self._files:05}.bin", "xb")  # noqa: SIM115
        self._files, self._in_file = self._files + 1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        if error is None:
            bounds = np.array(self._bounds, dtype=np.int64)
            np.save(self._folder / f"{self._split}-documents.npy", bounds, allow_pickle=False)


def open_documents(folder: Path, split: str, dtype: np.dtype) -> TokenDocuments:
    """Map the shards of a split; raises UserError if they do not fit together.

    The caller has verified the folder's manifest: this finds defects of the writer, not of the disk.
    """
    bounds = np.load(folder / f"{split}-documents.npy", allow_pickle=False)
    shards = [np.memmap(path, dtype=dtype, mode="r") for path in sorted(folder.glob(f"{split}-*.bin"))]
    if bounds[0] != 0 or (np.diff(bounds) < 1).any() or sum(map(len, shards)) != bounds[-1]:
        raise UserError(f"{folder}: {split}-documents.npy does not fit the shards; remove the folder")
    return TokenDocuments(bounds, shards)
