"""The training loss, and the tokens that multi-token prediction sees."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.data import Batch
from tessera.model import Transformer
from tessera.numerics import Policy
from tessera.ops.chunked_loss import IGNORED
from tessera.recipe import Recipe
from tessera.training.loss import Share, draft_tokens, training_loss


def test_depth_k_embeds_the_token_k_ahead_and_predicts_the_one_behind_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for depth in (1, 2, 3):
        targets = torch.randint(0, 50, (3, 9), generator=generator)
        targets[torch.rand(3, 9, generator=generator) < 0.2] = IGNORED
        embedded, goals = draft_tokens(targets, depth)
        for row in range(3):
            for i in range(9):
                # t_{i+1} is targets[i]: the path from i to the goal must be whole
                path = targets[row, i : i + depth + 1].tolist()
                whole = len(path) == depth + 1 and IGNORED not in path
                assert goals[row, i] == (path[depth] if whole else IGNORED)
                assert embedded[row, i] == (path[depth - 1] if whole else 0)


def parts(
    model: Transformer, batch: Batch, micro: int, weights: tuple[float, float]
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    share = Share(int((batch.targets != IGNORED).sum()), len(batch.tokens), *weights)
    total = 0.0
    for start in range(0, len(batch.tokens), micro):
        rows = slice(start, start + micro)
        part = Batch(batch.tokens[rows], batch.targets[rows], batch.document_ids[rows])
        loss = training_loss(model, part, None, share).total
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 320, (4, 17), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:].clone(), torch.zeros(4, 16, dtype=torch.int32))


def test_micro_batches_add_up_to_the_whole_batch(recipe_with: Callable[..., Recipe], batch: Batch) -> None:
    model = Transformer(recipe_with().model, Policy(precision="fp32"))
    batch.targets[0, 3:7] = IGNORED  # an uneven cut: a mean of means would differ
    whole, gradient = parts(model, batch, 4, (0.3, 0.1))
    for micro in (1, 2):
        total, pieces = parts(model, batch, micro, (0.3, 0.1))
        assert total == pytest.approx(whole, rel=1e-6)
        for name in gradient:
            assert torch.allclose(pieces[name], gradient[name], rtol=1e-4, atol=1e-7), name


def test_the_loss_is_the_weighted_sum_of_its_parts(recipe_with: Callable[..., Recipe], batch: Batch) -> None:
    model = Transformer(recipe_with().model, Policy(precision="fp32"))
    share = Share(64, 4, 0.3, 0.05)
    losses = training_loss(model, batch, None, share)
    logits = model.logits(model(batch.tokens).hidden)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert losses.lm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.mtp[0].item() > 1  # its own cross-entropy, not weighted
    summed = losses.lm + 0.3 * losses.mtp[0] + 0.05 * losses.balance
    assert losses.total.item() == pytest.approx(summed.item(), rel=1e-6)
    assert [int(c.sum()) for c in losses.counts] == [2 * 64, 2 * 64]  # top-2, one MoE layer and the MTP block


def test_without_a_weight_multi_token_prediction_moves_nothing(
    recipe_with: Callable[..., Recipe], batch: Batch
) -> None:
    model = Transformer(recipe_with().model, Policy(precision="fp32"))
    _, gradient = parts(model, batch, 4, (0.0, 0.0))
    blocks = [g for name, g in gradient.items() if name.startswith("model.layers.2.")]
    assert blocks
    assert all(not g.any() for g in blocks)
