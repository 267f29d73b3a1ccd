"""The shipped recipes load, say what the report says, and have the sizes that their comments claim."""

from math import isclose
from pathlib import Path

import pytest

from tessera.recipe import Recipe, load_recipe
from tests.recipe.examples import ROOT

NAMES = ["deepseek-v3", "moonlight-16b", "small", "tiny"]


def shipped(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.toml")


def test_these_recipes_are_shipped() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_its_resolved_form_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = shipped(name)
    assert recipe.name == name
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_its_notes_are_about_peculiarities_of_the_model_not_about_unfinished_schedules(name: str) -> None:
    notes = shipped(name).notes()
    assert all(note.startswith("model") for note in notes)
    assert len(notes) == (2 if name == "moonlight-16b" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_its_schedules_last_exactly_as_long_as_the_run(name: str) -> None:
    recipe = shipped(name)
    schedules = (
        recipe.optimizer.learning_rate,
        recipe.data.batch_size,
        recipe.training.bias_update_speed,
        recipe.training.mtp_loss_weight,
    )
    assert all(schedule.steps in (0, recipe.training.steps) for schedule in schedules)


def test_tiny_is_the_measured_plan_of_the_main_job() -> None:
    recipe = shipped("tiny")
    model = recipe.model
    assert (model.hidden_size, model.num_hidden_layers, model.first_k_dense_replace) == (128, 4, 1)
    assert (model.n_routed_experts, model.num_experts_per_tok, model.n_shared_experts) == (8, 2, 1)
    assert (model.vocab_size, model.num_nextn_predict_layers) == (4096, 1)
    assert recipe.total_tokens() == 500 * 2048
    assert recipe.data.source == "python-stdlib"
    assert recipe.training.time_limit_minutes == 8
    assert recipe.optimizer.learning_rate.at(0) == 0
    assert all(recipe.training.steps * share % (4 * recipe.checkpoint.interval) == 0 for share in (1, 2, 3, 4))


def test_deepseek_v3_follows_the_reports_counts_of_tokens() -> None:
    recipe = shipped("deepseek-v3")
    rate, batch = recipe.optimizer.learning_rate, recipe.data.batch_size
    bias, mtp = recipe.training.bias_update_speed, recipe.training.mtp_loss_weight
    tokens, passed = 0, {}
    for step in range(recipe.training.steps):  # the step before which so many tokens were seen
        for mark in (469e9, 10e12, 14.3e12, 14.3e12 + 333e9):
            if tokens >= mark and mark not in passed:
                passed[mark] = step
        tokens += recipe.batch_size_at(step) * 4096
    assert isclose(tokens, 14.8e12, rel_tol=1e-4)

    def near(mark: float, before: float, after: float, schedule) -> None:
        assert schedule.at(passed[mark] - 3) == pytest.approx(before, rel=2e-3)
        assert schedule.at(passed[mark] + 3) == pytest.approx(after, rel=2e-3)

    near(469e9, 15360, 15360, batch)
    assert (batch.at(0), batch.at(6212)) == (3072, 9216)
    assert (rate.at(0), rate.at(1000), rate.at(2000)) == (0, pytest.approx(1.1e-4), 2.2e-4)
    near(10e12, 2.2e-4, 2.2e-4, rate)
    assert rate.at(passed[10e12] + 34000) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=0.02)
    near(14.3e12, 2.2e-5, 2.2e-5, rate)
    near(14.3e12 + 333e9, 2.2e-5, 7.3e-6, rate)
    near(14.3e12, 0.001, 0.0, bias)
    near(10e12, 0.3, 0.1, mtp)
    assert rate.at(recipe.training.steps - 1) == 7.3e-6


def test_deepseek_v3_is_the_published_config_but_for_two_values_of_the_pre_training() -> None:
    config = {  # config.json of the published checkpoint, the keys that a recipe has
        "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 129280,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
            "original_max_position_embeddings": 4096,
        },
    }  # fmt: skip
    model = shipped("deepseek-v3").model.model_dump()
    assert (model["initializer_range"], model["rope_scaling"]["factor"]) == (0.006, 1.0)
    model["initializer_range"], model["rope_scaling"]["factor"] = 0.02, 40
    assert model == config


def test_deepseek_v3_trains_with_the_reports_optimizer_and_text() -> None:
    recipe = shipped("deepseek-v3")
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.gradient_clip) == (
        0.9,
        0.95,
        0.1,
        1,
    )
    assert optimizer.moments == "bf16"
    assert (recipe.data.fim_rate, recipe.data.cross_document_attention) == (0.1, True)
    assert (recipe.numerics.precision, recipe.numerics.scales) == ("fp8", "deepseek-v3")
    assert recipe.training.balance_loss_weight == 1e-4


def test_moonlight_has_its_published_shape() -> None:
    recipe = shipped("moonlight-16b")
    model = recipe.model
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (27, 2048, 16)
    assert (model.n_routed_experts, model.num_experts_per_tok, model.n_shared_experts) == (64, 6, 2)
    assert (model.moe_intermediate_size, model.intermediate_size, model.first_k_dense_replace) == (
        1408,
        11264,
        1,
    )
    assert (model.q_lora_rank, model.kv_lora_rank, model.vocab_size) == (None, 512, 163840)
    assert (model.routed_scaling_factor, model.rope_theta, model.rope_scaling) == (2.446, 50000, None)
    assert (model.num_nextn_predict_layers, model.max_position_embeddings) == (0, 8192)
    assert isclose(recipe.total_tokens(), 5.7e12, rel_tol=1e-5)


def test_a_later_stage_of_deepseek_v3_is_a_matter_of_a_few_overrides() -> None:
    stage = load_recipe(
        ROOT / "recipes" / "deepseek-v3.toml",
        [
            "model.rope_scaling.factor=40", "data.sequence_length=32768", "data.batch_size=1920",
            "optimizer.learning_rate=7.3e-6", "training.steps=1000", "training.bias_update_speed=0",
            "training.mtp_loss_weight=0.1",
        ],
    )  # fmt: skip
    assert stage.total_tokens() == 1000 * 1920 * 32768
