"""Norms, plain, normed and unquantised linears, SwiGLU: against float64, and row by row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.numerics import COLUMN, E4M3, ROW, TENSOR, VECTOR, RoleKind, Weight, quantise
from tessera.numerics.tiles import ROW_OF_TRANSPOSED, Tile
from tessera.ops.dense_linear import dense_linear
from tessera.ops.keep import Keep
from tessera.ops.linear import linear, normed_linear
from tessera.ops.rms_norm import rms_norm
from tessera.ops.swiglu import swiglu_linear
from tests.ops.float64 import BF16, normal

ROWS = (1, 2, 3, 16, 64)
ARMS = [("fp32", torch.float32, 3e-6), ("bf16", BF16, 0.02), ("fp8", BF16, 0.12)]


def exact_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * gamma


def errors(y: Tensor, exact: Tensor, leaves: list[Tensor], exact_leaves: list[Tensor]) -> list[float]:
    """Backward with the same random gradient on both sides; relative errors of output and gradients."""
    dy = normal(*y.shape, seed=9).to(y.dtype)
    y.backward(dy)
    exact.backward(dy.double())
    pairs = [(y, exact), *((a.grad, b.grad) for a, b in zip(leaves, exact_leaves, strict=True))]
    return [float64.relative(a, b) for a, b in pairs]


def plain_linear(x: Tensor, weight: Weight) -> Tensor:
    operand = weight.role.input(x.detach())
    return linear(x, operand, operand, weight)


def twins(*leaves: Tensor) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-6), (BF16, 5e-3)])
def test_rms_norm_and_its_gradients(dtype: torch.dtype, bar: float) -> None:
    x, gamma = (3 * normal(50, 40)).to(dtype).requires_grad_(), (1 + normal(40, seed=1)).requires_grad_()
    e = twins(x, gamma)
    assert max(errors(rms_norm(x, gamma, 0.1, Keep())[0], exact_norm(*e, 0.1), [x, gamma], e)) < bar


@pytest.mark.parametrize("precision, dtype, bar", ARMS)
def test_normed_linears_on_one_input_add_up_their_gradients(precision: str, dtype: torch.dtype, bar: float) -> None:
    x, gamma = normal(140, 136).to(dtype).requires_grad_(), (1 + 0.2 * normal(136, seed=1)).requires_grad_()
    one, other = (float64.weight(n, 136, precision=precision, seed=n) for n in (40, 264))
    e = twins(x, gamma, one.parameter, other.parameter)
    y = torch.cat(normed_linear(x, gamma, 1e-3, Keep(), one, other)[0], dim=-1)
    unit = exact_norm(e[0], e[1], 1e-3)
    exact = torch.cat([unit @ e[2].T, unit @ e[3].T], dim=-1)
    assert max(errors(y, exact, [x, gamma, one.parameter, other.parameter], e)) < bar


@pytest.mark.parametrize("precision, dtype, bar", ARMS)
def test_linear_and_swiglu_linear(precision: str, dtype: torch.dtype, bar: float) -> None:
    x = normal(140, 136).to(dtype).requires_grad_()
    up = float64.weight(2 * 200, 136, precision=precision, row_segment=200, kind=RoleKind.EXPERT_GATE_UP)
    down = float64.weight(136, 200, precision=precision, seed=1)
    e = twins(x, up.parameter, down.parameter)
    y = swiglu_linear(plain_linear(x, up), up.role, down, Keep())
    gate, value = (e[0] @ e[1].T).chunk(2, dim=-1)
    exact = (torch.nn.functional.silu(gate) * value) @ e[2].T
    assert max(errors(y, exact, [x, up.parameter, down.parameter], e)) < bar


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-6), (BF16, 1e-2)])
def test_an_unquantised_linear_rounds_its_operands_only(dtype: torch.dtype, bar: float) -> None:
    x, w = normal(70, 136).to(BF16).requires_grad_(), torch.nn.Parameter(normal(40, 136, seed=1))
    e = [x.detach().double().requires_grad_(), w.detach().to(dtype).double().requires_grad_()]
    y = dense_linear(x, x, w, dtype)
    assert y.dtype == dtype and max(errors(y, e[0] @ e[1].T, [x, w], e)[::2]) < bar
    assert w.grad.dtype == torch.float32 and x.grad.dtype == BF16
    if dtype == BF16:  # the incoming gradient is BF16 as well: products of these operands, added in FP32
        assert float64.relative(w.grad, e[1].grad) < 1e-6
    assert float64.relative(x.grad, e[0].grad) < 1e-2


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_a_row_depends_on_that_row_alone(rows: int, precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else BF16
    x, gamma = normal(200, 640).to(dtype), 1 + normal(640, seed=1)
    w, up = (float64.weight(n, 640, precision=precision, row_segment=s) for n, s in ((72, 0), (528, 264)))
    down, router = float64.weight(640, 264, precision=precision), normal(9, 640, seed=2)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "normed linear": lambda x: normed_linear(x, gamma, 1e-6, Keep(), w)[0][0],
        "swiglu": lambda x: swiglu_linear(plain_linear(x, up), up.role, down, Keep()),
        "norm": lambda x: rms_norm(x, gamma, 1e-6, Keep())[0],
        "router": lambda x: dense_linear(x, x, router, torch.float32),
        "eh_proj": lambda x: dense_linear(x, x, router, x.dtype),
    }

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = function(x)
        y.backward(normal(200, y.shape[1], seed=5)[: len(x)].to(y.dtype))
        return y.detach(), x.grad

    for name, function in functions.items():
        whole, part = run(function, x), run(function, x[:rows])
        assert torch.equal(part[0], whole[0][:rows]), name
        assert torch.equal(part[1], whole[1][:rows]), f"gradient of {name}"


def test_the_swiglu_product_is_rounded_once_from_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = normal(140, 400).to(BF16).requires_grad_()
    gate, up = gate_up.detach().double().chunk(2, dim=-1)
    product = (torch.nn.functional.silu(gate) * up).float()
    role, down = float64.role(RoleKind.EXPERT_GATE_UP), float64.weight(64, 200)
    seen = float64.spy_on_gemms(monkeypatch)
    swiglu_linear(gate_up, role, down, Keep()).backward(normal(140, 64, seed=1).to(BF16))
    forward, _, backward = seen
    assert (forward.kind, backward.kind) == ("fprop", "wgrad")
    owed = quantise(product, E4M3, VECTOR)
    # FP32's own silu differs by a rounding of 2^-24; a detour through BF16 would change some 3 % of the codes.
    assert (forward.a.codes != owed.codes).double().mean() < 1e-3
    kept = quantise(gate_up.detach(), E4M3, VECTOR, column_segment=200).decode().double()
    gate, up = kept.chunk(2, dim=-1)
    again = quantise((torch.nn.functional.silu(gate) * up).float(), E4M3, COLUMN)
    assert (backward.b.codes != again.codes).double().mean() < 1e-3


@pytest.mark.parametrize("tiles, along, columns", [("row", ROW, ROW_OF_TRANSPOSED), ("tensor", TENSOR, TENSOR)])
def test_tiles_of_a_whole_matrix_lie_over_gate_and_up_apart(
    tiles: str, along: Tile, columns: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = float64.weight(2 * 40, 72, row_segment=40, kind=RoleKind.EXPERT_GATE_UP, tiles=tiles)
    up.parameter.data[40:] *= 300.0  # in one tile with it, much of gate would become zero
    x = normal(70, 72).to(BF16).requires_grad_()
    dy = torch.cat([normal(70, 40, seed=1), 300.0 * normal(70, 40, seed=2)], dim=1).to(BF16)
    seen = float64.spy_on_gemms(monkeypatch)
    plain_linear(x, up).backward(dy)
    fprop, dgrad, wgrad = seen
    gate_and_up, gradients = up.parameter.detach().split(40), dy.split(40, dim=1)
    for operand, tile, dim, parts in ((fprop.b, along, 0, gate_and_up), (dgrad.a, along, 1, gradients)):
        owed = [quantise(part.contiguous(), E4M3, tile) for part in parts]
        assert torch.equal(operand.codes, torch.cat([q.codes for q in owed], dim=dim))
        assert torch.equal(operand.scales, torch.cat([q.scales for q in owed], dim=dim))
    owed = [quantise(part.contiguous(), E4M3, columns) for part in gradients]
    assert torch.equal(wgrad.a.codes, torch.cat([q.codes for q in owed], dim=1))
    assert torch.equal(wgrad.a.scales, torch.cat([q.scales for q in owed], dim=1))
    for product in seen:
        product.assert_exact()
