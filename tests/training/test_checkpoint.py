"""A checkpoint is complete or absent, whatever stops the writing of it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tessera.model import Transformer
from tessera.model import weights as weight_files
from tessera.model.weights import read_weights, weights
from tessera.numerics import Policy
from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder
from tessera.training import checkpoint
from tessera.training.optimizer import AdamW

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "recipe.toml",
    "tokenizer.json",
    "manifest.json",
]


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

    def save(self, step: int, **facts: Any) -> Path:
        return checkpoint.save(self.run, step, self.model, self.optimizer, None, '{"made": "here"}', facts)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints_path.iterdir())


@pytest.fixture
def small(recipe_with: Callable[..., Recipe], tmp_path: Path) -> Small:
    return Small(recipe_with(), tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the file `name` stops in the middle of it, in a safetensors file as in the others."""
    save_file, replace = weight_files.save_file, os.replace

    def stopping_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == name:
            path.write_bytes(b"half of it")
            raise error
        save_file(tensors, path)

    def stopping_replace(source: Path, target: Path) -> None:
        if target.name == name:
            raise error
        replace(source, target)

    monkeypatch.setattr(weight_files, "save_file", stopping_save)
    monkeypatch.setattr(os, "replace", stopping_replace)


def test_what_was_saved_is_what_is_read(small: Small, recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    path = small.save(7, position=11)
    assert sorted(contents(path)) == sorted(FILES)
    assert path == small.run.checkpoint_path(7)
    state = checkpoint.read_state(path)
    assert state == {"schema": 1, "step": 7, "optimizer_steps": 1, "position": 11}
    other = Small(recipe_with(training={"seed": 5}), tmp_path / "other")
    other.update()
    read_weights(path, other.model)
    checkpoint.read_optimizer(path, other.optimizer, state["optimizer_steps"])
    assert other.optimizer.steps == 1
    for found, owed in (
        (weights(other.model), weights(small.model)),
        (other.optimizer.tensors(), small.optimizer.tensors()),
    ):
        assert found.keys() == owed.keys()
        assert all(torch.equal(found[name], owed[name]) for name in owed)
    assert (path / "tokenizer.json").read_text() == '{"made": "here"}'
    assert (path / "recipe.toml").read_text() == small.run.recipe().to_toml()


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(
    name: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(small.save(2))
    small.update()
    with monkeypatch.context() as disk:
        stop_at(name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), disk)
        with pytest.raises(UserError, match=rf"step-4\.partial/{name}: cannot be written: .*No space left on device"):
            small.save(4)
    assert small.names() == ["step-2"]
    assert contents(small.run.checkpoint_path(2)) == before
    small.save(4)  # there is room again
    assert small.names() == ["step-2", "step-4"]
    assert checkpoint.read_state(small.run.checkpoint_path(4))["optimizer_steps"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect")])
def test_whatever_else_stops_it_leaves_no_half_one_either(
    error: BaseException, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at("state.json", error, monkeypatch)
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
    assert checkpoint.read_state(path) == {"schema": 1, "step": 4, "optimizer_steps": 2, "position": 2}


def test_a_checkpoint_stays_until_the_one_that_replaces_it_is_written(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(small.save(4, position=1))
    stop_at("tokenizer.json", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), monkeypatch)
    with pytest.raises(UserError, match="No space left"):
        small.save(4, position=2)
    assert small.names() == ["step-4"]
    assert contents(small.run.checkpoint_path(4)) == before


def test_a_checkpoint_that_cannot_be_removed_is_named(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.save(2)
    small.save(4)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="step-2: cannot be removed: Permission denied"):
        checkpoint.prune(small.run, keep=1, milestones=())


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
    checkpoint.prune(small.run, keep=1, milestones=(2,))
    assert [4 in steps for steps in seen] == [True, False]  # a leftover of an earlier crash first, then its own
    assert small.names() == ["step-2", "step-6"]
