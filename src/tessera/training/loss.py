"""The training loss of one micro-batch: next token, multi-token prediction, sequence-wise balance.

    L = CE_main / T + lambda / D * sum_k CE_k / T + alpha * sum_layers balance

(DeepSeek-V3 report, equations 17-20, 24-25). CE are sums over positions in nats, T the positions of the *whole*
batch that have a next token, so that micro-batches add up to the same loss however the batch is cut. MTP depth k at
position i embeds t_{i+k}, predicts t_{i+k+1}, and has no target in the last k positions of a sequence, nor where a
document's border that hides the next token lies between; as in the report it is divided by T all the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.data import Batch
from tessera.model import Output, Transformer
from tessera.ops.chunked_loss import IGNORED, chunked_loss


@dataclass(frozen=True)
class Share:
    """What one micro-batch's sums are divided by, and the weights of the step."""

    positions: int  # of the whole batch, with a target
    sequences: int  # of the whole batch
    mtp_weight: float
    balance_weight: float


@dataclass(frozen=True)
class Losses:
    """Contributions of a micro-batch to the step's losses; `total` carries the graph, the others are detached."""

    total: Tensor
    lm: Tensor  # float32 []
    mtp: Tensor  # float32 [D], not weighted
    balance: Tensor  # float32 [], mean over the batch's sequences, summed over layers, not weighted
    counts: list[Tensor]  # int64 [E], for each router of the model in order


def training_loss(model: Transformer, batch: Batch, document_ids: Tensor | None, share: Share) -> Losses:
    """The micro-batch's part of the step's loss. `document_ids` [B, L]: attention stays within a document."""
    output = model(batch.tokens, document_ids=document_ids)
    lm = main_loss(model, output, batch.targets, 1 / share.positions) / share.positions
    routings = list(output.router)
    total, depths, mtp = lm, model.section.num_nextn_predict_layers, []
    weight = share.mtp_weight / max(depths, 1) / share.positions
    for depth in range(1, depths + 1):
        tokens, goals = draft_tokens(batch.targets, depth)
        output = model.draft(depth, output.carry, tokens, document_ids=document_ids)
        routings += output.router
        loss = main_loss(model, output, goals, weight)
        mtp.append(loss.detach() / share.positions)
        total = total + loss * weight
    sequences = batch.tokens.shape[0] / share.sequences
    balance = torch.stack([r.balance_loss for r in routings]).sum() * sequences if routings else lm.new_zeros(())
    return Losses(
        total=total + balance * share.balance_weight,
        lm=lm.detach(),
        mtp=torch.stack(mtp) if mtp else lm.new_zeros(0),
        balance=balance.detach(),
        counts=[r.counts for r in routings],
    )


def main_loss(model: Transformer, output: Output, targets: Tensor, grad_output: float = 1.0) -> Tensor:
    """Sum of the cross-entropy of `output.hidden` [B, L, H] against targets [B, L], in nats.

    grad_output: the gradient that backward will bring, where it is known (chunked_loss).
    """
    return chunked_loss(
        output.hidden.flatten(0, 1),
        model.lm_head.weight,
        targets.flatten(),
        chunked=model.keep.chunked_head,
        grad_output=grad_output,
    )


def draft_tokens(targets: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """targets [B, L] -> what MTP block `depth` embeds and what it predicts, both int64 [B, L].

    Embeds targets[i + depth - 1], predicts targets[i + depth]; IGNORED where any target from i on is missing.
    Positions without a token to embed get token 0, whose output nobody reads.
    """
    missing = targets == IGNORED
    hidden = missing.clone()
    for shift in range(1, depth + 1):
        hidden[:, :-shift] |= missing[:, shift:]
        hidden[:, -shift:] = True
    embedded = _shifted(targets, depth - 1).masked_fill(hidden, 0)
    return embedded, _shifted(targets, depth).masked_fill(hidden, IGNORED)


def _shifted(x: Tensor, places: int) -> Tensor:
    return torch.nn.functional.pad(x[:, places:], (0, places), value=0)
