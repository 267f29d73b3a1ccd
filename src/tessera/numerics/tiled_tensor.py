"""A matrix in a narrow format: codes, one scale a tile, and how the tiles lie.

A dataclass registered as a pytree, not a tensor subclass: what is stored is written down, and nothing happens to it
that a reader of the calling code does not see.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tessera.numerics import operators
from tessera.numerics.formats import E4M3, Format
from tessera.numerics.tiles import COLUMN, Tile


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
        """[R, C] values fl(code * scale), rounded to `dtype`.

        In BF16 this is exact for power-of-two scales, but for magnitudes at the end of its range (2^-126).
        """
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

    def columnwise(self, scale_mode: str, offsets: Tensor | None = None) -> "TiledTensor":
        """From 1 x 128 tiles to E4M3 in 128 x 1 tiles, each value rounded a second time; for tiles without segments."""
        codes, scales, nonfinite = operators.requantise_columns(
            self.codes, self.scales, self.format.name, self.shape[1], offsets, scale_mode
        )
        return TiledTensor(codes, scales, nonfinite, COLUMN, E4M3, self.shape, offsets=offsets)

    def rows(self, index: Tensor) -> "TiledTensor":
        """The rows `index` int64 [n], in that order; only for tiles one row high (a token's codes travel with it).

        `nonfinite` stays that of the whole matrix. Raises ValueError where rows share scales.
        """
        if self.tile.rows != 1:
            if self.tile.rows == 0:
                return replace(self, codes=self.codes.index_select(0, index), shape=(index.numel(), self.shape[1]))
            raise ValueError(f"rows of a tensor tiled {self.tile.rows}x{self.tile.columns} share scales")
        return replace(
            self,
            codes=self.codes.index_select(0, index),
            scales=self.scales.index_select(0, index),
            shape=(index.numel(), self.shape[1]),
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
    shape = (x.shape[0], x.shape[1])
    return TiledTensor(codes, scales, nonfinite, tile, format, shape, row_segment, column_segment, offsets)


Facts = tuple[Tile, Format, tuple[int, int], int, int]


def _flatten(q: TiledTensor) -> tuple[list[Tensor | None], Facts]:
    facts = (q.tile, q.format, q.shape, q.row_segment, q.column_segment)
    return [q.codes, q.scales, q.nonfinite, q.offsets], facts


def _unflatten(tensors: Iterable[Any], facts: Facts) -> TiledTensor:
    codes, scales, nonfinite, offsets = tensors
    return TiledTensor(codes, scales, nonfinite, *facts, offsets)


# Not register_dataclass: torch's does not keep the fields that are no tensors.
pytree.register_pytree_node(TiledTensor, _flatten, _unflatten, serialized_type_name="tessera.numerics.TiledTensor")
