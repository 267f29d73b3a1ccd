"""The verdict on FP8, from measured figures: docs/numerics.md, "The verdict on FP8". Pure arithmetic, no torch.

A verdict says what the figures allow and no more: the curves of two runs that differ in rounding only drift apart by
chaos, so their difference is a verdict only where control runs (the BF16 twin, perturbed in the last places of its
masters) stay together, and "not resolved" otherwise. The same-weights criteria have no such noise and always count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

LOSS_BAR = 0.0005  # same-weights loss error
GRADIENT_BAR = 0.10  # same-weights gradient error
BIAS_BAR = 0.01  # magnitude of the same-weights gradient bias
CURVE_BAR = 0.0025  # relative loss error of the curves; the report's 0.25 %
CONTROL_BAR = 0.00125  # each control's own figure must stay below
WINDOW = 50  # steps
SHORTEST_RUN = 500  # steps
FEWEST_CONTROLS = 2


@dataclass(frozen=True)
class CurveError:
    """`figure`: the curves' relative loss error, None without a window; `reason`: why it is no verdict, or None."""

    figure: float | None
    reason: str | None
    controls: tuple[float, ...]

    @property
    def resolved(self) -> bool:
        return self.reason is None


def curve_error(
    fp8: Mapping[int, float], bf16: Mapping[int, float], controls: Sequence[Mapping[int, float]], steps: int
) -> CurveError:
    """Losses by step -> CurveError over the windows of a run of `steps`."""
    figure = largest_gap(fp8, bf16, steps)
    own = tuple(gap for c in controls if (gap := largest_gap(c, bf16, steps)) is not None)
    reason = None
    if steps < SHORTEST_RUN:
        reason = f"the run has {steps} steps, fewer than {SHORTEST_RUN}"
    elif not controls:
        reason = "no controls"
    elif len(own) < FEWEST_CONTROLS:
        reason = f"{len(own)} finished control run{'s' if len(own) != 1 else ''}, fewer than {FEWEST_CONTROLS}"
    elif not all(step in fp8 and step in bf16 for window in windows(steps) for step in window):
        reason = "a run ended early or met a step that is not finite, and has no loss for some steps of the last half"
    elif max(own) >= CONTROL_BAR:
        reason = f"a control run differs from its twin by {max(own):.3%}, not below {CONTROL_BAR:.3%}"
    return CurveError(figure, reason, own)


def largest_gap(a: Mapping[int, float], b: Mapping[int, float], steps: int) -> float | None:
    """max over windows of |mean a - mean b| / mean b; windows without all losses of both are left out, None: all."""
    gaps = []
    for window in windows(steps):
        if all(step in a and step in b for step in window):
            mean = fmean(b[step] for step in window)
            gaps.append(abs(fmean(a[step] for step in window) - mean) / mean)
    return max(gaps, default=None)


def windows(steps: int) -> list[range]:
    """The disjoint 50-step windows of the last half, laid from the end of the run, whose last steps always count."""
    half = steps - steps // 2  # the first step of the last half
    return [range(end - WINDOW, end) for end in range(steps, half + WINDOW - 1, -WINDOW)]


def failures(
    loss_error: float, gradient_error: float | None, gradient_bias: float | None, curve: CurveError | None = None
) -> list[str]:
    """Which bars are missed, in words; an empty list is a pass. None: not measured, no bar."""
    found = []
    if not loss_error < LOSS_BAR:  # a NaN fails too
        found.append(f"same-weights loss error {loss_error:.3%} is not below {LOSS_BAR:.2%}")
    if gradient_error is not None and not gradient_error < GRADIENT_BAR:
        found.append(f"same-weights gradient error {gradient_error:.2%} is not below {GRADIENT_BAR:.0%}")
    if gradient_bias is not None and not abs(gradient_bias) < BIAS_BAR:
        found.append(f"same-weights gradient bias {gradient_bias:+.3%} is not within {BIAS_BAR:.0%}")
    if curve and curve.resolved and curve.figure is not None and not curve.figure < CURVE_BAR:
        found.append(f"relative loss error of the curves {curve.figure:.3%} is not below {CURVE_BAR:.2%}")
    return found
