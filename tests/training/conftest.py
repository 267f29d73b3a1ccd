"""A run small enough for a test: two layers, a corpus of a few pages made here, a byte-sized vocabulary."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.data import Dataset, prepare
from tessera.recipe import Recipe
from tessera.store import RunFolder
from tessera.training.trainer import Trainer

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}


def make_recipe(folder: Path, changes: dict[str, dict[str, Any]]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "numerics": {},
        "data": {
            "source": str(folder / "text"),
            "cache": str(folder / "data"),
            "sequence_length": 16,
            "batch_size": 4,
            "validation_fraction": 0.2,
        },
        "optimizer": {"learning_rate": 3e-3},
        "training": {
            "steps": 6,
            "validation_interval": 3,
            "validation_batches": 2,
            "health_interval": 4,
            "load_interval": 2,
        },
        "checkpoint": {"interval": 2},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    return Recipe.model_validate({"name": "small", **sections})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["tile", "scale", "expert", "token", "route", "sum", "FP8", "def", "return", "self", "né", "=", "(", ")"]
    for number in range(40):
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(12)]
        (folder / "text" / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def recipe_with(corpus: Path) -> Callable[..., Recipe]:
    """recipe_with(training={"steps": 9}, ...): the small recipe with some keys changed."""
    return lambda **changes: make_recipe(corpus, changes)


def dies_after(step: int) -> Callable[[dict[str, Any]], None]:
    """An observer that ends the run in the middle of what follows the training step `step` (counted from 0)."""

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise RuntimeError("the machine dies")

    return observe


def broken_at_step_4(recipe: Recipe, folder: Path, dataset: Dataset) -> tuple[RunFolder, Path]:
    """A new run that dies after the checkpoint of step 4: its folder, and that checkpoint, which is the latest."""
    trainer = Trainer(recipe, RunFolder.create(folder, recipe), dataset, observer=dies_after(4))
    with pytest.raises(RuntimeError, match="the machine dies"):
        trainer.run()
    run = RunFolder.open(folder)
    latest = run.latest_checkpoint()
    assert latest is not None and latest[0] == 4
    return run, latest[1]


@pytest.fixture
def dataset_of() -> Callable[[Recipe], Dataset]:
    def prepared(recipe: Recipe) -> Dataset:
        assert recipe.data.cache is not None
        return prepare(recipe.data, recipe.model.vocab_size, Path(recipe.data.cache))

    return prepared
