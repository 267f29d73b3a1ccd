"""The choice of experts and the balance loss against plain loops, with ties, by every kernel."""

import math

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.ops.kernels import routing as kernels
from tessera.ops.routing import balance_loss, best, select
from tests.ops.float64 import normal
from tests.ops.kernels.sets import KERNELS, each_set, misaligned, threads

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
SHAPES = [  # experts, choices, groups, chosen groups
    (1, 1, 1, 1), (7, 7, 1, 1), (16, 4, 1, 1), (17, 3, 1, 1), (64, 8, 8, 4), (256, 8, 8, 4), (12, 3, 4, 2),
    (12, 3, 4, 4), (12, 5, 6, 1), (300, 6, 3, 1),
]  # fmt: skip


def largest(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def chosen(affinity: list[float], bias: list[float], shape: tuple[int, int, int, int], excluded: float) -> list[int]:
    experts, choices, groups, chosen_groups = shape
    value = [float(torch.tensor(a) + torch.tensor(b)) for a, b in zip(affinity, bias, strict=True)]  # in float32
    if chosen_groups < groups:
        width = experts // groups
        score = []
        for g in range(groups):
            one, two = sorted(value[g * width : (g + 1) * width], reverse=True)[:2]
            score.append(float(torch.tensor(one) + torch.tensor(two)))
        allowed = largest(score, chosen_groups)
        value = [v if e // width in allowed else excluded for e, v in enumerate(value)]
    return largest(value, choices)


def affinities(tokens: int, experts: int, ties: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts)
    affinity = torch.rand(tokens, experts, generator=generator)
    bias = torch.randn(experts, generator=generator)
    return ((affinity * 4).round() / 4, bias.round()) if ties else (affinity, bias)


@each_kernel
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("excluded", [-torch.inf, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_choice_is_that_of_the_loops_and_of_equals_the_lower_expert(
    shape: tuple[int, int, int, int], excluded: float, ties: bool, kernel: str
) -> None:
    affinity, bias = affinities(40, shape[0], ties)
    found = select(affinity, bias, *shape[1:], excluded, kernel)
    owed = [chosen(row, bias.tolist(), shape, excluded) for row in affinity.tolist()]
    assert found.dtype == torch.int64 and found.tolist() == owed
    assert torch.equal(select(misaligned(affinity), bias, *shape[1:], excluded, kernel), found)


@each_kernel
def test_more_choices_than_the_best_groups_have_go_on_with_the_first_of_the_excluded(kernel: str) -> None:
    affinity, bias = affinities(5, 8, False)
    found = select(affinity, bias, 5, 4, 1, -torch.inf, kernel)
    for row in found.tolist():
        group = row[0] // 2
        others = [e for e in range(8) if e // 2 != group]
        assert sorted(row[:2]) == [2 * group, 2 * group + 1] and row[2:] == others[:3]


@each_kernel
def test_every_row_has_valid_choices_whatever_its_values(kernel: str) -> None:
    affinity, bias = affinities(6, 32, False)
    affinity[0], affinity[1, 5], affinity[2, 7], affinity[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    affinity[4] = 0.0
    bias[4] = torch.nan
    for groups in ((1, 1), (4, 2)):
        found = select(affinity, bias, 4, *groups, -torch.inf, kernel)
        assert torch.equal(found, select(affinity, bias, 4, *groups, -torch.inf, "torch"))
        for row in found.tolist():
            assert len(set(row)) == 4 and all(0 <= e < 32 for e in row)


@each_kernel
def test_a_row_does_not_depend_on_the_others_or_on_threads(kernel: str) -> None:
    affinity, bias = affinities(900, 64, True)
    whole = select(affinity, bias, 8, 8, 4, -torch.inf, kernel)
    for rows in (slice(0, 1), slice(7, 80)):
        assert torch.equal(select(affinity[rows], bias, 8, 8, 4, -torch.inf, kernel), whole[rows])
    loss = balance_loss(affinity, 9, 8, kernel)
    with threads(3):
        assert torch.equal(select(affinity, bias, 8, 8, 4, -torch.inf, kernel), whole)
        assert torch.equal(balance_loss(affinity, 9, 8, kernel), loss)
    assert select(affinity[:0], bias, 8, 8, 4, -torch.inf, kernel).shape == (0, 8)


def test_more_experts_than_a_kernel_has_room_for_are_pytorchs() -> None:
    affinity, bias = affinities(3, kernels.MOST + 4, True)
    found = select(affinity, bias, 8, 1, 1, -torch.inf)
    assert found.tolist() == [largest((row + bias).tolist(), 8) for row in affinity]
    balance_loss(affinity.requires_grad_(), 1, 8).backward()
    assert affinity.grad.isfinite().all()


@each_set
def test_sizes_without_an_answer_are_refused(isa: str) -> None:
    affinity, bias = affinities(3, 12, False)
    for choices, groups, chosen_groups in ((13, 1, 1), (2, 5, 2), (2, 12, 3), (2, 4, 0)):
        with pytest.raises(ValueError):
            kernels.select_experts(affinity, bias, groups, chosen_groups, choices, -torch.inf, isa)
    with pytest.raises(ValueError):
        kernels.select_experts(affinity, bias[:11], 1, 1, 2, -torch.inf, isa)
    with pytest.raises(ValueError):
        kernels.balance(affinity, 2, 2, isa)
    with pytest.raises(ValueError):
        kernels.balance_backward(affinity, torch.zeros(2, 12), 1.0, isa)


def test_best_sorts_as_the_numbers_do() -> None:
    values = torch.tensor([[1.0, -1.0, 0.0, torch.inf, -torch.inf, 1.0, -2.0, 1e-40, -1e-40]])
    assert best(values, 9).tolist() == [[3, 0, 5, 7, 2, 8, 1, 6, 4]]


@each_kernel
@pytest.mark.parametrize("experts, choices, sequences", [(1, 1, 1), (8, 3, 4), (17, 2, 3), (64, 8, 1)])
def test_the_balance_loss_and_its_gradient_are_those_of_the_formula(
    experts: int, choices: int, sequences: int, kernel: str
) -> None:
    length = 21
    affinity = torch.sigmoid(normal(sequences * length, experts)).requires_grad_()
    loss = balance_loss(affinity, sequences, choices, kernel)
    (3.0 * loss).backward()
    exact = affinity.detach().double().requires_grad_()
    owed = torch.zeros((), dtype=torch.float64)
    for tokens in exact.split(length):
        frequency = torch.zeros(experts, dtype=torch.float64)
        for row in tokens.tolist():
            for expert in largest(row, choices):
                frequency[expert] += experts / (choices * length)
        owed = owed + (frequency * (tokens / tokens.sum(dim=-1, keepdim=True)).mean(dim=0)).sum() / sequences
    (3.0 * owed).backward()
    assert loss.dtype == torch.float32 and math.isclose(float(loss.detach()), float(owed.detach()), rel_tol=1e-6)
    scale = max(float(exact.grad.abs().max()), 0.05)  # a gradient of zero is a difference of terms of 0.05 to 0.5
    assert float((affinity.grad.double() - exact.grad).abs().max()) < 2e-6 * scale


@each_kernel
def test_shares_are_added_in_float64(kernel: str) -> None:
    affinity = torch.full((200_000, 2), 0.1)
    affinity[0] = torch.tensor([1.0, 0.0])
    owed = 2 / 200_000 * (200_000 * (1.0 + 199_999 * 0.5)) / 200_000
    assert float64.relative(balance_loss(affinity, 1, 1, kernel), torch.tensor(owed)) < 1e-7
