"""The evidence of an unstable step names what hurt, is bounded, and never stands in the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tessera.data import Batch, Dataset
from tessera.recipe import Recipe, UserError
from tessera.store import EventWriter, RunFolder, read_events, write_json
from tessera.training import evidence
from tessera.training.nonfinite import NonFinite
from tessera.training.trainer import Trainer
from tests.training.poison import ROW, poisoned_sequence, position_of
from tests.training.test_stability import new, recipe_of

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]


def read(folder: Path, step: int) -> dict[str, Any]:
    found = json.loads((folder / "evidence" / f"step-{step}.json").read_text())
    assert isinstance(found, dict)
    return found


def event(folder: Path, kind: str, step: int) -> dict[str, Any]:
    (found,) = (e for e in read_events(folder / "events.jsonl", kind) if e["step"] == step)
    return found


@pytest.mark.parametrize("cross", [False, True])
def test_a_spikes_file_has_its_figures_its_batch_and_the_sequence_that_made_it(
    cross: bool, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, on_spike="skip", steps=6)
    data = recipe.data.model_copy(update={"cross_document_attention": cross})
    recipe = recipe.model_copy(update={"data": data})
    dataset = dataset_of(recipe)
    trainer = new(recipe, tmp_path / "run", dataset, (4,))
    norms: dict[str, float] = {}
    each: list[float] = []

    def watch(total: Tensor) -> Tensor:
        if trainer.step == 4:
            norms.update({n: float(p.grad.norm()) for n, p in trainer.model.named_parameters() if p.grad is not None})
            batch = dataset.train.batch(trainer.position, 4)
            with torch.no_grad():
                for row in range(4):
                    ids = None if cross else batch.document_ids[row : row + 1]
                    hidden = trainer.model(batch.tokens[row : row + 1], document_ids=ids).hidden
                    logits = trainer.model.logits(hidden).flatten(0, 1)
                    each.append(float(cross_entropy(logits, batch.targets[row])))
        return total

    real = trainer.optimizer.gradient_norm
    trainer.optimizer.gradient_norm = lambda: watch(real())  # type: ignore[method-assign]
    trainer.run()
    found, told, step = (
        read(tmp_path / "run", 4),
        event(tmp_path / "run", "unstable", 4),
        event(tmp_path / "run", "step", 4),
    )

    assert (found["finding"], found["rule"], found["decision"]) == ("spike", 'stability.on_spike = "skip"', "skipped")
    assert told["evidence"] == "evidence/step-4.json" and "evidence_error" not in told
    assert {key: found[key] for key in ("loss", "gradient_norm", "reason", "rate_scale")} == {
        key: told[key] for key in ("loss", "gradient_norm", "reason", "rate_scale")
    }
    steps = list(read_events(tmp_path / "run" / "events.jsonl", "step"))
    calm = torch.tensor([e["gradient_norm"] for e in steps[:4]], dtype=torch.float64)
    assert found["loss"]["value"] == step["lm_loss"] == found["losses"]["lm"]
    assert found["gradient_norm"]["value"] == step["gradient_norm"]
    assert found["gradient_norm"]["mean"] == pytest.approx(float(calm.mean()))
    assert found["gradient_norm"]["deviation"] == pytest.approx(float(calm.std()))
    assert (found["losses"]["total"], found["losses"]["balance"]) == (step["loss"], step["balance_loss"])
    assert found["losses"]["mtp"] == [pytest.approx(step["mtp_loss"])]
    assert found["learning_rate"] == recipe.optimizer.learning_rate.at(4) == step["learning_rate"]

    batch = dataset.train.batch(position_of(recipe, 4), 4)
    sequences = found["batch"]["sequences"]
    assert (found["batch"]["position"], found["batch"]["size"], found["batch"]["left_out"]) == (16, 4, 0)
    assert sequences[0]["position"] == 16 + ROW
    assert sequences[0]["tokens"] == poisoned_sequence(recipe, dataset, 4).tolist()
    assert sequences[0]["text"] == dataset.tokenizer.decode(sequences[0]["tokens"])
    by_row = sorted(sequences, key=lambda one: one["position"])
    assert [one["tokens"] for one in by_row] == batch.tokens.tolist()
    assert [one["document_ids"] for one in by_row] == batch.document_ids.tolist()
    assert [one["loss"] for one in by_row] == pytest.approx(each, rel=1e-5)
    assert [one["loss"] for one in sequences] == sorted((one["loss"] for one in sequences), reverse=True)

    given = found["parameters"]["gradient_norms"]
    assert given == pytest.approx(norms) and list(given.values()) == sorted(given.values(), reverse=True)
    health = event(tmp_path / "run", "health", 4)["tensors"]
    assert found["tensors"]["health"] == health and len(health) > 10


def test_a_poisoned_batch_and_the_place_where_it_broke_are_named(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, steps=6)
    dataset = dataset_of(recipe)
    trainer = new(recipe, tmp_path / "run", dataset, (), (3,))
    with pytest.raises(NonFinite) as error:
        trainer.run()
    found = read(tmp_path / "run", 3)
    assert (found["finding"], found["decision"]) == ("nonfinite", "stopped")
    assert error.value.where.startswith("model.layers.1.") and found["reason"] == f"not finite in {error.value.where}"
    worst, *rest = found["batch"]["sequences"]
    assert (worst["position"], worst["loss"]) == (12 + ROW, "nan")
    assert worst["tokens"] == poisoned_sequence(recipe, dataset, 3).tolist()
    assert all(isinstance(one["loss"], float) for one in rest)
    assert found["loss"]["value"] == "nan" and found["gradient_norm"]["value"] == "nan"
    named, count = next(iter(found["tensors"]["nonfinite"].items()))
    assert error.value.where == f"{named} ({count} values)"


def test_the_poisoned_parameters_gradient_comes_first(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_with, on_nonfinite="skip", steps=4)
    trainer = new(recipe, tmp_path / "run", dataset_of(recipe), ())
    name = "model.layers.1.self_attn.o_proj.weight"
    dict(trainer.model.named_parameters())[name].register_hook(lambda g: g * torch.inf if trainer.step == 2 else g)
    trainer.run()
    found = read(tmp_path / "run", 2)
    assert found["reason"] == f"not finite in the gradient of {name}"
    first, norm = next(iter(found["parameters"]["gradient_norms"].items()))
    assert (first, norm) == (name, "nan")  # 0 times infinity
    assert all(isinstance(one["loss"], float) for one in found["batch"]["sequences"])


def test_a_step_that_was_not_measured_says_so(recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path) -> None:
    recipe = recipe_of(recipe_with, steps=6)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"health_interval": 0})})
    new(recipe, tmp_path / "run", dataset_of(recipe), (4,)).run()
    assert read(tmp_path / "run", 4)["tensors"] == {"health": None, "nonfinite": {}, "left_out": 0}


def test_a_file_is_bounded_whatever_the_model_and_the_batch(
    dataset_of: DatasetOf, recipe_with: RecipeWith, tmp_path: Path
) -> None:
    tokenizer = dataset_of(recipe_with()).tokenizer
    shape = (4000, 128)
    batch = Batch(torch.full(shape, 319), torch.full(shape, 319), torch.full(shape, 12, dtype=torch.int32))
    losses = [float(row % 1000) for row in range(4000)]
    described = evidence.describe_batch(batch, losses, 1_000_000_000, tokenizer)
    assert (
        len(described["sequences"]) == evidence.MAX_SEQUENCES and described["left_out"] == 4000 - evidence.MAX_SEQUENCES
    )
    assert [one["loss"] for one in described["sequences"][:5]] == [999.0, 999.0, 999.0, 999.0, 998.0]
    kept = sum(len(one.get("tokens", [])) for one in described["sequences"])
    assert kept == evidence.MAX_TOKENS and described["tokens_left_out"] == batch.tokens.numel() - kept
    assert sum("text" in one for one in described["sequences"]) == evidence.MAX_TEXTS

    model = nn.Module()
    for i in range(3000):
        weight = nn.Parameter(torch.zeros(1))
        weight.grad = torch.full((1,), float(i))
        model.register_parameter(f"a_name_as_long_as_those_of_the_largest_models_{i}", weight)
    given = evidence.gradient_norms(model)
    assert (len(given["gradient_norms"]), given["left_out"]) == (evidence.MAX_NAMES, 3000 - evidence.MAX_NAMES)
    assert next(iter(given["gradient_norms"].values())) == 2999.0
    write_json(tmp_path / "whole.json", {"batch": described, "parameters": given})
    assert (tmp_path / "whole.json").stat().st_size < 2**20

    # One sequence that alone is longer than all that is kept.
    long = Batch(*(torch.zeros(1, evidence.MAX_TOKENS + 7, dtype=torch.int64) for _ in range(3)))
    described = evidence.describe_batch(long, [1.0], 0, tokenizer)
    assert described["tokens_left_out"] == 7 and len(described["sequences"][0]["text"]) <= evidence.MAX_CHARACTERS


def full_disk(*_: object, **__: object) -> None:
    raise UserError("evidence: cannot be written: No space left on device")


def test_a_disk_without_room_for_evidence_neither_ends_a_run_nor_hides_why_it_ends(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "write_json", full_disk)
    recipe = recipe_of(recipe_with, on_spike="skip", steps=6)
    dataset = dataset_of(recipe)
    assert new(recipe, tmp_path / "skips", dataset, (4,)).run() == "finished"
    told = event(tmp_path / "skips", "unstable", 4)
    assert (told["evidence"], told["decision"]) == (None, "skipped") and "No space left" in told["evidence_error"]

    stops = new(recipe, tmp_path / "stops", dataset, (), (3,))
    with pytest.raises(NonFinite, match="step 3"):
        stops.run()
    assert "No space left" in event(tmp_path / "stops", "unstable", 3)["evidence_error"]

    real = EventWriter.write

    def no_room(writer: EventWriter, kind: str, step: int, **fields: Any) -> None:
        if kind in ("unstable", "end"):
            full_disk()
        real(writer, kind, step, **fields)

    monkeypatch.setattr(EventWriter, "write", no_room)
    silent = new(recipe, tmp_path / "silent", dataset, (), (3,))
    with pytest.raises(NonFinite, match="step 3"):
        silent.run()
    assert RunFolder.open(tmp_path / "silent").state()["state"] == "failed"


def test_evidence_that_cannot_be_made_is_told_too(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> list[float]:
        raise torch.OutOfMemoryError("one forward pass too many")

    monkeypatch.setattr(evidence, "sequence_losses", no_memory)
    recipe = recipe_of(recipe_with, steps=6)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), dataset_of(recipe))
    name = "lm_head.weight"
    dict(trainer.model.named_parameters())[name].register_hook(lambda g: g * 1e6 if trainer.step == 4 else g)
    assert trainer.run() == "finished"
    assert event(tmp_path / "run", "unstable", 4)["evidence_error"] == "OutOfMemoryError: one forward pass too many"
