"""The events of a run as TensorBoard's files, for those who watch their runs there.

A reader of events like the report: whatever it shows is in events.jsonl too. On resume it begins a new file, and
TensorBoard's own purge hides the steps that are made again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.recipe import UserError
from tessera.store.files import unwritable

_NOT_CURVES = ("kind", "step")


class TensorBoard:
    """Writes `folder`/tensorboard; give `handle` every event.

    Raises UserError where the extra is missing or the disk refuses; the files are written in a thread of their own, so
    that the event whose curves are refused is an earlier one.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.tensorboard = true, but TensorBoard is not installed; pip install 'tessera[tensorboard]', "
                "or set it to false"
            ) from None
        self._path = folder / "tensorboard"
        with self._writing():
            self._writer = SummaryWriter(str(self._path), purge_step=purge_step or None)

    def handle(self, event: dict[str, Any]) -> None:
        """Write an event's curves; kinds without any are passed over."""
        with self._writing():
            self._handle(event)

    def close(self) -> None:
        """Write out what is buffered."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self._path, error) from None

    def _handle(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "step" | "validation":
                for name, value in event.items():
                    if name not in _NOT_CURVES:
                        self._curve(f"{event['kind']}/{name}", value, event["step"])
            case "load":
                for layer, counts in zip(event["layers"], event["counts"], strict=True):
                    mean = sum(counts) / len(counts) or 1.0
                    self._curve(f"load/{layer} max over mean", max(counts) / mean, event["step"])
                for layer, low, high in zip(event["layers"], event["bias_min"], event["bias_max"], strict=True):
                    self._curve(f"routing bias/{layer} range", high - low, event["step"])
            case "health":
                for tensor, figures in event["tensors"].items():
                    for name in ("relative_rms", "saturated", "flushed", "rounded_twice"):
                        self._curve(f"health {name}/{tensor}", figures[name], event["step"])

    def _curve(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, list):
            for i, one in enumerate(value):
                self._curve(f"{name} {i + 1}", one, step)
        elif value is not None:
            self._writer.add_scalar(name, value, step)
