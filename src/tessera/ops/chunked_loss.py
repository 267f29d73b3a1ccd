"""The output head and its cross-entropy, a few hundred tokens at a time: no logits are kept.

Logits are FP32, from BF16 operands with FP32 accumulation; the head's gradient is FP32 (docs/numerics.md, "Precision
by role"). Loss and gradients of a chunk are made together in forward, so memory is one chunk of logits, the gradient
of the hidden states and that of the head. `backward` only scales them by the gradient that arrives.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics.dense import matmul_rows

CHUNK_TOKENS = 256
IGNORED = -100  # target of a position that has none


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, H] in the activation dtype, weight [V, H] FP32 master -> logits float32 [T, V].

    Operands are rounded to hidden's dtype; a row depends on that row and the weight alone.
    """
    return matmul_rows(hidden.float(), weight.to(hidden.dtype).float().t())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        operand = weight.to(hidden.dtype)
        wide = operand.float()
        loss = hidden.new_zeros((), dtype=torch.float64)
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_gradient else None
        dweight = torch.zeros_like(weight) if needs_gradient else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            x, target = hidden[rows].float(), targets[rows]
            logits = matmul_rows(x, wide.t())
            keep = target != IGNORED
            index = target.clamp(min=0)[:, None]
            log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
            token_loss = (log_normaliser - logits.gather(1, index)).squeeze(1)
            loss += torch.where(keep, token_loss, 0.0).sum(dtype=torch.float64)
            if dhidden is None or dweight is None:
                continue
            d = logits.sub_(log_normaliser).exp_()
            d.scatter_add_(1, index, torch.full_like(index, -1, dtype=d.dtype))
            d = (d * keep[:, None]).to(hidden.dtype)
            dhidden[rows] = d @ operand
            dweight.addmm_(d.float().t(), x)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = hidden.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        dhidden, dweight = ctx.saved_tensors
        return (dhidden * gradient).to(ctx.dtype), dweight * gradient, None


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the next-token cross-entropy in nats: hidden [T, H], weight [V, H] float32, targets int64 [T].

    Targets equal to IGNORED take no part. float32 scalar; tokens are added in float64.
    """
    return _ChunkedLoss.apply(hidden, weight, targets)
