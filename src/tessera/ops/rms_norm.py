"""RMSNorm: y = gamma * x / sqrt(mean(x^2) + eps), FP32 inside, activations' dtype in and out.

As plain functions for the ops that fuse it with what follows, and as autograd Functions, alone and behind a residual
addition, that save x (the residual stream, which lives anyway) and one float per token. Whoever needs y in backward
makes it again from these. Zhang and Sennrich, 2019.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.ops.keep import Keep
from tessera.ops.kernels import norm, usable
from tessera.ops.saved import Again


def normalise(x: Tensor, gamma: Tensor, epsilon: float, kernel: str = "") -> tuple[Tensor, Tensor]:
    """x [T, H], gamma [H] float32 -> (y [T, H] in x's dtype, 1 / rms [T, 1] float32)."""
    if usable(kernel, x):
        return norm.rms_norm(x, gamma, epsilon, kernel)
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return scaled(x, gamma, inverse_rms, kernel), inverse_rms


def scaled(x: Tensor, gamma: Tensor, inverse_rms: Tensor, kernel: str = "") -> Tensor:
    """The normalised value [T, H] in x's dtype, from x and its 1 / rms [T, 1]."""
    if usable(kernel, x):
        return norm.rms_norm_again(x, gamma, inverse_rms, kernel)
    return (x.float() * inverse_rms * gamma).to(x.dtype)


def normalise_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, inverse_rms: Tensor, passing: Tensor | None = None, kernel: str = ""
) -> tuple[Tensor, Tensor]:
    """dy [T, H] float32 or in x's dtype -> (dx [T, H] in x's dtype, dgamma [H] float32).

    `passing` [T, H], in x's dtype: the gradient of a sum x that is read past the norm as well, added before dx is
    rounded.
    """
    if usable(kernel, x) and dy.dtype in (x.dtype, torch.float32):
        return norm.rms_norm_backward(dy, x, gamma, inverse_rms, passing, kernel)
    dy, unit = dy.float(), x.float() * inverse_rms
    product = dy * unit
    dgamma = product.sum(dim=0)
    # No matrix-vector product with gamma: on a CPU that adds up a row in an order that depends on the row's place.
    along_x = product.mul_(gamma).mean(dim=-1, keepdim=True)
    dx = (dy * gamma).addcmul_(unit, along_x, value=-1).mul_(inverse_rms)
    return (dx if passing is None else dx.add_(passing)).to(x.dtype), dgamma


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y, inverse_rms = normalise(x, gamma, epsilon)
        ctx.save_for_backward(x, gamma, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return y, inverse_rms

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma, inverse_rms = ctx.saved_tensors
        return *normalise_backward(dy, x, gamma, inverse_rms), None


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, keep: Keep) -> tuple[Tensor, Tensor | Again]:
    """x [T, H] -> (y [T, H] in x's dtype, what stands for y in the backward of its readers); gamma [H] float32."""
    y, inverse_rms = _RmsNorm.apply(x, gamma, epsilon)
    return y, kept_norm(y, x, gamma, inverse_rms, keep)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, y, inverse_rms = _add_and_normalise(x, delta, gamma, epsilon, kernel)
        ctx.save_for_backward(total, gamma, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        ctx.kernel = kernel
        return total, y, inverse_rms

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        total, gamma, inverse_rms = ctx.saved_tensors
        d, dgamma = normalise_backward(dy, total, gamma, inverse_rms, dtotal, ctx.kernel)
        return d, d, dgamma, None, None


def add_rms_norm(
    x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, keep: Keep, kernel: str = ""
) -> tuple[Tensor, Tensor, Tensor | Again]:
    """x, delta [T, H] -> (x + delta, its norm, what stands for that in the backward of its readers); gamma [H] float32.

    One pass over the residual stream. The gradients of the sum and of its norm are added in FP32, then rounded.
    """
    total, y, inverse_rms = _AddRmsNorm.apply(x, delta, gamma, epsilon, kernel)
    return total, y, kept_norm(y, total, gamma, inverse_rms, keep)


def _add_and_normalise(
    x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    if usable(kernel, x, delta) and x.dtype == delta.dtype:
        return norm.add_rms_norm(x, delta, gamma, epsilon, kernel)
    total = x + delta
    return total, *normalise(total, gamma, epsilon, kernel)


def kept_norm(y: Tensor, x: Tensor, gamma: Tensor, inverse_rms: Tensor, keep: Keep) -> Tensor | Again:
    """y itself, or the way to make it again."""
    return Again(scaled, x, gamma, inverse_rms) if keep.recompute_norms else y
