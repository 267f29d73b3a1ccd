"""Hopper's FP8 tensor-core accumulation: compiled (native/source/hopper.cpp), and vectorised over outputs in PyTorch.

One wgmma instruction takes 32 products and the accumulator. Each product keeps the sum of its operands' exponents
(it is not renormalised, so its significand is below 4; subnormal operands keep the format's minimum exponent). The
largest exponent among the non-zero terms, accumulator included, is e_max; every term is cut toward zero to a
multiple of 2^(e_max - 13); the cut terms are summed exactly; the sum is cut toward zero to 13 fraction bits. Model:
MMA-Sim (arXiv 2511.10909), validated bit for bit on the hardware; the report's section 3.5.2 calls it 14 bits.

All terms fit float32: 33 of them, each below 2^15 units, sum below 2^24. Promotion every `interval` elements adds
s_a * s_b * accumulator to a float32 result with one rounding (DeepSeek-V3 report, section 3.3.2).

`native_hopper` runs on a CPU and is some fifty times as fast; `hopper_matmul` needs no library and runs on any
device. Where finite codes meet, they give the same bits. Infinite codes of E5M2 count as NaN in the former only.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.numerics.formats import Format

KERNEL = Kernel("hopper_matmul", "piipiipppiip")
INSTRUCTION_K = 32
FRACTION_BITS = 13
NO_EXPONENT = -1000.0  # of a zero: takes no part in the maximum
CHUNK_OUTPUTS = 4096  # outputs worked on at once: 32 products each fill half a megabyte, which a core's cache holds


def hopper_matmul(
    kind: str,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    formats: tuple[Format, Format],
    indices: Sequence[tuple[Tensor, Tensor]],
    segment: int,
    offsets: Tensor | None,
    interval: int,
) -> Tensor:
    """The three GEMMs of kernels/__init__.py; a, b are decoded codes (float32, without scales).

    `indices` gives the tile of each row and column of a and of b; `interval` 0 never promotes. float32 out.
    """
    (a_rows, a_columns), (b_rows, b_columns) = indices
    results = []
    for tokens, others, lengths in _products(kind, a, b, segment, offsets):
        left = (a[tokens], a_scales[a_rows[tokens]][:, a_columns])
        right = (b[others], b_scales[b_rows[others]][:, b_columns])
        if kind == "wgrad":
            left = (left[0].t(), left[1].t())
        if kind != "fprop":
            right = (right[0].t(), right[1].t())
        results.append(_contract(*left, *right, lengths, formats, interval))
    return torch.cat(results)


def native_hopper(
    kind: str,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    formats: tuple[Format, Format],
    indices: Sequence[tuple[Tensor, Tensor]],
    segment: int,
    offsets: Tensor | None,
    interval: int,
    isa: str = "",
) -> Tensor:
    """`hopper_matmul` of codes (uint8) on a CPU, by the compiled kernel; `isa` forces an instruction set.

    A block of the contraction is taken to have one scale, that of its first element. Raises ValueError without the
    library, or where `isa` cannot be run.
    """
    (a_rows, a_columns), (b_rows, b_columns) = indices
    a, b = a.contiguous(), b.contiguous()
    products = list(_products(kind, a, b, segment, offsets))
    outputs = b.shape[0] // len(products) if kind == "fprop" else b.shape[1]
    # Every element is added to, block by block.
    rows = len(products) * a.shape[1] if kind == "wgrad" else a.shape[0]
    result = torch.zeros(rows, outputs, dtype=torch.float32)
    row = 0
    for tokens, others, lengths in products:
        edges = torch.tensor([0, *(end for _, end in _blocks(lengths, interval))])
        first = edges[:-1]
        if kind == "wgrad":
            left, left_scales = a[tokens].t().contiguous(), a_scales[a_rows[tokens][first]][:, a_columns].t()
        else:
            left, left_scales = a[tokens], a_scales[a_rows[tokens]][:, a_columns[first]]
        if kind == "fprop":
            right, right_scales = b[others].t().contiguous(), b_scales[b_rows[others]][:, b_columns[first]].t()
        else:
            right, right_scales = b[others], b_scales[b_rows[others][first]][:, b_columns]
        count, length = left.shape
        KERNEL(
            count,
            left,
            length,
            formats[0].mantissa_bits,
            right,
            outputs,
            formats[1].mantissa_bits,
            left_scales.contiguous(),
            right_scales.contiguous(),
            edges,
            len(first),
            outputs,
            result[row : row + count],
            work=length * outputs // 16,  # about 16 products take as long as an element of other kernels
            isa=isa,
        )
        row += count
    return result


def _products(
    kind: str, a: Tensor, b: Tensor, segment: int, offsets: Tensor | None
) -> Iterator[tuple[slice, slice, list[int]]]:
    """Of each group: its rows of a, its rows of b, and the lengths of the segments the contraction falls into."""
    bounds = [0, a.shape[0]] if offsets is None else offsets.tolist()
    outputs = b.shape[0] // (len(bounds) - 1)  # rows of a group's weights
    for g, (start, end) in enumerate(pairwise(bounds)):
        if kind == "wgrad":
            yield slice(start, end), slice(start, end), [end - start]
        else:
            restarts = kind == "dgrad" and segment
            lengths = [segment] * (a.shape[1] // segment) if restarts else [a.shape[1]]
            yield slice(start, end), slice(g * outputs, (g + 1) * outputs), lengths


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c with one rounding.

    The product of two float32 is exact in float64. Its sum with c is rounded to odd there (the lost part, found
    by Knuth's two-sum, is folded into the last bit), so that the cast to float32 rounds as if from the exact sum.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    shadow = total - product
    lost = (product - (total - shadow)) + (c - shadow)
    bits = total.view(torch.int64)
    toward = torch.where((lost > 0) == (total > 0), bits, bits - 1)  # truncated magnitude of the exact sum
    odd = torch.where(lost.abs() > 0, toward | 1, bits)  # not where an infinity made `lost` NaN
    return odd.view(torch.float64).float()


def _contract(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    lengths: list[int],
    formats: tuple[Format, Format],
    interval: int,
) -> Tensor:
    """a, a_scale [M, L], b, b_scale [N, L] -> float32 [M, N]; the contraction falls into segments of `lengths`."""
    result = a.new_zeros(a.shape[0], b.shape[0])
    a_exponent, b_exponent = _exponents(a, formats[0]), _exponents(b, formats[1])
    step = max(1, CHUNK_OUTPUTS // max(1, min(b.shape[0], 64)))
    for m in range(0, a.shape[0], step):
        for n in range(0, b.shape[0], 64):
            rows, columns = slice(m, m + step), slice(n, n + 64)
            y = result[rows, columns]
            for start, end in _blocks(lengths, interval):
                accumulator = torch.zeros_like(y)
                for k in range(start, end, INSTRUCTION_K):
                    ks = slice(k, min(k + INSTRUCTION_K, end))
                    accumulator = _instruction(
                        a[rows, ks], a_exponent[rows, ks], b[columns, ks], b_exponent[columns, ks], accumulator
                    )
                scale = a_scale[rows, start, None] * b_scale[columns, start]
                y = fma(scale, accumulator, y)
            result[rows, columns] = y
    return result


def _blocks(lengths: list[int], interval: int) -> Iterator[tuple[int, int]]:
    """Promotion blocks [start, end) of a contraction that restarts at every segment."""
    offset = 0
    for length in lengths:
        for start in range(0, length, interval or max(length, 1)):
            yield offset + start, offset + min(start + (interval or length), length)
        offset += length


def _instruction(a: Tensor, a_exponent: Tensor, b: Tensor, b_exponent: Tensor, accumulator: Tensor) -> Tensor:
    """One wgmma step: a [m, <= 32], b [n, <= 32], accumulator [m, n] -> accumulator."""
    exponent = (a_exponent.t()[:, :, None] + b_exponent.t()[:, None, :]).amax(dim=0)
    own = ((accumulator.view(torch.int32) >> 23 & 0xFF) - 127).float().masked_fill_(accumulator == 0, NO_EXPONENT)
    exponent = torch.maximum(exponent, own).clamp_(min=-64)  # all zero: any unit will do
    unit_bits = (127 - FRACTION_BITS + exponent).int()
    unit = (unit_bits << 23).view(torch.float32)
    inverse = (254 - unit_bits << 23).view(torch.float32)
    terms = a.t()[:, :, None] * b.t()[:, None, :]
    total = terms.mul_(inverse).trunc_().sum(dim=0).add_((accumulator * inverse).trunc_())
    kept = (total * unit).view(torch.int32) & ~((1 << 23 - FRACTION_BITS) - 1)
    return kept.view(torch.float32)


def _exponents(x: Tensor, f: Format) -> Tensor:
    """Exponent of each value as the tensor core reads it: subnormals keep the format's minimum; float32."""
    exponent = ((x.view(torch.int32) >> 23 & 0xFF) - 127).clamp_(min=f.minimum_exponent).float()
    return exponent.masked_fill_(x == 0, NO_EXPONENT)
