"""AdamW against the formula in plain float64 loops."""

import pytest
import torch
from torch import nn

from tessera.recipe import OptimizerSection
from tessera.training.optimizer import AdamW


def section(**changes: object) -> OptimizerSection:
    return OptimizerSection.model_validate({"learning_rate": 1e-2, **changes})


def formula(
    weights: list[float], gradients: list[list[float]], s: OptimizerSection, rate: float, decays: bool
) -> list[float]:
    """One element at a time, in Python's float64, moments unrounded."""
    result = []
    for index, w in enumerate(weights):
        m = v = 0.0
        for t, step in enumerate(gradients, start=1):
            g = step[index]
            m = s.beta1 * m + (1 - s.beta1) * g
            v = s.beta2 * v + (1 - s.beta2) * g * g
            w = w * (1 - rate * s.weight_decay) if decays else w
            w -= rate * (m / (1 - s.beta1**t)) / ((v / (1 - s.beta2**t)) ** 0.5 + s.epsilon)
        result.append(w)
    return result


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_fp32_moments_follow_the_formula_and_decay_matrices_only(shape: tuple[int, ...]) -> None:
    s = section(moments="fp32", beta2=0.95)
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    start = parameter.detach().flatten().tolist()
    optimizer = AdamW({"w": parameter}, s)
    gradients = []
    for _ in range(20):
        parameter.grad = torch.randn(shape, generator=generator)
        gradients.append(parameter.grad.flatten().tolist())
        optimizer.step(1e-2, 1.0)
    expected = formula(start, gradients, s, 1e-2, decays=len(shape) > 1)
    assert torch.allclose(parameter.detach().flatten(), torch.tensor(expected), rtol=2e-6, atol=2e-6)


def test_bf16_moments_are_rounded_only_between_steps() -> None:
    generator = torch.Generator().manual_seed(2)
    one, two = (nn.Parameter(torch.ones(64)) for _ in range(2))
    bf16, fp32 = AdamW({"w": one}, section(moments="bf16")), AdamW({"w": two}, section(moments="fp32"))
    for step in range(30):
        one.grad = two.grad = torch.randn(64, generator=generator)
        bf16.step(1e-2, 1.0)
        fp32.step(1e-2, 1.0)
        if step == 0:  # nothing was stored yet: the first update is the same
            assert torch.equal(one, two)
            assert torch.equal(bf16.first[0], fp32.first[0].bfloat16())
    assert bf16.first[0].dtype == bf16.second[0].dtype == torch.bfloat16
    assert torch.allclose(one, two, atol=5e-3)
    assert not torch.equal(one, two)


def test_clipping_scales_gradients_and_leaves_them_as_they_were() -> None:
    one, two = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    first, second = AdamW({"w": one}, section(epsilon=1.0)), AdamW({"w": two}, section(epsilon=1.0))
    one.grad, two.grad = torch.full((8,), 4.0), torch.full((8,), 1.0)
    assert float(first.gradient_norm()) == pytest.approx(4 * 8**0.5)
    first.step(1e-2, 0.25)
    second.step(1e-2, 1.0)
    assert torch.equal(one, two)
    assert torch.equal(one.grad, torch.full((8,), 4.0))


def test_a_parameter_without_gradient_decays_its_moments_and_moves_on_them() -> None:
    s = section(moments="fp32")
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW({"w": parameter}, s)
    parameter.grad = torch.ones(3)
    optimizer.step(1e-2, 1.0)
    optimizer.zero_gradients()
    optimizer.step(1e-2, 1.0)
    assert parameter.detach().tolist() == pytest.approx(formula([1.0], [[1.0], [0.0]], s, 1e-2, decays=False) * 3)


def test_an_update_is_seen_by_the_version_counter() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW({"w": parameter}, section(weight_decay=0.0))
    parameter.grad = torch.ones(2, 2)
    before = parameter._version
    optimizer.step(1e-2, 1.0)
    assert parameter._version > before  # numerics' Weight quantises again because of it
