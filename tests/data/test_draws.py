"""Choices are the published SplitMix64, and pure functions of their words."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.draws import below, choice, draw, mix, permutation, start


def test_mix_gives_the_published_sequence_of_splitmix64() -> None:
    # The generator's output is mix(seed + i golden); these are Rosetta Code's test values for seed 1234567.
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(1, 6)], dtype=np.uint64)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(0, 300), st.integers(0, 2**80), st.integers(0, 10**15))
@settings(deadline=None)
def test_a_permutation_has_every_element_once(size: int, seed: int, epoch: int) -> None:
    order = permutation(size, seed, "order", epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, permutation(size, seed, "order", epoch))


def test_permutations_put_each_element_everywhere_equally_often() -> None:
    first = np.array([permutation(5, seed, "order", epoch)[0] for seed in range(40) for epoch in range(50)])
    counts = np.bincount(first, minlength=5)
    assert abs(counts - 400).max() < 90  # 5 standard deviations of a binomial with n = 2000, p = 1/5


def test_words_that_run_together_are_different_choices() -> None:
    assert len({int(start(1, 23)), int(start(12, 3)), int(start(1, 2, 3)), int(start(123))}) == 4


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.floats(0, 1))
@settings(deadline=None)
def test_below_is_exact_at_its_ends_and_grows_with_the_share(numbers: list[int], share: float) -> None:
    draws = np.array(numbers, dtype=np.uint64)
    assert below(draws, 1.0).all() and not below(draws, 0.0).any()
    assert (below(draws, share) <= below(draws, min(1.0, share * 1.5))).all()
    assert below(draws, share).tolist() == [(n >> 11) / 2**53 < share for n in numbers]


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**40))
@settings(deadline=None)
def test_a_choice_is_one_of_its_options(number: int, options: int) -> None:
    assert 0 <= choice(number, options) < options
    assert choice(2**64 - 1, options) == options - 1 and choice(0, options) == 0


def test_draws_of_different_purposes_are_unrelated() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    split, middle = below(draw(keys, 0, "split"), 0.5), below(draw(keys, 0, "middle"), 0.5)
    assert abs((split & middle).mean() - 0.25) < 0.016  # 5 standard deviations
