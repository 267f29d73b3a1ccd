"""Refused steps: which they are, and that a run which leaves one out is the run without it, bit for bit."""

import json
import random
import shutil
from collections.abc import Callable
from math import nan, nextafter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.data import Dataset
from tessera.model import Transformer
from tessera.model.weights import weights
from tessera.numerics import Policy
from tessera.ops.chunked_loss import IGNORED
from tessera.recipe import Recipe, StabilitySection
from tessera.store import RunFolder, read_events
from tessera.training.loss import Share, training_loss
from tessera.training.nonfinite import NonFinite
from tessera.training.optimizer import AdamW
from tessera.training.stability import Stability, Stopped
from tessera.training.trainer import Trainer
from tests.training.poison import poison, position_of
from tests.training.test_trainer import assert_same, facts, state

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]
DECAY = 0.9
LEAP = 30.0
# Few steps are remembered, so that the first spike can come early; the deviations of two or three are wild.
QUICK = {"spike_window": 4, "spike_deviations": 40.0}


def recipe_of(recipe_with: RecipeWith, *, precision: str = "fp8", steps: int = 8, **stability: Any) -> Recipe:
    recipe = recipe_with(
        numerics={"precision": precision},
        training={
            "steps": steps,
            "micro_batch_size": 2,
            "ema_decay": DECAY,
            "health_interval": 1,
            "load_interval": 1,
            "bias_update_speed": 0.01,
        },
        checkpoint={"interval": 1},
        optimizer={"learning_rate": [{"shape": "linear", "steps": 6, "from": 1e-3, "to": 4e-3}]},
    )
    return recipe.model_copy(update={"stability": StabilitySection(**(QUICK | stability))})


def new(recipe: Recipe, folder: Path, dataset: Dataset, leaps: tuple[int, ...], nans: tuple[int, ...] = ()) -> Trainer:
    return poison(Trainer(recipe, RunFolder.create(folder, recipe), dataset), dict.fromkeys(leaps, LEAP), nans)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.ema is not None
    averages = {f"average.{name}": t.clone() for name, t in trainer.ema.tensors().items()}
    return state(trainer) | averages | {"updates": torch.tensor(trainer.optimizer.steps)}


def unstable(folder: Path) -> list[tuple[int, str]]:
    return [(e["step"], e["decision"]) for e in read_events(folder / "events.jsonl", "unstable")]


def plain_loop(recipe: Recipe, dataset: Dataset, left_out: set[int], factors: dict[int, float]) -> dict[str, Tensor]:
    """The run whose steps `left_out` were never looked at; `factors`: step -> what its learning rate is times."""
    model = Transformer(recipe.model, Policy(**recipe.numerics.model_dump()), seed=recipe.training.seed)
    optimizer = AdamW(dict(model.named_parameters()), recipe.optimizer)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in sorted(set(range(recipe.training.steps)) - left_out):
        batch = dataset.train.batch(position_of(recipe, step), recipe.batch_size_at(step))
        share = Share(
            int((batch.targets != IGNORED).sum()),
            len(batch.tokens),
            recipe.training.mtp_loss_weight.at(step),
            recipe.training.balance_loss_weight,
        )
        model.zero_grad()
        counts: list[list[Tensor]] = []
        ids = not recipe.data.cross_document_attention
        for part in batch.split(recipe.training.micro_batch_size):
            one = training_loss(model, part, part.document_ids if ids else None, share)
            one.total.backward()
            counts.append(one.counts)
        rate = recipe.optimizer.learning_rate.at(step) * factors.get(step, 1.0)
        clip = recipe.optimizer.gradient_clip / (float(optimizer.gradient_norm()) + 1e-12)
        optimizer.step(rate, min(1.0, clip))
        for i, (_, router) in enumerate(model.routers()):
            router.update_bias(
                torch.stack([part[i] for part in counts]).sum(dim=0), recipe.training.bias_update_speed.at(step)
            )
        for name, p in model.named_parameters():
            averages[name] = torch.lerp(averages[name], p.detach(), 1 - DECAY)
    kept = {f"average.{name}": t for name, t in (weights(model) | averages).items()}
    return weights(model) | optimizer.tensors() | kept | {"updates": torch.tensor(optimizer.steps)}


# The rule alone


def rule(**keys: Any) -> Stability:
    return Stability(StabilitySection(**keys))


def test_a_spike_exceeds_the_mean_by_so_many_sample_deviations_of_the_calm_steps() -> None:
    draw, stability = random.Random(3), rule(on_spike="skip", spike_window=10, spike_deviations=2.5)
    calm: list[tuple[float, float]] = []
    counted = {"loss": 0, "norm": 0, "early": 0}
    for step in range(400):
        loss, norm = draw.gauss(3.0, 0.1), draw.lognormvariate(0.0, 0.3)
        found = stability.judge(loss, norm, finite=True)
        spike = False
        if len(calm) >= 5:
            window = np.array(calm[-10:], dtype=np.float64)
            bars = window.mean(axis=0) + 2.5 * window.std(axis=0, ddof=1)
            spike = bool(loss > bars[0] or norm > bars[1])
            counted["loss"] += loss > bars[0]
            counted["norm"] += norm > bars[1]
            if found:
                assert [found.loss.limit, found.gradient_norm.limit] == pytest.approx(bars.tolist(), rel=1e-12)
                assert found.loss.mean == pytest.approx(window[:, 0].mean(), rel=1e-12)
                assert found.loss.deviation == pytest.approx(window[:, 0].std(ddof=1), rel=1e-9)
        else:
            counted["early"] += 1
        assert (found is not None) == spike, step
        if not spike:
            calm.append((loss, norm))
    assert counted["early"] == 5 and counted["loss"] > 5 and counted["norm"] > 5


def test_no_step_before_half_a_window_is_a_spike_and_a_fall_never_is() -> None:
    stability = rule(on_spike="stop", spike_window=8)
    for loss in (5.0, 5.1, 5.0, 500.0):  # the fourth calm one fills the half
        assert stability.judge(loss, 1.0, finite=True) is None
    stability = rule(on_spike="stop", spike_window=8)
    for loss in (5.0, 5.1, 5.0, 4.9):
        assert stability.judge(loss, 1.0, finite=True) is None
    assert stability.judge(-500.0, 0.0, finite=True) is None
    assert stability.judge(5e4, 1.0, finite=True) is not None


def test_where_nothing_varies_a_last_bit_is_no_spike_and_a_leap_is() -> None:
    for above, spike in ((nextafter(2.0, 3.0), False), (2.0 * (1 + 5.9 / 1024), False), (2.0 * (1 + 6.1 / 1024), True)):
        stability = rule(on_spike="skip", spike_window=4)
        for _ in range(4):
            assert stability.judge(2.0, 0.0, finite=True) is None
        assert (stability.judge(above, 0.0, finite=True) is not None) == spike, above
    stability = rule(on_spike="skip", spike_window=4)
    for _ in range(4):
        stability.judge(2.0, 0.0, finite=True)
    assert stability.judge(2.0, 1e-3, finite=True) is None  # beside zeros nothing is large or small


def test_neither_spikes_nor_what_is_not_finite_are_remembered() -> None:
    for keys in ({"on_spike": "skip"}, {"on_spike": "note"}, {"on_spike": "lower"}):
        stability = rule(spike_window=4, on_nonfinite="skip", **keys)
        for loss in (2.0, 2.1, 2.0, 2.1):
            stability.judge(loss, 1.0, finite=True)
        before = stability.facts()
        assert stability.judge(90.0, 1.0, finite=True) is not None
        assert stability.judge(2.0, nan, finite=False) is not None
        assert stability.judge(2.0, 1.0, finite=False) is not None  # NaN within, though both figures are finite
        after = stability.facts()
        assert (after["losses"], after["gradient_norms"]) == (before["losses"], before["gradient_norms"])


def test_as_many_noted_steps_in_a_row_as_would_end_a_run_are_a_new_level() -> None:
    stability = rule(spike_window=4, max_consecutive=3)
    for loss in (2.0, 2.1, 2.0, 2.1):
        stability.judge(loss, 1.0, finite=True)
    found = [stability.judge(9.0 + step % 2, 1.0, finite=True) is not None for step in range(20)]
    assert found == [True] * 3 + [False] * 17
    broken = rule(spike_window=4, max_consecutive=3)
    for loss in (2.0, 2.1, 2.0, 2.1):
        broken.judge(loss, 1.0, finite=True)
    # A calm step between them: not in a row.
    assert [broken.judge(loss, 1.0, finite=True) is not None for loss in (9, 9, 2.05, 9, 9, 2.05, 9)] == [
        True, True, False, True, True, False, True,
    ]  # fmt: skip


def test_what_a_checkpoint_keeps_of_the_numbers_is_every_bit() -> None:
    draw, one = random.Random(5), rule(on_spike="lower", spike_window=16, spike_deviations=1.5, max_consecutive=40)
    for _ in range(60):
        one.judge(draw.gauss(3, 0.1), draw.gauss(1, 0.1), finite=True)
    other = Stability(one.section)
    other.restore(json.loads(json.dumps(one.facts())))
    assert other.facts() == one.facts() and one.rate_scale < 1
    for _ in range(60):
        figures = draw.gauss(3, 0.1), draw.gauss(1, 0.1)
        assert one.judge(*figures, finite=True) == other.judge(*figures, finite=True)


# A run


@pytest.mark.parametrize("rule", ["skip", "lower"])
@pytest.mark.parametrize(
    ("leaps", "nans", "precision"), [((4,), (), "bf16"), ((), (4,), "bf16"), ((4, 6), (5,), "fp8")]
)
def test_a_refused_step_leaves_no_trace_but_the_lower_rate(
    leaps: tuple[int, ...],
    nans: tuple[int, ...],
    rule: str,
    precision: str,
    recipe_with: RecipeWith,
    dataset_of: DatasetOf,
    tmp_path: Path,
) -> None:
    recipe = recipe_of(recipe_with, precision=precision, on_spike=rule, on_nonfinite=rule, lower_factor=0.25)
    dataset = dataset_of(recipe)
    trainer = new(recipe, tmp_path / "run", dataset, leaps, nans)
    assert trainer.run() == "finished"
    refused = sorted({*leaps, *nans})
    assert unstable(tmp_path / "run") == [(step, "skipped" if rule == "skip" else "lowered") for step in refused]
    scale = {step: 0.25 ** sum(r < step for r in refused) if rule == "lower" else 1.0 for step in range(8)}
    assert_same(everything(trainer), plain_loop(recipe, dataset, set(refused), scale))
    events = list(read_events(tmp_path / "run" / "events.jsonl", "step"))
    assert [e["learning_rate"] for e in events] == [recipe.optimizer.learning_rate.at(s) * scale[s] for s in range(8)]
    assert (trainer.step, trainer.position, trainer.tokens) == (8, 8 * 4, 8 * 4 * 16)  # the batch is consumed


@pytest.mark.parametrize("measured", [0, 1])
def test_noting_a_spike_changes_no_bit_of_the_run_nor_what_it_tells(
    measured: int, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    noting = recipe_of(recipe_with)
    noting = noting.model_copy(update={"training": noting.training.model_copy(update={"health_interval": measured})})
    blind = noting.model_copy(update={"stability": StabilitySection()})  # whose window never fills
    dataset = dataset_of(noting)
    one, two = new(noting, tmp_path / "one", dataset, (4, 5)), new(blind, tmp_path / "two", dataset, (4, 5))
    one.run()
    two.run()
    assert unstable(tmp_path / "one") == [(4, "noted"), (5, "noted")] and unstable(tmp_path / "two") == []
    assert (tmp_path / "one" / "evidence" / "step-4.json").is_file()
    assert_same(everything(one), everything(two))
    kinds = ("step", "load", "health", "validation")
    assert facts(tmp_path / "one" / "events.jsonl", *kinds) == facts(tmp_path / "two" / "events.jsonl", *kinds)


def test_the_defaults_stop_at_nan_before_the_optimizer_and_say_which_key_goes_on(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with)
    trainer = new(recipe, tmp_path / "run", dataset_of(recipe), (), (3,))
    with pytest.raises(NonFinite, match=r'step 3: not finite.*(?s:.*)stability\.on_nonfinite = "skip"') as error:
        trainer.run()
    assert_same(everything(trainer), plain_loop(recipe, dataset_of(recipe), set(range(3, 8)), {}))
    assert trainer.step == 3
    found = RunFolder.open(tmp_path / "run").state()
    assert (found["state"], found["nonfinite"], found["stopped"]) == ("failed", error.value.where, error.value.reason)


def test_a_stopped_run_goes_on_once_its_recipe_leaves_such_steps_out(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with)
    dataset = dataset_of(recipe)
    with pytest.raises(NonFinite, match=r"recipe\.toml of this run before --resume"):
        new(recipe, tmp_path / "run", dataset, (), (3,)).run()
    run = RunFolder.open(tmp_path / "run")
    run.recipe_path.write_text(run.recipe_path.read_text().replace('on_nonfinite = "stop"', 'on_nonfinite = "skip"'))
    latest = run.latest_checkpoint()
    assert latest is not None
    again = poison(Trainer.resume(run, dataset, latest[1]), {}, (3,))
    assert again.run() == "finished"
    assert_same(everything(again), plain_loop(recipe, dataset, {3}, {}))
    assert unstable(run.path) == [(3, "skipped")]


def test_a_spike_can_stop_the_run_before_the_optimizer(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, on_spike="stop")
    trainer = new(recipe, tmp_path / "run", dataset_of(recipe), (5,))
    with pytest.raises(Stopped, match=r'step 5: a spike, .* above .*(?s:.*)stability\.on_spike = "skip"'):
        trainer.run()
    assert_same(everything(trainer), plain_loop(recipe, dataset_of(recipe), set(range(5, 8)), {}))
    run = RunFolder.open(tmp_path / "run")
    (end,) = read_events(run.events_path, "end")
    assert (run.state()["state"], run.state()["stopped"]) == ("failed", end["reason"])
    assert end["reason"].startswith("a spike, ") and unstable(run.path) == [(5, "stopped")]


def test_so_many_refused_steps_in_a_row_end_the_run_and_fewer_do_not(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, on_nonfinite="skip", on_spike="lower", max_consecutive=3)
    dataset = dataset_of(recipe)
    assert new(recipe, tmp_path / "fewer", dataset, (3, 7), (4, 6)).run() == "finished"
    trainer = new(recipe, tmp_path / "run", dataset, (4,), (3, 5))
    with pytest.raises(Stopped, match=r"step 5: 3 steps in a row.*max_consecutive = 3.*the last one: not finite in"):
        trainer.run()
    assert unstable(tmp_path / "run") == [(3, "skipped"), (4, "lowered"), (5, "stopped")]
    assert trainer.step == 5
    # Going on in the middle of them counts those before.
    run = RunFolder.open(tmp_path / "run")
    again = poison(Trainer.resume(run, dataset, run.checkpoint_path(4)), {4: LEAP}, (3, 5))
    with pytest.raises(Stopped, match="step 5: 3 steps in a row"):
        again.run()


def test_going_on_around_refused_steps_is_bit_exact(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, on_nonfinite="lower", on_spike="skip")
    dataset = dataset_of(recipe)
    whole = new(recipe, tmp_path / "whole", dataset, (4, 7), (5,))
    whole.run()
    assert unstable(tmp_path / "whole") == [(4, "skipped"), (5, "lowered"), (7, "skipped")]
    kinds = ("step", "load", "health", "validation", "unstable")
    for step in (3, 4, 5, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from-{step}")
        run = RunFolder.open(tmp_path / f"from-{step}")
        again = poison(Trainer.resume(run, dataset, run.checkpoint_path(step)), {4: LEAP, 7: LEAP}, (5,))
        assert again.run() == "finished"
        assert_same(everything(again), everything(whole))
        assert facts(run.events_path, *kinds) == facts(tmp_path / "whole" / "events.jsonl", *kinds)
        assert again.stability.facts() == whole.stability.facts()
    assert whole.stability.facts()["rate_scale"] == 0.5
