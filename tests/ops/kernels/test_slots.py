"""Sorting by expert and adding up against plain loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.ops.dispatch import combine, sort_slots
from tests.ops.float64 import BF16, normal
from tests.ops.kernels.sets import KERNELS, SETS, each_set, misaligned, threads

EXPERTS = [(0, 1, 1), (1, 1, 1), (5, 3, 4), (64, 4, 16), (131, 8, 256), (700, 1, 3)]


def ids_of(tokens: int, choices: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(experts, (tokens, choices), generator=generator)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens, choices, experts", EXPERTS)
def test_slots_are_sorted_by_expert_then_token_then_choice(
    tokens: int, choices: int, experts: int, kernel: str
) -> None:
    ids = ids_of(tokens, choices, experts)
    for given in (ids, ids.t().contiguous().t(), misaligned(ids)):
        slots = sort_slots(given, experts, kernel)
        owed = sorted((int(e), t, j) for t, row in enumerate(ids) for j, e in enumerate(row))
        assert slots.token.tolist() == [t for _, t, _ in owed]
        assert slots.choice.tolist() == [t * choices + j for _, t, j in owed]
        assert slots.position[slots.choice].tolist() == list(range(ids.numel()))
        counts = [sum(e == expert for e, _, _ in owed) for expert in range(experts)]
        assert slots.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
        assert {t.dtype for t in vars(slots).values()} == {torch.int64}


@each_set
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_expert_that_is_not_there_is_refused(wrong: int, isa: str) -> None:
    ids = ids_of(20, 2, 4)
    ids[13, 1] = wrong
    with pytest.raises(IndexError, match=rf"{wrong}.*4 experts"):
        sort_slots(ids, 4, isa)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 250])
@pytest.mark.parametrize("choices", [1, 2, 8])
def test_a_tokens_rows_are_added_in_float32_in_the_order_of_its_choices(
    choices: int, columns: int, dtype: torch.dtype, kernel: str
) -> None:
    tokens = 37
    rows = normal(tokens * choices, columns).to(dtype)
    rows[::3] *= 1e4  # so that the order shows
    position = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(1))
    owed = np.zeros((tokens, columns), dtype=np.float32)
    for token in range(tokens):
        for j in range(choices):
            owed[token] += rows[position[token * choices + j]].float().numpy()
    assert torch.equal(combine(rows, position, tokens, kernel), torch.from_numpy(owed).to(dtype))
    assert torch.equal(combine(misaligned(rows), position, tokens, kernel), torch.from_numpy(owed).to(dtype))


@each_set
def test_no_tokens_and_many_threads(isa: str) -> None:
    assert combine(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 0, isa).shape == (0, 8)
    rows, position = normal(4000, 96), torch.randperm(4000)
    alone = combine(rows, position, 1000, isa)
    with threads(3):
        assert torch.equal(combine(rows, position, 1000, isa), alone)


@each_set
@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_a_place_that_is_not_there_is_refused(wrong: int, isa: str) -> None:
    position = torch.arange(40)
    position[17] = wrong
    with pytest.raises(IndexError, match=rf"{wrong}.*40 rows"):
        combine(normal(40, 8), position, 20, isa)
    if wrong == 40 and isa == SETS[0]:
        with pytest.raises(ValueError, match="do not fit"):
            combine(normal(40, 8), torch.arange(39), 20, isa)
