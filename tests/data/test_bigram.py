"""Witten-Bell against dictionaries and exact fractions."""

import time
from collections import Counter
from fractions import Fraction
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import WittenBellBigram, bigram
from tessera.ops.chunked_loss import IGNORED

V = 7
token = st.integers(0, V - 1)
pairs = st.lists(st.tuples(token, token | st.just(IGNORED)), max_size=60)


class Exact:
    """The formulas of the module's text, word for word."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        self.pairs = Counter((h, w) for h, w in seen if w != IGNORED)
        self.tokens: Counter[int] = Counter()
        for (_, w), n in self.pairs.items():
            self.tokens[w] += n

    def unigram(self, w: int) -> Fraction:
        c, t = sum(self.tokens.values()), len(self.tokens)
        return (self.tokens[w] + Fraction(t, V)) / (c + t) if c else Fraction(1, V)

    def probability(self, h: int, w: int) -> Fraction:
        followers = {b: n for (a, b), n in self.pairs.items() if a == h}
        c, t = sum(followers.values()), len(followers)
        return (followers.get(w, 0) + t * self.unigram(w)) / (c + t) if c else self.unigram(w)


def counted(seen: list[tuple[int, int]]) -> WittenBellBigram:
    model = WittenBellBigram(V)
    model.count([h for h, _ in seen], [w for _, w in seen])
    return model


EVERY = np.divmod(np.arange(V * V), V)


@given(pairs)
@settings(deadline=None)
def test_probabilities_are_the_exact_ones_and_sum_to_one(seen: list[tuple[int, int]]) -> None:
    found = counted(seen).probability(*EVERY).reshape(V, V)
    exact = Exact(seen)
    for h in range(V):
        row = [exact.probability(h, w) for w in range(V)]
        assert sum(row) == 1
        np.testing.assert_allclose(found[h], [float(p) for p in row], rtol=1e-13)


@given(pairs, st.lists(st.integers(1, 5), max_size=30), st.integers(1, 20))
@settings(deadline=None)
def test_counting_in_any_pieces_gives_the_same_model(seen, sizes, pending) -> None:
    whole, parts, start = counted(seen), WittenBellBigram(V), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigram, "_PENDING", pending)
        for size in [*sizes, len(seen)]:
            part = seen[start : start + size]
            parts.count([h for h, _ in part], [w for _, w in part])
            parts.probability([0], [0])  # asking between counts changes nothing
            start += size
    assert np.array_equal(whole.probability(*EVERY), parts.probability(*EVERY))


@given(pairs, pairs.filter(lambda p: any(w not in (0, IGNORED) for _, w in p)))
@settings(deadline=None)
def test_bits_per_byte_is_the_exact_sum_over_the_bytes(seen, held_out) -> None:
    lengths = np.array([0, 1, 2, 3, 4, 5, 6])
    exact = Exact(seen)
    scored = [(h, w) for h, w in held_out if w != IGNORED]
    bits = -sum(log2(exact.probability(h, w)) for h, w in scored)
    num_bytes = sum(int(lengths[w]) for _, w in scored)
    half = len(held_out) // 2
    batches = [
        (torch.tensor([h for h, _ in part]), torch.tensor([w for _, w in part], dtype=torch.int64))
        for part in (held_out[:half], held_out[half:])
    ]
    found = counted(seen).bits_per_byte(batches, lengths)
    assert found == pytest.approx(bits / num_bytes, rel=1e-12)


def test_it_takes_batches_of_any_shape_and_joins_no_rows() -> None:
    model = WittenBellBigram(V)
    model.count(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 5], [4, 6]]))
    exact = Exact([(1, 2), (2, 5), (3, 4), (4, 6)])
    assert model.probability([2], [3])[0] == pytest.approx(float(exact.probability(2, 3)))
    assert model.probability([[5]], [[3]]).shape == (1, 1)


def test_wrong_input_is_refused() -> None:
    model = WittenBellBigram(V)
    for tokens, targets in ([[V], [0]], [[0], [V]], [[-1], [0]], [[0], [-1]]):
        with pytest.raises(ValueError, match="must be in"):
            model.count(tokens, targets)
    with pytest.raises(ValueError, match="one shape"):
        model.count([1, 2], [1])
    with pytest.raises(ValueError, match="no byte"):
        model.bits_per_byte([([1], [IGNORED])], np.ones(V))


def test_a_million_tokens_take_less_than_three_seconds() -> None:
    r = np.random.default_rng(0)
    stream = (r.zipf(1.3, 1_000_001) % 4096).astype(np.int64)
    started = time.process_time()
    model = WittenBellBigram(4096)
    for i in range(0, 1_000_000, 2000):
        model.count(stream[i : i + 2000], stream[i + 1 : i + 2001])
    model.bits_per_byte([(stream[:100_000], stream[1:100_001])], np.ones(4096, dtype=np.int64))
    assert time.process_time() - started < 3


def test_a_vocabulary_of_full_size_needs_no_square_table() -> None:
    model = WittenBellBigram(129_280)
    model.count([129_279, 0], [129_279, 129_279])
    assert model.probability([129_279], [129_279])[0] > 0.5
