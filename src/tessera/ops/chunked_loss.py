"""The output head and its cross-entropy, a few hundred tokens at a time: no logits are kept.

Logits are FP32, from BF16 operands with FP32 accumulation; the head's gradient is FP32 (docs/numerics.md, "Precision
by role"). Loss and gradients of a chunk are made together in forward, so memory is one chunk of logits, the gradient
of the hidden states and that of the head. `backward` only scales them by the gradient that arrives.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics.dense import MINIMUM_ROWS, matmul_rows, tall

CHUNK_TOKENS = 256
IGNORED = -100  # target of a position that has none


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, H] in the activation dtype, weight [V, H] FP32 master -> logits float32 [T, V].

    Operands are rounded to hidden's dtype; a row depends on that row and the weight alone.
    """
    return matmul_rows(hidden.float(), weight.to(hidden.dtype).float().t())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> Tensor:
        operand = weight.to(hidden.dtype)
        transposed = operand.float().t()
        loss = hidden.new_zeros((), dtype=torch.float64)
        dhidden = torch.empty_like(hidden, dtype=torch.float32) if keep else None
        dweight = torch.zeros_like(weight) if keep else None
        # Two strips that all chunks reuse: fresh ones of this size cost a CPU more in page faults than their contents.
        height = max(min(CHUNK_TOKENS, hidden.shape[0]), MINIMUM_ROWS)
        strips = torch.empty(2, height, weight.shape[0], device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            x, target = hidden[rows].float(), targets[rows]
            padded = tall(x, MINIMUM_ROWS)  # a token's loss does not depend on how many the chunk has
            torch.mm(padded, transposed, out=strips[0, : padded.shape[0]])
            logits, probability = strips[:, : x.shape[0]]
            counted = target != IGNORED
            index = target.clamp(min=0)[:, None]
            largest, own = logits.amax(dim=-1), logits.gather(1, index).squeeze(1)
            torch.softmax(logits, dim=-1, out=probability)
            # The largest logit's probability is 1 / sum(exp(logit - largest)), at least 1 / V.
            token_loss = largest - probability.amax(dim=-1).log() - own
            loss += torch.where(counted, token_loss, 0.0).sum(dtype=torch.float64)
            if dhidden is None or dweight is None:
                continue
            probability.scatter_add_(1, index, probability.new_full(index.shape, -1.0))
            d = probability.mul_(counted[:, None]).to(hidden.dtype)
            dhidden[rows] = matmul_rows(d, operand)
            dweight.addmm_(probability.copy_(d).t(), x)
        if keep:
            ctx.save_for_backward(dhidden, dweight)
            ctx.dtype = hidden.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (dhidden * gradient).to(ctx.dtype), dweight * gradient, None, None


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the next-token cross-entropy in nats: hidden [T, H], weight [V, H] float32, targets int64 [T].

    Targets equal to IGNORED take no part. float32 scalar; tokens are added in float64.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, weight, targets, torch.is_grad_enabled())
    return loss
