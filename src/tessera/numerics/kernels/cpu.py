"""The native kernels of a CPU: the same codes and scales as `reference`, at the speed of the memory and the units.

Tiles of the recipe (1 x 128, 128 x 1, 128 x 128, and rows) are quantised by compiled code, one visit of a tile for
amax, scale and cast (native/source/quantise.cpp). What only baselines and experiments use (whole-matrix tiles, rounding
toward zero, 12-bit codes in tall tiles) is the `torch` kernel's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.numerics.formats import FORMATS
from tessera.numerics.kernels import torch as fallback
from tessera.numerics.kernels.native_gemm import Side
from tessera.numerics.kernels.native_gemm import matmul as native_matmul
from tessera.numerics.tiles import COLUMN, TILE, Tile, scale_shape

FORMAT_NAMES = ("e4m3", "e5m2", "e5m6")  # as source/quantise.cpp numbers them
DTYPES = (torch.float32, torch.bfloat16)

QUANTISE_ROWS = Kernel("quantise_rows", "piiiiiiipipi", counts=True)
QUANTISE_TALL = Kernel("quantise_tall", "piipiiiipiiippi", counts=True)
REQUANTISE_COLUMNS = Kernel("requantise_columns", "ppiiipiipiipp", counts=True)
DEQUANTISE_ROWS = Kernel("dequantise_rows", "pipiiiiipi")


@dataclass(frozen=True)
class Kernels:
    """The three functions of kernels/__init__.py; `isa` names an instruction set, "" is the machine's best."""

    isa: str = ""

    def quantise(
        self,
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
        tall = tile_rows == TILE and tile_columns in (1, TILE)
        cut = format == "e5m6" and column_segment % 2  # a tile would begin inside a pair of 12-bit codes
        if rounding != "nearest" or not (tile_rows == 1 or tall) or (tall and format == "e5m6") or cut:
            return fallback.quantise(
                x, tile_rows, tile_columns, row_segment, column_segment, offsets, format, scale_mode, rounding
            )
        if x.dtype not in DTYPES:
            x = x.float()
        if x.stride(-1) != 1:
            x = x.contiguous()
        rows, columns = x.shape
        f = FORMATS[format]
        groups = 0 if offsets is None else offsets.numel() - 1
        tile = Tile(tile_rows, tile_columns)
        codes = x.new_empty(rows, f.code_bytes(columns), dtype=torch.uint8)
        shape = scale_shape(rows, columns, tile, row_segment, column_segment, groups)
        scales = x.new_empty(shape, dtype=torch.float32)
        how = (FORMAT_NAMES.index(format), scale_mode == "power_of_two")
        source = (x, DTYPES.index(x.dtype), x.stride(0))
        across = column_segment or columns
        if columns == 0:
            scales.fill_(1.0)
            nonfinite = 0
        elif tall:
            down = (row_segment or rows, across, offsets, groups)
            nonfinite = QUANTISE_TALL(
                shape[0],
                *source,
                None,
                columns,
                tile_columns,
                *down,
                *how,
                codes,
                scales,
                shape[1],
                work=TILE * columns,
                isa=self.isa,
            )
        else:
            into = (codes, codes.shape[1], scales, shape[1])
            nonfinite = QUANTISE_ROWS(
                rows, *source, columns, tile_columns, across, *how, *into, work=columns, isa=self.isa
            )
        return codes, scales, torch.tensor(nonfinite)

    def requantise_columns(
        self, codes: Tensor, scales: Tensor, format: str, columns: int, offsets: Tensor | None, scale_mode: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See operators.requantise_columns."""
        rows, groups = codes.shape[0], 0 if offsets is None else offsets.numel() - 1
        codes, scales = codes.contiguous(), scales.contiguous()
        shape = scale_shape(rows, columns, COLUMN, groups=groups)
        made = codes.new_empty(rows, columns)
        made_scales = scales.new_empty(shape)
        source = (codes, scales, codes.shape[1], scales.shape[1], FORMAT_NAMES.index(format), None)
        how = (rows, columns, offsets, groups, scale_mode == "power_of_two")
        nonfinite = REQUANTISE_COLUMNS(shape[0], *source, *how, made, made_scales, work=TILE * columns, isa=self.isa)
        return made, made_scales, torch.tensor(nonfinite)

    def dequantise(
        self,
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
        if tile_rows != 1 or columns == 0 or (format == "e5m6" and column_segment % 2):
            return fallback.dequantise(
                codes, scales, tile_rows, tile_columns, row_segment, column_segment, offsets, format, columns
            )
        codes, scales = codes.contiguous(), scales.contiguous()
        values = codes.new_empty(codes.shape[0], columns, dtype=torch.float32)
        DEQUANTISE_ROWS(
            codes.shape[0],
            codes,
            codes.shape[1],
            scales,
            scales.shape[1],
            columns,
            tile_columns,
            column_segment or columns,
            FORMAT_NAMES.index(format),
            values,
            DTYPES.index(torch.float32),
            work=columns,
            isa=self.isa,
        )
        return values

    def matmul(
        self,
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
        out: Tensor | None = None,
    ) -> Tensor:
        """See kernels/__init__.py; the result is written to `out` where it is given."""
        y = None
        if accumulation == "float32" and "e5m6" not in (a_format, b_format):
            a_segment, b_segment = (0 if kind == "fprop" else segment), (0 if kind == "wgrad" else segment)
            a_tile, b_tile = Tile(a_tile_rows, a_tile_columns), Tile(b_tile_rows, b_tile_columns)
            a = Side(a_codes.contiguous(), a_format, a_scales.contiguous(), a_tile, 0, a_segment)
            b = Side(b_codes.contiguous(), b_format, b_scales.contiguous(), b_tile, b_segment, 0)
            y = native_matmul(kind, a, b, offsets, out_dtype, out=out, isa=self.isa)
        if y is not None:
            return y
        a_operand = (a_codes, a_scales, a_tile_rows, a_tile_columns, a_format)
        b_operand = (b_codes, b_scales, b_tile_rows, b_tile_columns, b_format)
        how = (segment, offsets, accumulation, interval, out_dtype)
        y = fallback.matmul(kind, *a_operand, *b_operand, *how, isa=self.isa)
        return y if out is None else out.copy_(y)
