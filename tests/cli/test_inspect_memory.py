"""tessera inspect memory: predicted without allocating, measured with autograd's hooks, and the two agree."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from tessera.recipe import MemorySection
from tests.cli.conftest import tessera

RECIPES = Path(__file__).parents[2] / "recipes"
# DeepSeek-V3 at a sixteenth of its widths and heads, a layer of 16 experts of which a token takes 8, as in the whole
SCALED = [
    f"model.{key}={value}"
    for key, value in {
        "vocab_size": 512, "hidden_size": 448, "intermediate_size": 1152, "moe_intermediate_size": 128,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 8, "n_routed_experts": 16,
        "n_group": 8, "topk_group": 4, "q_lora_rank": 96, "kv_lora_rank": 32, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 256,
    }.items()
]  # fmt: skip
SCALED += ["data.sequence_length=256", "data.batch_size=2", "model.rope_scaling.original_max_position_embeddings=64"]


def facts(recipe: str, *settings: str, measure: bool = False) -> dict[str, Any]:
    options = [word for setting in settings for word in ("--set", setting)]
    answer = tessera("inspect", "memory", str(RECIPES / recipe), *options, "--json", *["--measure"] * measure)
    assert answer.code == 0, answer.err
    return answer.json


@pytest.mark.parametrize("recipe, settings", [("tiny.toml", ["data.batch_size=2"]), ("deepseek-v3.toml", SCALED)])
def test_a_layer_with_experts_keeps_a_fifth_of_plain_autograd_and_as_much_as_predicted(
    recipe: str, settings: list[str]
) -> None:
    found = facts(recipe, *settings, measure=True)
    measured = found["measured"]
    assert found["saved_bytes_ratio"] <= 0.20
    assert measured["total"] == pytest.approx(found["saved_bytes"], rel=0.02)
    layer = measured["layer_with_experts"]
    assert found["saved_bytes_ratio"] == layer["tessera"] / layer["plain"]
    assert layer["transformers"] > layer["plain"]
    assert found["saved_bytes_ratio_to_transformers"] == layer["tessera"] / layer["transformers"]
    # The table of rotations, which all layers and both sequences share, is in the measured layer, not in the predicted.
    rotation = next(row["bytes_per_token"] for row in found["tensors"] if row["name"].startswith("rotation")) / 2
    assert layer["tessera"] - rotation == pytest.approx(found["layers"][1], rel=0.01)
    by_layer = [size / found["tokens"] for size in measured["layers"]]
    assert by_layer[1] == pytest.approx(found["layers"][1], rel=0.02)


@pytest.mark.parametrize("switch", [name for name in MemorySection.model_fields if name != "fp8_linear_inputs"])
def test_what_a_switch_saves_is_measured(switch: str) -> None:
    small = ["data.batch_size=4"]
    on = facts("tiny.toml", *small, measure=True)
    off = facts("tiny.toml", *small, f"memory.{switch}=false", measure=True)
    owed = on["switches"][switch]["saves"] * on["tokens"]
    assert owed == off["switches"][switch]["saves"] * off["tokens"] > 0
    fixed = on["saved_bytes_fixed"] - off["saved_bytes_fixed"]
    # Where nothing is coded, 64 rows behind the last expert's product stay with it.
    assert off["measured"]["total"] - on["measured"]["total"] + fixed == pytest.approx(owed, rel=0.05)


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.toml")))
def test_every_recipe_is_predicted_without_allocating(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torch(name: str, *rest: Any) -> Any:
        assert name.partition(".")[0] != "torch", "a prediction needs no tensors"
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    found = facts(recipe)
    parts = ("masters", "gradients", "moments", "operands", "ema", "checkpoint_copy", "saved_bytes")
    assert found["total"] == sum(found[part] for part in parts)
    assert found["saved_bytes_ratio"] is None and found["measured"] is None
    assert found["saved_bytes_ratio_to_transformers"] is None


def test_the_bf16_twin_and_an_average_are_counted() -> None:
    fp8 = facts("tiny.toml")
    bf16 = facts("tiny.toml", "numerics.precision=bf16", "training.ema_decay=0.99")
    assert bf16["operands"] > fp8["operands"] and bf16["saved_bytes"] > fp8["saved_bytes"]
    assert (fp8["ema"], bf16["ema"]) == (0, bf16["masters"])
    assert bf16["switches"]["fp8_swiglu_inputs"]["saves"] == 0


def test_what_does_not_fit_is_not_begun() -> None:
    answer = tessera("inspect", "memory", str(RECIPES / "deepseek-v3.toml"), "--measure")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert "GB are free here" in answer.err and "--measure" in answer.err


def test_a_model_without_experts_is_measured_too() -> None:
    dense = [f"model.{key}" for key in ("num_hidden_layers=1", "first_k_dense_replace=1", "num_nextn_predict_layers=0")]
    found = facts("tiny.toml", *dense, "data.batch_size=1", measure=True)
    assert found["saved_bytes_ratio"] is None
    assert found["measured"]["total"] == pytest.approx(found["saved_bytes"], rel=0.02)


def test_the_page_says_what_lives_and_what_each_switch_saves() -> None:
    answer = tessera("inspect", "memory", str(RECIPES / "tiny.toml"), "--measure", "--set", "data.batch_size=1")
    assert answer.code == 0
    for words in ("weights (masters)", "inputs of SwiGLU", "1-3 (3 layers, each), experts", "4, MTP", "measured "):
        assert words in answer.out, words
    for switch in MemorySection.model_fields:
        assert switch in answer.out
    assert max(map(len, answer.out.splitlines())) <= 120
