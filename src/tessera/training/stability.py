"""Which steps are refused: those that are not finite, and spikes. Plain numbers, no torch.

A step is a spike where its next-token loss or the norm of its whole gradient, before clipping, exceeds

    mean + spike_deviations * deviation        of the last `spike_window` calm steps

with the sample standard deviation (n - 1), which is the rule of OLMo-core's SkipStepOptimizer, on one side: a loss
that falls is no harm. It differs in three more points. Only calm steps are remembered, so that a spike does not raise
the bar for the next one. Nothing is a spike before half of the window is filled. And the deviation counts as at least
SMALLEST_DEVIATION of the mean: values that hardly vary would make their last bit a spike, and values that do not vary
at all have no measure for a leap. Of the losses the next-token one is judged, because the weight of the others may
follow a schedule, and a new weight is no spike.

What happens then is said in the recipe. A refused step ("skip", "lower") consumes its batch and counts as a step, so
that schedules and data go on; its gradients are dropped, and the optimizer with its count of updates, the moving
average and the routing biases stay as they were. "lower" also multiplies the learning rate of all later steps.
"note" changes nothing. After `max_consecutive` refused steps in a row the run is stopped; after as many noted ones
there is no spike but a new level, and the window begins anew.

All of this follows from the numbers of the steps before, which `facts` gives to the checkpoint bit for bit.
"""

from collections import deque
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from typing import Any, Literal

from tessera.recipe import StabilitySection, UserError

SMALLEST_DEVIATION = 2.0**-10  # of the mean: with six deviations, a leap of 0.6 %
Kind = Literal["nonfinite", "spike"]
Decision = Literal["noted", "skipped", "lowered", "stopped"]
REFUSED = ("skipped", "lowered")  # decisions after which a run goes on without the update
_DECISIONS: dict[str, Decision] = {"note": "noted", "skip": "skipped", "lower": "lowered", "stop": "stopped"}


class Stopped(UserError):
    """A step at which the recipe's rules end the run; going on from its checkpoint would end there again.

    `reason` says why in few words, for the run's last event.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Level:
    """What one figure of a step was held against; `mean` and `deviation` are None before half a window is filled."""

    value: float
    mean: float | None
    deviation: float | None  # as measured, not raised to the smallest
    limit: float | None

    @property
    def exceeded(self) -> bool:
        """Whether the value is above the limit."""
        return self.limit is not None and self.value > self.limit


@dataclass(frozen=True)
class Finding:
    """A step that is no calm one: what it is, the recipe's rule for it, and what is done."""

    kind: Kind
    rule: str  # the recipe's word
    decision: Decision
    loss: Level
    gradient_norm: Level
    refused_in_a_row: int  # this step included
    rate_scale: float  # of the steps after this one

    @property
    def key(self) -> str:
        """The recipe's key that decided."""
        return f"stability.on_{self.kind}"

    @property
    def applied(self) -> bool:
        """Whether the update is made all the same."""
        return self.decision == "noted"

    def facts(self, where: str | None) -> dict[str, Any]:
        """The finding as plain values, for the event and the evidence; `where` as of `reason`."""
        return {
            "finding": self.kind,
            "reason": self.reason(where),
            "rule": f'{self.key} = "{self.rule}"',
            "decision": self.decision,
            "refused_in_a_row": self.refused_in_a_row,
            "rate_scale": self.rate_scale,
            "loss": asdict(self.loss),
            "gradient_norm": asdict(self.gradient_norm),
        }

    def reason(self, where: str | None) -> str:
        """In words: what leapt, and how far; or `where` a value that is not finite was first seen."""
        if self.kind == "nonfinite":
            return f"not finite in {where}"
        leaps = [("loss", self.loss), ("gradient norm", self.gradient_norm)]
        return "a spike, " + " and ".join(
            f"{name} {level.value:.4g} above {level.limit:.4g} (mean {level.mean:.4g}, deviation {level.deviation:.2g})"
            for name, level in leaps
            if level.exceeded
        )


class Stability:
    """The calm steps' numbers, the learning rate's factor and the refusals in a row of one run."""

    def __init__(self, section: StabilitySection) -> None:
        self.section = section
        self.rate_scale = 1.0
        self._refused = self._noted = 0  # in a row, up to the step before
        self._losses: deque[float] = deque(maxlen=section.spike_window)
        self._norms: deque[float] = deque(maxlen=section.spike_window)

    def judge(self, loss: float, gradient_norm: float, *, finite: bool) -> Finding | None:
        """Take the next step's figures; None: a calm step. To be called once a step, before its update.

        `finite` is of everything that the step computed, of which the two figures are a part.
        """
        levels = (self._level(loss, self._losses), self._level(gradient_norm, self._norms))
        if finite and not any(level.exceeded for level in levels):
            self._calm(loss, gradient_norm)
            return None
        kind: Kind = "spike" if finite else "nonfinite"
        rule = self.section.on_spike if finite else self.section.on_nonfinite
        decision = _DECISIONS[rule]
        if decision == "noted":
            self._refused, self._noted = 0, self._noted + 1
            if self._noted >= self.section.max_consecutive:
                self._begin_anew()
        else:
            self._refused, self._noted = self._refused + 1, 0
            if decision == "lowered":
                self.rate_scale *= self.section.lower_factor
            if self._refused >= self.section.max_consecutive:
                decision = "stopped"
        return Finding(kind, rule, decision, *levels, self._refused, self.rate_scale)

    def facts(self) -> dict[str, Any]:
        """Everything that later judgements depend on, for a checkpoint."""
        return {
            "losses": list(self._losses),
            "gradient_norms": list(self._norms),
            "rate_scale": self.rate_scale,
            "refused_in_a_row": self._refused,
            "noted_in_a_row": self._noted,
        }

    def restore(self, facts: Any) -> None:
        """Go on from `facts`, as a checkpoint has them; raises UserError for anything else."""
        try:
            losses, norms, scale = facts["losses"], facts["gradient_norms"], facts["rate_scale"]
            refused, noted = facts["refused_in_a_row"], facts["noted_in_a_row"]
        except (KeyError, TypeError):
            raise UserError('"stability" must hold the numbers of the steps before') from None
        lists = isinstance(losses, list) and isinstance(norms, list)
        if not (lists and all(type(value) is float for value in (*losses, *norms, scale))):
            raise UserError('"stability" must hold lists of numbers, and the factor of the learning rate')
        if type(refused) is not int or type(noted) is not int:
            raise UserError('"stability" must hold how many steps in a row were refused and noted')
        self._losses.extend(losses)
        self._norms.extend(norms)
        self.rate_scale, self._refused, self._noted = scale, refused, noted

    def _calm(self, loss: float, gradient_norm: float) -> None:
        self._refused = self._noted = 0
        self._losses.append(loss)
        self._norms.append(gradient_norm)

    def _begin_anew(self) -> None:
        self._noted = 0
        self._losses.clear()
        self._norms.clear()

    def _level(self, value: float, window: deque[float]) -> Level:
        count = len(window)
        if count < self.section.fewest_calm_steps:
            return Level(value, None, None, None)
        mean = fsum(window) / count
        deviation = sqrt(fsum((known - mean) ** 2 for known in window) / (count - 1))
        spread = max(deviation, SMALLEST_DEVIATION * abs(mean))
        # A window of zeros, such as the gradient of frozen weights, knows no scale at all.
        limit = mean + self.section.spike_deviations * spread if spread else None
        return Level(value, mean, deviation, limit)


def stopped(step: int, finding: Finding, where: str | None) -> Stopped:
    """The error of a spike at which the rule is to stop, and of too many refused steps in a row."""
    reason = finding.reason(where)
    ways = "lower optimizer.learning_rate, or resume from an earlier checkpoint with other data"
    if finding.rule == "stop":
        ways += (
            '; stability.on_spike = "skip" or "lower" leaves such a step out and trains on, "note" makes its update, '
        )
        ways += "also in the recipe.toml of this run before --resume"
    else:
        count = finding.refused_in_a_row
        reason = f"{count} steps in a row were refused (stability.max_consecutive = {count}), the last one: {reason}"
    kept = f"stopped before the optimizer, the weights are those of step {step}"
    return Stopped(f"step {step}: {reason}; {kept}\n{ways}", reason)
