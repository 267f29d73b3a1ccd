"""Values that change over the steps of a run: learning rate, batch size, bias update speed, MTP weight.

A schedule is a number (constant for the whole run) or a list of segments, one after the other:

    learning_rate = [
      { shape = "linear",   steps = 2000,  from = 0.0, to = 2.2e-4 },
      { shape = "constant", steps = 10000, to = 2.2e-4 },
      { shape = "cosine",   steps = 5000,  to = 2.2e-5 },
    ]

In the i-th step (from 0) of a segment of N steps that goes from a to b,

    constant: b          linear: a + (b - a) i/N          cosine: b + (a - b) (1 + cos(pi i/N)) / 2

so a linear or cosine segment starts at `from` exactly, and `to` is reached by the step after its last one: the
pieces join without a repeated value, and a warm-up from 0 has the value 0 in step 0. After the last segment its
`to` holds. Schedules count steps, never tokens: a recipe says its own conversion in a comment.
"""

from collections.abc import Iterator
from math import cos, pi
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, RootModel, Strict, Tag

from tessera.recipe.section import Section


class Segment(Section):
    """One piece of a schedule."""

    shape: Literal["constant", "linear", "cosine"] = Field(
        description='How the value moves: "constant" holds `to` in all its steps.'
    )
    steps: int = Field(ge=1, description="Steps the segment lasts.")
    start: float | None = Field(
        None,
        alias="from",
        ge=0,
        description="Value in its first step; default: the previous segment's `to`, or 0. Not for constants.",
    )
    end: float = Field(alias="to", ge=0, description="Value reached in the step after its last one.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.shape == "constant" and self.start is not None:
            yield "from", 'has no meaning in a "constant" segment, which holds `to`; leave it out'

    def value(self, start: float, step: int) -> float:
        """The value in the segment's own step `step` (0 <= step < steps), coming from `start`."""
        if self.shape == "constant":
            return self.end
        if step == 0:
            return start  # exact: end + (start - end) may differ in the last bit
        if self.shape == "linear":
            return start + (self.end - start) * (step / self.steps)
        return self.end + (start - self.end) * (1 + cos(pi * step / self.steps)) / 2


def _form(value: Any) -> str:
    return "segments" if isinstance(value, (list, tuple)) else "number"


Number = Annotated[float, Field(ge=0), Tag("number")]
Segments = Annotated[tuple[Segment, ...], Field(min_length=1), Strict(False), Tag("segments")]


class Schedule(RootModel[Annotated[Number | Segments, Discriminator(_form)]]):
    """A value for every step of a run: `Schedule(1e-3)`, or a list of segments; see the module's text."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    def at(self, step: int) -> float:
        """The value in `step`, counted from 0; raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        if isinstance(self.root, float):
            return self.root
        start = 0.0
        for segment in self.root:
            if segment.start is not None:
                start = segment.start
            if step < segment.steps:
                return segment.value(start, step)
            step -= segment.steps
            start = segment.end
        return start

    @property
    def steps(self) -> int:
        """Steps that the segments describe; 0 for a bare number."""
        return 0 if isinstance(self.root, float) else sum(segment.steps for segment in self.root)

    def ends(self) -> list[float]:
        """The values between which the schedule moves: where each segment starts and where it goes."""
        if isinstance(self.root, float):
            return [self.root]
        ends, start = [], 0.0
        for segment in self.root:
            if segment.shape != "constant":
                ends.append(start if segment.start is None else segment.start)
            ends.append(segment.end)
            start = segment.end
        return ends
