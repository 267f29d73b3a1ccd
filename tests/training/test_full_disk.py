"""A disk that is full or read-only: told with the file, nothing lost that was kept, and a run that can be resumed."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tessera.data import Dataset
from tessera.recipe import Recipe, UserError
from tessera.store import EventWriter, RunFolder, read_events, verify_checkpoint
from tessera.store.files import Unwritable, unwritable
from tessera.training import checkpoint
from tessera.training.journal import Journal
from tessera.training.trainer import Trainer
from tests.training.test_trainer import assert_same, facts, state, trained

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """A small file system in memory: `fill` takes all but some bytes of it, `free` gives them back."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self, room: int) -> None:
        facts = os.statvfs(self.path)
        with open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, facts.f_bavail * facts.f_bsize - room)

    def free(self) -> None:
        self._filler.unlink()

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, *MOUNT, str(self.path)], check=True, capture_output=True)


MOUNT = ("-t", "tmpfs", "tessera-test")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    disk = Disk(path)
    try:
        disk.mount("size=8m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_in_a_save_stops_the_run_which_goes_on_once_there_is_room(
    asynchronous: bool, disk: Disk, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(checkpoint={"interval": 2, "asynchronous": asynchronous})
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(disk.path / "run", recipe), dataset)

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            trainer._checkpoints.join()
            disk.fill(300_000)  # room for a part of a checkpoint, and for events

    trainer.observer = observe
    with pytest.raises(UserError, match=r"step-4\.partial/.*: cannot be written: No space left on device; free some"):
        trainer.run()
    run = RunFolder.open(disk.path / "run")
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-2"]
    verify_checkpoint(run.checkpoint_path(2))
    disk.free()
    resumed = Trainer.resume(run, dataset, run.checkpoint_path(2))
    assert resumed.run() == "finished"
    whole = trained(recipe, tmp_path / "whole", dataset)
    assert_same(state(whole), state(resumed))
    kinds = ("step", "load", "health", "validation", "checkpoint")
    assert facts(run.events_path, *kinds) == facts(whole.run_folder.events_path, *kinds)


def test_a_run_that_is_to_go_on_over_a_full_disk_tells_of_it_and_saves_when_there_is_room(
    disk: Disk, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 8}, checkpoint={"interval": 2, "on_failed_write": "go_on"})
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(disk.path / "run", recipe), dataset)
    heard: list[dict[str, Any]] = []

    def observe(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["kind"] == "step" and event["step"] == 3:
            trainer._checkpoints.join()
            disk.fill(300_000)
        if event["kind"] == "step" and event["step"] == 6:
            trainer._join_save()
            disk.free()

    trainer.observer = observe
    assert trainer.run() == "finished"
    run = RunFolder.open(disk.path / "run")
    assert [path.name for path in sorted(run.checkpoints_path.iterdir())] == ["step-2", "step-8"]
    told = [event for event in heard if event["kind"] == "refused"]
    assert [event["reasons"][0].count("No space left on device") for event in told] == [1, 1]  # steps 4 and 6
    written = [*read_events(run.events_path, "refused")]
    assert [reason for event in written for reason in event["reasons"]] == [e["reasons"][0] for e in told]
    assert [event["lost"] for event in written] == [[], []]
    assert [event["step"] for event in read_events(run.events_path, "step")] == list(range(8))
    whole = trained(recipe, tmp_path / "whole", dataset)
    assert_same(state(whole), state(trainer))


def test_events_that_a_full_disk_refuses_stop_the_run_or_are_told_in_the_next_one(
    disk: Disk, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    training = {"steps": 24, "load_interval": 1, "validation_interval": 0}
    recipe = recipe_with(training=training, checkpoint={"interval": 2})
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(disk.path / "run", recipe), dataset)

    def fill(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            trainer._checkpoints.join()
            disk.fill(0)

    trainer.observer = fill
    with pytest.raises(UserError, match="cannot be written: No space left on device; free some space"):
        trainer.run()
    assert trainer.step < 20
    disk.free()
    run = RunFolder.open(disk.path / "run")
    going_on = recipe_with(training={**training, "steps": 16}, checkpoint={"interval": 0, "on_failed_write": "go_on"})
    run.recipe_path.write_text(going_on.to_toml())
    resumed = Trainer.resume(run, dataset, run.checkpoint_path(2))

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            disk.fill(0)
        if event["kind"] == "step" and event["step"] == 13:
            disk.free()

    resumed.observer = watch
    assert resumed.run() == "finished"
    steps = [event["step"] for event in read_events(run.events_path, "step")]
    missing = set(range(16)) - set(steps)
    assert missing and max(missing) <= 13 and len(steps) == len(set(steps))
    refused = [*read_events(run.events_path, "refused")]  # more than one, where the last free bytes take a short line
    assert sum(event["lost"].count("step") for event in refused) == len(missing)
    reason = f"{run.events_path}: cannot be written: No space left on device; free some space"
    assert all(event["reasons"] == [reason] for event in refused)
    whole = trained(recipe_with(training={**training, "steps": 16}), tmp_path / "whole", dataset)
    assert_same(state(whole), state(resumed))


def test_the_last_checkpoint_must_be_written_in_any_case(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on to its end without it would say "finished" and have nothing."""
    recipe = recipe_with(checkpoint={"interval": 2, "on_failed_write": "go_on"})
    dataset = dataset_of(recipe)
    real = checkpoint.write_tensors

    def full(folder: Path, *arguments: Any) -> None:
        if "step-2" not in folder.parent.name:
            raise unwritable(folder, NO_SPACE)
        real(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(UserError, match=r"step-6.*No space left"):
            Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset).run()
    run = RunFolder.open(tmp_path / "run")
    assert run.state()["state"] == "failed"
    assert [step for step, _ in run.checkpoints()] == [2]
    resumed = Trainer.resume(run, dataset, run.checkpoint_path(2))
    assert resumed.run() == "finished"


def test_a_checkpoint_whose_event_is_lost_is_not_written_since_no_event_would_lead_to_it(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(checkpoint={"interval": 2, "on_failed_write": "go_on"})
    dataset = dataset_of(recipe)
    real = EventWriter.write

    def full(writer: EventWriter, kind: str, step: int, **fields: Any) -> None:
        if (kind, step) == ("checkpoint", 4):
            raise unwritable(writer.path, NO_SPACE)
        real(writer, kind, step, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(EventWriter, "write", full)
        trainer = trained(recipe, tmp_path / "run", dataset)
    assert [step for step, _ in trainer.run_folder.checkpoints()] == [2, 6]
    (refused,) = read_events(trainer.run_folder.events_path, "refused")
    assert refused["lost"] == ["checkpoint"]


def test_the_same_reason_is_told_once_in_a_row(recipe_with: RecipeWith, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    run = RunFolder.create(tmp_path / "run", recipe_with())
    journal = Journal(run, "run", None, heard.append, go_on=True)
    for _ in range(3):
        journal.refused(Unwritable("the disk is full"), 1)
    journal.refused(Unwritable("the disk is gone"), 2)
    assert [event["reasons"] for event in heard] == [["the disk is full"], ["the disk is gone"]]
    assert journal.emit("step", 3)
    journal.refused(Unwritable("the disk is full"), 4)
    assert heard[-1]["reasons"] == ["the disk is full"]
    with journal.strictly(), pytest.raises(Unwritable):
        journal.refused(Unwritable("the disk is full"), 5)
    journal.close(5)
    (event,) = read_events(run.events_path, "refused")
    assert event["reasons"] == ["the disk is full", "the disk is gone"]


def test_a_read_only_folder_is_told_at_the_start_and_the_run_is_as_it_was(
    disk: Disk, recipe_with: RecipeWith, dataset_of: DatasetOf
) -> None:
    recipe = recipe_with(training={"steps": 4})
    dataset = dataset_of(recipe)
    trained(recipe, disk.path / "run", dataset)
    run = RunFolder.open(disk.path / "run")
    disk.mount("remount,ro")
    resumed = Trainer.resume(run, dataset, run.checkpoint_path(2))
    with pytest.raises(UserError, match=r"events\.jsonl: cannot be written: Read-only file system; choose a folder on"):
        resumed.run()
    disk.mount("remount,rw")
    assert Trainer.resume(run, dataset, run.checkpoint_path(2)).run() == "finished"


@pytest.mark.parametrize("on_failed_write", ["stop", "go_on"])
def test_a_folder_that_becomes_read_only_is_a_refusal_like_a_full_disk(
    on_failed_write: str,
    recipe_with: RecipeWith,
    dataset_of: DatasetOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_with(checkpoint={"interval": 2, "on_failed_write": on_failed_write})
    real = os.mkdir

    def read_only(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).endswith("step-4.partial"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    if on_failed_write == "stop":
        with pytest.raises(UserError, match=r"step-4\.partial: cannot be written: Read-only file system; choose"):
            trainer.run()
        assert [step for step, _ in trainer.run_folder.checkpoints()] == [2]
    else:
        assert trainer.run() == "finished"
        assert [step for step, _ in trainer.run_folder.checkpoints()] == [2, 6]
