"""Expert loads over time as the heat map draws them: tokens of an expert relative to the layer's mean.

1 is perfect balance. One number sums a layer up: the maximal violation, max over experts of load / mean - 1
(Wang et al., arXiv 2408.15664), here averaged over the last quarter of the records. Records are grouped, and their
counts added, until the map fits its budget of cells.
"""

from typing import Any

import numpy as np

from tessera.training.report.curves import compact
from tessera.training.report.history import Array, History, Load

MAX_CELLS = 400_000  # of one run, all layers together: about 1.4 MB of the page
MAX_COLUMNS = 300


def heat_map(history: History, max_cells: int = MAX_CELLS) -> dict[str, Any] | None:
    """{steps, grouped, layers: [{name, experts, percent, bias_min, bias_max, violation}]}, or None without loads.

    `percent` is flat, one column of `experts` numbers after the other: 100 x load / mean, rounded. A column is
    empty of tokens (a layer that got none) as zeros.
    """
    if not history.loads:
        return None
    layout = _layout(next(reversed(history.loads.values())))
    records = {step: load for step, load in history.loads.items() if _layout(load) == layout}
    experts = sum(size for _, size in layout)
    columns = min(MAX_COLUMNS, max(1, max_cells // max(1, experts)))
    size = -(-len(records) // columns)
    steps = list(records)
    starts = range(0, len(steps), size)
    groups = [[records[step] for step in steps[start : start + size]] for start in starts]
    return {
        "steps": [steps[min(start + size, len(steps)) - 1] for start in starts],
        "grouped": size,
        "layers": [_layer(index, name, experts, groups) for index, (name, experts) in enumerate(layout)],
    }


def _layout(load: Load) -> list[tuple[str, int]]:
    return [(name, len(counts)) for name, counts in zip(load.layers, load.counts, strict=False)]


def _layer(index: int, name: str, experts: int, groups: list[list[Load]]) -> dict[str, Any]:
    counts = np.array([sum(load.counts[index] for load in group) for group in groups], dtype=np.float64)
    mean = counts.mean(axis=1, keepdims=True) if experts else np.ones((len(groups), 1))
    relative = np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)
    late = relative[-max(1, len(groups) // 4) :]
    return {
        "name": name,
        "experts": experts,
        "percent": [int(value) for value in np.rint(100 * relative).ravel()],
        "bias_min": compact(_over(groups, index, "bias_min", np.fmin)),
        "bias_max": compact(_over(groups, index, "bias_max", np.fmax)),
        "violation": compact([late.max(axis=1).mean() - 1 if experts else np.nan])[0],
    }


def _over(groups: list[list[Load]], index: int, name: str, ufunc: np.ufunc) -> Array:
    return np.array([ufunc.reduce([getattr(load, name)[index] for load in group]) for group in groups])
