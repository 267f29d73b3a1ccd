"""Notes are said where they apply and only there."""

from pathlib import Path

import pytest

from tessera.recipe import load_recipe
from tests.recipe.examples import MINIMAL

WHOLE_TILES = [
    "model.hidden_size=128", "model.intermediate_size=256", "model.moe_intermediate_size=128",
    "model.kv_lora_rank=128", "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=128", "model.v_head_dim=128",
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def notes(file: Path, *overrides: str) -> list[str]:
    return load_recipe(file, [*WHOLE_TILES, *overrides]).notes()


def test_a_recipe_without_peculiarities_has_no_notes(file: Path) -> None:
    assert notes(file) == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["model.kv_lora_rank=96"],
            "model: kv_lora_rank = 96 and 1 more: no multiple of 128; transformers cannot load",
        ),
        (["model.q_lora_rank=100"], "model: q_lora_rank = 100: no multiple of 128"),
        (["model.rms_norm_eps=1e-5"], "rms_norm_eps = 1e-05: transformers uses 1e-06"),
        (
            ["model.num_hidden_layers=27", "model.q_lora_rank=128"],
            "llama.cpp takes models of 26 or 27 layers",
        ),
        (
            ["stability.on_spike=skip", "stability.spike_window=20"],
            'stability.on_spike = "skip" has no effect: training.steps = 10, and none is a spike before 10 calm ones',
        ),
        (["model.n_group=4", "model.topk_group=2"], "num_experts_per_tok / topk_group = 1 of them"),
        (
            ["optimizer.learning_rate=[{shape='linear', steps=40, to=4}]"],
            "optimizer.learning_rate describes 40 steps, but training.steps = 10: the run ends at 0.9",
        ),
    ],
)
def test_a_peculiarity_is_named_with_its_figure(file: Path, overrides: list[str], words: str) -> None:
    (note,) = notes(file, *overrides)
    assert words in note


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.intermediate_size=100", "model.first_k_dense_replace=0"],  # no dense layer has that width
        ["model.kv_lora_rank=96", "numerics.precision=bf16"],
        ["model.num_hidden_layers=27"],
        ["model.num_hidden_layers=28", "model.q_lora_rank=128"],
        ["model.n_group=4", "model.topk_group=4"],  # all groups are allowed, so nothing is selected
        ["model.n_group=4", "model.topk_group=2", "model.num_experts_per_tok=4"],  # the two rules agree
        ["optimizer.learning_rate=[{shape='linear', steps=10, to=4}]"],
        ["optimizer.learning_rate=[{shape='linear', steps=3, to=4}]"],
    ],
)
def test_nothing_is_said_where_nothing_follows(file: Path, overrides: list[str]) -> None:
    assert notes(file, *overrides) == []


def test_spikes_that_are_only_noted_or_that_can_come_are_no_note(file: Path) -> None:
    assert notes(file, "stability.spike_window=20") == []
    assert notes(file, "stability.on_spike=stop", "stability.spike_window=19") == []
