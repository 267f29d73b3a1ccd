"""Validation against plain loops in float64: loss, bits per byte, drafts that greedy decoding would accept."""

import random
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.data import Batch, Dataset, prepare
from tessera.model import Transformer
from tessera.ops.chunked_loss import IGNORED
from tessera.recipe import Recipe
from tessera.store import RunFolder, read_events
from tessera.training.trainer import Trainer
from tessera.training.validation import Validation, held_out, validate
from tests.training.conftest import make_recipe

DEPTHS = 2
WORDS = [
    "tile",
    "scale",
    "expert",
    "token",
    "route",
    "gradient",
    "weight",
    "sum",
    "FP8",
    "def",
    "return",
    "self",
    "né",
    "=",
]
CHANGES: dict[str, dict[str, Any]] = {
    "model": {"num_nextn_predict_layers": DEPTHS},
    "numerics": {"precision": "fp32"},
    "data": {"cross_document_attention": False},
    "optimizer": {"learning_rate": 1e-2},
    "training": {"steps": 20, "validation_interval": 20, "micro_batch_size": 2},
    "checkpoint": {"interval": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Dataset, Recipe]:
    """A model that knows enough for some drafts to be accepted, and some not; documents shorter than a sequence."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for number in range(200):
        words = draw.choices(WORDS, k=draw.randint(2, 6))
        (folder / "text" / f"{number:03d}.txt").write_text(" ".join(words) + "\n")
    recipe = make_recipe(folder, CHANGES)
    assert recipe.data.cache is not None
    dataset = prepare(recipe.data, recipe.model.vocab_size, Path(recipe.data.cache))
    trainer = Trainer(recipe, RunFolder.create(tmp_path_factory.mktemp("runs") / "run", recipe), dataset)
    trainer.run()
    return trainer, dataset, recipe


@torch.no_grad()
def slow(model: Transformer, batches: list[Batch], token_bytes: np.ndarray, masked: bool) -> dict[str, Any]:
    """One position at a time."""
    nats = tokens = size = 0.0
    draft_nats, drafts, accepted = [0.0] * DEPTHS, [0] * DEPTHS, [0] * DEPTHS
    for batch in batches:
        ids = batch.document_ids if masked else None
        output = model(batch.tokens, document_ids=ids)
        main = model.logits(output.hidden).double().log_softmax(dim=-1)
        rows, length = batch.tokens.shape
        for row in range(rows):
            for i in range(length):
                target = int(batch.targets[row, i])
                if target != IGNORED:
                    nats -= float(main[row, i, target])
                    tokens += 1
                    size += int(token_bytes[target])
        for depth in range(1, DEPTHS + 1):
            embedded = torch.zeros_like(batch.targets)
            whole: list[tuple[int, int]] = []
            for row in range(rows):
                for i in range(length):
                    path = batch.targets[row, i : i + depth + 1].tolist()
                    if len(path) == depth + 1 and IGNORED not in path:
                        whole.append((row, i))
                        embedded[row, i] = path[depth - 1]
            output = model.draft(depth, output.carry, embedded, document_ids=ids)
            draft = model.logits(output.hidden).double().log_softmax(dim=-1)
            for row, i in whole:
                draft_nats[depth - 1] -= float(draft[row, i, batch.targets[row, i + depth]])
                drafts[depth - 1] += 1
                # What the draft makes at i and the head makes at i + depth is the token at i + depth + 1.
                accepted[depth - 1] += int(draft[row, i].argmax()) == int(main[row, i + depth].argmax())
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / log(2) / size,
        "mtp_loss": [n / d for n, d in zip(draft_nats, drafts, strict=True)],
        "mtp_acceptance": [a / d for a, d in zip(accepted, drafts, strict=True)],
        "tokens": tokens,
        "bytes": size,
    }


def assert_equal(found: Validation, owed: dict[str, Any]) -> None:
    facts = found.facts()
    assert facts.keys() == owed.keys()
    for name, value in owed.items():
        assert facts[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("masked", [True, False])
def test_every_figure_is_that_of_a_plain_loop(masked: bool, trained: tuple[Trainer, Dataset, Recipe]) -> None:
    trainer, dataset, recipe = trained
    batches = held_out(dataset, recipe, 3)
    assert any(bool((b.document_ids != b.document_ids[:, :1]).any()) for b in batches)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:  # also within words, where a draft that does not count may well be right
        batch.targets[torch.rand(batch.targets.shape, generator=generator) < 0.2] = IGNORED
    found = validate(trainer.model, batches, dataset.token_bytes, masked=masked)
    owed = slow(trainer.model, batches, dataset.token_bytes, masked)
    assert_equal(found, owed)
    assert all(0 < share < 1 for share in found.mtp_acceptance)
    assert len(set(found.mtp_acceptance)) == DEPTHS


def test_the_trainers_validation_masks_documents_as_its_training_does(
    trained: tuple[Trainer, Dataset, Recipe], dataset_of: Callable[[Recipe], Dataset], tmp_path: Path
) -> None:
    trainer, _, recipe = trained
    seen = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cross_document_attention": True})})
    other = Trainer(seen, RunFolder.create(tmp_path / "run", seen), dataset_of(seen))
    other.start_from(trainer.run_folder.checkpoint_path(recipe.training.steps))
    for one, masked in ((trainer, True), (other, False)):
        batches = held_out(one.dataset, one.recipe, one.recipe.training.validation_batches)
        owed, otherwise = (slow(one.model, batches, one.dataset.token_bytes, m) for m in (masked, not masked))
        assert owed["loss"] != pytest.approx(otherwise["loss"], rel=1e-4)
        assert_equal(one.validate(), owed)


def test_the_event_of_a_validation_holds_its_figures(trained: tuple[Trainer, Dataset, Recipe]) -> None:
    trainer, _, _ = trained
    (event,) = read_events(trainer.run_folder.events_path, "validation")
    figures = trainer.validate().facts()
    assert {name: event[name] for name in figures} == figures


def test_validation_never_takes_more_sequences_at_once_than_training(
    trained: tuple[Trainer, Dataset, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, _ = trained
    seen: list[int] = []
    forward = trainer.model.forward

    def watched(tokens: Tensor, **options: Any) -> Any:
        seen.append(len(tokens))
        return forward(tokens, **options)

    monkeypatch.setattr(trainer.model, "forward", watched)
    trainer.validate()
    assert seen == [2, 2, 2, 2]  # two batches of four


def test_held_out_batches_have_the_largest_size_of_the_run_and_are_always_the_same(
    recipe_with: Callable[..., Recipe], dataset_of: Callable[[Recipe], Dataset]
) -> None:
    ramp = [{"shape": "linear", "steps": 4, "from": 1, "to": 3}, {"shape": "constant", "steps": 2, "to": 3}]
    recipe = recipe_with(data={"batch_size": ramp})
    dataset = dataset_of(recipe)
    batches = held_out(dataset, recipe, 4)
    assert [b.tokens.shape for b in batches] == [(3, 16)] * 4
    again = held_out(dataset, recipe, 2)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, batches, strict=False))
    rows = torch.cat([b.tokens for b in batches])
    assert torch.equal(rows, torch.cat([dataset.validation.batch(i, 1).tokens for i in range(12)]))
    all_of_it = held_out(dataset, recipe, 10**6)
    assert len(all_of_it) == dataset.validation.num_sequences // 3


def test_a_text_of_fewer_sequences_than_a_batch_still_makes_one(
    recipe_with: Callable[..., Recipe], dataset_of: Callable[[Recipe], Dataset]
) -> None:
    recipe = recipe_with(data={"batch_size": 200})
    dataset = dataset_of(recipe)
    assert dataset.validation.num_sequences < 200
    (batch,) = held_out(dataset, recipe, 4)
    assert len(batch.tokens) == dataset.validation.num_sequences < 200
