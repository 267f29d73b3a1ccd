"""The vectorised kernel: plain PyTorch, any device, bit-equal codes to `reference`.

What makes it fast on a CPU. A tile's amax is the largest of its elements' bits without the sign, an integer maximum,
which finds NaN and infinity (their bits are above all others) in the same pass. The product with the inverse scale
reads BF16 or float32 and needs no padding (layout.py). A code's bits, moved to the place of float32's exponent and
fraction, are its value times a power of two, which the multiplication by the scale takes along, subnormal codes
included: ten times faster than torch's cast out of FP8. With power-of-two scales a decoded operand is exact in BF16
too, so a BF16 matrix product with float32 accumulation computes the law's GEMM at BF16 speed.

Subnormal float32 numbers are part of the law: torch.set_flush_denormal(True) breaks this kernel.
"""

import struct

import torch
from torch import Tensor

from tessera.numerics import dense
from tessera.numerics.formats import FORMATS, Format
from tessera.numerics.kernels.hopper import hopper_matmul, native_hopper
from tessera.numerics.kernels.layout import Layout, Piece
from tessera.numerics.kernels.twelve_bits import pack, unpack_to_half
from tessera.numerics.tiles import TILE, Tile

EXPONENT, FRACTION = 0x7F800000, 0x007FFFFF  # bits of a float32
# Below this a BF16 operand or a product of two could leave BF16's normal range, which matrix units flush to zero.
SMALLEST_BF16_SCALE = 2.0**-50


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
    """See kernels/__init__.py."""
    f = FORMATS[format]
    layout = _layout(x.shape, tile_rows, tile_columns, row_segment, column_segment, offsets)
    pieces = list(layout.pieces())
    # BF16 times a power of two is exact, or so small that its code is zero.
    x = (x if x.dtype == torch.bfloat16 and scale_mode == "power_of_two" else x.float()).contiguous()
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    bad = None
    y = torch.empty_like(x)  # scratch for the magnitudes first
    amax = _amax_bits(x, layout, pieces, y)
    if amax.numel() and int(amax.max()) >= _exponent_mask(x.dtype):
        bad = ~torch.isfinite(x)
        nonfinite = bad.sum()
        x = x.masked_fill(bad, 0.0)
        amax = _amax_bits(x, layout, pieces, y)
    scale, inverse = _scales(amax, f, scale_mode, x.dtype)
    for piece in pieces:
        torch.mul(piece.of(x), piece.scales_of(inverse), out=piece.of(y))
    if scale_mode == "float32":
        y.clamp_(-f.largest, f.largest)
    codes = _encode(y, f, rounding)
    if bad is not None:
        codes.masked_fill_(bad, f.nan_code)
    return (pack(codes) if f.bits == 12 else codes), scale, nonfinite


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
    """See kernels/__init__.py."""
    shape = (codes.shape[0], columns)
    layout = _layout(shape, tile_rows, tile_columns, row_segment, column_segment, offsets)
    return _decode(codes, scales, layout, FORMATS[format], torch.float32)


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
    isa: str | None = None,
) -> Tensor:
    """See kernels/__init__.py. `isa`: the tensor-core model in compiled code, in that set of instructions ("": any)."""
    a_segment, b_segment = (0 if kind == "fprop" else segment), (0 if kind == "wgrad" else segment)
    b_offsets = offsets if kind == "wgrad" else None
    a_layout = _layout(a_codes.shape, a_tile_rows, a_tile_columns, 0, a_segment, offsets)
    b_layout = _layout(b_codes.shape, b_tile_rows, b_tile_columns, b_segment, 0, b_offsets)
    a_format_, b_format_ = FORMATS[a_format], FORMATS[b_format]
    if accumulation != "float32":
        block = 0 if accumulation == "hopper_unpromoted" else interval
        _require_constant_scales(kind, block, a_layout.tile, b_layout.tile)
        indices = [(o.row_tiles(a_codes.device), o.column_tiles(a_codes.device)) for o in (a_layout, b_layout)]
        formats = (a_format_, b_format_)
        if isa is not None:
            y = native_hopper(
                kind, a_codes, a_scales, b_codes, b_scales, formats, indices, segment, offsets, block, isa
            )
        else:
            a, b = _values(a_codes, a_format_), _values(b_codes, b_format_)
            y = hopper_matmul(kind, a, a_scales, b, b_scales, formats, indices, segment, offsets, block)
        return y.to(out_dtype)
    exact = out_dtype == torch.bfloat16 and _exact_in_bf16(a_scales) and _exact_in_bf16(b_scales)
    dtype = torch.bfloat16 if exact else torch.float32
    a = _decode(a_codes, a_scales, a_layout, a_format_, dtype)
    b = _decode(b_codes, b_scales, b_layout, b_format_, dtype)
    return dense.vectorised_matmul(kind, a, b, offsets, out_dtype)


def _layout(
    shape: tuple[int, ...],
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
) -> Layout:
    rows, columns = shape
    return Layout(rows, columns, Tile(tile_rows, tile_columns), row_segment, column_segment, offsets)


def _amax_bits(x: Tensor, layout: Layout, pieces: list[Piece], scratch: Tensor) -> Tensor:
    """Bits of each tile's largest magnitude, as x's dtype has them, in the shape of the scales; 0 without elements."""
    integer = _integer(x.dtype)
    magnitude = torch.bitwise_and(x.view(integer), torch.iinfo(integer).max, out=scratch.view(integer))
    amax = torch.zeros(layout.scale_shape, dtype=integer, device=x.device)
    for piece in pieces:
        torch.amax(piece.of(magnitude), dim=(2, 5), keepdim=True, out=piece.scales_of(amax))
    return amax


def _scales(amax: Tensor, f: Format, mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """amax as bits of `dtype` -> (scale float32, 1 / scale in `dtype`): docs/numerics.md, "Tiles and scales"."""
    exponent_mask, fraction_bits = _exponent_mask(dtype), _fraction_bits(dtype)
    one, fraction_mask = 1 << fraction_bits, (1 << fraction_bits) - 1
    largest = _float32_bits(f.largest) >> 23 - fraction_bits
    # Where the fraction is larger than that of the format's largest value, the sum carries into the exponent.
    bits = (amax + (fraction_mask - (largest & fraction_mask))).bitwise_and_(exponent_mask)
    bits = bits.sub_((largest & exponent_mask) - 127 * one).clamp_(min=one)
    inverse = (254 * one - bits).view(dtype)
    scale = bits.masked_fill_(amax == 0, 127 * one).view(dtype)
    if mode == "float32":
        # Two tensors: torch computes scalar / tensor as reciprocal times scalar, which rounds twice.
        exact = amax.view(torch.float32) / torch.full_like(scale, f.largest)
        reciprocal = torch.ones_like(exact) / exact
        usable = torch.isfinite(reciprocal)
        scale, inverse = torch.where(usable, exact, scale), torch.where(usable, reciprocal, inverse)
    return scale.float(), inverse


def _encode(y: Tensor, f: Format, rounding: str) -> Tensor:
    """Finite y with |y| <= largest -> codes (uint8, or int16 for 12 bits); y may be overwritten."""
    if rounding == "toward_zero" or f.bits == 12:
        y = _round_to_grid(y.float(), f, rounding)
    if f.bits == 12:  # E5M6 is the upper 12 bits of FP16, and y is on its grid: the cast is exact
        return y.to(torch.float16).view(torch.int16) >> 4 & 0xFFF
    # Values are in range, so the cast's own treatment of overflow, which changed between torch versions, never acts.
    return y.to(torch.float8_e4m3fn if f.name == "e4m3" else torch.float8_e5m2).view(torch.uint8)


def _round_to_grid(y: Tensor, f: Format, rounding: str) -> Tensor:
    """y float32, rounded in place to values of the format; ties to even or toward zero; the sign of zero is kept."""
    binade = (y.view(torch.int32) & EXPONENT).clamp_(min=_float32_bits(2.0**f.minimum_exponent))
    per_quantum = ((254 + f.mantissa_bits) << 23) - binade  # bits of 2^(mantissa bits) / binade: a power of two
    y.mul_(per_quantum.view(torch.float32))
    y.round_() if rounding == "nearest" else y.trunc_()
    return y.mul_(binade.sub_(f.mantissa_bits << 23).view(torch.float32))


def _decode(codes: Tensor, scales: Tensor, layout: Layout, f: Format, dtype: torch.dtype) -> Tensor:
    """Codes times the scale of their tiles [R, C], rounded once to `dtype`."""
    values, exponent = _shifted_values(codes, f, layout.columns, dtype)
    if exponent and scales.numel() and float(scales.max()) < 2.0 ** (127 - exponent):
        scales = scales * 2.0**exponent
    elif exponent:
        values.mul_(2.0**exponent)
    scales = scales.to(dtype)
    for piece in layout.pieces():
        tiles = piece.of(values)
        torch.mul(tiles, piece.scales_of(scales), out=tiles)
    return values


def _values(codes: Tensor, f: Format) -> Tensor:
    """float32 values of 8-bit codes, without scales."""
    values, exponent = _shifted_values(codes, f, codes.shape[1], torch.float32)
    return values.mul_(2.0**exponent)


def _shifted_values(codes: Tensor, f: Format, columns: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(v, e): the values of codes, without scales, are v * 2^e; v [R, columns] in `dtype`, float32 or BF16; exact."""
    if f.bits == 12:
        return unpack_to_half(codes, columns).to(dtype), 0
    integer = _integer(dtype)
    shift = _fraction_bits(dtype) - f.mantissa_bits
    # Sign-extended, so that the sign arrives at the top; its copies between the sign and the exponent are cleared.
    sign = -1 << 8 * integer.itemsize - 1
    bits = codes.view(torch.int8).to(integer).mul_(1 << shift).bitwise_and_(sign | 0x7F << shift)
    first_special = f.nan_code if f.name == "e4m3" else f.nan_code & ~(2**f.mantissa_bits - 1)
    magnitude = codes & 0x7F
    if codes.numel() and int(magnitude.max()) >= first_special:
        bits.bitwise_or_(torch.where(magnitude >= first_special, _exponent_mask(dtype), 0).to(integer))
    return bits.view(dtype), 127 - f.bias


def _integer(dtype: torch.dtype) -> torch.dtype:
    """The integer type that reads the bits of float32 or BF16."""
    return torch.int32 if dtype == torch.float32 else torch.int16


def _fraction_bits(dtype: torch.dtype) -> int:
    return 23 if dtype == torch.float32 else 7


def _exponent_mask(dtype: torch.dtype) -> int:
    """The exponent's bits; magnitudes from here on are infinite or NaN."""
    return 0xFF << _fraction_bits(dtype)


def _float32_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def _exact_in_bf16(scales: Tensor) -> bool:
    """True when every scale is a power of two far enough from BF16's ends for decoded products to stay normal."""
    if scales.numel() == 0:
        return True
    bits = scales.view(torch.int32)
    return int((bits & FRACTION).max()) == 0 and int(bits.min()) >= _float32_bits(SMALLEST_BF16_SCALE)


def _require_constant_scales(kind: str, block: int, a: Tile, b: Tile) -> None:
    """A promotion block (0: the whole sum) is multiplied by one scale: the scales must not vary inside it."""
    contraction = {"fprop": (a.columns, b.columns), "dgrad": (a.columns, b.rows), "wgrad": (a.rows, b.rows)}[kind]
    allowed = (0, TILE) if block and TILE % block == 0 else (0,)
    if any(extent not in allowed for extent in contraction):
        raise ValueError(
            f"{kind}: scales of tiles {a.rows}x{a.columns} and {b.rows}x{b.columns} vary inside a promotion block; an "
            f"unpromoted sum or an interval that does not divide {TILE} needs scales that are constant along the "
            "contraction: tiles 'tensor', or 'row' in fprop and wgrad"
        )
