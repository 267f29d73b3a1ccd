"""The history of one run, read back from its events into plain numbers.

A run's events are append-only, and a run may be interrupted and resumed. A resumed run first goes back to its last
checkpoint and walks the steps after it again, so what was written about those steps before is the end of a branch
that no longer exists: it is dropped. Of several events of one kind at one step the last one counts. Every part may
be missing (no validation yet, no FP8, zero steps): it is then empty, never an error. Numbers that are missing or
were not finite are NaN here. Events are reduced as they are read, because a long run has gigabytes of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Event = dict[str, Any]
Array = NDArray[np.float64]

STEP_FIELDS = (
    "lm_loss", "mtp_loss", "balance_loss", "gradient_norm", "learning_rate", "tokens", "tokens_per_s", "mfu",
    "batch_size", "bias_update_speed", "mtp_loss_weight",
)  # fmt: skip
HEALTH_FIELDS = (
    "relative_rms", "saturated", "flushed", "rounded_twice", "nonfinite", "scale_min", "scale_max", "elements",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Tokens each expert got in one step: `counts[l]` int [E] of layer `layers[l]`, and the range of its bias."""

    layers: tuple[str, ...]
    counts: tuple[NDArray[np.int64], ...]
    bias_min: Array
    bias_max: Array


@dataclass(frozen=True)
class Health:
    """What quantisation did in one step: `values` float [tensor, HEALTH_FIELDS]."""

    names: tuple[str, ...]
    values: Array


@dataclass
class History:
    """Tables are keyed by step, ascending; `baselines` is bits per byte by name; None was never written.

    `unstable` are the events of steps that were not finite, or spikes. A step's own figures stand at its number from
    0; validations at the number of steps done before them.
    """

    start: Event | None = None
    end: Event | None = None
    sample: Event | None = None
    resumed_at: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)
    steps_done: int = 0
    first_time: float = nan
    last_time: float = nan
    steps: dict[int, Array] = field(default_factory=dict)
    loads: dict[int, Load] = field(default_factory=dict)
    health: dict[int, Health] = field(default_factory=dict)
    validations: dict[int, Event] = field(default_factory=dict)
    unstable: dict[int, Event] = field(default_factory=dict)

    def column(self, name: str) -> Array:
        """One of STEP_FIELDS over the steps."""
        index = STEP_FIELDS.index(name)
        return np.array([row[index] for row in self.steps.values()], dtype=np.float64)

    def final(self, name: str) -> float:
        """The latest finite value of one of STEP_FIELDS; NaN where there is none."""
        index = STEP_FIELDS.index(name)
        return next((float(row[index]) for row in reversed(self.steps.values()) if np.isfinite(row[index])), nan)

    def validation(self, name: str) -> list[float]:
        """One field over the validations."""
        return [number(event.get(name)) for event in self.validations.values()]

    def final_validation(self, name: str) -> float:
        """The latest finite value of a field of the validations."""
        return next((value for value in reversed(self.validation(name)) if np.isfinite(value)), nan)

    @property
    def seconds(self) -> float:
        """How long the run took: what it said at its end, else the time between its first and last event."""
        said = number((self.end or {}).get("seconds"))
        return said if np.isfinite(said) else self.last_time - self.first_time


def number(value: Any) -> float:
    """A JSON value as a float; NaN for null and for everything that is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return nan
    return float(value)


def read(events: Iterable[Event]) -> History:
    """Events in the order written -> the run as it stands now."""
    history = History()
    for event in events:
        kind, step = event.get("kind"), int(number(event.get("step") or 0))
        _note_time(history, number(event.get("time")))
        if kind == "start":
            _start(history, event, step)
            continue
        if kind in ("step", "validation", "checkpoint", "end"):
            history.steps_done = step + (kind == "step")
        table = _table(history, kind)
        if table is not None:
            if kind == "step" and history.steps and step < next(reversed(history.steps)):
                _forget_after(history, step)
            table[step] = _reduce(kind, event)
        elif kind == "baseline":
            history.baselines[str(event.get("name", "baseline"))] = number(event.get("bits_per_byte"))
        elif kind == "sample":
            history.sample = event
        elif kind == "end":
            history.end = event
    for kind in ("steps", "loads", "health", "validations", "unstable"):
        setattr(history, kind, dict(sorted(getattr(history, kind).items())))
    return history


def _note_time(history: History, time: float) -> None:
    if np.isfinite(time):
        history.first_time = time if np.isnan(history.first_time) else history.first_time
        history.last_time = time


def _start(history: History, event: Event, step: int) -> None:
    history.end = None  # a run that started again has not ended
    history.notes += [str(note) for note in event.get("notes") or [] if str(note) not in history.notes]
    if history.start is None:
        history.start = event
    else:
        _forget_after(history, step)
    history.steps_done = step
    if event.get("resumed"):
        history.resumed_at.append(step)


def _table(history: History, kind: Any) -> dict[int, Any] | None:
    tables: dict[str, dict[int, Any]] = {
        "step": history.steps,
        "load": history.loads,
        "health": history.health,
        "validation": history.validations,
        "unstable": history.unstable,
    }
    return tables.get(kind)


def _forget_after(history: History, step: int) -> None:
    # What was measured at the checkpoint itself stays: it is not measured again.
    for table in (history.steps, history.loads, history.health, history.validations, history.unstable):
        for later in [known for known in table if known > step]:
            del table[later]


def _reduce(kind: Any, event: Event) -> Any:
    if kind == "step":
        return _row(event, STEP_FIELDS)
    if kind == "load":
        layers, counts = event.get("layers") or [], event.get("counts") or []
        return Load(
            tuple(str(layer) for layer in layers),
            tuple(np.array(row, dtype=np.int64) for row in counts),
            _numbers(event.get("bias_min"), len(layers)),
            _numbers(event.get("bias_max"), len(layers)),
        )
    if kind == "health":
        tensors = {str(name): value for name, value in (event.get("tensors") or {}).items()}
        rows = [_row(value, HEALTH_FIELDS) for value in tensors.values()]
        return Health(tuple(tensors), np.array(rows, dtype=np.float64).reshape(-1, len(HEALTH_FIELDS)))
    return event


def _row(event: Event, fields: Sequence[str]) -> Array:
    return np.array([number(event.get(name)) for name in fields], dtype=np.float64)


def _numbers(values: Any, length: int) -> Array:
    given = [number(value) for value in values or []]
    return np.array(given[:length] + [nan] * (length - len(given)), dtype=np.float64)
