"""[stability]: what a run does at a step that is not finite, or whose loss or gradient leaps.

The defaults stop at NaN and infinity, and only note a spike: with them a run's arithmetic is that of the formulas.
How a spike is told, and what a refused step changes, stands in `tessera.training.stability`.
"""

from typing import Literal

from pydantic import Field

from tessera.recipe.section import Section


class StabilitySection(Section):
    """What happens at a step that is not finite, or whose loss or gradient norm leaps."""

    on_nonfinite: Literal["stop", "skip", "lower"] = Field(
        "stop",
        description="At a loss or gradient that is NaN or infinite: end the run, leave the step's update out, or leave "
        "it out and lower the learning rate of all later steps.",
    )
    on_spike: Literal["note", "skip", "lower", "stop"] = Field(
        "note",
        description="At a spike: keep the evidence and train on as if nothing were, or one of the above.",
    )
    spike_window: int = Field(
        128, ge=2, description="Latest calm steps that a step is compared with; none is a spike before half of them."
    )
    spike_deviations: float = Field(
        6.0,
        ge=1,
        description="A spike's loss or gradient norm exceeds the mean of the window by more than so many standard "
        "deviations.",
    )
    lower_factor: float = Field(
        0.5, gt=0, lt=1, description='What each "lower" multiplies the learning rate of all later steps by.'
    )
    max_consecutive: int = Field(
        10,
        ge=2,
        description="Refused steps in a row that end the run whatever the rules say; so many noted ones are "
        "no spikes but a new level, and the window begins anew.",
    )

    @property
    def fewest_calm_steps(self) -> int:
        """Calm steps that must be remembered before a step can be a spike."""
        return max(2, self.spike_window // 2)
