"""The verdict: what the figures allow, and no more."""

from statistics import fmean

import pytest

from tessera.training import verdict
from tessera.training.verdict import curve_error, failures, largest_gap


def losses(offset: float = 0.0, steps: int = 500) -> dict[int, float]:
    return {step: (4 - step / 400) * (1 + offset) for step in range(steps)}


def test_the_gap_is_the_largest_of_disjoint_windows_of_the_last_half() -> None:
    a, b = losses(), losses()
    for step in range(300, 350):
        a[step] *= 1.01
    for step in range(0, 250):  # the first half does not count
        a[step] *= 2
    gaps = [
        abs(fmean(a[s] for s in range(w, w + 50)) - fmean(b[s] for s in range(w, w + 50)))
        / fmean(b[s] for s in range(w, w + 50))
        for w in (250, 300, 350, 400, 450)
    ]
    assert largest_gap(a, b, 500) == pytest.approx(max(gaps)) == pytest.approx(0.01)


@pytest.mark.parametrize(("steps", "starts"), [(500, [450, 400, 350, 300, 250]), (549, [499, 449, 399, 349, 299])])
def test_windows_end_with_the_run_and_stay_in_its_last_half(steps: int, starts: list[int]) -> None:
    assert [window.start for window in verdict.windows(steps)] == starts
    a = losses(steps=steps)
    for step in range(steps - 50, steps):
        a[step] *= 1.02
    assert largest_gap(a, losses(steps=steps), steps) == pytest.approx(0.02)


def test_a_run_that_ended_early_has_a_figure_but_no_verdict() -> None:
    short = {step: loss for step, loss in losses(0.1).items() if step < 420}
    error = curve_error(short, losses(), [losses(), losses()], 500)
    assert error.figure == pytest.approx(0.1)
    assert "ended early" in str(error.reason)


def test_a_control_without_a_full_window_is_no_control() -> None:
    nothing = {step: loss for step, loss in losses().items() if step < 240}
    error = curve_error(losses(0.1), losses(), [losses(), nothing], 500)
    assert "1 finished control run" in str(error.reason)


def test_a_window_compares_means_so_opposite_differences_inside_it_cancel() -> None:
    a = {step: loss * (1.01 if step % 2 else 0.99) for step, loss in losses().items()}
    assert largest_gap(a, losses(), 500) < 1e-4


@pytest.mark.parametrize(
    ("controls", "steps", "word"),
    [
        ([], 500, "no controls"),
        ([losses()], 500, "1 finished control run"),
        ([losses(), losses()], 499, "499 steps"),
        ([losses(), losses(0.0013)], 500, "control run differs"),
    ],
)
def test_a_curve_is_no_verdict_without_a_quiet_noise_floor(
    controls: list[dict[int, float]], steps: int, word: str
) -> None:
    error = curve_error(losses(0.1), losses(), controls, steps)
    assert not error.resolved
    assert word in str(error.reason)
    assert error.figure == pytest.approx(0.1)
    assert failures(0.0, 0.0, 0.0, error) == []  # and so it cannot fail a run either


def test_with_two_quiet_controls_the_curve_counts_in_both_directions() -> None:
    controls = [losses(0.0012), losses(-0.0012)]
    assert failures(0.0, 0.0, 0.0, curve_error(losses(0.0024), losses(), controls, 500)) == []
    missed = failures(0.0, 0.0, 0.0, curve_error(losses(-0.0026), losses(), controls, 500))
    assert len(missed) == 1
    assert "relative loss error" in missed[0]


@pytest.mark.parametrize(
    ("loss", "gradient", "bias", "number"),
    [
        (0.00049, 0.099, 0.0099, 0),
        (0.0005, 0.099, 0.0, 1),
        (0.0, 0.10, 0.0, 1),
        (0.0, 0.0, -0.01, 1),
        (float("nan"), float("nan"), float("nan"), 3),
        (0.0, None, None, 0),
    ],
)
def test_each_bar_fails_where_it_is_reached(
    loss: float, gradient: float | None, bias: float | None, number: int
) -> None:
    assert len(failures(loss, gradient, bias)) == number


def test_the_bars_are_those_of_the_law() -> None:
    assert (verdict.LOSS_BAR, verdict.GRADIENT_BAR, verdict.BIAS_BAR) == (0.0005, 0.10, 0.01)
    assert (verdict.CURVE_BAR, verdict.CONTROL_BAR, verdict.WINDOW) == (0.0025, 0.00125, 50)
