"""The section on memory: what a run needs by its recipe, and what it keeps for backward, as bars."""

import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tessera.accounting import memory
from tessera.recipe import Recipe
from tessera.training.report.wording import grouped, size

_LIVES = {
    "masters": "weights (FP32 masters)",
    "gradients": "gradients",
    "moments": "moments of AdamW",
    "operands": "weights as GEMM operands",
    "ema": "moving average (CPU memory)",
    "checkpoint_copy": "copy for a checkpoint (CPU memory)",
    "saved": "kept for backward",
}


def memory_bars(text: str) -> dict[str, Any] | None:
    """Bars of the recipe in TOML, predicted by `accounting`; None for a text that is no recipe of this version."""
    try:
        recipe = Recipe.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError):
        return None
    found = memory(recipe)
    lives = {words: getattr(found, name) for name, words in _LIVES.items() if getattr(found, name)}
    return {
        "tokens": grouped(found.tokens),
        "total": size(found.total),
        "per_token": size(found.saved_per_token),
        "lives": _bars(lives),
        "kept": _bars(found.kinds()),
        "off": [name for name, on in recipe.memory.model_dump().items() if not on],
    }


def _bars(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    largest = max(sizes.values())
    return [
        {"label": label, "value": size(count), "width": round(100 * count / largest, 2)}
        for label, count in sizes.items()
    ]
