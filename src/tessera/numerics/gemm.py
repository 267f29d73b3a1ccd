"""The three GEMMs of a linear layer on operands of any precision, Y[T, N] = X[T, K] W[N, K]^T.

An operand is a `TiledTensor` (FP8: codes travel into the kernel) or a plain tensor (BF16 and FP32 twins). Grouped
forms take `offsets` int64 [G + 1]: rows offsets[g] .. offsets[g + 1] meet weight g of W [G * N, K]. Groups may be
empty. docs/numerics.md has the operand table.
"""

import torch
from torch import Tensor

from tessera.numerics import operators
from tessera.numerics.kernels.torch import dense_matmul
from tessera.numerics.precision import Accumulation
from tessera.numerics.tiled_tensor import TiledTensor

Operand = TiledTensor | Tensor


def fprop(
    x: Operand, weight: Operand, accumulation: Accumulation, out_dtype: torch.dtype, offsets: Tensor | None = None
) -> Tensor:
    """x [T, K], weight [G * N, K] -> [T, N]."""
    return _matmul("fprop", x, weight, accumulation, out_dtype, offsets)


def dgrad(
    dy: Operand, weight: Operand, accumulation: Accumulation, out_dtype: torch.dtype, offsets: Tensor | None = None
) -> Tensor:
    """dy [T, N], weight [G * N, K], the same codes as in fprop -> dX [T, K]."""
    return _matmul("dgrad", dy, weight, accumulation, out_dtype, offsets)


def wgrad(dy: Operand, x: Operand, accumulation: Accumulation, offsets: Tensor | None = None) -> Tensor:
    """dy [T, N], x [T, K] -> dW [G * N, K] float32; the contraction is over the tokens of each group."""
    return _matmul("wgrad", dy, x, accumulation, torch.float32, offsets)


def _matmul(
    kind: str, a: Operand, b: Operand, accumulation: Accumulation, out_dtype: torch.dtype, offsets: Tensor | None
) -> Tensor:
    if isinstance(a, TiledTensor) and isinstance(b, TiledTensor):
        return operators.matmul(
            kind,
            a.codes,
            a.scales,
            a.tile,
            a.format.name,
            b.codes,
            b.scales,
            b.tile,
            b.format.name,
            0 if kind == "wgrad" else b.row_segment,
            offsets,
            accumulation.model,
            accumulation.interval,
            out_dtype,
        )
    if isinstance(a, TiledTensor) or isinstance(b, TiledTensor):
        raise TypeError("both operands of a GEMM are quantised, or neither")
    return dense_matmul(kind, a, b, offsets, out_dtype)
