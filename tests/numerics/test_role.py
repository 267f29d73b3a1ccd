"""Roles make the operands the law asks for, each from the source it asks for; weights are quantised once a step."""

import pytest
import torch
from torch import Tensor, nn

import tests.numerics.oracle as oracle
from tessera.numerics import (
    BLOCK,
    COLUMN,
    E4M3,
    E5M6,
    VECTOR,
    Policy,
    Recorder,
    Role,
    RoleKind,
    TiledTensor,
    Weight,
    quantise,
)
from tessera.numerics.gemm import Operand
from tests.numerics.oracle import Layout


def role_of(kind: RoleKind = RoleKind.OTHER, **choices: str) -> Role:
    return Role("layer", Policy(**choices).role(kind), Recorder())  # type: ignore[arg-type]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def same(one: Operand, two: TiledTensor) -> bool:
    assert isinstance(one, TiledTensor)
    return one.tile == two.tile and torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


def test_both_quantisations_of_the_gradient_are_made_from_its_high_precision_values() -> None:
    dy = normal(300, 200)
    dy[::7] *= 1e4  # tokens of very different magnitude: a second rounding would show
    rows, columns = role_of().gradient(dy)
    assert same(rows, quantise(dy, E4M3, VECTOR)) and same(columns, quantise(dy, E4M3, COLUMN))
    assert not same(columns, quantise(quantise(dy, E4M3, VECTOR).decode(), E4M3, COLUMN))


def test_the_wgrad_form_of_the_input_is_made_from_the_cached_codes() -> None:
    x = normal(300, 200)
    x[::7] *= 1e4
    role = role_of()
    role.recorder.measuring = True
    operand = role.input(x)
    assert same(operand, quantise(x, E4M3, VECTOR))
    assert role.input_cache(x, operand) is operand  # kept once
    columns = role.input_columns(operand)
    decoded = quantise(x, E4M3, VECTOR).decode()
    assert same(columns, quantise(decoded, E4M3, COLUMN))
    assert not same(columns, quantise(x, E4M3, COLUMN))
    assert isinstance(columns, TiledTensor)
    share = role.recorder.tensors["layer.input_columns"]["rounded_twice"]
    assert share == float((columns.decode() != decoded).double().mean()) > 0


def test_elements_that_stay_normal_under_the_new_power_of_two_scale_go_over_exactly() -> None:
    x = normal(256, 256) * 2.0 ** torch.randint(-8, 8, (256, 1), generator=torch.Generator().manual_seed(5))
    cached = role_of().input(x)
    columns = role_of().input_columns(cached)
    assert isinstance(cached, TiledTensor) and isinstance(columns, TiledTensor)
    before, after = cached.decode(), columns.decode()
    scale = oracle.scale_of_each_element(columns.scales, before.shape, Layout(COLUMN))
    normal_there = before.abs() >= scale * 2.0**-6
    assert torch.equal(after[normal_there], before[normal_there])
    others = ~normal_there & (before != 0)
    assert bool((after[others] != before[others]).any())  # and the others are rounded a second time
    assert bool(((after - before).abs() <= scale * 2.0**-10).all())


def test_the_linear_after_attention_multiplies_e4m3_and_keeps_e5m6_of_the_original() -> None:
    x = normal(200, 160)
    x[::3] *= 1e3
    role = role_of(RoleKind.ATTENTION_OUTPUT)
    role.recorder.measuring = True
    operand = role.input(x)
    cached = role.input_cache(x, operand)
    assert same(operand, quantise(x, E4M3, VECTOR))
    assert same(cached, quantise(x, E5M6, VECTOR))
    assert isinstance(cached, TiledTensor)
    columns = role.input_columns(cached)
    assert same(columns, quantise(quantise(x, E5M6, VECTOR).decode(), E4M3, COLUMN))
    assert role.recorder.tensors["layer.input_columns"]["rounded_twice"] is None  # by nature, not counted


def test_a_recomputed_input_is_quantised_in_tiles_of_128_tokens_directly() -> None:
    product = normal(300, 70).float()
    offsets = torch.tensor([0, 127, 127, 300])
    role = role_of(RoleKind.EXPERT_DOWN)
    role.recorder.measuring = True
    columns = role.input_columns(product, offsets)
    assert same(columns, quantise(product, E4M3, COLUMN, offsets=offsets))
    assert role.recorder.tensors["layer.input_columns"]["rounded_twice"] is None


def test_gate_and_up_are_tiled_apart_in_the_cache_in_the_weight_and_in_the_gradient() -> None:
    gate_up = normal(5, 2 * 80)
    gate_up[:, 80:] *= 1e4
    role = role_of(RoleKind.EXPERT_GATE_UP)
    cache = role.gate_up_cache(gate_up, 80)
    assert same(cache, quantise(gate_up, E4M3, VECTOR, column_segment=80))
    assert isinstance(cache, TiledTensor) and cache.scales.shape == (5, 2)
    assert bool((cache.scales[:, 1] > 1e3 * cache.scales[:, 0]).all())
    weight = normal(160, 30).float()
    assert same(role.weight(weight, 80), quantise(weight, E4M3, BLOCK, row_segment=80))
    rows, columns = role.gradient(gate_up, column_segment=80)
    assert same(rows, quantise(gate_up, E4M3, VECTOR, column_segment=80))
    assert same(columns, quantise(gate_up, E4M3, COLUMN))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_twins_cast_where_fp8_quantises(precision: str) -> None:
    role = role_of(RoleKind.ATTENTION_OUTPUT, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    x = normal(4, 5).float()
    operand = role.input(x)
    made = [operand, role.input_cache(x, operand), role.input_columns(operand), *role.gradient(x), role.weight(x, 4)]
    for tensor in made:
        assert isinstance(tensor, Tensor) and tensor.dtype == dtype and torch.equal(tensor, x.to(dtype))
    assert role.recorder.nonfinite == {}


def test_block_tiles_of_gradients_restart_at_each_experts_first_token() -> None:
    dy, offsets = normal(300, 96), torch.tensor([0, 5, 200, 300])
    rows, columns = role_of(gradient_tiles="block").gradient(dy, column_segment=48, offsets=offsets)
    owed = quantise(dy, E4M3, BLOCK, column_segment=48, offsets=offsets)
    assert same(rows, owed) and same(columns, owed)


# Weights


def counting(role: Role) -> list[int]:
    """How often the role's weight has been quantised, as the recorder's calls show."""
    calls: list[int] = []
    observe = role.recorder.observe

    def count(name: str, source: Tensor, quantised: TiledTensor, *, requantised: bool = False) -> None:
        calls.append(1)
        observe(name, source, quantised, requantised=requantised)

    role.recorder.observe = count  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd"])
def test_a_weight_is_quantised_once_after_an_optimizer_step_and_not_otherwise(optimizer: str) -> None:
    parameter = nn.Parameter(normal(96, 40).float())
    make = {
        "adamw": lambda: torch.optim.AdamW([parameter], lr=0.1),
        "fused": lambda: torch.optim.AdamW([parameter], lr=0.1, fused=True),
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.1, foreach=True),
    }[optimizer]()
    role = role_of()
    calls, weight = counting(role), Weight(parameter, role)
    for step in range(1, 4):
        first = weight.operand()
        assert same(first, quantise(parameter.detach(), E4M3, BLOCK))
        for _ in range(3):  # micro-batches, recomputation, evaluation
            assert weight.operand() is first
        parameter.grad = torch.ones_like(parameter)
        assert weight.operand() is first  # a gradient changes nothing
        assert len(calls) == step
        make.step()
        assert weight.operand() is not first


def test_a_weight_follows_loading_and_moving_of_its_parameter() -> None:
    parameter = nn.Parameter(normal(4, 5).float())
    weight = Weight(parameter, role_of())
    weight.operand()
    holder = nn.Module()
    holder.w = parameter
    holder.load_state_dict({"w": normal(4, 5, seed=9).float()})
    assert same(weight.operand(), quantise(parameter.detach(), E4M3, BLOCK))
    parameter.data = normal(4, 5, seed=10).float()  # a new place in memory, as .to(device) makes
    assert same(weight.operand(), quantise(parameter.detach(), E4M3, BLOCK))


def test_stacked_experts_are_tiled_each_for_itself_also_without_being_told() -> None:
    parameter = nn.Parameter(normal(3 * 50, 20).float().view(3, 50, 20))
    matrix = parameter.detach().flatten(0, 1)
    assert same(Weight(parameter, role_of()).operand(), quantise(matrix, E4M3, BLOCK, row_segment=50))
    assert same(Weight(parameter, role_of(), 25).operand(), quantise(matrix, E4M3, BLOCK, row_segment=25))
    single = nn.Parameter(normal(50, 20).float())
    assert same(Weight(single, role_of()).operand(), quantise(single.detach(), E4M3, BLOCK))


def test_quantising_a_weight_leaves_no_graph_behind() -> None:
    parameter = nn.Parameter(normal(4, 5).float())
    operand = Weight(parameter, role_of(precision="bf16")).operand()
    assert isinstance(operand, Tensor) and not operand.requires_grad
