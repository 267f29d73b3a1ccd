"""The head of the page: the verdict in words, each figure of compare.json beside its bar, and what that means.

The bars and the rules are those of docs/numerics.md, "The verdict on FP8". The verdict itself was given by the
comparison; nothing is judged again here, figures are only put beside their bars.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from tessera.training.report.folder import Arm, Source
from tessera.training.report.history import number
from tessera.training.report.wording import arm_label, bound, fixed, grouped, listed, percent
from tessera.training.verdict import BIAS_BAR, CONTROL_BAR, CURVE_BAR, GRADIENT_BAR, LOSS_BAR


@dataclass(frozen=True)
class Criterion:
    """One figure beside its bar; `state` is "met", "missed", "unresolved" or "unmeasured"; `share` = figure / bar."""

    title: str
    state: str
    figure: str
    bar: str
    share: float
    meaning: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Headline:
    """The head of the page; `state` is "passed", "failed", "unresolved" or "none" (of a single run)."""

    state: str
    eyebrow: str
    title: str
    lede: str
    criteria: list[Criterion] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def headline(source: Source) -> Headline:
    """What the head of the page says."""
    if source.comparison:
        return _of_comparison(source.comparison)
    if source.is_comparison:
        return Headline(
            "unresolved",
            "Verdict on FP8",
            "No verdict yet",
            f"The comparison has not come to its end: {_states(source.arms)}. The verdict needs every arm and the "
            "measurements on the same weights after them.",
        )
    return _of_run(source.arms[0])


def _of_comparison(found: dict[str, Any]) -> Headline:
    criteria = list(_criteria(found))
    curve = criteria[-1]
    failures = [str(failure) for failure in found.get("failures") or []]
    loss, gradient = percent(number(found.get("same_weights_loss_error"))), _gradient(found)
    same = f"On the same weights FP8 moves the loss by at most {loss} and the gradient by {gradient}."
    if found.get("verdict") == "failed":
        missed = [criterion.title.lower() for criterion in criteria if criterion.state == "missed"]
        bars = "its bar" if len(missed) == 1 else "their bars"
        lede = f"Outside {bars}: {listed(missed)}. {same}" if missed else same
        title = "Failed: FP8 is not a match for BF16 here"
        return Headline("failed", "Verdict on FP8", title, lede, criteria, failures)
    if curve.state == "met":
        title = "Passed: FP8 trains like BF16"
        rest = f"Over the second half of training its loss stays within {curve.figure} of the BF16 twin's."
    else:
        title = "Passed on the same weights; the curves are not resolved"
        rest = "Whether the two loss curves differ, a run like this cannot tell."
        reason = found.get("relative_loss_error_reason")
        rest += f" The reason: {reason}." if reason else ""
    if found.get("verdict") != "passed":
        title = "Not resolved"
    state = "passed" if found.get("verdict") == "passed" else "unresolved"
    return Headline(state, "Verdict on FP8", title, f"{same} {rest}", criteria, failures)


def _gradient(found: dict[str, Any]) -> str:
    return percent(number(found.get("same_weights_gradient_error")))


def _criteria(found: dict[str, Any]) -> Iterator[Criterion]:
    yield _judged(
        "Same-weights loss",
        number(found.get("same_weights_loss_error")),
        LOSS_BAR,
        "How far FP8 arithmetic moves the loss of one and the same model, against FP32; the worst of "
        f"{len(found.get('points') or []) or 'several'} points in training.",
        _loss_details(found),
    )
    yield _judged(
        "Same-weights gradient",
        number(found.get("same_weights_gradient_error")),
        GRADIENT_BAR,
        "Distance between the FP8 and the FP32 gradient, relative to its length. Mostly rounding noise.",
        _gradient_details(found),
    )
    yield _judged(
        "Gradient bias",
        number(found.get("same_weights_gradient_bias")),
        BIAS_BAR,
        "Noise averages out over steps, a lean does not: how much longer or shorter the FP8 gradient is along the "
        "true one.",
        [],
        signed=True,
    )
    yield _curve(found)


def _judged(
    title: str, figure: float, bar: float, meaning: str, details: list[str], *, signed: bool = False
) -> Criterion:
    share = abs(figure) / bar if isfinite(figure) else 0.0
    state = "unmeasured" if not isfinite(figure) else "met" if share < 1 else "missed"
    sign = "+" if signed and figure > 0 else ""
    stated = f"±{bound(bar)}" if signed else bound(bar)
    return Criterion(title, state, sign + percent(figure), stated, share, meaning, details)


def _loss_details(found: dict[str, Any]) -> list[str]:
    details = []
    replayed, moved = number(found.get("same_weights_loss_error_replayed")), number(found.get("rerouted_tokens"))
    if isfinite(replayed):
        details.append(f"{percent(replayed)} with FP32's choice of experts replayed")
    if isfinite(moved):
        details.append(f"{percent(moved)} of the tokens went to other experts")
    twin = max((number(point.get("bf16_loss_error")) for point in found.get("points") or []), default=nan)
    if isfinite(twin):
        details.append(f"BF16, measured the same way: {percent(twin)}")
    return details


def _gradient_details(found: dict[str, Any]) -> list[str]:
    worst = found.get("worst_tensor") or {}
    error = number(worst.get("error"))
    details = [f"worst tensor: {worst.get('name')}, {percent(error)}"] if isfinite(error) else []
    twin = number(found.get("bf16_gradient_error"))
    return [*details, f"BF16, measured the same way: {percent(twin)}"] if isfinite(twin) else details


def _curve(found: dict[str, Any]) -> Criterion:
    meaning = "Largest difference of a 50-step mean to the BF16 twin's, in the second half of training."
    resolved = number(found.get("relative_loss_error"))
    figure = resolved if isfinite(resolved) else number(found.get("relative_loss_error_figure"))
    controls = [number(error) for error in found.get("control_errors") or []]
    details = []
    if controls:
        shown = listed([percent(error) for error in controls])
        details.append(f"controls against the twin: {shown}; each must stay below {bound(CONTROL_BAR)}")
    if isfinite(resolved):
        return _judged("Loss curve", resolved, CURVE_BAR, meaning, details)
    share = abs(figure) / CURVE_BAR if isfinite(figure) else 0.0
    reason = found.get("relative_loss_error_reason")
    if reason:
        details.insert(0, f"not resolved: {reason}")
    state = "unmeasured" if found.get("relative_loss_error") is None else "unresolved"
    return Criterion("Loss curve", state, percent(figure), bound(CURVE_BAR), share, meaning, details)


def _states(arms: list[Arm]) -> str:
    if not arms:
        return "no arm has started"
    done = [(arm_label(arm.name), arm.state, grouped(arm.history.steps_done)) for arm in arms]
    return listed([f"{label} is {state} after {steps} steps" for label, state, steps in done])


def _of_run(arm: Arm) -> Headline:
    history = arm.history
    precision = str((history.start or {}).get("precision", "")).upper()
    planned = number((history.start or {}).get("steps"))
    reached = history.steps_done
    of = f" of {grouped(planned)}" if isfinite(planned) and arm.state != "finished" else ""
    done = f"{grouped(reached)}{of} steps" + (f" in {precision}" if precision else "")
    title = {
        "finished": f"Finished: {done}",
        "running": f"Running: {done}",
        "interrupted": f"Interrupted after {done}",
        "failed": f"Failed after {done}",
    }.get(arm.state, done)
    if not history.steps:
        title = {"running": "Running: no step yet"}.get(arm.state, f"{arm.state.capitalize()} before its first step")
    twin = "What FP8 cost, a single run cannot say: that takes its BF16 twin." if precision == "FP8" else ""
    loss = history.final("lm_loss")
    lede = f"The loss stands at {fixed(loss, 3)} nats per token. " if isfinite(loss) else ""
    reason = (history.end or {}).get("reason")
    if reason and arm.state != "finished":
        lede += f"It ended because: {reason}. "
    return Headline("none", "Training run", title, (lede + twin).strip())
