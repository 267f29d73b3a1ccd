"""Saving beside the training steps: the same files as saving between them, and no error of the worker unheard."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from tessera.data import Dataset
from tessera.recipe import Recipe, UserError
from tessera.recipe.checkpoint import CheckpointSection
from tessera.store import RunFolder, read_events, verify_checkpoint
from tessera.store.checkpoint_path import TENSORS, read_state_file
from tessera.training import checkpoint
from tessera.training.checkpoint_writer import CheckpointWriter
from tessera.training.ema import Ema
from tessera.training.trainer import Trainer
from tests.training.test_trainer import assert_same, facts, state, trained

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]
LIMIT = 30.0  # seconds after which a test that waits has failed


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; the bytes of the files differ in the order of the library's notes."""
    parts = [folder for folder in path.iterdir() if folder.is_dir()]
    return {f"{part.name}/{name}": t for part in parts for name, t in load_file(part / TENSORS).items()}


def numbers(path: Path) -> dict[str, Any]:
    measured = ("seconds", "event_offset")
    return {name: value for name, value in read_state_file(path).items() if name not in measured}


class Gate:
    """Holds the writing of every checkpoint until `open` is set; `reached` is set by the first one held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self._real = checkpoint.write_tensors
        monkeypatch.setattr(checkpoint, "write_tensors", self._write)

    def _write(self, *arguments: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.reached.set()
        assert self.open.wait(LIMIT)
        self._real(*arguments)


@pytest.fixture
def writer_in(recipe_with: RecipeWith, tmp_path: Path) -> Callable[..., CheckpointWriter]:
    def made(**section: Any) -> CheckpointWriter:
        run = RunFolder.create(tmp_path / "run", recipe_with())
        return CheckpointWriter(run, CheckpointSection(**section), "{}")

    return made


def test_checkpoints_are_the_same_with_and_without_the_worker(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = recipe_with(training={"ema_decay": 0.9}, checkpoint={"interval": 1})
    between = recipe_with(training={"ema_decay": 0.9}, checkpoint={"interval": 1, "asynchronous": False})
    dataset = dataset_of(beside)
    one = trained(between, tmp_path / "between", dataset)
    real = checkpoint.write_tensors

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)  # the steps overtake it
        real(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    two = trained(beside, tmp_path / "beside", dataset)
    assert_same(state(one), state(two))
    assert len(one.run_folder.checkpoints()) == len(two.run_folder.checkpoints()) == 6
    for (_, a), (_, b) in zip(one.run_folder.checkpoints(), two.run_folder.checkpoints(), strict=True):
        verify_checkpoint(b, ("model", "optimizer", "ema"))
        assert_same(tensors(a), tensors(b))
        assert numbers(a) == numbers(b)
    kinds = ("step", "load", "health", "validation", "checkpoint")
    assert facts(one.run_folder.events_path, *kinds) == facts(two.run_folder.events_path, *kinds)


def test_steps_are_made_while_a_checkpoint_is_written(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"steps": 5}, checkpoint={"interval": 2})
    gate = Gate(monkeypatch)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    complete: list[list[int]] = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 3:  # before step 4 saves, and waits for the save of step 2
            assert gate.reached.wait(LIMIT)
            complete.append([step for step, _ in trainer.run_folder.checkpoints()])
            gate.open.set()

    trainer.observer = observe
    assert trainer.run() == "finished"
    assert complete == [[]]
    assert [step for step, _ in trainer.run_folder.checkpoints()] == [2, 4, 5]
    assert gate.threads and threading.main_thread().name not in gate.threads
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_what_is_saved_is_what_was_there_when_save_returned(
    writer_in: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, writer = Gate(monkeypatch), writer_in()
    weight = torch.arange(6.0)
    parts = {"model": {"w": weight}, "optimizer": {"first.w": weight.bfloat16()}}
    owed = weight.clone()
    writer.save(2, parts, {"position": 1})
    weight.fill_(-1.0)
    gate.open.set()
    writer.close()
    assert torch.equal(tensors(writer.run.checkpoint_path(2))["model/w"], owed)
    assert writer.saved == 2


def test_one_save_is_under_way_at_a_time_and_the_buffers_serve_again(
    writer_in: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, writer = Gate(monkeypatch), writer_in()
    weight = torch.zeros(4)
    parts = {"model": {"w": weight}, "optimizer": {"first.w": weight}}
    writer.save(1, parts, {})
    buffers = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    threading.Timer(0.2, gate.open.set).start()
    weight.fill_(1.0)
    writer.save(2, parts, {})  # waits for the first: otherwise the first would be written from what is copied here
    assert gate.open.is_set()
    writer.join()
    assert {name: buffer.data_ptr() for name, buffer in writer._buffers.items()} == buffers
    assert [float(tensors(writer.run.checkpoint_path(step))["model/w"][0]) for step in (1, 2)] == [0.0, 1.0]
    writer.close()


def test_averages_are_staged_after_their_worker_is_done(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"ema_decay": 0.9, "steps": 4}, checkpoint={"interval": 1})
    dataset = dataset_of(recipe)
    one = trained(recipe, tmp_path / "quick", dataset)
    real = Ema._move

    def slow(ema: Ema) -> None:
        time.sleep(0.2)
        real(ema)

    monkeypatch.setattr(Ema, "_move", slow)
    two = trained(recipe, tmp_path / "slow", dataset)
    for step in range(1, 5):
        paths = (trainer.run_folder.checkpoint_path(step) for trainer in (one, two))
        assert_same(*(tensors(path) for path in paths))


@pytest.mark.parametrize(
    ("error", "asynchronous", "on_failed_write"),
    [
        (MemoryError("no room"), True, "stop"),
        (RuntimeError("a defect"), True, "go_on"),
        (SystemExit(3), True, "stop"),
        (RuntimeError("a defect"), False, "stop"),
    ],
)
def test_a_worker_that_dies_ends_the_run_soon_and_clearly_and_the_run_can_be_resumed(
    error: BaseException,
    asynchronous: bool,
    on_failed_write: str,
    recipe_with: RecipeWith,
    dataset_of: DatasetOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no disk that refuses, so that a run does not go on over it either."""
    section = {"interval": 2, "asynchronous": asynchronous, "on_failed_write": on_failed_write}
    recipe = recipe_with(training={"steps": 40}, checkpoint=section)
    dataset = dataset_of(recipe)
    real = checkpoint.write_tensors

    def dying(folder: Path, *arguments: Any) -> None:
        if "step-4" in folder.parent.name:
            raise error
        real(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", dying)
        trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset)
        words = rf"step-4: was not written: {type(error).__name__}: {error}; earlier checkpoints are whole"
        with pytest.raises(UserError, match=words):
            trainer.run()
    assert trainer.step < 40
    run = RunFolder.open(tmp_path / "run")
    assert run.state()["state"] == "failed"
    assert [step for step, _ in run.checkpoints()] == [2]
    run.recipe_path.write_text(recipe_with(training={"steps": 6}).to_toml())
    resumed = Trainer.resume(run, dataset, run.checkpoint_path(2))
    assert resumed.run() == "finished"
    whole = trained(recipe_with(training={"steps": 6}), tmp_path / "whole", dataset)
    assert_same(state(whole), state(resumed))


def test_an_error_is_heard_between_steps_not_only_at_the_next_save(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"steps": 500, "validation_interval": 0}, checkpoint={"interval": 400})
    failed = threading.Event()

    def dying(*_: Any) -> None:
        failed.set()
        raise RuntimeError("a defect")

    monkeypatch.setattr(checkpoint, "write_tensors", dying)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe), milestones=(1,))
    trainer.observer = lambda event: event["step"] == 1 and event["kind"] == "step" and failed.wait(LIMIT)
    with pytest.raises(UserError, match="a defect"):
        trainer.run()
    assert trainer.step < 10


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 3])
def test_a_signal_waits_for_the_save_under_way_and_writes_its_own_once(
    kind: signal.Signals,
    at: int,
    recipe_with: RecipeWith,
    dataset_of: DatasetOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 2's save is under way: a run stopped at step 2 needs no other one, and one stopped at step 3 does."""
    recipe = recipe_with()
    gate = Gate(monkeypatch)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == ("checkpoint" if at == 2 else "step") and event["step"] == 2:
            os.kill(os.getpid(), kind)
            threading.Timer(0.2, gate.open.set).start()

    trainer.observer = observe
    assert trainer.run() == "interrupted"
    assert trainer.step == at
    run = RunFolder.open(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()] == sorted({2, at})
    assert [e["step"] for e in read_events(run.events_path, "checkpoint")] == sorted({2, at})
    for _, path in run.checkpoints():
        verify_checkpoint(path)


def test_a_second_ctrl_c_does_not_lose_the_save_under_way(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with()
    gate = Gate(monkeypatch)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            threading.Timer(0.2, gate.open.set).start()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    trainer.observer = observe
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    run = RunFolder.open(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()] == [2]
    assert run.state()["state"] == "failed"


def test_the_random_stream_goes_on_where_the_checkpoint_saw_it(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    """Nothing in training draws from it today; what will, such as dropout, resumes like the rest."""
    recipe = recipe_with()
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset)
    seen: dict[int, Tensor] = {}

    def draw(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            seen[event["step"]] = torch.rand(3)

    trainer.observer = draw
    trainer.run()
    unbroken, seen = seen, {}
    torch.manual_seed(99)
    resumed = Trainer.resume(trainer.run_folder, dataset, trainer.run_folder.checkpoint_path(4), observer=draw)
    resumed.run()
    assert list(seen) == [4, 5]
    assert all(torch.equal(seen[step], unbroken[step]) for step in seen)


def _rank(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "model": {"w": torch.randn(5, 3, generator=generator), "b": torch.ones(2)},
        "optimizer": {"first.w": torch.randn(5, 3, generator=generator).bfloat16()},
    }
    run = RunFolder.open(folder / "run")
    writer = CheckpointWriter(run, CheckpointSection(keep_latest=1), "{}")
    for step in (1, 2):
        writer.save(step, parts, {"position": step})
        total = torch.ones(1)
        dist.all_reduce(total)  # of the training steps, on the group of the training steps
        assert total.item() == 2
    writer.close()
    if rank == 0:
        run.checkpoint_path(3).write_text("in the way")  # a checkpoint that cannot be published
        run.checkpoint_path(3).with_name("step-3.new").mkdir()
    dist.barrier()
    writer = CheckpointWriter(run, CheckpointSection(), "{}")
    writer.save(3, parts, {})
    try:
        writer.close()
    except UserError as error:
        (folder / f"refused-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_write_one_checkpoint_through_a_group_of_their_own(recipe_with: RecipeWith, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", recipe_with())
    multiprocessing.spawn(_rank, args=(tmp_path,), nprocs=2)
    assert [step for step, _ in run.checkpoints()] == [2]
    path = run.checkpoint_path(2)
    verify_checkpoint(path)
    found, generator = tensors(path), torch.Generator().manual_seed(0)
    assert found.keys() == {"model/w", "model/b", "optimizer/first.w"}
    assert torch.equal(found["model/w"], torch.randn(5, 3, generator=generator))
    assert "it exists already" in (tmp_path / "refused-0").read_text()
    assert "the first rank" in (tmp_path / "refused-1").read_text()
