"""The moving average: the formula's bits, whatever the worker's timing; training does not notice it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.data import Dataset
from tessera.model.weights import weights
from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder, read_events
from tessera.training.ema import Ema
from tessera.training.trainer import Trainer
from tests.training.conftest import broken_at_step_4
from tests.training.test_trainer import assert_same, state, trained

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]
DECAY = 0.9


def formula(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """a + (1 - d) (w - a) over the weights before the run and after each step, one tensor after another."""
    averages = {name: w.clone() for name, w in history[0].items()}
    for step in history[1:]:
        for name, w in step.items():
            averages[name] = torch.lerp(averages[name], w, 1 - DECAY)
    return averages


def recorded(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Copies of the parameters at the start and after each optimizer step, as the run goes on."""

    def now() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    history, real = [now()], trainer.optimizer.step

    def step(rate: float, scale: float) -> None:
        real(rate, scale)
        history.append(now())

    monkeypatch.setattr(trainer.optimizer, "step", step)
    return history


def averages(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.ema is not None
    parameters = dict(trainer.model.named_parameters())
    return {name: t for name, t in trainer.ema.tensors().items() if name in parameters}


@pytest.mark.parametrize("delay", [0.0, 0.3])  # a step takes less
def test_averages_are_the_formulas_bits_however_slow_the_worker_is(
    delay: float, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"ema_decay": DECAY})
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    history = recorded(trainer, monkeypatch)
    real, threads = Ema._move, set()

    def slow(ema: Ema) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(delay)
        real(ema)

    monkeypatch.setattr(Ema, "_move", slow)
    trainer.run()
    assert len(history) == 7
    assert_same(averages(trainer), formula(history))
    assert threads and threading.main_thread().name not in threads


def test_reading_waits_for_a_move_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 2)
    ema = Ema(model, DECAY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.weight.add_(1.0)
    real = Ema._move

    def slow(ema: Ema) -> None:
        time.sleep(0.2)
        real(ema)

    monkeypatch.setattr(Ema, "_move", slow)
    owed = torch.lerp(before["weight"], model.weight.detach(), 1 - DECAY)
    ema.update()
    assert torch.equal(ema.tensors()["weight"], owed)
    ema.restart()
    ema.update()
    with ema.in_place():
        assert torch.equal(model.weight, ema.tensors()["weight"])
    ema.update()
    ema.close()
    assert not any(thread.name.startswith("ema") for thread in threading.enumerate())


def test_training_is_the_same_with_and_without_averages(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    plain, averaged = recipe_with(), recipe_with(training={"ema_decay": DECAY})
    dataset = dataset_of(plain)
    one, two = trained(plain, tmp_path / "plain", dataset), trained(averaged, tmp_path / "averaged", dataset)
    assert_same(state(one), state(two))
    losses = [[e["loss"] for e in read_events(t.run_folder.events_path, "step")] for t in (one, two)]
    assert losses[0] == losses[1]
    assert not (one.run_folder.checkpoint_path(6) / "ema").exists()


def test_resuming_gives_the_averages_of_the_unbroken_run(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"ema_decay": DECAY})
    dataset = dataset_of(recipe)
    whole = trained(recipe, tmp_path / "whole", dataset)
    run, latest = broken_at_step_4(recipe, tmp_path / "broken", dataset)
    second = Trainer.resume(run, dataset, latest)
    second.run()
    assert_same(averages(whole), averages(second))
    assert_same(state(whole), state(second))


def test_validation_of_the_averages_is_that_of_a_model_with_them_and_leaves_the_weights_alone(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"ema_decay": DECAY, "steps": 3})
    dataset = dataset_of(recipe)
    trainer = trained(recipe, tmp_path / "run", dataset)
    before = {name: t.clone() for name, t in state(trainer).items()}
    own = trainer.validate()
    facts = trainer._validate_ema()
    assert_same(before, state(trainer))
    assert trainer.validate() == own  # its codes too are those of the parameters again

    other = Trainer(recipe, RunFolder.create(tmp_path / "other", recipe), dataset)
    assert trainer.ema is not None
    with torch.no_grad():
        for name, target in weights(other.model).items():
            target.copy_(trainer.ema.tensors()[name])
    owed = other.validate()
    assert facts == {"ema_loss": owed.loss, "ema_bits_per_byte": owed.bits_per_byte}
    assert owed.loss != own.loss
    (event,) = read_events(trainer.run_folder.events_path, "validation")
    assert {name: event[name] for name in facts} == facts


def test_a_new_stage_averages_from_the_weights_it_was_given(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 2, "ema_decay": DECAY})
    dataset = dataset_of(recipe)
    first = trained(recipe, tmp_path / "first", dataset)
    second = Trainer(recipe, RunFolder.create(tmp_path / "second", recipe), dataset)
    second.start_from(first.run_folder.checkpoint_path(2))
    own = dict(first.model.named_parameters())
    assert_same(averages(second), {name: p.detach() for name, p in own.items()})
    second.perturb(1)
    assert_same(averages(second), {name: p.detach() for name, p in second.model.named_parameters()})


def test_what_goes_wrong_in_the_worker_ends_the_run(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"ema_decay": DECAY})
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))

    def broken(ema: Ema) -> None:
        raise MemoryError("no room for an average")

    monkeypatch.setattr(Ema, "_move", broken)
    with pytest.raises(MemoryError, match="no room"):
        trainer.run()
    assert RunFolder.open(tmp_path / "run").state()["state"] == "failed"


def test_a_checkpoint_without_averages_is_refused_where_the_recipe_keeps_them(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    plain = recipe_with(training={"steps": 2})
    dataset = dataset_of(plain)
    trained(plain, tmp_path / "run", dataset)
    run = RunFolder.open(tmp_path / "run")
    run.recipe_path.write_text(recipe_with(training={"steps": 4, "ema_decay": DECAY}).to_toml())
    with pytest.raises(UserError, match=r"manifest\.json: does not list ema/"):
        Trainer.resume(run, dataset, run.checkpoint_path(2))
