"""benchmarks/train_step.py compares like with like, and says so where it does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lockstep
import pytest
import step_figures
import step_systems
import torch

from tessera.accounting import parameters
from tessera.recipe import Recipe, load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Weights large enough for the loss to depend on each of them, and every setting of the optimizer large enough to show:
# with an epsilon this large, Adam is no longer blind to the gradient's scale, so clipping shows as well.
TINY = """
[model]
vocab_size = 96
hidden_size = 48
intermediate_size = 80
moe_intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 3
n_routed_experts = 8
num_experts_per_tok = 3
routed_scaling_factor = 1.7
kv_lora_rank = 20
q_lora_rank = 28
qk_nope_head_dim = 12
qk_rope_head_dim = 8
v_head_dim = 10
max_position_embeddings = 64
num_nextn_predict_layers = 0
initializer_range = 0.1
[data]
source = "none"
sequence_length = 32
batch_size = 4
[optimizer]
learning_rate = [{ shape = "linear", steps = 8, from = 4e-2, to = 1e-2 }]
epsilon = 1e-2
weight_decay = 0.5
gradient_clip = 0.5
moments = "fp32"
[training]
steps = 8
balance_loss_weight = 0.0
bias_update_speed = 0.0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def losses(recipe: Recipe, *system: Any, steps: int = 6) -> list[float]:
    built = step_systems.build(recipe, *system)
    return [built.step(step, step_systems.tokens(recipe, step)) for step in range(steps)]


def test_both_sides_make_the_same_steps(config: Path) -> None:
    recipe = load_recipe(config)
    ours, theirs = (losses(recipe, system, "fp32", False) for system in ("tessera", "transformers"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0] - 0.1
    assert theirs == losses(recipe, "transformers", "fp32", False)


@pytest.mark.parametrize("change", ["epsilon=1e-3", "weight_decay=0.0", "gradient_clip=5.0", "beta1=0.8", "beta2=0.9"])
def test_each_setting_of_the_optimizer_shows_in_the_losses(config: Path, change: str) -> None:
    """Without which the test above would prove nothing of it."""
    known = losses(load_recipe(config), "tessera", "fp32", False)
    changed = losses(load_recipe(config, [f"optimizer.{change}"]), "tessera", "fp32", False)
    assert changed != pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize(
    "system",
    [("tessera", one) for one in ("bf16", "fp8", "fp8-lean")]
    + [("transformers", one) for one in ("bf16-autocast", "bf16")],
)
def test_rounded_precisions_follow_fp32_and_are_not_it(config: Path, system: tuple[str, str]) -> None:
    recipe = load_recipe(config)
    exact, rounded = losses(recipe, "tessera", "fp32", False), losses(recipe, *system, False)
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert all(a != b for a, b in zip(rounded, exact, strict=True))


def test_the_lean_system_keeps_what_the_recipe_says_and_the_others_everything(config: Path) -> None:
    recipe = load_recipe(config, ["memory.recompute_norms=false"])
    lean, full = (step_systems.build(recipe, "tessera", one, False).model.keep for one in ("fp8-lean", "fp8"))
    assert vars(lean) == recipe.memory.model_dump() and lean.chunked_head and not lean.recompute_norms
    assert not any(vars(full).values())


def test_pure_bf16_has_no_fp32_weight_but_the_routers(config: Path) -> None:
    model = step_systems.build(load_recipe(config), "transformers", "bf16", False).model
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
    assert wide == {"model.layers.1.mlp.gate.weight"}


def test_tokens_depend_on_the_step_alone_and_targets_are_the_next_ones(config: Path) -> None:
    recipe = load_recipe(config)
    first, again, second = (step_systems.tokens(recipe, step) for step in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.tokens[:, 1:], first.targets[:, :-1])
    assert first.tokens.min() >= 0 and int(torch.cat([first.tokens, first.targets]).max()) < recipe.model.vocab_size


def test_the_shipped_configurations_are_those_that_figures_are_quoted_for() -> None:
    small, wide = (load_recipe(BENCHMARKS / name) for name in ("train_step.toml", "train_step_1024.toml"))
    assert round(parameters(small.model).total / 1e6, 1) == 14.2
    assert (wide.model.hidden_size, wide.model.num_hidden_layers) == (1024, 3)
    for recipe in (small, wide):
        assert recipe.memory == type(recipe.memory)()  # "fp8-lean" is the default
        assert recipe.optimizer.gradient_clip == 1.0 and recipe.model.num_nextn_predict_layers == 0


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, BENCHMARKS / "train_step.py", *words], capture_output=True, text=True)


def test_json_has_a_row_a_system_and_nothing_else_on_stdout(config: Path, tmp_path: Path) -> None:
    names = ["tessera-fp8-lean", "tessera-bf16", "transformers-bf16-autocast"]
    out = tmp_path / "rows.json"
    done = run(str(config), "--rounds", "1", "--systems", ",".join(names), "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["rows"] and found == json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert row["threads"] == 1 and row["compiled"] is False
        assert f"{row['system']}-{row['precision']}" == row["name"]
        assert row["tokens_per_cpu_s"] == pytest.approx(4 * 32 * 1e3 / row["median_cpu_ms"])
        assert row["tokens_per_s"] == pytest.approx(4 * 32 * 1e3 / row["median_wall_ms"])
        assert 0 < row["baseline_mib"] < row["resident_mib"] <= row["peak_mib"]
    ratio = rows["tessera-fp8-lean"]["against_own_bf16"]
    assert ratio["cpu"] == pytest.approx(
        rows["tessera-bf16"]["median_cpu_ms"] / rows["tessera-fp8-lean"]["median_cpu_ms"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "tessera-fp7"], "tessera-fp7: no such system; there are tessera-fp8,"),
        (["--set", "model.num_nextn_predict_layers=1"], "transformers has neither MTP"),
        (["--set", "training.balance_loss_weight=1e-4"], "transformers has neither MTP"),
        (["--set", "model.hidden_sise=1"], "hidden_size"),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(config: Path, words: list[str], message: str) -> None:
    done = run(str(config), *words)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr and not done.stdout


def row(name: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    system, _, precision = name.partition("-")
    rounds = [{"cpu": s, "wall": 2 * s, "loss": 5.0 - i, "tokens": 10} for i, s in enumerate(seconds)]
    facts = {"name": name, "system": system, "precision": precision, "compiled": False, "parameters": 7, "threads": 1}
    return facts | {"first_loss": 6.0, "peak_mib": 100.0, "rounds": rounds} | changes


def test_ratios_are_taken_within_a_round_and_against_the_fastest_mode() -> None:
    rows = [
        row("tessera-bf16", [1.0, 10.0, 1.0]),
        row("transformers-fp32", [4.0, 40.0, 4.0]),
        row("transformers-bf16", [3.0, 30.0, 3.0], peak_mib=400.0),
        row("transformers-bf16-autocast", [2.0, 2.0, 2.0], compiled=True),
    ]
    step_figures.compare(rows)
    assert rows[0]["against_best"] == {"name": "transformers-bf16-autocast", "peak": 1.0, "cpu": 2.0, "wall": 2.0}
    assert rows[0]["against_eager"] == {"name": "transformers-bf16", "peak": 0.25, "cpu": 3.0, "wall": 3.0}
    assert not any("against_best" in other for other in rows[1:])


def test_on_more_threads_the_fastest_mode_is_that_by_wall_time() -> None:
    rows = [row(name, [1.0], threads=2) for name in ("tessera-bf16", "transformers-fp32", "transformers-bf16")]
    rows[1]["rounds"][0] |= {"cpu": 9.0, "wall": 1.0}
    step_figures.compare(rows)
    assert rows[0]["against_best"] == {"name": "transformers-fp32", "peak": 1.0, "cpu": 9.0, "wall": 0.5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": 8}, "8 parameters, tessera-fp32 has 7"),
        ({"first_loss": 6.001}, "the first loss is 6.001, tessera-fp32's 6.0"),
        ({"first_loss": float("nan")}, "the first loss is nan"),
        ({"rounds": [{"loss": 6.0}]}, "the loss went from 6.0 to 6.0"),
        ({"rounds": [{"loss": float("nan")}]}, "the loss went from 6.0 to nan"),
    ],
)
def test_an_unequal_comparison_is_named(changes: dict[str, Any], words: str) -> None:
    rows = [row("tessera-fp32", [1.0]), row("transformers-fp32", [1.0])]
    assert step_figures.inequalities(rows) == []
    found = step_figures.inequalities([rows[0], rows[1] | changes])
    assert found[0].startswith(f"transformers-fp32: {words}")


SERVER = """
import os, lockstep
def answer(question):
    print("noise of a library", flush=True)
    os.write(1, b"and of one in C\\n")
    if question == {"ask": "die"}:
        raise SystemExit(3)
    return question
lockstep.serve(answer)
"""


def test_what_a_library_prints_is_no_answer_and_a_death_is_told() -> None:
    child = lockstep.Child("some system", [sys.executable, "-c", SERVER], {"PYTHONPATH": str(BENCHMARKS)})
    for number in range(3):
        assert child.ask(number=number) == {"number": number}
    with pytest.raises(SystemExit, match="some system: ended with 3"):
        child.ask(ask="die")
    child.close()


@pytest.mark.skipif(not lockstep.STATUS.exists(), reason="the system does not tell a process's peak memory")
def test_the_peak_begins_anew() -> None:
    held = bytearray(200 * 2**20)
    del held
    before = lockstep.peak_mib()
    assert lockstep.restart_peak()
    assert lockstep.peak_mib() < before - 100
    size = lockstep.resident_mib()
    held = bytearray(b"x") * (200 * 2**20)
    assert len(held) and lockstep.peak_mib() > size + 190
