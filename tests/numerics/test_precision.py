"""The table "Precision by role" and the operand table, written out a second time."""

import pytest
import torch

from tessera.numerics import E4M3, E5M2, E5M6, Policy, RoleKind
from tessera.numerics.precision import Accumulation, Quantisation
from tessera.numerics.tiles import Tile

VECTOR, COLUMN, BLOCK = Tile(1, 128), Tile(128, 1), Tile(128, 128)
POWERS, FLOATS = "power_of_two", "float32"

# The DeepSeek-V3 report's exceptions: role -> (scales of the input, of the output's gradient)
DEEPSEEK_V3 = {
    RoleKind.ATTENTION_INPUT: (FLOATS, FLOATS),
    RoleKind.ATTENTION_UP: (FLOATS, FLOATS),
    RoleKind.ATTENTION_OUTPUT: (POWERS, FLOATS),  # the linear after attention
    RoleKind.DENSE_GATE_UP: (FLOATS, FLOATS),
    RoleKind.DENSE_DOWN: (FLOATS, FLOATS),
    RoleKind.EXPERT_GATE_UP: (POWERS, FLOATS),  # the dispatched tokens
    RoleKind.EXPERT_DOWN: (FLOATS, POWERS),  # the dispatched gradient
    RoleKind.OTHER: (FLOATS, FLOATS),
}


@pytest.mark.parametrize("scales", [POWERS, FLOATS, "deepseek-v3"])
@pytest.mark.parametrize("kind", RoleKind)
def test_every_role_takes_the_operands_of_the_law(kind: RoleKind, scales: str) -> None:
    role = Policy(scales=scales).role(kind)
    of_input, of_gradient = DEEPSEEK_V3[kind] if scales == "deepseek-v3" else (scales, scales)
    of_others = FLOATS if scales == "deepseek-v3" else scales
    assert role.quantised and role.operands == "fp8"
    assert role.input == Quantisation(E4M3, VECTOR, of_input, "nearest")
    assert role.weight == Quantisation(E4M3, BLOCK, of_others, "nearest")
    assert role.gradient_rows == Quantisation(E4M3, VECTOR, of_gradient, "nearest")
    assert role.gradient_columns == Quantisation(E4M3, COLUMN, of_gradient, "nearest")
    assert role.input_columns == Quantisation(E4M3, COLUMN, of_input, "nearest")
    assert role.gate_up_cache == Quantisation(E4M3, VECTOR, of_others, "nearest")
    assert role.accumulation == Accumulation("float32", 128)
    assert role.activation_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", RoleKind)
def test_only_the_input_of_the_linear_after_attention_is_kept_in_twelve_bits(kind: RoleKind) -> None:
    for scales in (POWERS, FLOATS, "deepseek-v3"):
        cache = Policy(scales=scales).role(kind).input_cache
        owed = Quantisation(E5M6, VECTOR, POWERS, "nearest") if kind is RoleKind.ATTENTION_OUTPUT else None
        assert cache == owed


def test_the_default_policy_is_the_recipes() -> None:
    assert Policy() == Policy("fp8", POWERS, "block", "e4m3", "vector", "nearest", "float32", 128)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_twins_quantise_nothing(precision: str, dtype: torch.dtype) -> None:
    for kind in RoleKind:
        role = Policy(precision=precision).role(kind)
        assert not role.quantised and role.operands == precision and role.activation_dtype == dtype


def test_baselines_and_ablations_change_what_they_name_and_nothing_else() -> None:
    kind = RoleKind.ATTENTION_OUTPUT
    row, tensor = Policy(tiles="row").role(kind), Policy(tiles="tensor").role(kind)
    assert [q.tile for q in (row.input, row.weight, row.gradient_rows)] == [Tile(1, 0)] * 3
    assert [q.tile for q in (row.input_columns, row.gradient_columns)] == [Tile(0, 1)] * 2
    five = (tensor.input, tensor.weight, tensor.gradient_rows, tensor.gradient_columns, tensor.input_columns)
    assert [q.tile for q in five] == [Tile(0, 0)] * 5
    e5m2 = Policy(gradient_format="e5m2").role(kind)
    assert (e5m2.gradient_rows.format, e5m2.gradient_columns.format, e5m2.input.format) == (E5M2, E5M2, E4M3)
    block = Policy(gradient_tiles="block").role(kind)
    assert block.gradient_rows.tile == block.gradient_columns.tile == BLOCK
    assert (block.input.tile, block.input_columns.tile) == (VECTOR, COLUMN)
    toward_zero = Policy(rounding="toward_zero").role(kind)
    assert toward_zero.input_cache is not None
    assert {q.rounding for q in (toward_zero.input, toward_zero.weight, toward_zero.input_cache)} == {"toward_zero"}


@pytest.mark.parametrize(
    ("choices", "word"),
    [
        ({"precision": "fp16"}, "precision"),
        ({"scales": "pow2"}, "scales"),
        ({"tiles": "vector"}, "tiles"),
        ({"gradient_format": "e3m4"}, "gradient_format"),
        ({"gradient_tiles": "row"}, "gradient_tiles"),
        ({"rounding": "up"}, "rounding"),
        ({"accumulation": "tf32"}, "accumulation"),
        ({"accumulation": "hopper_unpromoted"}, "hopper_unpromoted"),
        ({"tiles": "tensor", "gradient_tiles": "block"}, "gradient_tiles"),
        ({"promotion_interval": 0}, "promotion_interval"),
        ({"promotion_interval": 48}, "promotion_interval"),
        ({"promotion_interval": 96}, "promotion_interval"),  # would reach over the end of a tile
        ({"promotion_interval": 256}, "promotion_interval"),
        ({"promotion_interval": -32, "tiles": "row"}, "promotion_interval"),
    ],
)
def test_a_choice_that_the_arithmetic_cannot_give_is_refused_by_name(choices: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Policy(**choices)  # type: ignore[arg-type]


def test_long_intervals_go_with_scales_that_are_constant_along_the_contraction() -> None:
    assert Policy(tiles="row", promotion_interval=512).role(RoleKind.OTHER).accumulation.interval == 512
    assert Policy(tiles="tensor", accumulation="hopper_unpromoted").accumulation == "hopper_unpromoted"
