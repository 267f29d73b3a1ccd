"""The held-out documents: disjoint from the others in content too, never all, never none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.split import cut_in_two, held_out

fractions = st.floats(1e-6, 1 - 1e-6)


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=200), fractions, st.integers(0, 2**70))
@settings(deadline=None)
def test_neither_side_is_empty_and_copies_stay_together(content: list[int], fraction: float, seed: int) -> None:
    chosen = held_out(keys(*content), fraction, seed)
    assert chosen.any() and not chosen.all()
    if len(set(content)) > 1:
        sides = {(key, bool(side)) for key, side in zip(content, chosen, strict=True)}
        assert len(sides) == len(set(content))
    if len(set(content)) == len(content):
        assert chosen.sum() == min(max(round(fraction * len(content)), 1), len(content) - 1)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), fractions)
@settings(deadline=None)
def test_many_copies_never_empty_a_side(content: list[int], fraction: float) -> None:
    chosen = held_out(keys(*content), fraction, 0)
    assert chosen.any() and not chosen.all()


def test_the_split_depends_on_content_and_not_on_order() -> None:
    content = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    order = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(held_out(content, 0.1, 7)[order], held_out(content[order], 0.1, 7))


def test_documents_keep_their_side_when_others_join() -> None:
    content = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
    few, many = held_out(content[:1000], 0.1, 7), held_out(content, 0.1, 7)[:1000]
    assert (few != many).sum() < 40  # a fresh choice would move about 180


def test_another_seed_holds_out_other_documents() -> None:
    content = np.arange(1000, dtype=np.uint64)
    assert (held_out(content, 0.5, 0) != held_out(content, 0.5, 1)).sum() > 400


def test_a_large_family_of_copies_does_not_swallow_the_share() -> None:
    content = keys(*([9] * 90), *range(100, 110))
    for seed in range(20):
        assert held_out(content, 0.02, seed).sum() == 2


@given(st.text(min_size=2, max_size=200), fractions)
@settings(deadline=None)
def test_a_lone_document_falls_in_two_whole_parts(text: str, fraction: float) -> None:
    training, validation = cut_in_two(text, fraction)
    assert training + validation == text and training and validation


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_a_lone_document_is_cut_at_a_line_near_the_place(fraction: float) -> None:
    text = "one line of text\n" * 1000
    training, validation = cut_in_two(text, fraction)
    assert training.endswith("\n")
    assert fraction <= len(validation) / len(text) < fraction * 1.5 + 0.001
