"""Several linear layers on one input: y_i = x W_i^T, the input quantised once.

`normed_linear` puts RMSNorm in front (q_a and kv_a of MLA, the dense gate/up); `linear` takes x as it is, and an
operand already made of it, where more than one consumer shares it (shared expert and routed experts).

Kept for backward: the input's codes (once, however many weights), and for the norm x itself, which is the residual
stream or an MLA latent, with one float a token. The input's gradients from all weights are added in FP32.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Weight
from tessera.ops.rms_norm import normalise, normalise_backward
from tessera.ops.saved import load, save


class _Linear(torch.autograd.Function):
    """Forward and backward of the weights alone; `cached` is the shared input operand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, operand: Operand, weights: tuple[Weight, ...], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.weights, ctx.dtype = weights, x.dtype
        save(ctx, operand)
        return tuple(_fprop(operand, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        (operand,) = load(ctx)
        dx, dws = _backward(ctx.weights, operand, dys)
        return dx.to(ctx.dtype), None, None, *dws


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, epsilon: float, weights: tuple[Weight, ...], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        y, inverse_rms = normalise(x, gamma, epsilon)
        operand = weights[0].role.input(y)
        ctx.weights = weights
        save(ctx, x, gamma, inverse_rms, operand)
        return tuple(_fprop(operand, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, gamma, inverse_rms, operand = load(ctx)
        dy, dws = _backward(ctx.weights, operand, dys)
        dx, dgamma = normalise_backward(dy, x, gamma, inverse_rms)
        return dx, dgamma, None, None, *dws


def normed_linear(x: Tensor, gamma: Tensor, epsilon: float, *weights: Weight) -> tuple[Tensor, ...]:
    """x [T, K] -> y_i [T, N_i] = rms_norm(x) W_i^T, in the roles' activation dtype; gamma [K] float32."""
    return _NormedLinear.apply(x, gamma, epsilon, weights, *(w.parameter for w in weights))


def linear(x: Tensor, operand: Operand, weight: Weight) -> Tensor:
    """x [T, K] (for its gradient) and its fprop operand -> [T, N]."""
    (y,) = _Linear.apply(x, operand, (weight,), weight.parameter)
    return y


def _fprop(operand: Operand, weight: Weight) -> Tensor:
    p = weight.role.precision
    return gemm.fprop(operand, weight.operand(), p.accumulation, p.activation_dtype)


def _backward(weights: tuple[Weight, ...], operand: Operand, dys: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of all outputs -> (dX [T, K] float32, [dW_i in the shape of its parameter])."""
    role = weights[0].role
    columns = role.input_columns(operand)
    total: Tensor | None = None
    dws = []
    for weight, dy in zip(weights, dys, strict=True):
        p = weight.role.precision
        dy = dy.contiguous()
        rows, dy_columns = weight.role.gradient(dy, column_segment=segment_of(weight))
        dx = gemm.dgrad(rows, weight.operand(), p.accumulation, p.activation_dtype).float()
        total = dx if total is None else total + dx
        dws.append(gemm.wgrad(dy_columns, columns, p.accumulation).view_as(weight.parameter))
    assert total is not None  # there is at least one weight
    return total, dws


def segment_of(weight: Weight) -> int:
    """Columns of dY after which tiles restart: where several matrices are stored as one."""
    rows = weight.parameter.shape[-2]
    return weight.row_segment if weight.row_segment != rows else 0
