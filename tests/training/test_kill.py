"""kill -9 and SIGTERM at any moment: what goes on afterwards is the run that was never stopped, bit for bit."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.recipe import Recipe
from tessera.store import RunFolder, verify_checkpoint
from tests.training.killed_run import LIMIT, dataset_of, process_of
from tests.training.test_checkpoint_writer import numbers, tensors
from tests.training.test_trainer import facts

STEPS = 12
PARTS = ("model", "optimizer", "ema")
KINDS = ("step", "load", "health", "validation", "checkpoint")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the last checkpoint's tensors and numbers (its random stream among them), and its events."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    events: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        run = RunFolder.open(folder)
        assert run.state()["state"] == "finished"
        last = run.checkpoint_path(STEPS)
        verify_checkpoint(last, PARTS)
        return cls(tensors(last), numbers(last), facts(run.events_path, *KINDS))

    def assert_same(self, other: "Outcome") -> None:
        assert self.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(t, other.tensors[name]) for name, t in self.tensors.items())
        assert self.numbers == other.numbers
        assert self.events == other.events


@dataclass(frozen=True)
class Unbroken:
    """The run that is never stopped, its recipe file, and how long it took."""

    recipe: Path
    outcome: Outcome
    seconds: float


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    from tests.training.conftest import make_recipe

    folder = tmp_path_factory.mktemp("unbroken")
    changes: dict[str, dict[str, Any]] = {
        "training": {"steps": STEPS, "ema_decay": 0.9, "validation_interval": 5},
        "checkpoint": {"interval": 2, "keep_latest": 3},
    }
    recipe: Recipe = make_recipe(corpus, changes)
    dataset_of(recipe)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    finish(process_of(folder / "recipe.toml", folder / "warm", None, 0.0))
    begun = time.monotonic()
    finish(process_of(folder / "recipe.toml", folder / "run", None, 0.0))
    return Unbroken(folder / "recipe.toml", Outcome.of(folder / "run"), time.monotonic() - begun)


def finish(process: Any) -> None:
    process.join(LIMIT)
    assert process.exitcode == 0


def end_when(process: Any, moment: Callable[[], bool], number: int) -> bool:
    """Send the signal once `moment` is true; returns whether the process was still there."""
    limit = time.monotonic() + LIMIT
    while process.is_alive() and not moment():
        assert time.monotonic() < limit
        time.sleep(0.0005)
    caught = process.is_alive()
    if caught:
        os.kill(process.pid, number)
    process.join(LIMIT)
    assert process.exitcode is not None
    return caught and process.exitcode in (-number, 0)


def complete(folder: Path) -> set[int]:
    """The steps of the complete checkpoints, each of which is looked through."""
    found = RunFolder(folder).checkpoints()
    for _, path in found:
        verify_checkpoint(path, PARTS)
    return {step for step, _ in found}


def kill_again_and_again(kills: int, seed: int, unbroken: Unbroken, folder: Path) -> None:
    """Kill a run `kills` times, half of them inside a save, and go on with it each time."""
    draw = random.Random(seed)
    caught = inside = 0
    for number in range(kills):
        aimed = number % 2 == 0
        process = process_of(unbroken.recipe, folder, None, draw.uniform(0.02, 0.1) if aimed else 0.0)
        begun, wait = time.monotonic(), draw.uniform(0.0, unbroken.seconds)
        before = {path.name for path in (folder / "checkpoints").glob("*.partial")}

        def moment(aimed: bool = aimed, begun: float = begun, wait: float = wait, before: set[str] = before) -> bool:
            if not aimed:
                return time.monotonic() - begun > wait
            names = {path.name for path in (folder / "checkpoints").glob("*.partial")} - before
            return bool(names) and time.monotonic() - begun > wait / 4

        caught += end_when(process, moment, signal.SIGKILL)
        inside += any((folder / "checkpoints").glob("step-*.partial"))
        if (folder / "run.json").is_file():
            complete(folder)
            if RunFolder.open(folder).state()["state"] == "finished":
                break
    assert caught and inside
    if not (folder / "run.json").is_file() or RunFolder.open(folder).state()["state"] != "finished":
        finish(process_of(unbroken.recipe, folder, None, 0.0))
    Outcome.of(folder).assert_same(unbroken.outcome)
    assert complete(folder) == {8, 10, 12}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-10", "step-12", "step-8"]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(unbroken: Unbroken, tmp_path: Path) -> None:
    kill_again_and_again(4, 1, unbroken, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_runs_that_are_killed_at_many_moments_go_on_to_the_same_bits(
    seed: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    kill_again_and_again(20, seed, unbroken, tmp_path / "run")


def test_sigterm_with_a_save_under_way_keeps_it_and_goes_on_to_the_same_bits(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = process_of(unbroken.recipe, folder, None, 0.1)
    assert end_when(process, lambda: (folder / "checkpoints" / "step-2.partial").is_dir(), signal.SIGTERM)
    assert process.exitcode == 0
    state = RunFolder.open(folder).state()
    assert state["state"] == "interrupted" and 2 <= state["step"] < STEPS
    assert complete(folder) == {2, state["step"]}
    finish(process_of(unbroken.recipe, folder, None, 0.0))
    Outcome.of(folder).assert_same(unbroken.outcome)


def killed_while_steps_are_made_again(kills: int, seed: int, unbroken: Unbroken, folder: Path) -> None:
    """A finished run goes on from an earlier checkpoint, and is killed while it writes a later one anew."""
    draw = random.Random(seed)
    finish(process_of(unbroken.recipe, folder, None, 0.0))
    caught = 0
    for _ in range(kills):
        kept = complete(folder)
        process = process_of(unbroken.recipe, folder, RunFolder(folder).checkpoint_path(8), draw.uniform(0.02, 0.06))
        place, wait = folder / "checkpoints", draw.uniform(0.0, 0.5)
        seen: list[float] = []

        def moment(place: Path = place, wait: float = wait, seen: list[float] = seen) -> bool:
            if any(place.glob("step-1?.*")):
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] > wait

        caught += end_when(process, moment, signal.SIGKILL)
        assert complete(folder) >= kept
    assert caught
    finish(process_of(unbroken.recipe, folder, None, 0.0))  # from what the events lead to, not from what was left
    Outcome.of(folder).assert_same(unbroken.outcome)


def test_a_kill_while_a_step_is_made_again_costs_no_checkpoint(unbroken: Unbroken, tmp_path: Path) -> None:
    killed_while_steps_are_made_again(2, 1, unbroken, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_kills_while_steps_are_made_again_cost_no_checkpoint(seed: int, unbroken: Unbroken, tmp_path: Path) -> None:
    killed_while_steps_are_made_again(10, seed, unbroken, tmp_path / "run")
