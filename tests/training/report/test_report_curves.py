"""Thinned curves keep what they stand for, and the difference is the one the verdict judges."""

import random
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from tessera.training.report.curves import axis, compact, differences, series
from tessera.training.report.history import History, read
from tessera.training.verdict import largest_gap, windows
from tests.training.report.example_runs import event


def run_of(losses: dict[int, float | None]) -> History:
    return read([event("step", step, lm_loss=loss, gradient_norm=loss) for step, loss in losses.items()])


def noisy(steps: range, seed: int, size: float = 0.01) -> dict[int, float]:
    draw = random.Random(seed)
    return {step: 3.0 * (1 + draw.gauss(0, size)) for step in steps}


def test_a_short_run_is_drawn_step_by_step() -> None:
    history = run_of({0: 3.0, 1: None, 2: 2.0})
    shared = axis([history])
    assert shared.places.tolist() == [0, 1, 2] and shared.steps_a_point == 1
    assert series(history, shared)["lm_loss"] == [3.0, None, 2.0]
    assert "lm_loss_low" not in series(history, shared)


def test_thinned_points_are_means_with_their_extremes() -> None:
    losses = noisy(range(1003), seed=1)
    history = run_of(dict(losses))
    shared = axis([history], max_points=100)
    drawn = series(history, shared)
    assert shared.points <= 100 and shared.steps_a_point == 11
    for point, start in enumerate(range(0, 1003, 11)):
        group = [losses[step] for step in range(start, min(start + 11, 1003))]
        assert drawn["lm_loss"][point] == pytest.approx(fmean(group), rel=1e-4)
        assert drawn["lm_loss_low"][point] == pytest.approx(min(group), rel=1e-4)
        assert drawn["lm_loss_high"][point] == pytest.approx(max(group), rel=1e-4)
        assert drawn["gradient_norm"][point] == pytest.approx(max(group), rel=1e-4)
        assert start <= shared.places[point] < start + 11


def test_one_spike_in_many_steps_stays_visible() -> None:
    losses: dict[int, float | None] = dict.fromkeys(range(50_000), 2.0)
    losses[31_415] = 11.0
    history = run_of(losses)
    high = series(history, axis([history]))["lm_loss_high"]
    assert max(value for value in high if value is not None) == 11.0


def test_arms_of_different_length_share_one_axis() -> None:
    long, short = run_of({0: 4.0, 1: 3.0, 2: 2.0}), run_of({0: 4.0, 1: 3.0})
    shared = axis([long, short])
    assert series(short, shared)["lm_loss"] == [4.0, 3.0, None]


@pytest.mark.parametrize(("steps", "interval"), [(500, 1), (330, 1), (500, 10), (1000, 7), (120, 1)])
def test_the_largest_drawn_window_of_the_last_half_is_the_verdicts_figure(steps: int, interval: int) -> None:
    recorded = [step for step in range(steps) if step % interval == 0]
    twin, arm = (
        {step: loss for step, loss in noisy(range(steps), seed).items() if step in recorded} for seed in (1, 2)
    )
    found = draw({"bf16": twin, "fp8": arm}, steps)
    places = axis([run_of(dict(twin))]).places
    judged = [
        abs(value)
        for place, value in zip(places, found["arms"]["fp8"]["windows"], strict=True)
        if place >= judged_from(steps) and value is not None
    ]
    gap = largest_gap(arm, twin, steps)
    if interval > 1:  # a window of thinned steps is drawn, but is no verdict
        assert gap is None and judged
    else:
        assert max(judged) == pytest.approx(gap, rel=1e-3)


def draw(arms: dict[str, dict[int, float]], steps: int, controls: tuple[str, ...] = (), max_points: int = 1500) -> Any:
    histories = {name: run_of(dict(losses)) for name, losses in arms.items()}
    shared = axis(list(histories.values()), max_points=max_points)
    return differences(histories, "bf16", controls, shared, judged_from(steps))


def judged_from(steps: int) -> int:
    return min((window.start for window in windows(steps)), default=steps - steps // 2)


def test_the_band_spans_the_controls_window_by_window() -> None:
    arms = {
        "bf16": noisy(range(200), 1),
        "fp8": noisy(range(200), 2),
        "control-1": noisy(range(200), 3),
        "control-2": noisy(range(200), 4),
    }
    found = draw(arms, 200, ("control-1", "control-2"))
    assert set(found["arms"]) == {"fp8"} and found["controls"] == 2
    for window in range(4):
        steps = range(50 * window, 50 * window + 50)
        twin = fmean(arms["bf16"][step] for step in steps)
        gaps = [fmean(arms[name][step] for step in steps) / twin - 1 for name in ("control-1", "control-2")]
        for step in steps:
            assert found["band"]["low"][step] == pytest.approx(min(gaps), rel=1e-3)
            assert found["band"]["high"][step] == pytest.approx(max(gaps), rel=1e-3)


def test_thinned_differences_keep_the_window_farthest_from_zero() -> None:
    arm, twin = noisy(range(20_000), 1), noisy(range(20_000), 2)
    whole = draw({"bf16": twin, "fp8": arm}, 20_000, max_points=20_000)["arms"]["fp8"]["windows"]
    thin = draw({"bf16": twin, "fp8": arm}, 20_000, max_points=100)["arms"]["fp8"]["windows"]
    assert len(thin) == 100
    assert max(map(abs, thin)) == max(map(abs, whole))


def test_a_window_that_one_arm_left_open_has_no_difference() -> None:
    found = draw({"bf16": noisy(range(200), 1), "fp8": noisy(range(130), 2)}, 200)
    windows = found["arms"]["fp8"]["windows"]
    assert None not in windows[:100] and set(windows[100:]) == {None}


def test_without_a_twin_there_is_no_difference() -> None:
    assert draw({"fp8": noisy(range(60), 1)}, 60) is None
    assert draw({"fp8": noisy(range(60), 1), "per-tensor": noisy(range(60), 2)}, 60) is None


def test_runs_without_steps_draw_nothing() -> None:
    empty = read([])
    shared = axis([empty, empty])
    assert shared.points == 0 and series(empty, shared) == {}
    assert differences({"bf16": empty, "fp8": empty}, "bf16", (), shared, 0) is None


def test_numbers_travel_short_and_finite() -> None:
    assert compact([1 / 3, 2.0, np.nan, np.inf, 123456.789, 0.0]) == [0.33333, 2, None, None, 123460, 0]
