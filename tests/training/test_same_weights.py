"""The same-weights criteria: each figure against its definition, and ablations that they must tell apart."""

from pathlib import Path

import pytest
import torch

from tessera.model import Transformer
from tessera.numerics import Policy
from tessera.recipe import Recipe
from tessera.store import RunFolder
from tessera.training import same_weights
from tessera.training.same_weights import SameWeights, add_outlier, gradient_error, rerouted
from tessera.training.trainer import Trainer
from tessera.training.validation import held_out


def test_the_points_are_quarters_of_the_run() -> None:
    assert same_weights.milestones(500) == [125, 250, 375, 500]
    assert same_weights.milestones(2) == [1, 2]
    assert same_weights.milestones(1) == [1]


def test_gradient_error_is_the_norm_of_the_difference_and_bias_the_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(7, generator=generator) * 1e-3}
    given = {"a": exact["a"] * 1.1, "b": exact["b"] * 0.5}
    result = gradient_error(given, exact)
    flat, other = (torch.cat([d["a"].flatten(), d["b"].flatten()]).double() for d in (given, exact))
    assert result.error == pytest.approx(float((flat - other).norm() / other.norm()))
    assert result.bias == pytest.approx(float(flat @ other / other.square().sum() - 1))
    assert (result.worst_name, result.worst_error) == ("b", pytest.approx(0.5))


def test_rerouted_counts_tokens_whose_set_of_experts_changed_in_any_layer() -> None:
    one = [torch.tensor([[0, 1], [2, 3], [0, 2]]), torch.tensor([[0, 1], [0, 1], [0, 1]])]
    two = [torch.tensor([[1, 0], [2, 3], [0, 3]]), torch.tensor([[1, 0], [1, 2], [1, 2]])]
    assert rerouted(one, one) == 0
    assert rerouted(one, two) == 2  # the second token in one layer, the third in both, the first in neither
    assert rerouted([], []) == 0


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[SameWeights, Path, Recipe]:
    from tessera.data import prepare
    from tests.training.conftest import make_recipe

    changes = {"numerics": {"precision": "bf16"}, "training": {"steps": 40, "validation_interval": 0}}
    recipe = make_recipe(corpus, changes)
    assert recipe.data.cache is not None
    dataset = prepare(recipe.data, recipe.model.vocab_size, Path(recipe.data.cache))
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "bf16", recipe)
    Trainer(recipe, run, dataset).run()
    judge = SameWeights(recipe, held_out(dataset, recipe, 4))
    path = run.checkpoint_path(40)
    judge.load(path)
    return judge, path, recipe


def test_the_yardstick_is_the_plain_cross_entropy_of_the_fp32_arm(
    judged: tuple[SameWeights, Path, Recipe],
) -> None:
    judge, _, _ = judged
    model, yardstick = judge.model("fp32"), judge.yardstick()
    for batch, loss in zip(judge.batches, yardstick.losses, strict=True):
        logits = model.logits(model(batch.tokens).hidden)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_the_yardstick_against_itself_is_exactly_zero(judged: tuple[SameWeights, Path, Recipe]) -> None:
    judge, _, _ = judged
    error = judge.loss_error("fp32", judge.yardstick())
    assert (error.free, error.replayed, error.rerouted) == (0, 0, 0)
    exact = judge.gradient("fp32", None)
    assert gradient_error(judge.gradient("fp32", judge.yardstick().routing), exact).error < 1e-5


def test_fp8_is_near_and_truncation_and_coarser_formats_are_farther(
    judged: tuple[SameWeights, Path, Recipe],
) -> None:
    judge, path, _ = judged
    judge.load(path)
    exact = judge.yardstick()
    fp8, truncated = judge.loss_error("fp8", exact), judge.loss_error("toward-zero", exact)
    assert fp8.replayed < truncated.replayed
    reference = judge.gradient("fp32", exact.routing)
    errors = {
        arm: gradient_error(judge.gradient(arm, exact.routing), reference)
        for arm in ("bf16", "fp8", "toward-zero", "e5m2-gradients")
    }
    assert errors["bf16"].error < errors["fp8"].error < errors["e5m2-gradients"].error
    assert errors["toward-zero"].bias < errors["fp8"].bias - 0.003  # truncation shrinks everything


def test_an_outlier_channel_changes_nothing_in_exact_arithmetic_and_ruins_per_tensor_scales(
    judged: tuple[SameWeights, Path, Recipe],
) -> None:
    judge, path, recipe = judged
    judge.load(path)
    plain = judge.yardstick()
    judge.load(path, outlier=True)
    exact = judge.yardstick()
    assert exact.losses == pytest.approx(plain.losses, rel=1e-4)
    per_tensor = judge.loss_error("per-tensor", exact)
    judge.load(path)
    ordinary = judge.loss_error("per-tensor", judge.yardstick())
    assert per_tensor.replayed > 3 * ordinary.replayed
    model = Transformer(recipe.model, Policy(precision="fp32"))
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    add_outlier(model)
    changed = (model.model.layers[0].mlp.down_proj.weight != before).any(dim=0)
    assert int(changed.sum()) == 1


@pytest.mark.parametrize(
    ("changes", "touched"),
    [
        ({}, "model.layers.0.mlp.down_proj.weight"),
        ({"first_k_dense_replace": 0}, "model.layers.0.mlp.shared_experts.down_proj.weight"),
        ({"first_k_dense_replace": 0, "n_shared_experts": 0}, "model.layers.0.mlp.experts.down_proj"),
    ],
)
@torch.no_grad()
def test_an_outlier_finds_a_channel_in_any_architecture(changes: dict[str, int], touched: str, corpus: Path) -> None:
    from tests.training.conftest import make_recipe

    recipe = make_recipe(corpus, {"model": changes})
    model = Transformer(recipe.model, Policy(precision="fp32"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.arange(32).view(2, 16)
    hidden = model(tokens).hidden
    add_outlier(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {touched, touched.replace("down_proj", "gate_up_proj")}
    down = dict(model.named_parameters())[touched]
    ratio = (before[touched] / down).flatten(0, -2)
    assert (ratio > 9e4).any(dim=0).sum() >= 1
    torch.testing.assert_close(model(tokens).hidden, hidden, rtol=1e-3, atol=1e-3)


def test_no_more_than_two_models_are_kept(judged: tuple[SameWeights, Path, Recipe]) -> None:
    judge, path, _ = judged
    judge.load(path)
    judge.model("fp32")
    for arm in ("fp8", "per-row", "toward-zero", "bf16"):
        judge.model(arm)
        assert set(judge._models) == {"fp32", arm}
    weights = dict(judge.model("fp32").named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in judge.model("bf16").named_parameters())
