"""The loop: exact resume, stages, stopping, and what it writes on the way."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.data import Dataset
from tessera.model.weights import weights
from tessera.ops.keep import Keep
from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder, read_events
from tessera.store.checkpoint_path import TENSORS
from tessera.store.files import unwritable
from tessera.training import checkpoint
from tessera.training.nonfinite import NonFinite
from tessera.training.trainer import Trainer
from tests.training.conftest import broken_at_step_4

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]
MEASURED = ("time", "tokens_per_s", "mfu", "seconds", "peak_flops")  # of the clock, not of the arithmetic


def trained(recipe: Recipe, folder: Path, dataset: Dataset, **options: Any) -> Trainer:
    trainer = Trainer(recipe, RunFolder.create(folder, recipe), dataset, **options)
    trainer.run()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**weights(trainer.model), **trainer.optimizer.tensors()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def facts(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in MEASURED} for e in read_events(path, *kinds)]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_resume_is_bit_exact(precision: str, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_with(numerics={"precision": precision}, training={"micro_batch_size": 2})
    dataset = dataset_of(recipe)
    whole = trained(recipe, tmp_path / "whole", dataset)

    broken = tmp_path / "broken"
    run, latest = broken_at_step_4(recipe, broken, dataset)
    second = Trainer.resume(run, dataset, latest)
    second.run()
    assert_same(state(whole), state(second))
    kinds = ("step", "load", "health", "validation", "checkpoint")
    assert [e["step"] for e in facts(broken / "events.jsonl", "checkpoint")] == [2, 4, 6]  # also the one gone on from
    assert facts(broken / "events.jsonl", *kinds) == facts(tmp_path / "whole" / "events.jsonl", *kinds)


def test_the_memory_switches_reach_the_model(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    ends = []
    for name, memory in (
        ("on", {}),
        ("lossless", {"recompute_norms": False, "regather_tokens": False}),
        ("lossy", {"fp8_swiglu_inputs": False}),
    ):
        recipe = recipe_with(memory=memory, training={"steps": 3})
        trainer = trained(recipe, tmp_path / name, dataset_of(recipe))
        assert trainer.model.keep == Keep(**recipe.memory.model_dump())
        ends.append(state(trainer))
    assert_same(ends[0], ends[1])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_measuring_health_and_validating_do_not_change_the_weights(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    quiet = recipe_with(training={"health_interval": 0, "validation_interval": 0, "load_interval": 0})
    curious = recipe_with(training={"health_interval": 1, "validation_interval": 1, "load_interval": 1})
    dataset = dataset_of(quiet)
    one, two = trained(quiet, tmp_path / "quiet", dataset), trained(curious, tmp_path / "curious", dataset)
    assert_same(state(one), state(two))


def test_every_promised_event_is_written(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_with()
    trained(recipe, tmp_path / "run", dataset_of(recipe))
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    steps = {kind: [e["step"] for e in events if e["kind"] == kind] for kind in {e["kind"] for e in events}}
    assert steps["step"] == [0, 1, 2, 3, 4, 5]
    assert steps["load"] == [0, 2, 4, 5]
    assert steps["health"] == [0, 4, 5]
    assert steps["validation"] == [3, 6]
    assert steps["checkpoint"] == [2, 4, 6]
    load = next(e for e in events if e["kind"] == "load")
    assert [sum(counts) for counts in load["counts"]] == [4 * 16 * 2] * len(load["layers"])
    health = next(e for e in events if e["kind"] == "health")["tensors"]
    assert any(name.endswith("gradient_columns") for name in health)
    assert any(t["rounded_twice"] is not None for t in health.values())
    assert events[-1]["reason"] == "finished"
    assert RunFolder.open(tmp_path / "run").state()["state"] == "finished"


def test_the_bias_moves_against_the_load_once_a_step(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 1, "load_interval": 1, "bias_update_speed": 0.01, "micro_batch_size": 1})
    trainer = trained(recipe, tmp_path / "run", dataset_of(recipe))
    (load,) = read_events(tmp_path / "run" / "events.jsonl", "load")
    for (_, router), counts in zip(trainer.model.routers(), load["counts"], strict=True):
        mean = sum(counts) / len(counts)
        expected = [0.01 * ((mean > c) - (mean < c)) for c in counts]
        assert router.e_score_correction_bias.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parameter", "value", "named"),
    [
        ("model.layers.1.mlp.experts.down_proj", torch.inf, "the weight model.layers.1.mlp.experts.down_proj"),
        ("lm_head.weight", torch.nan, "the weight lm_head.weight"),
        ("model.layers.0.input_layernorm.weight", 3e38, "model.layers.0.self_attn"),  # overflows in the activations
        ("model.norm.weight", 3e38, "model.layers.2"),  # behind the trunk: the first FP8 operand is the MTP block's
    ],
)
def test_a_non_finite_step_stops_before_the_optimizer_and_names_the_place(
    parameter: str, value: float, named: str, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with()
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    with torch.no_grad():
        dict(trainer.model.named_parameters())[parameter].view(-1)[5] = value
    before = {name: t.clone() for name, t in state(trainer).items()}
    with pytest.raises(NonFinite) as error:
        trainer.run()
    assert named in error.value.where
    after = state(trainer)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert RunFolder.open(tmp_path / "run").state()["state"] == "failed"


def test_bf16_runs_name_the_module_too(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_with(numerics={"precision": "bf16"})
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    with torch.no_grad():
        dict(trainer.model.named_parameters())["model.layers.1.input_layernorm.weight"][0] = 3e38
    with pytest.raises(NonFinite, match=r"the output of model\.layers\.1"):
        trainer.run()


def test_a_signal_finishes_the_step_and_keeps_a_checkpoint(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(checkpoint={"interval": 0})
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset)

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.observer = interrupt
    assert trainer.run() == "interrupted"
    run = RunFolder.open(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()] == [3]
    latest = run.latest_checkpoint()
    assert latest is not None
    resumed = Trainer.resume(run, dataset, latest[1])
    assert resumed.run() == "finished"
    whole = trained(recipe, tmp_path / "whole", dataset)
    assert_same(state(whole), state(resumed))


def test_a_new_stage_takes_weights_and_biases_and_starts_its_own_clock(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with()
    first = trained(recipe, tmp_path / "first", dataset_of(recipe))
    longer = recipe_with(data={"sequence_length": 24}, training={"steps": 2})
    second = Trainer(longer, RunFolder.create(tmp_path / "second", longer), dataset_of(longer))
    second.start_from(tmp_path / "first" / "checkpoints" / "step-6")
    assert_same(weights(first.model), weights(second.model))
    assert (second.step, second.position, second.optimizer.steps) == (0, 0, 0)
    assert second.run() == "finished"


def test_weights_of_another_shape_are_refused_by_name(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 1})
    trained(recipe, tmp_path / "run", dataset_of(recipe))
    wider = recipe_with(model={"moe_intermediate_size": 32})
    trainer = Trainer(wider, RunFolder.create(tmp_path / "wider", wider), dataset_of(wider))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp.*\(4, 48, 32\).*\(4, 64, 32\)"):
        trainer.start_from(tmp_path / "run" / "checkpoints" / "step-1")


def test_a_damaged_checkpoint_is_refused_by_file_name(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 1})
    trained(recipe, tmp_path / "run", dataset_of(recipe))
    path = tmp_path / "run" / "checkpoints" / "step-1"
    data = bytearray((path / "optimizer" / TENSORS).read_bytes())
    data[-1] ^= 1
    (path / "optimizer" / TENSORS).write_bytes(data)
    with pytest.raises(UserError, match=rf"optimizer/{TENSORS}"):
        checkpoint.read_state(path)


def test_a_checkpoint_of_a_newer_tessera_is_refused(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    from tessera.store import write_manifest

    recipe = recipe_with(training={"steps": 1})
    trained(recipe, tmp_path / "run", dataset_of(recipe))
    path = tmp_path / "run" / "checkpoints" / "step-1"
    facts = json.loads((path / "state.json").read_text()) | {"schema": 99}
    (path / "state.json").write_text(json.dumps(facts))
    write_manifest(path)
    with pytest.raises(UserError, match="newer tessera"):
        checkpoint.read_state(path)


def test_a_run_does_not_go_on_with_other_text(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_with(training={"steps": 1})
    trained(recipe, tmp_path / "run", dataset_of(recipe))
    run = RunFolder.open(tmp_path / "run")
    other = dataset_of(recipe_with(data={"seed": 1}))
    with pytest.raises(UserError, match="other text"):
        Trainer.resume(run, other, run.checkpoint_path(1))


def test_numerics_without_a_backward_pass_are_refused_at_the_start(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(numerics={"tiles": "row", "accumulation": "hopper"})
    with pytest.raises(UserError, match="no backward"):
        Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))


def test_only_the_latest_checkpoints_and_the_milestones_are_kept(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with(checkpoint={"interval": 1, "keep_latest": 2})
    trained(recipe, tmp_path / "run", dataset_of(recipe), milestones=(2,))
    run = RunFolder.open(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()] == [2, 5, 6]


def test_a_perturbation_moves_every_master_by_the_last_places_and_depends_on_its_seed(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_with()
    dataset = dataset_of(recipe)
    trainers = [Trainer(recipe, RunFolder.create(tmp_path / str(i), recipe), dataset) for i in range(3)]
    before = {name: p.detach().clone() for name, p in trainers[0].model.named_parameters()}
    trainers[0].perturb(1)
    trainers[1].perturb(2)
    signs = []
    for name, p in trainers[0].model.named_parameters():
        moved = (p.detach().double() / before[name].double() - 1)[before[name] != 0]
        assert torch.allclose(moved.abs(), torch.full_like(moved, 2.0**-20), rtol=0.2), name
        signs.append(moved.flatten() > 0)
    assert 0.4 < float(torch.cat(signs).float().mean()) < 0.6
    other = dict(trainers[1].model.named_parameters())
    assert not torch.equal(trainers[0].model.lm_head.weight, other["lm_head.weight"])
    assert torch.equal(before["lm_head.weight"], trainers[2].model.lm_head.weight.detach())


def test_a_divergence_is_told_in_the_runs_files(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_with()
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe), arm="bf16")
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(NonFinite):
        trainer.run()
    found = RunFolder.open(tmp_path / "run").state()
    assert (found["state"], found["arm"], found["nonfinite"]) == ("failed", "bf16", "the weight lm_head.weight")
    (end,) = read_events(tmp_path / "run" / "events.jsonl", "end")
    assert end["reason"] == "not finite in the weight lm_head.weight"


def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_no_half_one(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with()
    dataset = dataset_of(recipe)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset)
    real = checkpoint.write_tensors

    def full(folder: Path, *arguments: Any) -> None:
        if "step-4" in folder.parent.name and folder.name == "optimizer":
            folder.mkdir()
            (folder / TENSORS).write_bytes(b"half of it")
            raise unwritable(folder / TENSORS, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        real(folder, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)

    set_state = trainer.run_folder.set_state

    def no_room(state: Any, step: int, **facts: Any) -> None:
        if state == "failed":
            raise OSError("an echo of the first error")
        set_state(state, step, **facts)

    monkeypatch.setattr(trainer.run_folder, "set_state", no_room)
    with pytest.raises(UserError, match=rf"optimizer/{TENSORS}: cannot be written: No space left"):
        trainer.run()
    run = RunFolder.open(tmp_path / "run")
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-2"]
    latest = run.latest_checkpoint()
    assert latest is not None
    monkeypatch.setattr(checkpoint, "write_tensors", real)  # there is room again
    resumed = Trainer.resume(run, dataset, latest[1])
    assert resumed.run() == "finished"
    assert_same(state(resumed), state(trained(recipe, tmp_path / "whole", dataset)))
