"""The output head and its cross-entropy, a few hundred tokens at a time: no logits are kept (unless asked for).

Logits are FP32, from BF16 operands with FP32 accumulation; the head's gradient is FP32 (docs/numerics.md, "Precision
by role"). Loss and gradients of a chunk are made together in forward, so memory is one chunk of logits and of their
gradient, the gradient of the hidden states and that of the head.

Gradients made in forward need the one that backward will bring. A caller that knows it says so, and it is multiplied in
where the logits' gradient is rounded anyway; `backward` then has nothing to compute. Any other gradient scales the
results.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tessera.numerics.dense import MINIMUM_ROWS, Fixed, add_wgrad, matmul
from tessera.ops.gradient_room import room_for_gradient
from tessera.ops.kernels.cross_entropy import IGNORED, cross_entropy

__all__ = ["CHUNK_TOKENS", "IGNORED", "chunked_loss", "head_logits"]

CHUNK_TOKENS = 256


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, H] in the activation dtype, weight [V, H] FP32 master -> logits float32 [T, V].

    Operands are rounded to hidden's dtype; a row depends on that row and the weight alone.
    """
    return matmul("fprop", hidden, weight.to(hidden.dtype), None, torch.float32)


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool = True, grad_output: float = 1.0
) -> Tensor:
    """Sum over tokens of the next-token cross-entropy in nats: hidden [T, H], weight [V, H] float32, targets int64 [T].

    Targets equal to IGNORED take no part. float32 scalar; tokens are added in float64. With `chunked` false all
    logits are kept for backward; results have the same bits. grad_output: the gradient of this loss that backward
    will bring, where it is known; right or wrong, gradients are right, but only a right one costs nothing.
    Raises ValueError for targets that are neither a token nor IGNORED.
    """
    grad = torch.is_grad_enabled()
    loss: Tensor = (
        _ChunkedLoss.apply(hidden, weight, targets, grad_output, grad)
        if chunked or not grad
        else _WholeLoss.apply(hidden, weight, targets, grad_output)
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in forward, from the logits of one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad_output: float, keep: bool) -> Tensor:
        head = _Head(hidden, weight, targets, grad_output)
        # Strips that all chunks reuse: fresh ones of this size cost a CPU more in page faults than their contents.
        logits = hidden.new_empty(head.height, weight.shape[0], dtype=torch.float32)
        d = torch.empty_like(logits, dtype=hidden.dtype) if keep else None
        loss = hidden.new_zeros((), dtype=torch.float64)
        for rows in head.chunks():
            loss += head.loss(rows, head.logits(rows, logits), d)
            if d is not None:
                head.add_gradients(rows, d)
        if keep:
            ctx.save_for_backward(*head.gradients())
            ctx.expected = head.grad_output
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = _scaled(ctx.saved_tensors, gradient, ctx.expected)
        return dhidden, dweight, None, None, None


class _WholeLoss(torch.autograd.Function):
    """All logits are kept, as a loss behind a linear keeps them; the same sums, made in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad_output: float) -> Tensor:
        head = _Head(hidden, weight, targets, grad_output)
        tail = hidden.shape[0] % CHUNK_TOKENS or MINIMUM_ROWS  # a short last chunk is written with zeros behind it
        rows_written = hidden.shape[0] + max(MINIMUM_ROWS - tail, 0)
        kept = hidden.new_empty(rows_written, weight.shape[0], dtype=torch.float32)
        loss = hidden.new_zeros((), dtype=torch.float64)
        for rows in head.chunks():
            loss += head.loss(rows, head.logits(rows, kept[rows.start :]), None)
        ctx.save_for_backward(hidden, weight, targets, kept[: hidden.shape[0]])
        ctx.expected = head.grad_output
        return loss.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, logits = ctx.saved_tensors
        head = _Head(hidden, weight, targets, ctx.expected)
        d = torch.empty_like(logits[: head.height], dtype=hidden.dtype)
        for rows in head.chunks():
            head.loss(rows, logits[rows], d)
            head.add_gradients(rows, d)
        dhidden, dweight = _scaled(head.gradients(), gradient, ctx.expected)
        return dhidden, dweight, None, None


def _scaled(gradients: tuple[Tensor, ...], gradient: Tensor, expected: float) -> Iterator[Tensor]:
    """Gradients made for `expected`, for the one that came."""
    if float(gradient) == expected:
        return iter(gradients)
    ratio = float(gradient) / expected
    return ((one.float() * ratio).to(one.dtype) for one in gradients)


class _Head:
    """The steps of one chunk. hidden [T, H], weight [V, H] float32, targets [T]; `rows` is a slice of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, grad_output: float) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        # As autograd brings it; results for a gradient of zero could not be scaled to any other.
        self.grad_output = float(torch.tensor(grad_output, dtype=torch.float32)) or 1.0
        self.fixed = Fixed(weight, hidden.dtype)
        self.height = max(min(CHUNK_TOKENS, hidden.shape[0]), MINIMUM_ROWS)  # rows that a chunk's products take
        self._gradients: tuple[Tensor, Tensor] | None = None

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], CHUNK_TOKENS):
            yield slice(start, min(start + CHUNK_TOKENS, self.hidden.shape[0]))

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Logits [rows, V], written to the first rows of `out`, which has `height` of them."""
        return self.fixed.fprop(self.hidden[rows], out)

    def loss(self, rows: slice, logits: Tensor, d: Tensor | None) -> Tensor:
        """The chunk's loss, float64 []; the gradient of its logits goes to the first rows of `d`."""
        d = None if d is None else d[: logits.shape[0]]
        return cross_entropy(logits, self.targets[rows], self.grad_output, d).sum(dtype=torch.float64)

    def add_gradients(self, rows: slice, d: Tensor) -> None:
        """Fill the chunk's rows of the hidden states' gradient and add to the head's."""
        x, d = self.hidden[rows], d[: rows.stop - rows.start]
        if first := self._gradients is None:
            self._gradients = torch.empty_like(self.hidden), room_for_gradient(self.weight)
        dhidden, dweight = self._gradients
        self.fixed.dgrad(d, dhidden[rows])
        add_wgrad(d, x, dweight, add=not first)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of hidden, in its dtype, and of weight, float32."""
        return self._gradients or (torch.zeros_like(self.hidden), torch.zeros_like(self.weight))
