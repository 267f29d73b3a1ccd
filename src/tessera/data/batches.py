"""An endless stream of training sequences that a position alone determines.

An epoch is all documents of a split in a new order, laid one after another; each ends with end of text. Epoch follows
epoch without a gap, and the stream is cut every L tokens, wherever that falls (section 4.1 of the report: documents are
packed, nothing is cut off or padded). Sequence s of the stream therefore holds its tokens s L .. (s + 1) L, and the
targets are one further. In N tokens of an epoch every token is an input once and a target once.

Sequences are drawn in a shuffled order too, within windows of an epoch's length: neighbours in the stream are mostly
pieces of one document, and a batch of them is a batch of one document.

So the position of a run is one number, the sequences it has consumed. `batch` is a pure function of it: nothing is
to be saved, a resumed run sees the same batches, and a rank takes its own rows by asking for them.

Held-out text has one pass in one order, shuffled alike, so that its first batches come from everywhere: the stream
ends, the rest of its last sequence is filled with end of text whose targets are IGNORED, and position num_sequences is
position 0 again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.data.draws import permutation
from tessera.data.shards import TokenDocuments
from tessera.ops.chunked_loss import IGNORED

T = TypeVar("T")
_KEPT = 2  # a sequence may lie in two epochs, a batch in two windows


@dataclass(frozen=True)
class Batch:
    """B sequences of L tokens."""

    tokens: Tensor  # int64 [B, L]
    targets: Tensor  # int64 [B, L], the next token, or IGNORED where there is none
    document_ids: Tensor  # int32 [B, L], from 0 in each row; equal where two positions are in one document

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.document_ids.to(device))

    def split(self, size: int | None) -> Iterator["Batch"]:
        """Micro-batches of `size` sequences, the last one perhaps smaller; None: the batch itself."""
        size = size or len(self.tokens)
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            yield Batch(self.tokens[rows], self.targets[rows], self.document_ids[rows])


class Batches:
    """The sequences of a split; see the module's text.

    `endless` makes the shuffled stream of training, otherwise it is one pass over held-out text. Without
    `cross_document_attention` the first token of a document is no target: nothing of the document is seen before it.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        sequence_length: int,
        *,
        seed: int,
        end_of_text: int,
        endless: bool = True,
        cross_document_attention: bool = True,
    ) -> None:
        self.num_tokens = documents.num_tokens  # of one epoch
        self.sequence_length = sequence_length
        self._documents, self._lengths = documents, documents.lengths
        self._seed, self._end_of_text = seed, end_of_text
        self._endless, self._cross_document_attention = endless, cross_document_attention
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[int, NDArray[np.int64]] = {}

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch: whole ones of training, where the rest belongs to a sequence that the next epoch
        completes; all of held-out text, the last filled up. At least 1."""
        if self._endless:
            return max(self.num_tokens // self.sequence_length, 1)
        return max(-(-(self.num_tokens - 1) // self.sequence_length), 1)

    def batch(self, position: int, size: int) -> Batch:
        """Sequences position .. position + size of the stream. Raises ValueError for a negative position."""
        if position < 0 or size < 1:
            raise ValueError(f"position {position}, size {size}: positions count from 0, a batch has a sequence")
        tokens = np.empty((size, self.sequence_length + 1), dtype=np.int64)
        documents = np.empty((size, self.sequence_length + 1), dtype=np.int32)
        for row in range(size):
            self._fill(self._drawn(position + row), tokens[row], documents[row])
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        if not self._cross_document_attention:
            targets[documents[:, 1:] != documents[:, :-1]] = IGNORED
        targets[tokens[:, 1:] == IGNORED] = IGNORED
        inputs[inputs == IGNORED] = self._end_of_text
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(documents[:, :-1].copy()))

    def _drawn(self, position: int) -> int:
        """The sequence of the stream that stands at a position of the shuffled order."""
        window, place = divmod(position, self.num_sequences)
        if not self._endless:
            window = 0
        if window not in self._windows:
            order = permutation(self.num_sequences, self._seed, "sequences", window)
            self._windows = _latest(self._windows, window, order)
        return window * self.num_sequences + int(self._windows[window][place])

    def _fill(self, sequence: int, tokens: NDArray[np.int64], documents: NDArray[np.int32]) -> None:
        """Write the L + 1 tokens of a sequence, IGNORED behind the end of held-out text, and its document ids."""
        epoch, offset = divmod(sequence * self.sequence_length, self.num_tokens)
        order, ends = self._epoch(epoch)
        place, filled, number = int(np.searchsorted(ends, offset, side="right")), 0, 0
        while filled < len(tokens):
            if place == len(order):
                if not self._endless:
                    tokens[filled:], documents[filled:] = IGNORED, number
                    return
                epoch, place, offset = epoch + 1, 0, 0
                order, ends = self._epoch(epoch)
            document = int(order[place])
            length = int(self._lengths[document])
            start = offset - (int(ends[place]) - length)
            count = min(length - start, len(tokens) - filled)
            tokens[filled : filled + count] = self._documents.read(document, start, start + count)
            documents[filled : filled + count] = number
            filled, offset, place, number = filled + count, offset + count, place + 1, number + 1

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch in their order, and where each ends in it; the last few are kept at hand."""
        if epoch not in self._epochs:
            order = permutation(self._documents.num_documents, self._seed, "order", epoch)
            self._epochs = _latest(self._epochs, epoch, (order, np.cumsum(self._lengths[order])))
        return self._epochs[epoch]


def _latest(kept: dict[int, T], number: int, made: T) -> dict[int, T]:
    """`kept` with one more, without all but the last few."""
    return dict([*list(kept.items())[-(_KEPT - 1) :], (number, made)])
