"""The three GEMMs of a linear layer on operands of any precision, Y[T, N] = X[T, K] W[N, K]^T.

An operand is a `TiledTensor` (FP8: codes travel into the kernel) or a plain tensor (BF16 and FP32 twins). Grouped
forms take `offsets` int64 [G + 1]: rows offsets[g] .. offsets[g + 1] meet weight g of W [G * N, K]. Groups may be
empty. Raises TypeError for one quantised operand beside one that is not, ValueError for operands whose tiles do not
meet. docs/numerics.md has the operand table, section "The three GEMMs".
"""

import torch
from torch import Tensor

from tessera.numerics import dense, operators
from tessera.numerics.precision import Accumulation
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.numerics.tiles import TILE

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


def wgrad(
    dy: Operand, x: Operand, accumulation: Accumulation, offsets: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """dy [T, N], x [T, K] -> dW [G * N, K] float32; the contraction is over the tokens of each group.

    `out`: memory for the result, contiguous; it may have its rows apart by group, [G, N, K].
    """
    out = None if out is None else out.view(-1, out.shape[-1])
    return _matmul("wgrad", dy, x, accumulation, torch.float32, offsets, out)


def _matmul(
    kind: str,
    a: Operand,
    b: Operand,
    accumulation: Accumulation,
    out_dtype: torch.dtype,
    offsets: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    if isinstance(a, TiledTensor) and isinstance(b, TiledTensor):
        _require_tiles_that_meet(kind, a, b, offsets)
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
            a.column_segment if kind == "wgrad" else b.row_segment,
            offsets,
            accumulation.model,
            accumulation.interval,
            out_dtype,
            out=out,
        )
    if isinstance(a, TiledTensor) or isinstance(b, TiledTensor):
        raise TypeError("both operands of a GEMM are quantised, or neither")
    return dense.matmul(kind, a, b, offsets, out_dtype, out)


def _require_tiles_that_meet(kind: str, a: TiledTensor, b: TiledTensor, offsets: Tensor | None) -> None:
    """The kernel reads scales by the GEMM's offsets and segment: the operands must have been tiled by the same."""
    for name, operand in (("first", a), ("second", b)):
        by_group = operand.tile.rows == TILE and (kind == "wgrad" or operand is a)
        if by_group and (operand.offsets is None) != (offsets is None):
            raise ValueError(
                f"{kind}: tiles of the {name} operand are {TILE} rows high; quantise it with the offsets of the GEMM"
            )
    segments = (a.column_segment or a.shape[1], b.row_segment or b.shape[0])
    apart = segments[0] != segments[1] and (not a.tile.columns or any(s % TILE for s in segments))
    if kind == "dgrad" and a.tile.columns != 1 and apart:
        raise ValueError(
            f"dgrad: tiles restart every {segments[0]} columns of dY and every {segments[1]} rows of W; quantise dY "
            "with column_segment = the weight's row_segment"
        )
