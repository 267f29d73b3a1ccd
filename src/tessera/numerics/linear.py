"""A linear layer whose three GEMMs run in a Role's precision: y = x W^T + b.

Backward is two functions that share the quantised dY: `input_gradient` (dgrad) and `weight_gradient` (wgrad).
They can run apart, which zero-bubble pipeline schedules need. The nn.Parameter is the FP32 master; its gradient is
FP32 and accumulates through autograd. What is kept for backward is the codes of x, not x.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from tessera.numerics import gemm
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Role, Weight


def forward(x: Operand, weight: Weight) -> Tensor:
    """x operand [T, K] -> [T, N] in the role's activation dtype."""
    p = weight.role.precision
    return gemm.fprop(x, weight.operand(), p.accumulation, p.activation_dtype)


def input_gradient(dy_rows: Operand, weight: Weight) -> Tensor:
    """dgrad: dY [T, N] in 1 x 128 tiles -> dX [T, K] in the role's activation dtype."""
    p = weight.role.precision
    return gemm.dgrad(dy_rows, weight.operand(), p.accumulation, p.activation_dtype)


def weight_gradient(dy_columns: Operand, cached_x: Operand, role: Role) -> Tensor:
    """wgrad: dY [T, N] in 128 x 1 tiles, the cached input [T, K] -> dW [N, K] float32."""
    return gemm.wgrad(dy_columns, role.input_columns(cached_x), role.precision.accumulation)


class LinearFunction(torch.autograd.Function):
    """Saves the cached input operand, through autograd; nothing in BF16 when the role is FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, weight: Weight) -> Tensor:
        operand = weight.role.input(x)
        ctx.weight, ctx.dtype = weight, x.dtype
        if ctx.needs_input_grad[1]:
            leaves, ctx.cached = pytree.tree_flatten(weight.role.input_cache(x, operand))
            ctx.save_for_backward(*leaves)
        return forward(operand, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        role = ctx.weight.role
        dy = dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(role.gradient_rows(dy), ctx.weight).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            cached = pytree.tree_unflatten(ctx.saved_tensors, ctx.cached)
            dw = weight_gradient(role.gradient_columns(dy), cached, role).view_as(ctx.weight.parameter)
        return dx, dw, None


class Linear(nn.Module):
    """Drop-in for nn.Linear with an FP32 master weight [N, K]; output in x's dtype.

    Any leading shape; rows are tokens. The bias is added in FP32, before the cast to x's dtype.
    """

    def __init__(self, weight: nn.Parameter, bias: Tensor | None, role: Role) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.role = role
        self.operand = Weight(weight, role)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = LinearFunction.apply(x.reshape(-1, self.in_features), self.weight, self.operand)
        if self.bias is not None:
            y = y.float() + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.role.precision.operands}"
