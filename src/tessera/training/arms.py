"""Arms of a comparison: the same recipe with other numerics, or that keeps other bits for backward.

Every ablation is a recipe value.
"""

import difflib
import re
from typing import Any

from pydantic import ValidationError

from tessera.recipe import NumericsSection, Recipe, UserError
from tessera.recipe.problems import explain

# What each arm changes in [numerics]; the rest stays the recipe's.
ARMS: dict[str, dict[str, Any]] = {
    "fp8": {"precision": "fp8"},
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
    "float32-scales": {"precision": "fp8", "scales": "float32"},
    "deepseek-v3-scales": {"precision": "fp8", "scales": "deepseek-v3"},
    "per-row": {"precision": "fp8", "tiles": "row", "gradient_tiles": "vector"},
    "per-tensor": {"precision": "fp8", "tiles": "tensor", "gradient_tiles": "vector"},
    "e5m2-gradients": {"precision": "fp8", "gradient_format": "e5m2"},
    "block-gradients": {"precision": "fp8", "tiles": "block", "gradient_tiles": "block"},
    "toward-zero": {"precision": "fp8", "rounding": "toward_zero"},
    "hopper": {"precision": "fp8", "accumulation": "hopper"},
    "hopper-row": {"precision": "fp8", "accumulation": "hopper", "tiles": "row", "gradient_tiles": "vector"},
    "hopper-unpromoted": {
        "precision": "fp8",
        "accumulation": "hopper_unpromoted",
        "tiles": "row",
        "gradient_tiles": "vector",
    },
}
# What these change in [memory]: the FP8 arm, but for one tensor that backward has unrounded.
MEMORY_ARMS: dict[str, dict[str, Any]] = {
    "bf16-attention-output": {"e5m6_attention_output": False},
    "bf16-swiglu-inputs": {"fp8_swiglu_inputs": False},
}


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """The recipe as `arm` runs it; a control ("control-1") is the BF16 twin.

    Raises UserError for no such arm, and where its changes contradict the recipe's other numerics.
    """
    if arm in MEMORY_ARMS:
        kept = recipe.memory.model_copy(update=MEMORY_ARMS[arm])
        return arm_recipe(recipe, "fp8").model_copy(update={"memory": kept})
    changes = ARMS.get("bf16" if is_control(arm) else arm)
    if changes is None:
        names = [*ARMS, *MEMORY_ARMS]
        close = difflib.get_close_matches(arm, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no arm {arm!r}{hint}\nthere are {', '.join(names)}")
    values = recipe.numerics.model_dump() | changes
    try:
        numerics = NumericsSection.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(explain(error, NumericsSection, values))
        raise UserError(f"arm {arm} of {recipe.name}: numerics.{problems}") from None
    return recipe.model_copy(update={"numerics": numerics})


def require_backward(numerics: NumericsSection) -> None:
    """Raise UserError for numerics that have a forward pass only, and so cannot be trained."""
    if numerics.precision == "fp8" and numerics.tiles == "row" and numerics.accumulation != "float32":
        raise UserError(
            f'numerics.tiles = "row" with accumulation = "{numerics.accumulation}" has no backward: the scales '
            'of W vary along the contraction of dgrad; train with tiles = "block" or "tensor"'
        )


def is_control(arm: str) -> bool:
    """Whether the arm is a control run: the BF16 twin from masters changed in the last places."""
    return re.fullmatch(r"control-[1-9]\d*", arm) is not None


def control_seed(arm: str) -> int:
    """Seed of a control's perturbation, from its name."""
    return int(arm.removeprefix("control-"))
