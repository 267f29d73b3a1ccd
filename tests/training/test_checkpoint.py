"""A checkpoint is complete or absent, whatever stops the writing of it; the one that it replaces stays until then."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tessera.model import Transformer
from tessera.model.weights import weights
from tessera.numerics import Policy
from tessera.recipe import Recipe, UserError
from tessera.recipe.checkpoint import CheckpointSection
from tessera.store import RunFolder, verify_checkpoint
from tessera.store.checkpoint_path import TENSORS
from tessera.training import checkpoint
from tessera.training.checkpoint import Parts
from tessera.training.optimizer import AdamW

INDEX = "model.safetensors.index.json"
TENSOR_FILES = [f"{part}/{name}" for part in ("model", "optimizer") for name in (TENSORS, INDEX)]
FILES = [*TENSOR_FILES, "state.json", "recipe.toml", "tokenizer.json", "manifest.json"]


class Small:
    """A run folder with a model and an optimizer that has made one update."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self.run = RunFolder.create(path, recipe)
        self.model: nn.Module = Transformer(recipe.model, Policy(precision="fp32"))
        self.optimizer = AdamW(dict(self.model.named_parameters()), recipe.optimizer)
        self.update()

    def update(self) -> None:
        generator = torch.Generator().manual_seed(self.optimizer.steps)
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer.step(1e-2, 1.0)

    def parts(self) -> Parts:
        return {"model": weights(self.model), "optimizer": self.optimizer.tensors()}

    def save(self, step: int, **state: Any) -> Path:
        return checkpoint.save(self.run, step, self.parts(), state, '{"made": "here"}')

    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints_path.iterdir())


@pytest.fixture
def small(recipe_with: Callable[..., Recipe], tmp_path: Path) -> Small:
    return Small(recipe_with(), tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stop_at(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the file `name` stops in the middle of it, in those of the library as in the others."""
    replace, real_open = os.replace, open

    def stopping_replace(source: Path, target: Path) -> None:
        if target.as_posix().endswith(name):
            raise error
        replace(source, target)

    def stopping_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = real_open(file, mode, *arguments, **options)
        if "w" in mode and str(file).endswith(name):
            stream.write(b"half of it" if "b" in mode else "half of it")
            stream.close()
            raise error
        return stream

    monkeypatch.setattr(os, "replace", stopping_replace)
    monkeypatch.setattr("builtins.open", stopping_open)
    monkeypatch.setattr("io.open", stopping_open)  # pathlib's


def test_what_was_saved_is_what_is_read(small: Small, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    path = small.save(7, position=11)
    assert sorted(contents(path)) == sorted(FILES)
    assert path == small.run.checkpoint_path(7)
    assert checkpoint.read_state(path) == {"schema": 1, "step": 7, "position": 11}
    other = Small(recipe_with(training={"seed": 5}), tmp_path / "other")
    other.update()
    checkpoint.read_parts(path, other.parts())
    for part, owed in small.parts().items():
        found = other.parts()[part]
        assert found.keys() == owed.keys()
        assert all(torch.equal(found[name], owed[name]) for name in owed)
    assert (path / "tokenizer.json").read_text() == '{"made": "here"}'
    assert (path / "recipe.toml").read_text() == small.run.recipe().to_toml()


def test_saving_and_loading_need_no_pickle(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    import _pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was pickled or unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "_Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch.serialization, "load", refuse)
    path = small.save(3)
    owed = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in small.parts().items()}
    small.update()
    checkpoint.read_state(path)
    checkpoint.read_parts(path, small.parts())
    assert all(torch.equal(small.parts()[part][name], t) for part, ts in owed.items() for name, t in ts.items())


def test_no_folder_is_read_before_all_have_been_looked_through(small: Small) -> None:
    path = small.save(3)
    small.update()
    targets = {part: dict(tensors) for part, tensors in small.parts().items()}
    targets["optimizer"]["one more"] = torch.zeros(1)
    before = {name: t.clone() for name, t in weights(small.model).items()}
    with pytest.raises(UserError, match=f"optimizer/{TENSORS}: has no tensor one more"):
        checkpoint.read_parts(path, targets)
    assert all(torch.equal(before[name], t) for name, t in weights(small.model).items())


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(
    name: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(small.save(2))
    small.update()
    told = name.replace(INDEX, TENSORS)  # of the library's two files the one with the tensors stands for both
    with monkeypatch.context() as disk:
        stop_at(f"step-4.partial/{name}", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), disk)
        with pytest.raises(UserError, match=rf"step-4\.partial/{told}: cannot be written: .*No space left on device"):
            small.save(4)
    assert small.names() == ["step-2"]
    assert contents(small.run.checkpoint_path(2)) == before
    small.save(4)  # there is room again
    assert small.names() == ["step-2", "step-4"]
    verify_checkpoint(small.run.checkpoint_path(4))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect")])
@pytest.mark.parametrize("name", ["state.json", TENSORS])
def test_whatever_else_stops_it_leaves_no_half_one_either(
    error: BaseException, name: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(name, error, monkeypatch)
    with pytest.raises(type(error)) as told:
        small.save(4)
    assert told.value is error
    assert small.names() == []


def test_a_disk_that_does_not_even_remove_keeps_the_first_error(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at("state.json", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), monkeypatch)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rmdir", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(UserError, match=r"state\.json: cannot be written: No space left"):
        small.save(4)
    monkeypatch.undo()
    assert small.names() == ["step-4.partial"]
    assert small.run.checkpoints() == []
    small.save(4)
    assert small.names() == ["step-4"]


def test_a_step_that_is_made_again_replaces_its_checkpoint(small: Small) -> None:
    small.save(4, position=1)
    small.update()
    path = small.save(4, position=2)
    assert small.names() == ["step-4"]
    assert checkpoint.read_state(path) == {"schema": 1, "step": 4, "position": 2}


class Killed(BaseException):
    """The process ends here; what would clean up after an error does not run."""


CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")


def test_whenever_a_process_is_killed_a_step_that_is_made_again_keeps_a_complete_checkpoint(
    small: Small, recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each call that changes the disk, in turn, until one save has gone through."""
    small.save(2, position=0)
    small.save(4, position=1)
    whole = tmp_path / "whole"
    shutil.copytree(small.run.path, whole)
    kept: list[int] = []
    for moment in range(1000):
        shutil.rmtree(small.run.path)
        shutil.copytree(whole, small.run.path)
        left = iter(range(moment))
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, _dying(getattr(os, name), left))
            patch.setattr(shutil, "rmtree", _dying(shutil.rmtree, left))
            try:
                small.save(4, position=2)
                break
            except Killed:
                pass
        found = dict(small.run.checkpoints())
        assert sorted(found) == [2, 4], moment
        kept.append(checkpoint.read_state(found[4])["position"])
        small.run.settle()
        assert small.names() == ["step-2", "step-4"]
        assert checkpoint.read_state(small.run.checkpoint_path(4))["position"] == kept[-1]
    assert set(kept) == {1, 2} and kept == sorted(kept)  # the old one, and from some moment on the new one
    assert len(kept) > 20
    assert checkpoint.read_state(small.run.checkpoint_path(4))["position"] == 2


def _dying(call: Callable[..., Any], left: Any) -> Callable[..., Any]:
    def dying(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return call(*arguments, **options)

    return dying


def test_a_checkpoint_that_cannot_be_removed_is_named(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.save(2)
    small.save(4)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="step-2: cannot be removed: Permission denied"):
        checkpoint.prune(small.run, 4, CheckpointSection(keep_latest=1), ())


def test_a_checkpoint_is_never_seen_with_files_missing_while_it_is_removed(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        small.save(step)
    seen: list[list[int]] = []
    remove = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        seen.append([step for step, _ in small.run.checkpoints()])
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint.prune(small.run, 6, CheckpointSection(keep_latest=1), (2,))
    assert [4 in steps for steps in seen] == [True, False]  # a leftover of an earlier crash first, then its own
    assert small.names() == ["step-2", "step-6"]


@pytest.mark.parametrize(
    ("keep_latest", "keep_every", "milestones", "kept"),
    [
        (0, 0, (), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, 0, (), [5, 6, 7, 8, 9]),
        (1, 3, (), [3, 6, 7, 8, 9]),
        (3, 0, (1,), [1, 4, 5, 6, 7, 8, 9]),
        (9, 0, (), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_retention_counts_the_checkpoints_up_to_the_present_step_and_spares_the_rest(
    keep_latest: int, keep_every: int, milestones: tuple[int, ...], kept: list[int], small: Small
) -> None:
    """The run is at step 6; 7, 8 and 9 are of the course that it left, and must not push out what it has just saved."""
    small.save(9)
    for step in range(1, 9):
        shutil.copytree(small.run.checkpoint_path(9), small.run.checkpoint_path(step))
    checkpoint.prune(small.run, 6, CheckpointSection(keep_latest=keep_latest, keep_every=keep_every), milestones)
    assert [step for step, _ in small.run.checkpoints()] == kept
