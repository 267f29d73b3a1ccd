"""Routed experts: slots, groups of any size, each grouped GEMM against float64 of operands made expert by expert."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.numerics import BLOCK, COLUMN, E4M3, ROW, TENSOR, VECTOR, RoleKind, quantise
from tessera.numerics.gemm import Operand
from tessera.numerics.tiles import Tile
from tessera.ops.dispatch import Dispatcher, LocalDispatcher, Slots, sort_slots
from tessera.ops.expert_mlp import Experts, expert_mlp
from tessera.ops.keep import Keep
from tests.ops.float64 import BF16, Product, decoded, normal

GROUPS = [0, 1, 127, 129, 0, 128, 0]  # slots an expert gets


def ids_with(groups: list[int], choices: int, seed: int = 0) -> Tensor:
    """int64 [T, choices] in which expert e is chosen groups[e] times, in random places."""
    flat = torch.cat([torch.full((count,), expert) for expert, count in enumerate(groups)])
    assert len(flat) % choices == 0
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))].view(-1, choices)


def make_experts(num: int, hidden: int, intermediate: int, precision: str, tiles: str = "block") -> Experts:
    up, down = RoleKind.EXPERT_GATE_UP, RoleKind.EXPERT_DOWN
    return Experts(
        float64.weight(
            num, 2 * intermediate, hidden, kind=up, precision=precision, row_segment=intermediate, seed=1, tiles=tiles
        ),
        float64.weight(
            num, hidden, intermediate, kind=down, precision=precision, row_segment=hidden, seed=2, tiles=tiles
        ),
    )


def mlp(x: Tensor, operand: Operand, ids: Tensor, weights: Tensor, experts: Experts, dispatcher: Dispatcher) -> Tensor:
    return expert_mlp(x, operand, operand, ids, weights, experts, dispatcher, Keep())


def formula(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """float64, an expert at a time."""
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up * weights[token, choice, None]) @ down[e].T
        y = y.index_add(0, token, out)
    return y


def errors(groups: list[int], choices: int, precision: str, dispatcher: Dispatcher) -> list[float]:
    """Relative errors against `formula`: output, then gradients of x, routing weights, gate_up, down."""
    ids, dtype = ids_with(groups, choices), torch.float32 if precision == "fp32" else BF16
    experts = make_experts(len(groups), 48, 20, precision)
    x = normal(len(ids), 48, seed=3).to(dtype).requires_grad_()
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
    y = mlp(x, experts.gate_up.role.input(x.detach()), ids, weights, experts, dispatcher)
    dy = normal(*y.shape, seed=5).to(dtype)
    y.backward(dy)
    leaves = [x, weights, experts.gate_up.parameter, experts.down.parameter]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    owed = formula(exact[0], ids, *exact[1:])
    owed.backward(dy.double())
    pairs = [(y, owed), *((leaf.grad, e.grad) for leaf, e in zip(leaves, exact, strict=True))]
    return [float64.relative(a, b) for a, b in pairs]


@pytest.mark.parametrize("groups, choices", [(GROUPS, 1), ([2, 0, 130, 128], 2), ([0, 0, 1], 1), ([5, 5, 5], 3)])
@pytest.mark.parametrize("precision, bar", [("fp32", 2e-6), ("bf16", 0.02), ("fp8", 0.15)])
def test_output_and_gradients_are_those_of_the_formula(
    groups: list[int], choices: int, precision: str, bar: float
) -> None:
    assert max(errors(groups, choices, precision, LocalDispatcher())) < bar


class WrongOffset(LocalDispatcher):
    """One border between two experts is off by one slot."""

    def plan(self, experts: Tensor, num_experts: int) -> Slots:
        slots = super().plan(experts, num_experts)
        offsets = slots.offsets.clone()
        offsets[2] += 1
        return replace(slots, offsets=offsets)


class WrongPosition(LocalDispatcher):
    """Two results are carried back to each other's token."""

    def plan(self, experts: Tensor, num_experts: int) -> Slots:
        slots = super().plan(experts, num_experts)
        position = slots.position.clone()
        position[[0, 1]] = position[[1, 0]]
        return replace(slots, position=position)


@pytest.mark.parametrize("dispatcher", [WrongOffset(), WrongPosition()])
def test_a_slot_in_the_wrong_place_would_be_noticed(dispatcher: Dispatcher) -> None:
    assert max(errors([2, 0, 130, 128], 2, "fp32", dispatcher)) > 1e-3


@pytest.mark.parametrize("groups, choices", [(GROUPS, 1), ([2, 0, 130, 128], 2)])
def test_slots_are_sorted_by_expert_then_token_and_none_is_lost(groups: list[int], choices: int) -> None:
    ids = ids_with(groups, choices)
    slots = sort_slots(ids, len(groups))
    owed = sorted((int(e), t, j) for t, row in enumerate(ids) for j, e in enumerate(row))
    assert slots.token.tolist() == [t for _, t, _ in owed]
    assert slots.choice.tolist() == [t * choices + j for _, t, j in owed]
    assert slots.offsets.tolist() == [sum(groups[:e]) for e in range(len(groups) + 1)]
    assert slots.position[slots.choice].tolist() == list(range(ids.numel()))


def same_codes(operand: object, owed: list[Tensor]) -> bool:
    """The operand decodes to exactly the values of `owed`, one tensor an expert."""
    return torch.equal(decoded(operand), torch.cat(owed))


def test_a_layer_of_odd_widths_runs_each_gemm_on_its_own_experts_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 2056 and 264, N = 528 and 2056: no multiple of 128; groups of 0, 1, 127, 128 and 129."""
    hidden, intermediate, choices = 2056, 264, 1
    ids = ids_with(GROUPS, choices)
    experts = make_experts(len(GROUPS), hidden, intermediate, "fp8")
    x = normal(len(ids), hidden, seed=3).to(BF16).requires_grad_()
    weights = (0.5 + torch.rand(ids.shape, generator=torch.Generator().manual_seed(4))).requires_grad_()
    products = float64.spy_on_gemms(monkeypatch)
    y = mlp(x, experts.gate_up.role.input(x.detach()), ids, weights, experts, LocalDispatcher())
    dy = normal(*y.shape, seed=5).to(BF16)
    y.backward(dy)
    by_name = dict(zip(("up", "down", "d_product", "dw_down", "dx", "dw_up"), _in_order(products), strict=True))
    for product in products:
        product.assert_exact()

    tokens = [(ids == e).nonzero()[:, 0] for e in range(len(GROUPS))]
    gate_up_weights, down_weights = experts.gate_up.parameter.detach(), experts.down.parameter.detach()
    up, down = by_name["up"], by_name["down"]
    assert same_codes(up.a, [decoded(quantise(x.detach()[t], E4M3, VECTOR)) for t in tokens])
    halves = [half for w in gate_up_weights for half in w.chunk(2)]
    assert same_codes(up.b, [decoded(quantise(half, E4M3, BLOCK)) for half in halves])
    assert same_codes(down.b, [decoded(quantise(w, E4M3, BLOCK)) for w in down_weights])

    sorted_weights = torch.cat([weights.detach()[t, 0] for t in tokens])[:, None]
    gate, value = up.result.float().chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * value * sorted_weights
    assert torch.equal(decoded(down.a), decoded(quantise(inner, E4M3, VECTOR)))
    assert torch.equal(y, torch.cat([down.result[i : i + 1] for i in _slot_of_each_token(tokens)]))

    gradients = [dy[t] for t in tokens]
    d_product, dw_down = by_name["d_product"], by_name["dw_down"]
    assert same_codes(d_product.a, [decoded(quantise(g, E4M3, VECTOR)) for g in gradients])
    assert same_codes(dw_down.a, [decoded(quantise(g, E4M3, COLUMN)) for g in gradients])
    # The SwiGLU input is cached in E4M3, gate and up tiled apart; the product is made again from it.
    cached = torch.cat([decoded(quantise(half, E4M3, VECTOR)) for half in up.result.chunk(2, dim=-1)], dim=-1).float()
    gate, value = cached.chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * value * sorted_weights
    bounds = up.offsets.tolist()
    groups = [slice(a, b) for a, b in pairwise(bounds)]
    assert same_codes(dw_down.b, [decoded(quantise(product[g], E4M3, COLUMN)) for g in groups])

    d = d_product.result.float()
    slope = torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    owed = torch.cat([d * sorted_weights * value * slope, d * sorted_weights * torch.nn.functional.silu(gate)], dim=-1)
    dx, dw_up = by_name["dx"], by_name["dw_up"]
    assert float64.relative(decoded(dx.a), owed) < 0.04  # an E4M3 rounding
    parts = decoded(dx.a).chunk(2, dim=-1)
    again = torch.cat([decoded(quantise(part.float(), E4M3, VECTOR)) for part in parts], dim=-1)
    assert torch.equal(again, decoded(dx.a))  # tiles restart at up's first column
    assert float64.relative(decoded(dw_up.a), owed) < 0.04
    cached = [decoded(quantise(x.detach()[t], E4M3, VECTOR)).float() for t in tokens]
    assert same_codes(dw_up.b, [decoded(quantise(values, E4M3, COLUMN)) for values in cached])

    slots = _slot_of_each_token(tokens)
    assert torch.equal(x.grad, dx.result[slots])
    assert torch.equal(experts.gate_up.parameter.grad, dw_up.result.view_as(experts.gate_up.parameter))
    assert torch.equal(experts.down.parameter.grad, dw_down.result.view_as(experts.down.parameter))
    dweights = (d * torch.nn.functional.silu(gate) * value).sum(dim=-1)
    assert float64.relative(weights.grad[:, 0], dweights[slots]) < 1e-5


def _in_order(products: list[Product]) -> list[Product]:
    assert [p.kind for p in products] == ["fprop", "fprop", "dgrad", "wgrad", "dgrad", "wgrad"]
    assert all(p.offsets is not None for p in products)
    return products


def _slot_of_each_token(tokens: list[Tensor]) -> list[int]:
    """Where each token's only slot lies, when slots are sorted by expert, then token."""
    order = torch.cat(tokens)
    return torch.argsort(order).tolist()


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_a_token_does_not_depend_on_the_others(rows: int, precision: str) -> None:
    experts = make_experts(6, 256, 96, precision)
    dtype = torch.float32 if precision == "fp32" else BF16
    x = normal(200, 256, seed=3).to(dtype)
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:2] for t in range(200)])
    weights = torch.rand(200, 2, generator=torch.Generator().manual_seed(4))

    def run(count: int) -> Tensor:
        operand = experts.gate_up.role.input(x[:count])
        return mlp(x[:count], operand, ids[:count], weights[:count], experts, LocalDispatcher())

    assert torch.equal(run(rows), run(200)[:rows])


@pytest.mark.parametrize("tiles, along", [("row", ROW), ("tensor", TENSOR)])
def test_tiles_of_a_whole_matrix_lie_over_each_experts_gate_and_up(
    tiles: str, along: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = make_experts(3, 48, 20, "fp8", tiles)
    for expert, factor in enumerate((1.0, 300.0, 0.01)):
        experts.gate_up.parameter.data[expert, 20:] *= factor  # up alone, so that gate and up differ as well
        experts.down.parameter.data[expert] *= factor
    x, ids = normal(12, 48, seed=3).to(BF16).requires_grad_(), ids_with([5, 4, 3], 1)
    products = float64.spy_on_gemms(monkeypatch)
    y = mlp(x, experts.gate_up.role.input(x.detach()), ids, torch.ones(12, 1), experts, LocalDispatcher())
    y.backward(normal(*y.shape, seed=5).to(BF16))
    up, down, d_product, _, dx, dw_up = _in_order(products)
    halves = [half for w in experts.gate_up.parameter.detach() for half in w.chunk(2)]
    for operand, parts in ((up.b, halves), (down.b, experts.down.parameter.detach())):
        owed = [quantise(part, E4M3, along) for part in parts]
        assert torch.equal(operand.codes, torch.cat([q.codes for q in owed]))
        assert torch.equal(operand.scales, torch.cat([q.scales for q in owed]))
    # Gradients of gate and up, by the formula from the cached codes: enough of it for their scales.
    kept = torch.cat([decoded(quantise(half, E4M3, VECTOR)) for half in up.result.chunk(2, dim=-1)], dim=-1)
    gate, value = kept.chunk(2, dim=-1)
    d, s = d_product.result.double(), torch.sigmoid(gate)
    owed = [d * value * s * (1 + gate * (1 - s)), d * gate * s]
    scales = [quantise(part.to(BF16), E4M3, along).scales for part in owed]
    assert torch.equal(dx.a.scales, torch.cat(scales, dim=1)) and not torch.equal(*scales)
    if tiles == "tensor":  # those of rows are columns here, each with a scale of its own
        assert torch.equal(dw_up.a.scales, torch.cat(scales, dim=1))
    for product in products:
        product.assert_exact()
