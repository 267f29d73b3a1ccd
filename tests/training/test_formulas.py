"""A whole run against a plain loop over its formulas, in FP32, with everything that a schedule can move moving."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tessera.data import Dataset
from tessera.model import Transformer
from tessera.model.weights import weights
from tessera.numerics import Policy
from tessera.ops.chunked_loss import IGNORED
from tessera.recipe import Recipe
from tessera.store import RunFolder, read_events
from tessera.training import checkpoint
from tessera.training.trainer import Trainer
from tests.training.test_trainer import assert_same, facts, state, trained

RecipeWith = Callable[..., Recipe]
DatasetOf = Callable[[Recipe], Dataset]

RAMP = [{"shape": "linear", "steps": 4, "from": 2, "to": 4}, {"shape": "constant", "steps": 2, "to": 4}]
SIZES = [2, 2, 3, 4, 4, 4]  # 2, 2.5, 3, 3.5, 4, 4 to the nearest, ties to even
RATES = [0.0, 0.005, 0.01, 0.01, 0.01, 0.01]
WEIGHTS = [0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
SPEEDS = [0.02, 0.02, 0.02, 0.0, 0.0, 0.0]
DEPTHS, BALANCE, CLIP = 2, 0.5, 1.5


def plain_loop(recipe: Recipe, dataset: Dataset, steps: int) -> tuple[Transformer, list[dict[str, float]]]:
    """Training as the formulas have it: every target looked up one by one, one pass a batch, AdamW written out."""
    model = Transformer(recipe.model, Policy(precision="fp32"), seed=recipe.training.seed)
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    position, figures = 0, []
    for step in range(steps):
        rows = [dataset.train.batch(position + i, 1) for i in range(SIZES[step])]
        position += SIZES[step]
        tokens, targets, ids = (torch.cat([getattr(b, f) for b in rows]) for f in ("tokens", "targets", "document_ids"))
        if recipe.data.cross_document_attention:
            ids = None
        output = model(tokens, document_ids=ids)
        count = int((targets != IGNORED).sum())

        def entropy(hidden: torch.Tensor, goals: torch.Tensor, count: int = count) -> torch.Tensor:
            logits = model.logits(hidden).flatten(0, 1)
            return cross_entropy(logits, goals.flatten(), ignore_index=IGNORED, reduction="sum") / count

        loss = main = entropy(output.hidden, targets)
        routings = list(output.router)
        for depth in range(1, DEPTHS + 1):
            embedded, goals = torch.zeros_like(targets), torch.full_like(targets, IGNORED)
            for row in range(len(targets)):
                for i in range(targets.shape[1] - depth):
                    path = targets[row, i : i + depth + 1].tolist()
                    if IGNORED not in path:
                        embedded[row, i], goals[row, i] = path[-2], path[-1]
            output = model.draft(depth, output.carry, embedded, document_ids=ids)
            routings += output.router
            loss = loss + WEIGHTS[step] / DEPTHS * entropy(output.hidden, goals)
        loss = loss + BALANCE * sum(r.balance_loss for r in routings)
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        s = recipe.optimizer
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = gradients.get(name, torch.zeros_like(p)) * min(1.0, CLIP / norm)
                first[name] = s.beta1 * first[name] + (1 - s.beta1) * g
                second[name] = s.beta2 * second[name] + (1 - s.beta2) * g * g
                m, v = first[name] / (1 - s.beta1 ** (step + 1)), second[name] / (1 - s.beta2 ** (step + 1))
                if p.dim() > 1:
                    p.mul_(1 - RATES[step] * s.weight_decay)
                p.sub_(RATES[step] * m / (v.sqrt() + s.epsilon))
        for (_, router), routing in zip(model.routers(), routings, strict=True):
            mean = routing.counts.double().mean()
            router.e_score_correction_bias += SPEEDS[step] * (mean - routing.counts).sign().float()
        figures.append({"loss": loss.item(), "lm_loss": main.item(), "gradient_norm": norm})
    return model, figures


def moving_recipe(recipe_with: RecipeWith, *, cross_document_attention: bool) -> Recipe:
    """Everything moves: batch, learning rate, MTP weight, bias speed; two MTP depths, a micro-batch a sequence."""
    return recipe_with(
        model={"num_nextn_predict_layers": DEPTHS},
        numerics={"precision": "fp32"},
        data={"batch_size": RAMP, "cross_document_attention": cross_document_attention},
        # A large epsilon: the update then follows the size of the gradient, not only its sign.
        optimizer={
            "learning_rate": [{"shape": "linear", "steps": 2, "from": 0.0, "to": 0.01}],
            "epsilon": 1e-2,
            "gradient_clip": CLIP,
            "moments": "fp32",
        },
        training={
            "steps": 6,
            "micro_batch_size": 1,
            "mtp_loss_weight": [{"shape": "linear", "steps": 3, "from": 0.8, "to": 0.2}],
            "balance_loss_weight": BALANCE,
            "bias_update_speed": [
                {"shape": "constant", "steps": 3, "to": 0.02},
                {"shape": "constant", "steps": 3, "to": 0.0},
            ],
            "health_interval": 0,
        },
        checkpoint={"interval": 3},
    )


@pytest.mark.parametrize("cross", [False, True])
def test_a_run_is_the_plain_loop_over_its_formulas(
    cross: bool, recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = moving_recipe(recipe_with, cross_document_attention=cross)
    dataset = dataset_of(recipe)
    run = trained(recipe, tmp_path / "run", dataset)
    model, figures = plain_loop(recipe, dataset, 6)
    events = list(read_events(tmp_path / "run" / "events.jsonl", "step"))
    for name in ("loss", "lm_loss", "gradient_norm"):
        assert [e[name] for e in events] == pytest.approx([f[name] for f in figures], rel=1e-4), name
    assert [e["batch_size"] for e in events] == SIZES
    assert [e["tokens"] for e in events] == [16 * sum(SIZES[: i + 1]) for i in range(6)]
    assert run.position == sum(SIZES)
    norms = [f["gradient_norm"] for f in figures[1:]]  # those that moved a weight
    assert min(norms) < CLIP < max(norms)  # some steps are clipped, some are not
    owed = weights(model)
    start = weights(Transformer(recipe.model, Policy(precision="fp32"), seed=recipe.training.seed))
    for name, found in weights(run.model).items():
        moved = (owed[name] - start[name]).abs().max()
        assert (found - owed[name]).abs().max() <= 2e-3 * moved + 1e-7, name


def test_a_run_goes_on_in_the_middle_of_a_ramp_bit_for_bit(
    recipe_with: RecipeWith, dataset_of: DatasetOf, tmp_path: Path
) -> None:
    recipe = moving_recipe(recipe_with, cross_document_attention=False)
    dataset = dataset_of(recipe)
    whole = trained(recipe, tmp_path / "run", dataset)
    run = RunFolder.open(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()] == [3, 6]
    before = facts(run.events_path, "step", "checkpoint", "validation")
    again = Trainer.resume(run, dataset, run.checkpoint_path(3))  # not the latest: its successor is written again
    assert again.position == sum(SIZES[:3])
    again.run()
    assert_same(state(whole), state(again))
    assert [step for step, _ in run.checkpoints()] == [3, 6]
    checkpoint.read_state(run.checkpoint_path(6))
    assert facts(run.events_path, "step", "checkpoint", "validation") == before  # each event once, also step 3's
