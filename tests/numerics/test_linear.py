"""One linear layer, GEMM by GEMM: the operands are those of the roles, the products those of the codes."""

import pytest
import torch
from torch import Tensor, nn

from tessera.numerics import Policy, Recorder, Role, RoleKind, TiledTensor, linear
from tessera.numerics.linear import Linear
from tests.numerics.oracle import FLOAT32_BAR, Layout, Operand, Problem, relative_norm

TOKENS, N, K = 300, 200, 2120  # no multiples of 128


def layer(kind: RoleKind = RoleKind.OTHER, n: int = N, k: int = K, **choices: object) -> Linear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / k**0.5
    role = Role("layer", Policy(**choices).role(kind), Recorder())  # type: ignore[arg-type]
    return Linear(nn.Parameter(weight), None, role)


def data(tokens: int = TOKENS, n: int = N, k: int = K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(tokens, k, generator=generator), torch.randn(tokens, n, generator=generator)
    return x.bfloat16().requires_grad_(), dy.bfloat16()


def as_operand(made: object) -> Operand:
    assert isinstance(made, TiledTensor)
    return Operand(made.codes, made.scales, Layout(made.tile, made.row_segment, made.column_segment), made.format.name)


def owed(kind: str, a: object, b: object) -> Tensor:
    """FP64 product of two quantised operands, by the oracle's decoding."""
    return Problem(kind, as_operand(a), as_operand(b)).exact()


def assert_rounded_once(y: Tensor, exact: Tensor) -> None:
    assert y.dtype == torch.bfloat16
    error, half_step = (y.double() - exact).abs(), exact.abs() * 2.0**-8
    assert bool((error <= half_step + exact.abs().mean() * 1e-5).all())


@pytest.mark.parametrize("kind", [RoleKind.OTHER, RoleKind.ATTENTION_OUTPUT])
@pytest.mark.parametrize("scales", ["power_of_two", "float32", "deepseek-v3"])
def test_forward_and_backward_are_the_three_products_of_the_codes(scales: str, kind: RoleKind) -> None:
    lin, (x, dy) = layer(kind, scales=scales), data()
    y = lin(x)
    y.backward(dy)
    role, weight = lin.role, lin.operand.operand()
    operand = role.input(x.detach())
    assert_rounded_once(y, owed("fprop", operand, weight))
    rows, columns = role.gradient(dy)
    assert x.grad is not None
    assert_rounded_once(x.grad, owed("dgrad", rows, weight))
    cached = role.input_cache(x.detach(), operand)
    assert lin.weight.grad is not None and lin.weight.grad.dtype == torch.float32
    exact = owed("wgrad", columns, role.input_columns(cached))
    assert relative_norm(lin.weight.grad, exact) < FLOAT32_BAR
    unquantised = dy.double().T @ x.detach().double()
    assert 0.01 < relative_norm(lin.weight.grad, unquantised) < 0.06  # two operands of 4 significant bits


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_twins_multiply_their_operands_unquantised(precision: str) -> None:
    lin, (x, dy) = layer(precision=precision), data()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    y = lin(x)
    y.backward(dy)
    w = lin.weight.detach().to(dtype).double()
    x64, dy64 = x.detach().double(), dy.double()
    assert x.grad is not None and lin.weight.grad is not None
    assert_rounded_once(y, x64 @ w.T)
    assert_rounded_once(x.grad, dy64 @ w)
    assert lin.weight.grad.dtype == torch.float32
    assert relative_norm(lin.weight.grad, dy64.T @ x64) < FLOAT32_BAR


def test_backward_comes_apart_into_two_functions_in_either_order() -> None:
    lin, (x, dy) = layer(), data()
    lin(x).backward(dy)
    role, weight = lin.role, lin.operand
    cached = role.input_cache(x.detach(), role.input(x.detach()))
    dw = linear.weight_gradient(role.gradient_columns(dy), cached, role)
    dx = linear.input_gradient(role.gradient_rows(dy), weight)
    assert x.grad is not None and lin.weight.grad is not None
    assert torch.equal(dx, x.grad) and torch.equal(dw, lin.weight.grad)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    lin, (x, dy) = layer(n=40, k=50), data(n=40, k=50)
    lin(x.detach()).backward(dy)
    names = set(lin.role.recorder.nonfinite)
    assert "layer.gradient_columns" in names and "layer.gradient_rows" not in names
    lin = layer(n=40, k=50)
    lin.weight.requires_grad_(False)
    lin(x).backward(dy)
    names = set(lin.role.recorder.nonfinite)
    assert "layer.gradient_rows" in names and not names & {"layer.gradient_columns", "layer.input_columns"}
    assert lin.weight.grad is None and x.grad is not None


def test_gradients_of_micro_batches_accumulate_in_float32() -> None:
    lin, (x, dy) = layer(n=40, k=50), data(256, 40, 50)
    parts = []
    for rows in (slice(0, 128), slice(128, 256)):
        lin.weight.grad = None
        lin(x[rows]).backward(dy[rows])
        parts.append(lin.weight.grad)
    lin.weight.grad = None
    for rows in (slice(0, 128), slice(128, 256)):
        lin(x[rows]).backward(dy[rows])
    assert lin.weight.grad is not None and parts[0] is not None and parts[1] is not None
    assert torch.equal(lin.weight.grad, parts[0] + parts[1])


def test_backward_keeps_codes_and_nothing_in_bf16() -> None:
    kept: list[Tensor] = []
    x, _ = data(256, 128, 256)
    lin = layer(n=128, k=256)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lin(x)
    assert sum(t.nbytes for t in kept) == 256 * 256 + 256 * 2 * 4 + 8  # codes, scales, the count of non-finite values
    assert not [t for t in kept if t.dtype == torch.bfloat16]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(RoleKind.ATTENTION_OUTPUT, 128, 256)(x)
    assert sum(t.nbytes for t in kept) == 256 * 256 * 3 // 2 + 256 * 2 * 4 + 8
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.no_grad():
        lin(x)
    assert kept == []


@pytest.mark.parametrize(
    ("precision", "scales"),
    [("fp8", "power_of_two"), ("fp8", "float32"), ("bf16", "power_of_two"), ("fp32", "power_of_two")],
)
def test_a_token_does_not_depend_on_its_batch(precision: str, scales: str) -> None:
    lin, (x, dy) = layer(n=130, k=200, precision=precision, scales=scales), data(n=130, k=200)
    whole = lin(x)
    whole.backward(dy)
    assert x.grad is not None
    for rows in (1, 2, 3, 16, 64, 65, 200):
        for start in (0, 1, 99):
            part = x.detach()[start : start + rows].clone().requires_grad_()
            y = lin(part)
            y.backward(dy[start : start + rows])
            assert torch.equal(y, whole[start : start + rows])
            assert part.grad is not None and torch.equal(part.grad, x.grad[start : start + rows])


def test_leading_dimensions_dtype_and_bias_are_those_of_nn_linear() -> None:
    lin, (x, _) = layer(n=40, k=50), data(12, 40, 50)
    bias = nn.Parameter(torch.randn(40))
    with_bias = Linear(lin.weight, bias, lin.role)
    for dtype in (torch.float32, torch.bfloat16):
        shaped = x.detach().to(dtype).view(2, 3, 2, 50)
        y = lin(shaped)
        assert y.shape == (2, 3, 2, 40) and y.dtype == dtype
        assert torch.equal(y.flatten(0, 2), lin(x.detach().to(dtype)))
        assert torch.equal(with_bias(shaped), (y.float() + bias).to(dtype))
    assert lin(x.detach()[:0]).shape == (0, 40)
    with_bias(x.detach()).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((40,), 12.0))


def test_a_non_finite_input_is_named_and_reaches_the_output() -> None:
    lin, (x, _) = layer(n=40, k=50), data(12, 40, 50)
    with torch.no_grad():
        x[3, 7] = torch.inf
    y = lin(x)
    assert lin.role.recorder.first_nonfinite() == ("layer.input", 1)
    assert bool(y[3].isnan().all()) and bool(y[4].isfinite().all())


def test_a_second_derivative_is_refused_instead_of_being_wrong() -> None:
    lin, (x, _) = layer(n=4, k=5), data(3, 4, 5)
    (gradient,) = torch.autograd.grad(lin(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
