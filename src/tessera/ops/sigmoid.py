"""Sigmoid and SiLU, element by element the same bits wherever an element lies.

On a CPU torch's own take another exponential for the last elements of a tensor, and of each thread's share of one, than
for the full vectors before: a token's affinities would depend on how many tokens there are. Exponential, sum and
division as operations of their own do not.
"""

from typing import Any

import torch
from torch import Tensor


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _denominator(x).reciprocal_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (1.0 - y) * y


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); x float32 of any shape. Kept for backward: the result."""
    y: Tensor = _Sigmoid.apply(x)
    return y


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) as a tensor of its own, for use inside autograd Functions; x float32 of any shape."""
    denominator = _denominator(x)
    return torch.div(x, denominator, out=denominator)


def silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """silu(x) and its derivative s (1 + x (1 - s)), s = sigmoid(x); x float32 of any shape."""
    s = _denominator(x).reciprocal_()
    return x * s, (1.0 - s).mul_(x).add_(1.0).mul_(s)


def _denominator(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1.0)
