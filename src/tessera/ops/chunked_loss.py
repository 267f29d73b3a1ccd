"""The output head and its cross-entropy, a few hundred tokens at a time: no logits are kept (unless asked for).

Logits are FP32, from BF16 operands with FP32 accumulation; the head's gradient is FP32 (docs/numerics.md, "Precision
by role"). Loss and gradients of a chunk are made together in forward, so memory is one chunk of logits, the gradient
of the hidden states and that of the head. `backward` only scales them by the gradient that arrives.
"""

from collections.abc import Iterator
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
    """Gradients are made in forward, from the logits of one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> Tensor:
        head = _Head(hidden, weight, targets)
        # Two strips that all chunks reuse: fresh ones of this size cost a CPU more in page faults than their contents.
        strips = torch.empty(2, head.height, weight.shape[0], device=hidden.device)
        loss = hidden.new_zeros((), dtype=torch.float64)
        gradients = head.zero_gradients() if keep else None
        for rows in head.chunks():
            logits = head.logits(rows, strips[0])
            loss += head.loss(rows, logits, strips[1])
            if gradients:
                head.add_gradients(rows, strips[1], *gradients)
        if gradients:
            ctx.save_for_backward(*gradients)
            ctx.dtype = hidden.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (dhidden * gradient).to(ctx.dtype), dweight * gradient, None, None


class _WholeLoss(torch.autograd.Function):
    """All logits are kept, as a loss behind a linear keeps them; the same sums, made in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = _Head(hidden, weight, targets)
        tail = hidden.shape[0] % CHUNK_TOKENS or MINIMUM_ROWS  # a short last chunk is written with zeros behind it
        rows_written = hidden.shape[0] + max(MINIMUM_ROWS - tail, 0)
        kept = torch.empty(rows_written, weight.shape[0], device=hidden.device)
        strip = torch.empty(head.height, weight.shape[0], device=hidden.device)
        loss = hidden.new_zeros((), dtype=torch.float64)
        for rows in head.chunks():
            loss += head.loss(rows, head.logits(rows, kept[rows.start :]), strip)
        ctx.save_for_backward(hidden, weight, targets, kept[: hidden.shape[0]])
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, logits = ctx.saved_tensors
        head = _Head(hidden, weight, targets)
        strip = torch.empty(head.height, weight.shape[0], device=hidden.device)
        dhidden, dweight = head.zero_gradients()
        for rows in head.chunks():
            head.loss(rows, logits[rows], strip)
            head.add_gradients(rows, strip, dhidden, dweight)
        return (dhidden * gradient).to(hidden.dtype), dweight * gradient, None


class _Head:
    """The steps of one chunk. hidden [T, H], weight [V, H] float32, targets [T]; `rows` is a slice of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.operand = weight.to(hidden.dtype)
        self.transposed = self.operand.float().t()
        self.height = max(min(CHUNK_TOKENS, hidden.shape[0]), MINIMUM_ROWS)  # rows that a chunk's products take

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], CHUNK_TOKENS):
            yield slice(start, min(start + CHUNK_TOKENS, self.hidden.shape[0]))

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Logits [rows, V], written to the first rows of `out`, which has `height` of them."""
        x = self.hidden[rows].float()
        padded = tall(x, MINIMUM_ROWS)  # a token's loss does not depend on how many the chunk has
        torch.mm(padded, self.transposed, out=out[: padded.shape[0]])
        return out[: x.shape[0]]

    def loss(self, rows: slice, logits: Tensor, probability: Tensor) -> Tensor:
        """The chunk's loss, float64 []; the softmax of its logits goes to the first rows of `probability`."""
        target = self.targets[rows]
        largest, own = logits.amax(dim=-1), logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        probability = probability[: logits.shape[0]]
        torch.softmax(logits, dim=-1, out=probability)
        # The largest logit's probability is 1 / sum(exp(logit - largest)), at least 1 / V.
        token_loss = largest - probability.amax(dim=-1).log() - own
        return torch.where(target != IGNORED, token_loss, 0.0).sum(dtype=torch.float64)

    def zero_gradients(self) -> tuple[Tensor, Tensor]:
        """Room for those of hidden and weight, both float32."""
        return torch.empty_like(self.hidden, dtype=torch.float32), torch.zeros_like(self.weight)

    def add_gradients(self, rows: slice, probability: Tensor, dhidden: Tensor, dweight: Tensor) -> None:
        """Fill the chunk's rows of dhidden and add to dweight; `probability` as `loss` left it, overwritten here."""
        x, target = self.hidden[rows].float(), self.targets[rows]
        probability = probability[: x.shape[0]]
        index = target.clamp(min=0)[:, None]
        probability.scatter_add_(1, index, probability.new_full(index.shape, -1.0))
        d = probability.mul_((target != IGNORED)[:, None]).to(self.hidden.dtype)
        dhidden[rows] = matmul_rows(d, self.operand)
        dweight.addmm_(probability.copy_(d).t(), x)


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool = True) -> Tensor:
    """Sum over tokens of the next-token cross-entropy in nats: hidden [T, H], weight [V, H] float32, targets int64 [T].

    Targets equal to IGNORED take no part. float32 scalar; tokens are added in float64. With `chunked` false all
    logits are kept for backward; results have the same bits.
    """
    grad = torch.is_grad_enabled()
    loss: Tensor = (
        _ChunkedLoss.apply(hidden, weight, targets, grad)
        if chunked or not grad
        else _WholeLoss.apply(hidden, weight, targets)
    )
    return loss
