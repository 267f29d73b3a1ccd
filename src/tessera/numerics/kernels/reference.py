"""The law of `docs/numerics.md` in slow, plain code: the oracle every other kernel is tested against.

Loops over single tiles and elements. What is done to one number (a code, a rounding, a fused multiply-add, a
dot product of the tensor core) is defined in `reference_scalars` and exported here too; this file says which
numbers share a scale, which a partial sum, and in what order sums are promoted. Powers of two come from the
bits of a number (`math.frexp`), never from a logarithm.

It needs no speed: about 2 microseconds a multiplication, so 16 x 256 x 16 takes a fraction of a second.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tessera.numerics.formats import Format
from tessera.numerics.kernels.reference_scalars import (
    decode,
    encode,
    fma32,
    format_of,
    hopper_dot,
    round_float32,
)
from tessera.numerics.tiles import TILE, Tile, scale_shape

__all__ = ["decode", "dequantise", "encode", "fma32", "hopper_dot", "matmul", "quantise"]

Vector = tuple[list[int], list[float]]  # codes along the contraction, and the scale of each


def quantise(
    x: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
    format: str,
    scale_mode: str,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, C] float32 or bfloat16 -> codes uint8, scales float32, number of non-finite elements; `kernels`.

    Raises ValueError for unknown formats and modes, segments that do not divide, offsets that do not fit.
    """
    fmt = format_of(format)
    rows, columns = x.shape
    tile = Tile(tile_rows, tile_columns)
    groups = _bounds(offsets, rows)
    values = x.float().tolist()
    codes = [[0] * columns for _ in range(rows)]
    row_tiles, column_tiles = scale_shape(rows, columns, tile, row_segment, column_segment, len(groups or [0]) - 1)
    scales = [[1.0] * column_tiles for _ in range(row_tiles)]
    nonfinite = 0
    for i, top, bottom in _spans(rows, tile_rows, row_segment, groups):
        for j, left, right in _spans(columns, tile_columns, column_segment):
            elements = [v for row in values[top:bottom] for v in row[left:right]]
            finite = [abs(v) for v in elements if math.isfinite(v)]
            nonfinite += len(elements) - len(finite)
            scales[i][j], multiplier = _scale(max(finite, default=0.0), fmt, scale_mode)
            for r in range(top, bottom):
                for c in range(left, right):
                    codes[r][c] = encode(_scaled(values[r][c], multiplier, fmt), format, rounding)
    packed = codes if fmt.bits == 8 else [_pack(row) for row in codes]
    return (
        torch.tensor(packed, dtype=torch.uint8).reshape(rows, fmt.code_bytes(columns)),
        torch.tensor(scales, dtype=torch.float32).reshape(row_tiles, column_tiles),
        torch.tensor(nonfinite, dtype=torch.int64),
    )


def dequantise(
    codes: Tensor,
    scales: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
    format: str,
    columns: int,
) -> Tensor:
    """Codes and scales -> float32 [R, columns]: the product of code and scale, rounded once to float32."""
    fmt = format_of(format)
    rows = codes.shape[0]
    unpacked = [row if fmt.bits == 8 else _unpack(row)[:columns] for row in codes.tolist()]
    groups = _bounds(offsets, rows)
    spread = _spread(scales, rows, columns, tile_rows, tile_columns, row_segment, column_segment, groups)
    values = [_decoded(row, row_scales, format) for row, row_scales in zip(unpacked, spread, strict=True)]
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


def matmul(
    kind: str,
    a_codes: Tensor,
    a_scales: Tensor,
    a_tile_rows: int,
    a_tile_columns: int,
    a_format: str,
    b_codes: Tensor,
    b_scales: Tensor,
    b_tile_rows: int,
    b_tile_columns: int,
    b_format: str,
    segment: int,
    offsets: Tensor | None,
    accumulation: str,
    interval: int,
    out_dtype: torch.dtype,
    order: str = "product",
) -> Tensor:
    """One of the three GEMMs of a linear layer; arguments and shapes as in `kernels`.

    `order` is how the two scales meet a partial sum p: "product" (the law) fma(fl(s_a * s_b), p, y),
    "a_first" fma(fl(p * s_a), s_b, y), "b_first" fma(fl(p * s_b), s_a, y), as libraries do. They agree bit
    for bit where scales are powers of two and no product of scales is below 2^-126. In dgrad the blocks of
    the contraction restart with every segment, which is a product of its own in the published model; unpromoted,
    each of them is a single block. Raises ValueError where a scale varies inside a block of a `hopper` accumulation,
    and for unknown names.
    """
    if kind not in ("fprop", "dgrad", "wgrad"):
        raise ValueError(f"kind {kind!r} is none of 'fprop', 'dgrad', 'wgrad'")
    if format_of(a_format).bits != 8 or format_of(b_format).bits != 8:
        raise ValueError("matmul takes 8-bit operands; decode E5M6 and quantise it again")
    if accumulation not in ("float32", "hopper", "hopper_unpromoted"):
        raise ValueError(f"accumulation {accumulation!r} is none of 'float32', 'hopper', 'hopper_unpromoted'")
    groups = _bounds(offsets, len(a_codes))
    bounds = groups or [0, len(a_codes)]
    outputs = len(b_codes) // (len(bounds) - 1)  # rows of one group's W in fprop and dgrad
    a_segment, b_segment = segment * (kind != "fprop"), segment * (kind != "wgrad")
    b_groups = groups if kind == "wgrad" else None
    a = _operand(a_codes, a_scales, a_tile_rows, a_tile_columns, 0, a_segment, groups)
    b = _operand(b_codes, b_scales, b_tile_rows, b_tile_columns, b_segment, 0, b_groups)
    result: list[list[float]] = []
    for g, (first, last) in enumerate(pairwise(bounds)):
        weights = slice(g * outputs, (g + 1) * outputs)
        if kind == "fprop":
            left, right, extent = a.rows(slice(first, last)), b.rows(weights), b.width
        elif kind == "dgrad":
            left, right, extent = a.rows(slice(first, last)), b.columns(weights), outputs
        else:
            left, right, extent = a.columns(slice(first, last)), b.columns(slice(first, last)), last - first
        length = {"float32": TILE, "hopper": interval, "hopper_unpromoted": max(extent, 1)}[accumulation]
        restart = segment if kind == "dgrad" else 0
        blocks = [slice(start, end) for start, end in _cuts(extent, length, restart)]
        names = (a_format, b_format, accumulation, order)
        result += [[_dot(row, column, blocks, *names) for column in right] for row in left]
    width = outputs if kind == "fprop" else b.width
    return torch.tensor(result, dtype=torch.float32).reshape(len(result), width).to(out_dtype)


@dataclass(frozen=True)
class _Operand:
    """A matrix of codes with the scale of every element, read along its rows or along its columns."""

    codes: list[list[int]]
    scales: list[list[float]]
    width: int

    def rows(self, rows: slice) -> list[Vector]:
        return list(zip(self.codes[rows], self.scales[rows], strict=True))

    def columns(self, rows: slice) -> list[Vector]:
        codes, scales = self.codes[rows], self.scales[rows]
        return [([row[c] for row in codes], [row[c] for row in scales]) for c in range(self.width)]


def _operand(
    codes: Tensor,
    scales: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    groups: list[int] | None,
) -> _Operand:
    rows, columns = codes.shape
    spread = _spread(scales, rows, columns, tile_rows, tile_columns, row_segment, column_segment, groups)
    return _Operand(codes.tolist(), spread, columns)


def _dot(
    left: Vector,
    right: Vector,
    blocks: list[slice],
    a_format: str,
    b_format: str,
    accumulation: str,
    order: str,
) -> float:
    """One element of the result: partial sums of the blocks, promoted in order."""
    y = 0.0
    for block in blocks:
        (a, s), (b, t) = ((codes[block], scales[block]) for codes, scales in (left, right))
        constant = min(s) == max(s) and min(t) == max(t)
        if accumulation != "float32":
            if not constant:
                raise ValueError(f"{accumulation}: a scale varies inside a block of the contraction")
            y = _promote(hopper_dot(a, b, a_format, b_format), s[0], t[0], y, order)
        elif constant:
            p = _sum_of_products([decode(c, a_format) for c in a], [decode(c, b_format) for c in b])
            y = _promote(p, s[0], t[0], y, order)
        else:
            p = _sum_of_products(_decoded(a, s, a_format), _decoded(b, t, b_format))
            y = _promote(p, 1.0, 1.0, y, order)
    return y


def _promote(p: float, s_a: float, s_b: float, y: float, order: str) -> float:
    # Products of two float32 values are exact in float64, so each round_float32 here rounds once.
    if order == "product":
        return fma32(round_float32(s_a * s_b), p, y)
    if order == "a_first":
        return fma32(round_float32(p * s_a), s_b, y)
    if order == "b_first":
        return fma32(round_float32(p * s_b), s_a, y)
    raise ValueError(f"order {order!r} is none of 'product', 'a_first', 'b_first'")


def _sum_of_products(a: list[float], b: list[float]) -> float:
    products = [x * y for x, y in zip(a, b, strict=True)]  # exact in float64
    return round_float32(math.fsum(products) if all(map(math.isfinite, products)) else sum(products))


def _scale(amax: float, fmt: Format, mode: str) -> tuple[float, float]:
    """Scale of a tile with this amax, and what its elements are multiplied with."""
    if mode not in ("power_of_two", "float32"):
        raise ValueError(f"scale mode {mode!r} is neither 'power_of_two' nor 'float32'")
    if amax == 0:
        return 1.0, 1.0
    if mode == "float32":
        with np.errstate(all="ignore"):
            scale = np.float32(amax) / np.float32(fmt.largest)
            reciprocal = np.float32(1) / scale
        if np.isfinite(reciprocal):
            return float(scale), float(reciprocal)
    # frexp's significands lie in [0.5, 1); comparing them is comparing those in [1, 2).
    significand, exponent = math.frexp(amax)
    largest_significand, largest_exponent = math.frexp(fmt.largest)
    k = exponent - largest_exponent + (significand > largest_significand)
    k = max(k, -126)
    return math.ldexp(1.0, k), math.ldexp(1.0, -k)


def _scaled(value: float, multiplier: float, fmt: Format) -> float:
    """fl(value * multiplier), inside the format's range; non-finite values pass.

    The product is exact in float64. Rounding it to float32 is the law for float32 scales; after a power of
    two it only touches values below 2^-126, which are code 0 either way.
    """
    if not math.isfinite(value):
        return value
    return min(max(round_float32(value * multiplier), -fmt.largest), fmt.largest)


def _decoded(codes: list[int], scales: list[float], format: str) -> list[float]:
    # A code has 7 significant bits, a scale 24: their product is exact in float64 before it is rounded.
    return [round_float32(decode(code, format) * scale) for code, scale in zip(codes, scales, strict=True)]


def _cuts(extent: int, length: int, segment: int) -> list[tuple[int, int]]:
    """Pieces of `length` of a direction, ragged at its end; they restart every `segment` (0: never)."""
    segment = segment or max(extent, 1)
    if extent % segment:
        raise ValueError(f"segments of {segment} do not divide an extent of {extent}")
    return [
        (start, min(start + length, base + segment))
        for base in range(0, extent, segment)
        for start in range(base, base + segment, length)
    ]


def _spans(extent: int, tile: int, segment: int, groups: list[int] | None = None) -> list[tuple[int, int, int]]:
    """(index of the tile, first element, end) of all tiles along a direction (the rules of `tiles`)."""
    if tile == 0:
        return [(i, start, end) for i, (start, end) in enumerate(_cuts(extent, segment or max(extent, 1), segment))]
    if groups is None or tile == 1:
        cuts = _cuts(extent, tile, segment if tile > 1 else 0)
        return [(i, start, end) for i, (start, end) in enumerate(cuts)]
    return [
        (first // tile + g + i, first + start, first + end)
        for g, (first, last) in enumerate(pairwise(groups))
        for i, (start, end) in enumerate(_cuts(last - first, tile, 0))
    ]


def _spread(
    scales: Tensor,
    rows: int,
    columns: int,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    groups: list[int] | None,
) -> list[list[float]]:
    """The scale of every element."""
    table = scales.tolist()
    result = [[0.0] * columns for _ in range(rows)]
    for i, top, bottom in _spans(rows, tile_rows, row_segment, groups):
        for j, left, right in _spans(columns, tile_columns, column_segment):
            for r in range(top, bottom):
                result[r][left:right] = [table[i][j]] * (right - left)
    return result


def _bounds(offsets: Tensor | None, rows: int) -> list[int] | None:
    if offsets is None:
        return None
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"offsets {bounds} do not rise from 0 to {rows} rows")
    return bounds


def _pack(row: list[int]) -> list[int]:
    """12-bit codes -> bytes: a, b -> a | b << 12 in three bytes, lowest first; odd rows end with code 0."""
    pairs = zip(row[::2], row[1::2] + [0] * (len(row) % 2), strict=True)
    return [byte for a, b in pairs for byte in (a | b << 12).to_bytes(3, "little")]


def _unpack(row: list[int]) -> list[int]:
    words = [int.from_bytes(row[i : i + 3], "little") for i in range(0, len(row), 3)]
    return [code for word in words for code in (word & 0xFFF, word >> 12)]
