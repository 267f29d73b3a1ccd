"""Curves of several runs on one axis of steps, thinned to what a page can hold, and their difference to a twin.

Thinning puts consecutive steps into groups and draws one point a group: the mean, and for the loss also its
smallest and largest value, so that a spike of one step in a hundred thousand stays visible. Of the gradient's norm
a group keeps the largest.

The difference follows docs/numerics.md, `relative_loss_error`: over disjoint windows of 50 steps
(mean - mean of the twin) / mean of the twin, here with its sign. The control runs (the twin again, from masters
changed in their last bits) span a band window by window: a difference inside it is what chance alone does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.training.report.history import STEP_FIELDS, Array, History
from tessera.training.verdict import WINDOW

MAX_POINTS = 1500  # about one for each pixel of a wide screen

Values = list[float | None]


@dataclass(frozen=True)
class Axis:
    """All steps that any of the runs recorded, ascending, and the group (drawn point) each one is in."""

    steps: NDArray[np.int64]
    groups: NDArray[np.int64]

    @property
    def points(self) -> int:
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    @property
    def steps_a_point(self) -> int:
        """Recorded steps in a full group; 1 = nothing is thinned."""
        return int((self.groups == 0).sum()) or 1

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """x of each point: the middle step of its group."""
        first = np.searchsorted(self.groups, np.arange(self.points), side="left")
        last = np.searchsorted(self.groups, np.arange(self.points), side="right") - 1
        return self.steps[(first + last) // 2]

    def align(self, history: History, name: str) -> Array:
        """A column of one run over `steps`; NaN where that run has nothing."""
        aligned = np.full(len(self.steps), np.nan)
        if history.steps:
            aligned[np.searchsorted(self.steps, np.array(list(history.steps)))] = history.column(name)
        return aligned

    def mean(self, aligned: Array) -> Array:
        """[steps] -> [points]: the mean of the finite values of each group."""
        finite = np.isfinite(aligned)
        count = np.bincount(self.groups, weights=finite, minlength=self.points)
        total = np.bincount(self.groups, weights=np.where(finite, aligned, 0.0), minlength=self.points)
        return np.divide(total, count, out=np.full(self.points, np.nan), where=count > 0)

    def extreme(self, aligned: Array, ufunc: np.ufunc) -> Array:
        """[steps] -> [points] by np.fmin or np.fmax, which pass over NaN."""
        out = np.full(self.points, np.nan)
        ufunc.at(out, self.groups, aligned)
        return out


def axis(histories: Sequence[History], max_points: int = MAX_POINTS) -> Axis:
    """The common axis of the runs."""
    recorded = [np.array(list(history.steps), dtype=np.int64) for history in histories]
    steps = np.unique(np.concatenate(recorded)) if recorded else np.array([], dtype=np.int64)
    size = max(1, -(-len(steps) // max_points))
    return Axis(steps, np.arange(len(steps)) // size)


def series(history: History, shared: Axis) -> dict[str, Values]:
    """STEP_FIELDS -> values over the axis' points; with `lm_loss_low` and `_high` where points stand for many."""
    drawn: dict[str, Values] = {}
    for name in STEP_FIELDS:
        aligned = shared.align(history, name)
        if not np.isfinite(aligned).any():
            continue
        largest = name == "gradient_norm"
        drawn[name] = compact(shared.extreme(aligned, np.fmax) if largest else shared.mean(aligned))
        if name == "lm_loss" and shared.steps_a_point > 1:
            drawn["lm_loss_low"] = compact(shared.extreme(aligned, np.fmin))
            drawn["lm_loss_high"] = compact(shared.extreme(aligned, np.fmax))
    return drawn


def differences(
    runs: Mapping[str, History], reference: str, controls: Sequence[str], shared: Axis, judged_from: int
) -> dict[str, Any] | None:
    """Relative difference of each arm's loss to the reference's, over the axis' points; None without a pair.

    Windows lie from step `judged_from` (where those of the verdict begin) forward and back.
    `points` compares step by step (both arms saw the same batch); `windows` repeats a window's value at each of its
    points, and where several windows share a point the one farthest from zero stands.
    """
    if reference not in runs or len(runs) < 2:
        return None
    twin = shared.align(runs[reference], "lm_loss")
    index, full = _windows(shared.steps, judged_from)
    arms: dict[str, Any] = {}
    band: list[Array] = []
    for name, history in runs.items():
        if name == reference:
            continue
        loss = shared.align(history, "lm_loss")
        window = _window_difference(loss, twin, index, full)
        if name in controls:
            band.append(window)
            continue
        points = shared.mean((loss - twin) / twin)
        if np.isfinite(points).any():
            arms[name] = {"points": compact(points), "windows": compact(_farthest(window, shared))}
    if not arms and not band:
        return None
    spans = {}
    if band:
        lowest, highest = np.fmin.reduce(band), np.fmax.reduce(band)
        spans = {
            "low": compact(shared.extreme(lowest, np.fmin)),
            "high": compact(shared.extreme(highest, np.fmax)),
        }
    return {"reference": reference, "arms": arms, "band": spans, "controls": len(band)}


def _windows(steps: NDArray[np.int64], judged_from: int) -> tuple[NDArray[np.int64], int]:
    """The window of each step, numbered from 0, and how many records a full window has."""
    spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    index = (steps - judged_from) // WINDOW
    return index - index.min(initial=0), max(1, WINDOW // spacing)


def _window_difference(loss: Array, twin: Array, index: NDArray[np.int64], full: int) -> Array:
    """[steps] -> [steps]: the difference of the window a step is in; NaN in a window that either run left open."""
    both = np.isfinite(loss) & np.isfinite(twin)
    count = np.bincount(index, weights=both)
    total = np.bincount(index, weights=np.where(both, loss - twin, 0.0))
    base = np.bincount(index, weights=np.where(both, twin, 0.0))
    value = np.divide(total, base, out=np.full(len(count), np.nan), where=(count >= full) & (base > 0))
    return value[index]


def _farthest(window: Array, shared: Axis) -> Array:
    low, high = shared.extreme(window, np.fmin), shared.extreme(window, np.fmax)
    return np.where(np.abs(low) > np.abs(high), low, high)


def compact(values: Iterable[float], digits: int = 5) -> Values:
    """Numbers as JSON should carry them: a few significant digits, whole numbers without a point, NaN as None."""
    return [_short(float(value), digits) for value in values]


def _short(value: float, digits: int) -> float | None:
    if not np.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.{digits}g}")
