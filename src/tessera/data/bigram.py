"""The baseline that a language model must beat: a Witten-Bell bigram of the tokens that the model was trained on.

With c(h, w) the times token w followed h, c(h) their sum and t(h) the number of different tokens that followed h,

    P(w | h) = (c(h, w) + t(h) P(w)) / (c(h) + t(h))              P(w | h) = P(w) where h was never seen
    P(w)     = (c(w) + t / V) / (c + t)                           uniform, 1 / V, where nothing was counted

where c(w), c and t are the same counts over all histories (Witten and Bell 1991, method C; a context's chance of
something new is the number of new things seen in it). Each distribution sums to 1 over the V tokens.

Counted are exactly the pairs (token, target) of the batches that a model consumed, so that both have learnt from the
same text; positions whose target is IGNORED are left out. Counts are kept as sorted pairs, not as a V x V table.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessera.ops.chunked_loss import IGNORED

_PENDING = 1 << 22  # pairs that are collected before they are sorted into the counts


class WittenBellBigram:
    """Counts of pairs of tokens below `vocab_size`, and what they predict."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs = np.empty(0, dtype=np.int64)  # history * V + token, ascending, each once
        self._counts = np.empty(0, dtype=np.int64)
        self._pending: list[NDArray[np.int64]] = []
        self._num_pending = 0

    def count(self, tokens: ArrayLike, targets: ArrayLike) -> None:
        """Count each pair (tokens[i], targets[i]); integers of any one shape, targets IGNORED where none.

        Raises ValueError for a token outside the vocabulary.
        """
        pairs = self._keys(*_observed(tokens, targets))
        self._pending.append(pairs)
        self._num_pending += len(pairs)
        if self._num_pending >= _PENDING:
            self._merge()

    def probability(self, tokens: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
        """P(targets[i] | tokens[i]), float64 of the same shape; no target may be IGNORED."""
        self._merge()
        history, token = _integers(tokens), _integers(targets)
        keys = self._keys(history, token)
        if not len(self._pairs):
            return np.full(keys.shape, 1 / self.vocab_size)
        place = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        pair = np.where(self._pairs[place] == keys, self._counts[place], 0)
        new = self._followers[history]
        whole = self._by_history[history] + new
        unigram = self._unigram[token]
        return np.where(whole > 0, (pair + new * unigram) / np.maximum(whole, 1), unigram)

    def bits_per_byte(self, batches: Iterable[tuple[ArrayLike, ArrayLike]], token_bytes: ArrayLike) -> float:
        """Bits that the targets of (tokens, targets) pairs cost, per byte of text they stand for.

        token_bytes int64 [V]. Targets that are IGNORED cost nothing. Raises ValueError where no byte is left.
        """
        lengths = np.asarray(token_bytes)
        bits, num_bytes = 0.0, 0
        for tokens, targets in batches:
            history, token = _observed(tokens, targets)
            bits -= float(np.log2(self.probability(history, token)).sum())
            num_bytes += int(lengths[token].sum())
        if not num_bytes:
            raise ValueError("the targets stand for no byte of text")
        return bits / num_bytes

    def _keys(self, history: NDArray[np.int64], token: NDArray[np.int64]) -> NDArray[np.int64]:
        for ids in (history, token):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise ValueError(f"tokens from {ids.min()} to {ids.max()}: must be in 0..{self.vocab_size - 1}")
        return history * self.vocab_size + token

    def _merge(self) -> None:
        """Sort what is pending into the counts."""
        if not self._num_pending:
            return
        pairs, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._num_pending = [], 0
        self._pairs, place = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        merged = np.zeros(len(self._pairs), dtype=np.int64)
        np.add.at(merged, place, np.concatenate([self._counts, counts]))
        self._counts = merged
        self._summarise()

    def _summarise(self) -> None:
        """Make c(h), t(h) and P(w), float64 or int64 [V] each, from the counts."""
        history, token = np.divmod(self._pairs, self.vocab_size)
        self._by_history = np.bincount(history, self._counts, minlength=self.vocab_size)
        self._followers = np.bincount(history, minlength=self.vocab_size)
        by_token = np.bincount(token, self._counts, minlength=self.vocab_size)
        total, kinds = by_token.sum(), np.count_nonzero(by_token)
        self._unigram = (by_token + kinds / self.vocab_size) / (total + kinds)


def _integers(values: Any) -> NDArray[np.int64]:
    return np.asarray(values).astype(np.int64)


def _observed(tokens: Any, targets: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs that have a target, flat."""
    history, token = _integers(tokens), _integers(targets)
    if history.shape != token.shape:
        raise ValueError(f"tokens {list(history.shape)} and targets {list(token.shape)} must have one shape")
    keep = token != IGNORED
    return history[keep], token[keep]
