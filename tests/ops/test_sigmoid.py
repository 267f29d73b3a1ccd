"""Sigmoid and SiLU against float64, and each element against itself in other company."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tessera.ops.sigmoid import sigmoid, silu, silu_and_slope
from tests.ops.float64 import normal

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": sigmoid,
    "silu": silu,
    "slope": lambda x: silu_and_slope(x)[1],
    "silu beside its slope": lambda x: silu_and_slope(x)[0],
}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_element_has_the_same_bits_alone_and_in_any_company(name: str) -> None:
    function, x = FUNCTIONS[name], normal(1003, 50, scale=4.0)  # as many as several threads share
    whole = function(x)
    for rows in (1, 3, 37):
        assert torch.equal(torch.cat([function(part) for part in x.split(rows)]), whole)
    assert torch.equal(function(x[:999]), whole[:999])
    few = x[:20].flatten()
    assert torch.equal(torch.cat([function(one) for one in few.split(1)]), whole[:20].flatten())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_float64(name: str) -> None:
    x = torch.cat([normal(10_000, scale=5.0), torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0])])
    wide = x.double().requires_grad_()
    exact = torch.sigmoid(wide) if name == "sigmoid" else torch.nn.functional.silu(wide)
    if name == "slope":
        (exact,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(FUNCTIONS[name](x), exact.detach().float(), rtol=1e-6, atol=3e-7 * (name == "slope"))


def test_the_ends_of_float32_are_safe() -> None:
    x = torch.tensor([1e4, 3e38, -1e4, -3e38])
    assert sigmoid(x).tolist() == [1.0, 1.0, 0.0, 0.0]
    values, slope = silu_and_slope(x)
    assert silu(x).tolist() == x.clamp(min=0.0).tolist() == values.tolist()
    assert slope.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert sigmoid(torch.tensor(torch.nan)).isnan() and silu(torch.tensor(torch.nan)).isnan()


def test_the_gradient_of_sigmoid_is_that_of_float64() -> None:
    x = normal(500, scale=3.0).requires_grad_()
    dy = normal(500, seed=1)
    sigmoid(x).backward(dy)
    s = torch.sigmoid(x.detach().double())
    torch.testing.assert_close(x.grad, (dy.double() * s * (1 - s)).float(), rtol=1e-5, atol=1e-7)
