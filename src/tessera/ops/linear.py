"""Several linear layers on one input: y_i = x W_i^T, the input quantised once.

`normed_linear` puts RMSNorm in front (q_a and kv_a of MLA, the dense gate/up); `linear` takes x as it is, and an
operand already made of it, where more than one consumer shares it (shared expert and routed experts).

Kept for backward: x of the norm, which is the residual stream or an MLA latent, with one float a token; normalised
value and codes are made again, or the codes are kept as well (once, however many weights). The input's gradients from
all weights are added in FP32.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Weight
from tessera.ops.gradient_room import room_for_large_gradient
from tessera.ops.keep import Keep
from tessera.ops.rms_norm import kept_norm, normalise, normalise_backward
from tessera.ops.saved import Again, load, save


class _Linear(torch.autograd.Function):
    """Forward and backward of one weight alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, operand: Operand, kept: Operand | Again, weight: Weight, parameter: Tensor
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        save(ctx, kept)
        return fprop(operand, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (operand,) = load(ctx)
        dx, (dw,) = _backward((ctx.weight,), operand, (dy,))
        return dx.to(ctx.dtype), None, None, None, dw


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        epsilon: float,
        weights: tuple[Weight, ...],
        keep: Keep,
        kept: list[Operand | Again],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        y, inverse_rms = normalise(x, gamma, epsilon)
        operand = weights[0].role.input(y)
        kept.append(keep.linear_input(weights[0].role, operand, kept_norm(y, x, gamma, inverse_rms, keep)))
        ctx.weights = weights
        save(ctx, x, gamma, inverse_rms, kept[0])
        return tuple(fprop(operand, w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, gamma, inverse_rms, operand = load(ctx)
        dy, dws = _backward(ctx.weights, operand, dys)
        dx, dgamma = normalise_backward(dy, x, gamma, inverse_rms)
        return dx, dgamma, None, None, None, None, *dws


def normed_linear(
    x: Tensor, gamma: Tensor, epsilon: float, keep: Keep, *weights: Weight
) -> tuple[tuple[Tensor, ...], Operand | Again]:
    """x [T, K] -> (y_i [T, N_i] = rms_norm(x) W_i^T in the roles' activation dtype, what stands for the operand of all
    W_i in backward); gamma [K] float32.
    """
    kept: list[Operand | Again] = []
    ys = _NormedLinear.apply(x, gamma, epsilon, weights, keep, kept, *(w.parameter for w in weights))
    return ys, kept[0]


def linear(x: Tensor, operand: Operand, kept: Operand | Again, weight: Weight) -> Tensor:
    """x [T, K] (for its gradient) and its fprop operand -> [T, N]; `kept` stands for the operand in backward."""
    y: Tensor = _Linear.apply(x, operand, kept, weight, weight.parameter)
    return y


def fprop(operand: Operand, weight: Weight) -> Tensor:
    """operand [T, K] -> [T, N] in the role's activation dtype."""
    p = weight.role.precision
    return gemm.fprop(operand, weight.operand(), p.accumulation, p.activation_dtype)


def _backward(weights: tuple[Weight, ...], operand: Operand, dys: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of all outputs -> (dX [T, K], [dW_i in the shape of its parameter]); more than one dX are added in
    float32, a single one is as its GEMM gives it.
    """
    role = weights[0].role
    columns = role.input_columns(operand)
    total: Tensor | None = None
    dws = []
    for weight, dy in zip(weights, dys, strict=True):
        p = weight.role.precision
        dy = dy.contiguous()
        rows, dy_columns = weight.role.gradient(dy, column_segment=segment_of(weight))
        dx = gemm.dgrad(rows, weight.operand(), p.accumulation, p.activation_dtype)
        total = dx if total is None else total.float() + dx
        room = room_for_large_gradient(weight.parameter)
        dws.append(gemm.wgrad(dy_columns, columns, p.accumulation, out=room).view_as(weight.parameter))
    assert total is not None  # there is at least one weight
    return total, dws


def segment_of(weight: Weight) -> int:
    """Columns of dY after which tiles restart: where several matrices are stored as one."""
    rows = weight.parameter.shape[-2]
    return weight.row_segment if weight.row_segment != rows else 0
