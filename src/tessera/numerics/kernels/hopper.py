"""Hopper's FP8 tensor-core accumulation, vectorised over outputs.

One wgmma instruction takes 32 products and the accumulator. Each product keeps the sum of its operands' exponents
(it is not renormalised, so its significand is below 4; subnormal operands keep the format's minimum exponent). The
largest exponent among the non-zero terms, accumulator included, is e_max; every term is cut toward zero to a
multiple of 2^(e_max - 13); the cut terms are summed exactly; the sum is cut toward zero to 13 fraction bits. Model:
MMA-Sim (arXiv 2511.10909), validated bit for bit on the hardware; the report's section 3.5.2 calls it 14 bits.

All terms fit float32: 33 of them, each below 2^15 units, sum below 2^24. Promotion every `interval` elements adds
s_a * s_b * accumulator to a float32 result with one rounding (DeepSeek-V3 report, section 3.3.2).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tessera.numerics.formats import Format

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
    bounds = [0, a.shape[0]] if offsets is None else offsets.tolist()
    groups = len(bounds) - 1
    results = []
    for g, (start, end) in enumerate(pairwise(bounds)):
        a_g, a_index = a[start:end], a_rows[start:end]
        if kind == "wgrad":
            left = (a_g.t(), a_scales[a_index][:, a_columns].t())
            right = (b[start:end].t(), b_scales[b_rows[start:end]][:, b_columns].t())
            lengths = [end - start]
        else:
            rows = slice(g * (b.shape[0] // groups), (g + 1) * (b.shape[0] // groups))
            left = (a_g, a_scales[a_index][:, a_columns])
            right = (b[rows], b_scales[b_rows[rows]][:, b_columns])
            lengths = [a.shape[1]]
            if kind == "dgrad":
                right = (right[0].t(), right[1].t())
                if segment:
                    lengths = [segment] * (a.shape[1] // segment)
        results.append(_contract(*left, *right, lengths, formats, interval))
    return torch.cat(results)


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
