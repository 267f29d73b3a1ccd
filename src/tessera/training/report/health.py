"""What FP8 did to each tensor, over time, and which tensors stand out.

A tensor's name ends with its operand (`input`, `weight`, `gradient_rows`, ...). Operands of one kind have the same
format and tiles, so they are each other's yardstick: a tensor stands out when a figure of its last measurement is
some factor above the median of its kind and above a floor below which nobody need care. Operands made from codes
(those that report "rounded twice") are a kind apart: their error is that of the second rounding alone, mostly none.
Non-finite elements stand out always.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.training.report.curves import compact
from tessera.training.report.history import HEALTH_FIELDS, Array, History

MAX_NUMBERS = 200_000  # of one run: about 1.3 MB of the page
MAX_TIMES = 60

# field -> (times the median of the kind, floor). E4M3 rounds a tensor to about 0.026 of relative RMS.
OUTLIERS = {
    "relative_rms": (1.5, 0.01),
    "saturated": (4.0, 0.002),
    "flushed": (4.0, 0.01),
    "rounded_twice": (4.0, 0.02),
}
DRAWN = ("relative_rms", "saturated", "flushed", "rounded_twice")
SCALES = ("scale_min", "scale_max")  # drawn as powers of two


def table(history: History, max_numbers: int = MAX_NUMBERS) -> dict[str, Any] | None:
    """{steps, grouped, tensors: [{name, operand, elements, nonfinite, flags, and one list over steps for each field
    of DRAWN and SCALES}]}, or None where no health was measured. Of a group of measurements the worst is kept."""
    names = sorted({name for record in history.health.values() for name in record.names})
    if not names:
        return None
    steps = list(history.health)
    times = min(MAX_TIMES, max(1, max_numbers // (len(names) * len(DRAWN + SCALES))))
    size = -(-len(steps) // times)
    starts = range(0, len(steps), size)
    values = _values(history, names)  # [tensor, time, field]
    grouped = np.stack([_worst(values[:, start : start + size]) for start in starts], axis=1)
    latest = _latest(values)
    nonfinite = np.nansum(_field(values, "nonfinite"), axis=1)
    operands = [name.rpartition(".")[2] for name in names]
    kinds = [
        operand + " from codes" * bool(np.isfinite(again))
        for operand, again in zip(operands, _field(latest, "rounded_twice"), strict=True)
    ]
    flags = _flags(latest, np.array(kinds))
    return {
        "steps": [steps[min(start + size, len(steps)) - 1] for start in starts],
        "grouped": size,
        "tensors": [
            {
                "name": name.rpartition(".")[0] or name,
                "operand": operand,
                "elements": compact([_field(latest[i], "elements")], 15)[0],
                "nonfinite": int(nonfinite[i]),
                "flags": flags[i] + ["nonfinite"] * bool(nonfinite[i]),
            }
            | {field: compact(_field(grouped[i], field), 3) for field in DRAWN}
            | {field: compact(_exponents(_field(grouped[i], field)), 4) for field in SCALES}
            for i, (name, operand) in enumerate(zip(names, operands, strict=True))
        ],
    }


def _field(values: Array, name: str) -> Any:
    return values[..., HEALTH_FIELDS.index(name)]


def _exponents(scales: Array) -> Array:
    """log2; NaN for what is no scale."""
    return np.log2(scales, out=np.full(scales.shape, np.nan), where=scales > 0)


def _values(history: History, names: list[str]) -> Array:
    row = {name: index for index, name in enumerate(names)}
    values = np.full((len(names), len(history.health), len(HEALTH_FIELDS)), np.nan)
    for time, record in enumerate(history.health.values()):
        values[[row[name] for name in record.names], time] = record.values
    return values


def _worst(group: Array) -> Array:
    """[tensor, time, field] -> [tensor, field]: the largest of each figure, of the smallest scale the smallest."""
    worst = np.fmax.reduce(group, axis=1)
    smallest = HEALTH_FIELDS.index("scale_min")
    worst[:, smallest] = np.fmin.reduce(group[:, :, smallest], axis=1)
    return worst


def _latest(values: Array) -> Array:
    """[tensor, time, field] -> [tensor, field]: each tensor's last measurement, whenever that was."""
    measured = np.isfinite(_field(values, "relative_rms"))
    last = values.shape[1] - 1 - measured[:, ::-1].argmax(axis=1)
    return values[np.arange(len(values)), last]


def _flags(latest: Array, kinds: NDArray[np.str_]) -> list[list[str]]:
    """Names of the figures with which each tensor stands out."""
    flags: list[list[str]] = [[] for _ in kinds]
    for field, (factor, floor) in OUTLIERS.items():
        column = _field(latest, field)
        for kind in np.unique(kinds):
            same = column[kinds == kind]
            if not np.isfinite(same).any():
                continue
            limit = max(floor, factor * float(np.nanmedian(same)))
            for index in np.flatnonzero((kinds == kind) & (column > limit)):
                flags[index].append(field)
    return flags
