"""What a model knows of held-out text: loss, bits per byte, and how often its own drafts would be accepted.

Always the same batches: the first of the validation split, so that figures of different steps and arms compare.
MTP acceptance of depth k is the share of positions where the k-th draft, made from the text's own tokens, names the
token that the main head puts first there: what greedy speculative decoding would accept on this text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.data import Batch, Dataset
from tessera.model import Transformer
from tessera.ops.chunked_loss import CHUNK_TOKENS, IGNORED
from tessera.recipe import Recipe
from tessera.training.loss import draft_tokens, main_loss


@dataclass(frozen=True)
class Validation:
    """Sums over the held-out positions, as figures: nats a token, bits a byte, shares."""

    loss: float
    bits_per_byte: float
    mtp_loss: list[float]
    mtp_acceptance: list[float]
    tokens: int
    bytes: int

    def facts(self) -> dict[str, Any]:
        """The fields of a `validation` event."""
        return dict(self.__dict__)


def held_out(dataset: Dataset, recipe: Recipe, number: int) -> list[Batch]:
    """The first `number` held-out batches of the recipe's largest size; fewer where the text is short, never none."""
    split = dataset.validation
    size = min(recipe.largest_batch_size(), split.num_sequences)
    return [split.batch(i * size, size) for i in range(min(number, split.num_sequences // size))]


@torch.no_grad()
def validate(
    model: Transformer, batches: Sequence[Batch], token_bytes: np.ndarray, *, masked: bool = False
) -> Validation:
    """Score `batches`; token_bytes int64 [V] says how many bytes of text each token stands for.

    `masked`: attention stays within a document, as in training.
    """
    bytes_of = torch.from_numpy(token_bytes)
    depths = model.section.num_nextn_predict_layers
    nats, tokens, num_bytes = 0.0, 0, 0
    draft_nats, draft_tokens_seen, accepted = [0.0] * depths, [0] * depths, [0] * depths
    for batch in batches:
        ids = batch.document_ids if masked else None
        output = model(batch.tokens, document_ids=ids)
        nats += float(main_loss(model, output, batch.targets))
        counted = batch.targets != IGNORED
        tokens += int(counted.sum())
        num_bytes += int(bytes_of[batch.targets[counted].cpu()].sum())
        if not depths:
            continue
        first_choice = greedy(model, output.hidden)
        for k in range(depths):
            embedded, goals = draft_tokens(batch.targets, k + 1)
            output = model.draft(k + 1, output.carry, embedded, document_ids=ids)
            draft_nats[k] += float(main_loss(model, output, goals))
            drafted = greedy(model, output.hidden)[:, : -(k + 1)]
            wanted = first_choice[:, k + 1 :]
            valid = goals[:, : -(k + 1)] != IGNORED
            draft_tokens_seen[k] += int(valid.sum())
            accepted[k] += int(((drafted == wanted) & valid).sum())
    return Validation(
        loss=nats / max(tokens, 1),
        bits_per_byte=nats / log(2) / max(num_bytes, 1),
        mtp_loss=[n / max(t, 1) for n, t in zip(draft_nats, draft_tokens_seen, strict=True)],
        mtp_acceptance=[a / max(t, 1) for a, t in zip(accepted, draft_tokens_seen, strict=True)],
        tokens=tokens,
        bytes=num_bytes,
    )


def greedy(model: Transformer, hidden: Tensor) -> Tensor:
    """hidden [B, L, H] -> the most probable next token at each position, int64 [B, L]; logits a chunk at a time."""
    rows = hidden.flatten(0, 1).split(CHUNK_TOKENS)
    return torch.cat([model.logits(chunk).argmax(dim=-1) for chunk in rows]).view(hidden.shape[:2])
