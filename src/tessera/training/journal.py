"""What happens in a run, told to all who listen: the event file, TensorBoard and the observer.

A disk may refuse an event. The run ends then, or goes on without it ([checkpoint] on_failed_write = "go_on"): the
observer hears of it at once as an event "refused", and so does the file, before the next event that it takes. Numbers
of training are never lost with an event; they are in the checkpoints.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tessera.store import EventWriter, RunFolder
from tessera.store.files import Unwritable
from tessera.training.tensorboard import TensorBoard

Observer = Callable[[dict[str, Any]], object]


class Journal:
    """The only writer of a run's events, from its opening to `close`."""

    def __init__(self, run: RunFolder, name: str, offset: int | None, observer: Observer, *, go_on: bool) -> None:
        """Open the events of `run`, cut to `offset` bytes. Raises UserError."""
        self.observer, self.go_on = observer, go_on
        self._events = EventWriter(run.events_path, name, offset)
        self._tensorboard: TensorBoard | None = None
        self._lost: list[str] = []  # events that the file has not, and why something was refused
        self._reasons: list[str] = []

    def draw_curves(self, folder: Path, step: int) -> None:
        """Tell TensorBoard too, from `step` on. Raises UserError."""
        self._tensorboard = TensorBoard(folder, step)

    @contextmanager
    def strictly(self) -> Iterator[None]:
        """Within the block a refusal is raised, whatever the recipe says."""
        before, self.go_on = self.go_on, False
        try:
            yield
        finally:
            self.go_on = before

    @property
    def offset(self) -> int:
        """Bytes of events on the disk; raises UserError."""
        return self._events.offset

    def emit(self, kind: str, step: int, **fields: Any) -> bool:
        """Tell an event to all; returns whether the file has it. Raises Unwritable unless the run is to go on."""
        written = True
        try:
            if self._reasons:
                self._events.write("refused", step, lost=self._lost, reasons=self._reasons)
                self._lost, self._reasons = [], []
            self._events.write(kind, step, **fields)
        except Unwritable as error:
            written = False
            self.refused(error, step, kind)
        event = {"kind": kind, "step": step, **fields}
        if self._tensorboard:
            try:
                self._tensorboard.handle(event)
            except Unwritable as error:
                board, self._tensorboard = self._tensorboard, None  # its thread has ended: it takes nothing more
                self.refused(error, step)
                with suppress(Unwritable):
                    board.close()
        self.observer(event)
        return written

    def refused(self, error: Unwritable, step: int, lost: str = "") -> None:
        """Raise the error, or remember it for the next event and tell it; the same reason is told once in a row."""
        if not self.go_on:
            raise error
        if lost:
            self._lost.append(lost)
        if str(error) not in self._reasons:
            self._reasons.append(str(error))
            self.observer({"kind": "refused", "step": step, "reasons": [str(error)]})

    def close(self, step: int) -> None:
        """Bring everything to the disk; raises Unwritable unless the run is to go on."""
        try:
            with ExitStack() as ends:
                if self._tensorboard:
                    ends.callback(self._tensorboard.close)
                ends.callback(self._events.close)
        except Unwritable as error:
            self.refused(error, step)
