"""A linear layer that is never quantised: y = x W^T, W an FP32 master, operands rounded to a given dtype.

The router (float32) and MTP's eh_proj (the activations' dtype). Kept for backward: x as it is, no copy of it in
another dtype, or the way to make it again. The weight's gradient is float32.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.numerics.dense import matmul_rows
from tessera.ops.saved import Again, load, save


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor | Again, weight: Tensor, dtype: torch.dtype) -> Tensor:
        save(ctx, kept, weight)
        ctx.dtype = dtype
        return matmul_rows(x.to(dtype), weight.to(dtype).t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight = load(ctx)
        return matmul_rows(dy, weight.to(ctx.dtype)).to(x.dtype), None, dy.float().t() @ x.float(), None


def dense_linear(x: Tensor, kept: Tensor | Again, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, K], weight [N, K] float32 -> [T, N] in `dtype`; a row depends on that row and the weight alone.

    `kept` stands for x in backward.
    """
    y: Tensor = _DenseLinear.apply(x, kept, weight, dtype)
    return y
