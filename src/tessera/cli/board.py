"""What a person sees while a run works: a bar a job on a terminal, a line now and then elsewhere.

Everything goes to standard error. The board knows events (tessera.training.trainer), nothing of training itself.
"""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tessera.cli.options import say

STOPPING = "stopping after this step; a checkpoint is kept (Ctrl-C again stops at once, without one)"
LINE_EVERY = 10.0  # seconds between lines where there is no terminal
WARM_UP = 3  # steps
FIRST_ESTIMATE = 15.0  # seconds of training before a run's length is estimated
SMOOTHING = 0.1  # weight of the latest step in the tokens/s that are shown


class Board:
    """Shows the jobs of one command; `quiet` shows nothing. `handle` takes any event of a job."""

    def __init__(self, *, quiet: bool = False, limit_minutes: float | None = None, sharing: int = 1) -> None:
        """`sharing`: jobs that are done one after the other on each worker, for the estimate of the whole."""
        self.quiet, self.limit, self.sharing = quiet, limit_minutes, sharing
        self._steps: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._warm: set[str] = set()  # jobs whose first steps, which build kernels, are behind them
        self._losses: dict[str, float] = {}
        self._speed: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._last_line = self._started = time.monotonic()
        self._warned = self._stopping = False
        self._bars = None
        if not quiet and sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress of preparing the data, or of another work without steps; its bar goes when it is done."""
        self._show(name, done, total, f"{done / total:4.0%}" if total else "")
        if self._bars and done >= total and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def data(self, facts: dict[str, Any]) -> None:
        """What the text amounts to, from a dataset's facts."""
        self.say(f"data: {facts['documents']:,} documents, {facts['bytes']:,} bytes, {facts['tokens']:,} tokens")
        for warning in facts["warnings"]:
            self.say(f"warning: {warning}")

    def handle(self, job: str, event: dict[str, Any]) -> None:
        """Take an event of a training run, or {"kind": "progress", "done", "total"} of another job.

        {"kind": "stopping"} is what a job does after a first Ctrl-C; it may come from another thread.
        """
        match event["kind"]:
            case "start":
                self._steps[job] = event["steps"]
                self._began[job] = (time.monotonic(), event["step"])
                for note in event["notes"] if len(self._began) == 1 else ():
                    self.say(f"note: {note}")
            case "step":
                self._step(job, event)
            case "validation":
                averaged = f" ({event['ema_bits_per_byte']:.3f} averaged)" if "ema_bits_per_byte" in event else ""
                bits = f"{event['bits_per_byte']:.3f} bits per byte{averaged}"
                self.say(f"{job}: validation at step {event['step']}: {bits}")
            case "unstable":
                kept = event["evidence"] or f"no evidence: {event['evidence_error']}"
                done = f"{event['decision']} ({event['rule']}); {kept}"
                self.say(f"{job}: step {event['step']}: {event['reason']}; {done}")
            case "refused":
                self.say(f"{job}: {'; '.join(event['reasons'])}; training goes on without it")
            case "stopping" if job in self._steps and not self._stopping:  # other work has nothing to finish
                self._stopping = True
                self.say(STOPPING)
            case "progress":
                done, total = event["done"], event["total"]
                self._show(job, done, total, f"batch {done:>{len(str(total))}}/{total}")

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self.quiet:
            return
        if self._bars:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def _step(self, job: str, event: dict[str, Any]) -> None:
        done, total = event["step"] + 1, self._steps[job]
        since, first = self._began[job]
        elapsed = time.monotonic() - since
        left = elapsed / max(done - first, 1) * (total - done)
        speed = self._speed.get(job, event["tokens_per_s"])
        self._speed[job] = speed = speed + SMOOTHING * (event["tokens_per_s"] - speed)
        self._losses[job] = event["lm_loss"]
        figures = f"step {done:>{len(str(total))}}/{total}  loss {event['lm_loss']:.3f}  {speed:,.0f} tokens/s"
        others = ", ".join(f"{other} {loss:.3f}" for other, loss in self._losses.items() if other != job)
        self._show(job, done, total, f"{figures}  {clock(left)} left", others)
        if self.limit and not self._warned and job in self._warm and elapsed > FIRST_ESTIMATE:
            minutes = (time.monotonic() - self._started + left * self.sharing) / 60
            if minutes > self.limit:
                self._warned = True
                self.say(
                    f"estimated {minutes:.0f} minutes, more than training.time_limit_minutes = {self.limit:g}; "
                    "all steps are made all the same (Ctrl-C keeps a checkpoint)"
                )
        if done - first == WARM_UP and job not in self._warm:
            self._began[job] = (time.monotonic(), done)
            self._warm.add(job)

    def _show(self, name: str, done: int, total: int, figures: str, others: str = "") -> None:
        """`others`: what the bars of other jobs show; put behind a line where there are no bars."""
        if self.quiet:
            return
        if self._bars:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, figures="")
            self._bars.update(self._tasks[name], completed=done, total=total, figures=figures)
        elif done == total or time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            say(f"{name}: {figures}{others and f'  (loss of {others})'}")


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
