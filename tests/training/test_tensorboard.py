"""TensorBoard's files hold what the events say, also across a resumption."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.data import Dataset
from tessera.recipe import Recipe, UserError
from tessera.store import read_events
from tessera.training.tensorboard import TensorBoard
from tessera.training.trainer import Trainer
from tests.training.conftest import broken_at_step_4

Curves = Callable[[Path], dict[str, list[tuple[int, float]]]]


@pytest.fixture
def curves() -> Curves:
    """curves(folder): (step, value) of every curve, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        found.Reload()
        return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    return read


def test_every_kind_of_event_becomes_the_curves_it_stands_for(curves: Curves, tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.handle({"kind": "step", "step": 3, "lm_loss": 2.5, "mtp_loss": None})
    board.handle({"kind": "validation", "step": 4, "loss": 2.0, "mtp_acceptance": [0.5, 0.25]})
    load = {"layers": ["a", "b"], "counts": [[1, 3], [0, 0]], "bias_min": [-0.5, 0.0], "bias_max": [0.25, 0.0]}
    board.handle({"kind": "load", "step": 4, **load})
    health = {"relative_rms": 0.03, "saturated": 0, "flushed": 7, "rounded_twice": None}
    board.handle({"kind": "health", "step": 4, "tensors": {"x.input": health}})
    board.handle({"kind": "checkpoint", "step": 4, "path": "somewhere"})
    board.handle({"kind": "unstable", "step": 4, "loss": {"value": 9.0}, "decision": "skipped"})
    board.close()
    owed = {
        "step/lm_loss": [(3, 2.5)],
        "validation/loss": [(4, 2.0)],
        "validation/mtp_acceptance 1": [(4, 0.5)],
        "validation/mtp_acceptance 2": [(4, 0.25)],
        "load/a max over mean": [(4, 1.5)],
        "load/b max over mean": [(4, 0.0)],
        "routing bias/a range": [(4, 0.75)],
        "routing bias/b range": [(4, 0.0)],
        "health relative_rms/x.input": [(4, pytest.approx(0.03))],
        "health saturated/x.input": [(4, 0.0)],
        "health flushed/x.input": [(4, 7.0)],
    }
    assert curves(tmp_path) == owed


def test_a_resumed_run_shows_each_step_once(
    curves: Curves, recipe_with: Callable[..., Recipe], dataset_of: Callable[[Recipe], Dataset], tmp_path: Path
) -> None:
    recipe = recipe_with(training={"tensorboard": True})
    dataset = dataset_of(recipe)
    threads = set(threading.enumerate())
    run, latest = broken_at_step_4(recipe, tmp_path / "run", dataset)
    Trainer.resume(run, dataset, latest).run()
    shown = curves(run.path)["step/lm_loss"]
    events = [(e["step"], pytest.approx(e["lm_loss"])) for e in read_events(run.events_path, "step")]
    assert shown == events
    assert [step for step, _ in shown] == [0, 1, 2, 3, 4, 5]
    assert set(threading.enumerate()) <= threads  # both sittings closed their files, the one that died too


@pytest.mark.parametrize("call", ["add_scalar", "close"])
def test_a_full_disk_is_told_with_the_folder(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed").SummaryWriter

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    board = TensorBoard(tmp_path, 0)
    with monkeypatch.context() as disk:
        disk.setattr(writer, call, refuse)
        with pytest.raises(UserError, match="tensorboard: cannot be written: No space left on device"):
            board.handle({"kind": "step", "step": 3, "lm_loss": 2.5})
            board.close()
    board.close()


def test_without_the_extra_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tessera\[tensorboard\]"):
        TensorBoard(tmp_path, 0)
