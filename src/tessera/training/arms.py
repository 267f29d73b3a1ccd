"""Arms of a comparison: the same recipe with other numerics. Every ablation is a recipe value."""

import difflib
from typing import Any

from tessera.recipe import Recipe, UserError

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


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """The recipe as `arm` runs it; a control ("control-1") is the BF16 twin. Raises UserError for no such arm."""
    changes = ARMS.get("bf16" if is_control(arm) else arm)
    if changes is None:
        close = difflib.get_close_matches(arm, ARMS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no arm {arm!r}{hint}\nthere are {', '.join(ARMS)}")
    numerics = type(recipe.numerics).model_validate(recipe.numerics.model_dump() | changes)
    return recipe.model_copy(update={"numerics": numerics})


def is_control(arm: str) -> bool:
    """Whether the arm is a control run: the BF16 twin from masters changed in the last places."""
    return arm.startswith("control-")


def control_seed(arm: str) -> int | None:
    """Seed of a control's perturbation, from its name; None for other arms."""
    return int(arm.removeprefix("control-")) if is_control(arm) else None
