"""A matrix in a narrow format: codes, one scale a tile, and how the tiles lie.

A dataclass registered as a pytree, not a tensor subclass: what is stored is written down, and nothing happens to it
that a reader of the calling code does not see.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.numerics import operators
from tessera.numerics.formats import Format
from tessera.numerics.tiles import Tile


@dataclass(frozen=True)
class TiledTensor:
    """A [R, C] matrix; see tiles.py for segments and offsets.

    codes: uint8 [R, C] (12-bit formats: packed, [R, ceil(C / 2) * 3]); scales: float32 [row tiles, column tiles].
    nonfinite: int64 [], how many elements of the source were NaN or infinite.
    """

    codes: Tensor
    scales: Tensor
    nonfinite: Tensor
    tile: Tile
    format: Format
    shape: tuple[int, int]
    row_segment: int = 0
    column_segment: int = 0
    offsets: Tensor | None = None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[R, C] values fl(code * scale), rounded to `dtype` (exact in BF16 for power-of-two scales)."""
        values = operators.dequantise(
            self.codes,
            self.scales,
            self.tile.rows,
            self.tile.columns,
            self.row_segment,
            self.column_segment,
            self.offsets,
            self.format.name,
            self.shape[1],
        )
        return values.to(dtype)

    def rows(self, index: Tensor) -> "TiledTensor":
        """The rows `index` int64 [n], in that order; only for tiles one row high (a token's codes travel with it)."""
        if self.tile.rows != 1:
            if self.tile.rows == 0 and self.scales.shape[0] == 1:
                return replace(self, codes=self.codes[index], shape=(index.numel(), self.shape[1]))
            raise ValueError(f"rows of a tensor tiled {self.tile.rows}x{self.tile.columns} share scales")
        return replace(
            self, codes=self.codes[index], scales=self.scales[index], shape=(index.numel(), self.shape[1])
        )

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantise(
    x: Tensor,
    format: Format,
    tile: Tile,
    *,
    scale_mode: str = "power_of_two",
    rounding: str = "nearest",
    row_segment: int = 0,
    column_segment: int = 0,
    offsets: Tensor | None = None,
) -> TiledTensor:
    """x [R, C] float32 or bfloat16 -> TiledTensor; the rules are docs/numerics.md, section "Tiles and scales".

    Non-finite elements become the format's NaN code and are counted in `.nonfinite`; nothing saturates silently.
    Raises ValueError for a segment that does not divide the matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"quantise takes a matrix, got shape {tuple(x.shape)}")
    for name, segment, extent in (("row", row_segment, x.shape[0]), ("column", column_segment, x.shape[1])):
        if segment and extent % segment:
            raise ValueError(f"{name}_segment {segment} does not divide {extent}")
    codes, scales, nonfinite = operators.quantise(
        x, tile.rows, tile.columns, row_segment, column_segment, offsets, format.name, scale_mode, rounding
    )
    return TiledTensor(codes, scales, nonfinite, tile, format, (x.shape[0], x.shape[1]), row_segment, column_segment, offsets)


torch.utils._pytree.register_dataclass(  # type: ignore[attr-defined]
    TiledTensor,
    field_names=["codes", "scales", "nonfinite", "offsets"],
    drop_field_names=["tile", "format", "shape", "row_segment", "column_segment"],
)
