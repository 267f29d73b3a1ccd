"""The vectorised kernel: plain PyTorch, any device, bit-equal codes to `reference`.

What makes it fast on a CPU: amax, the multiplication by a power of two and torch's own cast each run near memory
speed, and decoding goes through a table of BF16 values (E4M3, E5M2 and E5M6 all fit BF16's 8-bit significand),
which is ten times faster than torch's cast out of FP8. With power-of-two scales a decoded operand is exact in BF16
too, so a BF16 matrix product with float32 accumulation computes the law's GEMM at BF16 speed.

Layout used inside: a matrix seen as [row tiles, tile height, column tiles, tile width], zero-padded where ragged.
"""

import torch
from torch import Tensor

from tessera.numerics.dense import matmul_rows
from tessera.numerics.formats import FORMATS, Format
from tessera.numerics.kernels.hopper import hopper_matmul
from tessera.numerics.kernels.layout import from_tiles, tile_index, to_tiles
from tessera.numerics.tiles import TILE

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
    rows, columns = x.shape
    tiles = to_tiles(x.float(), tile_rows, tile_columns, row_segment, column_segment, offsets)
    amax = _amax(tiles)
    nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    bad = None
    if not bool(torch.isfinite(amax).all()):  # rare: amax is the only full pass that healthy data pays
        bad = ~torch.isfinite(tiles)
        nonfinite = bad.sum()
        tiles = tiles.masked_fill(bad, 0.0)
        amax = _amax(tiles)
    scale, inverse = _scales(amax, f, scale_mode)
    y = tiles * inverse[:, None, :, None]
    if scale_mode == "float32":
        y.clamp_(-f.largest, f.largest)
    codes = _encode(y, f, rounding)
    if bad is not None:
        codes.masked_fill_(bad, f.nan_code)
    codes = from_tiles(codes, rows, columns, tile_rows, tile_columns, row_segment, column_segment, offsets)
    return (pack_twelve_bits(codes) if f.bits == 12 else codes), scale, nonfinite


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
    values = decode_codes(codes, FORMATS[format], columns).float()
    return _scaled(values, scales, tile_rows, tile_columns, row_segment, column_segment, offsets)


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
) -> Tensor:
    """See kernels/__init__.py."""
    a = decode_codes(a_codes, FORMATS[a_format], a_codes.shape[1])
    b = decode_codes(b_codes, FORMATS[b_format], b_codes.shape[1])
    a_layout = (a_tile_rows, a_tile_columns, 0, segment if kind == "dgrad" else 0, offsets if kind == "wgrad" else None)
    b_layout = (b_tile_rows, b_tile_columns, *((0, 0, offsets) if kind == "wgrad" else (segment, 0, None)))
    if accumulation != "float32":
        unpromoted = accumulation == "hopper_unpromoted"
        whole = unpromoted or interval > TILE
        _require_constant_scales(kind, whole, a_tile_rows, a_tile_columns, b_tile_rows, b_tile_columns)
        formats = (FORMATS[a_format], FORMATS[b_format])
        indices = (_indices(a, a_layout), _indices(b, b_layout))
        block = 0 if unpromoted else interval
        y = hopper_matmul(
            kind, a.float(), a_scales, b.float(), b_scales, formats, indices, segment, offsets, block
        )
        return y.to(out_dtype)
    exact = out_dtype == torch.bfloat16 and _exact_in_bf16(a_scales) and _exact_in_bf16(b_scales)
    dtype = torch.bfloat16 if exact else torch.float32
    a = _scaled(a.to(dtype), a_scales, *a_layout)
    b = _scaled(b.to(dtype), b_scales, *b_layout)
    return dense_matmul(kind, a, b, offsets, out_dtype)


def dense_matmul(kind: str, a: Tensor, b: Tensor, offsets: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The three GEMMs on unquantised operands of one dtype; the kinds and shapes of `matmul`, float32 accumulation."""
    if kind == "wgrad":
        a, b = a.float(), b.float()  # the output is float32, and torch's BF16 product would round it
        if offsets is None:
            return (a.t() @ b).to(out_dtype)
        bounds = offsets.tolist()
        y = a.new_zeros(len(bounds) - 1, a.shape[1], b.shape[1])
        for g, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if end > start:
                torch.mm(a[start:end].t(), b[start:end], out=y[g])
        return y.flatten(0, 1).to(out_dtype)
    if out_dtype == torch.float32:
        a, b = a.float(), b.float()
    if offsets is None:
        return matmul_rows(a, b.t() if kind == "fprop" else b).to(out_dtype)
    bounds = offsets.tolist()
    weights = b.unflatten(0, (len(bounds) - 1, -1))
    y = a.new_empty(a.shape[0], weights.shape[1 if kind == "fprop" else 2])
    for g, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > start:
            w = weights[g].t() if kind == "fprop" else weights[g]
            y[start:end] = matmul_rows(a[start:end], w, multiple=64)
    return y.to(out_dtype)


def decode_codes(codes: Tensor, f: Format, columns: int) -> Tensor:
    """codes (packed when 12 bits wide) -> bfloat16 [R, columns] of the codes' values, without scales; exact."""
    if f.bits == 12:
        codes = unpack_twelve_bits(codes, columns)
    table = code_values(f).to(codes.device, torch.bfloat16)
    return torch.index_select(table, 0, codes.reshape(-1).int()).view(codes.shape[0], columns)


def code_values(f: Format) -> Tensor:
    """float32 [2 ** bits]: the value of every code."""
    code = torch.arange(2**f.bits)
    magnitude = code & (2 ** (f.bits - 1) - 1)
    exponent, fraction = magnitude >> f.mantissa_bits, magnitude & (2**f.mantissa_bits - 1)
    significand = torch.where(exponent > 0, fraction + 2**f.mantissa_bits, fraction).double()
    value = significand * 2.0 ** (exponent.clamp(min=1).double() - f.bias - f.mantissa_bits)
    if f.bits == 8 and f.exponent_bits == 4:
        value[magnitude == f.nan_code] = torch.nan
    else:
        top = exponent == 2**f.exponent_bits - 1
        value[top] = torch.nan
        value[top & (fraction == 0)] = torch.inf
    return torch.where(code > magnitude, -value, value).float()


def pack_twelve_bits(codes: Tensor) -> Tensor:
    """int [R, C] -> uint8 [R, ceil(C / 2) * 3]: codes a, b as the little-endian three bytes of a | b << 12."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.int().view(codes.shape[0], -1, 2)
    word = pairs[..., 0] | pairs[..., 1] << 12
    return torch.stack([word & 0xFF, word >> 8 & 0xFF, word >> 16], dim=-1).to(torch.uint8).flatten(1)


def unpack_twelve_bits(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_twelve_bits`: int32 [R, columns]."""
    byte = packed.int().view(packed.shape[0], -1, 3)
    word = byte[..., 0] | byte[..., 1] << 8 | byte[..., 2] << 16
    return torch.stack([word & 0xFFF, word >> 12], dim=-1).flatten(1)[:, :columns]


def _amax(tiles: Tensor) -> Tensor:
    """[row tiles, h, column tiles, w] -> largest magnitude [row tiles, column tiles]."""
    magnitude = tiles.abs()
    if magnitude.numel() == 0:
        return tiles.new_zeros(tiles.shape[0], tiles.shape[2])
    if tiles.shape[1] == 1:
        return magnitude.amax(dim=3).squeeze(1)
    if tiles.shape[3] == 1:
        return magnitude.amax(dim=1).squeeze(2)
    return magnitude.amax(dim=3).amax(dim=1)


def _scales(amax: Tensor, f: Format, mode: str) -> tuple[Tensor, Tensor]:
    """amax float32 -> (scale, 1 / scale), by the two rules of docs/numerics.md."""
    power = _power_of_two_exponent(amax, f)
    scale, inverse = _two_to_the(power), _two_to_the(-power)
    if mode == "float32":
        # Two tensors: torch computes scalar / tensor as reciprocal times scalar, which rounds twice.
        exact = amax / torch.full_like(amax, f.largest)
        reciprocal = torch.ones_like(exact) / exact
        usable = torch.isfinite(reciprocal)
        scale, inverse = torch.where(usable, exact, scale), torch.where(usable, reciprocal, inverse)
    zero = amax == 0
    return scale.masked_fill(zero, 1.0), inverse.masked_fill(zero, 1.0)


def _power_of_two_exponent(amax: Tensor, f: Format) -> Tensor:
    """Smallest k with amax <= largest * 2^k, from the bits, not below -126; int32."""
    bits = amax.view(torch.int32)
    largest = torch.tensor(f.largest).view(torch.int32).item()
    exponent = (bits >> 23) - (int(largest) >> 23)
    above = (bits & 0x7FFFFF) > (int(largest) & 0x7FFFFF)
    return (exponent + above.int()).clamp_(min=-126)


def _two_to_the(exponent: Tensor) -> Tensor:
    return (exponent.int() + 127 << 23).view(torch.float32)


def _encode(y: Tensor, f: Format, rounding: str) -> Tensor:
    """Finite y with |y| <= largest -> codes (uint8, or int16 for 12 bits)."""
    if rounding == "toward_zero" or f.bits == 12:
        y = _to_grid(y, f, rounding)
    if f.bits == 12:  # E5M6 is the upper 12 bits of FP16, and y is on its grid: the cast is exact
        return y.to(torch.float16).view(torch.int16) >> 4 & 0xFFF
    # Values are in range, so the cast's own treatment of overflow, which changed between torch versions, never acts.
    return y.to(torch.float8_e4m3fn if f.name == "e4m3" else torch.float8_e5m2).view(torch.uint8)


def _to_grid(y: Tensor, f: Format, rounding: str) -> Tensor:
    """Round y to values of the format; ties to even or toward zero; the sign of zero is kept."""
    binade = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**f.minimum_exponent)
    quantum = binade * 2.0**-f.mantissa_bits
    steps = y / quantum  # exact: a power of two
    return (torch.round(steps) if rounding == "nearest" else torch.trunc(steps)) * quantum


def _scaled(
    values: Tensor,
    scales: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
) -> Tensor:
    """values [R, C] times the scale of each element's tile, in values' dtype."""
    rows, columns = values.shape
    tiles = to_tiles(values, tile_rows, tile_columns, row_segment, column_segment, offsets)
    tiles = tiles * scales.to(values.dtype)[:, None, :, None]
    return from_tiles(tiles, rows, columns, tile_rows, tile_columns, row_segment, column_segment, offsets)


def _exact_in_bf16(scales: Tensor) -> bool:
    """True when every scale is a power of two far enough from BF16's ends for decoded products to stay normal."""
    if scales.numel() == 0:
        return True
    powers = (scales.view(torch.int32) & 0x7FFFFF) == 0
    return bool((powers & (scales >= SMALLEST_BF16_SCALE)).all())


def _indices(values: Tensor, layout: tuple[int, int, int, int, Tensor | None]) -> tuple[Tensor, Tensor]:
    tile_rows, tile_columns, row_segment, column_segment, offsets = layout
    rows = tile_index(values.shape[0], tile_rows, row_segment, offsets, values.device)
    return rows, tile_index(values.shape[1], tile_columns, column_segment, None, values.device)


def _require_constant_scales(
    kind: str, whole: bool, a_rows: int, a_columns: int, b_rows: int, b_columns: int
) -> None:
    """A promotion block multiplies its sum by one scale: the scales must not vary inside it."""
    contraction = {"fprop": (a_columns, b_columns), "dgrad": (a_columns, b_rows), "wgrad": (a_rows, b_rows)}[kind]
    allowed = (0,) if whole else (0, TILE)
    if any(extent not in allowed for extent in contraction):
        raise ValueError(
            f"{kind}: scales of tiles {a_rows}x{a_columns} and {b_rows}x{b_columns} vary inside a promotion block; an "
            "unpromoted sum or an interval above 128 needs tiles 'row' or 'tensor', whose scales are constant"
        )
