"""Seeing a matrix as tiles: the index arithmetic that the vectorised kernels share.

Along one direction, tiles of one extent at regular distances form a `Span`: the whole tiles of all segments are one,
their ragged tails another, and each group of rows brings its own two. Two spans, one a direction, cut a `Piece` out
of the matrix: a strided view [segments, tiles, height, segments, tiles, width], in which one scale is constant over
the third and the last dimension. Nothing is padded or copied, however ragged the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from tessera.numerics.tiles import TILE, Tile, scale_shape


@dataclass(frozen=True)
class Span:
    """`segments` x `tiles` tiles of `extent` elements along one direction.

    Tile j of segment i begins at element start + i * stride + j * extent and has the scale with index
    scale_start + i * scale_stride + j.
    """

    start: int
    segments: int
    stride: int
    tiles: int
    extent: int
    scale_start: int
    scale_stride: int


@dataclass(frozen=True)
class Piece:
    """Tiles of one shape at regular distances in both directions."""

    rows: Span
    columns: Span

    def of(self, x: Tensor) -> Tensor:
        """View [segments, tiles, height, segments, tiles, width] of x [R, C]."""
        r, c = self.rows, self.columns
        down, across = x.stride()
        return x.as_strided(
            (r.segments, r.tiles, r.extent, c.segments, c.tiles, c.extent),
            (r.stride * down, r.extent * down, down, c.stride * across, c.extent * across, across),
            x.storage_offset() + r.start * down + c.start * across,
        )

    def scales_of(self, scales: Tensor) -> Tensor:
        """View of scales [row tiles, column tiles] that broadcasts over `of`."""
        r, c = self.rows, self.columns
        down, across = scales.stride()
        return scales.as_strided(
            (r.segments, r.tiles, 1, c.segments, c.tiles, 1),
            (r.scale_stride * down, down, 0, c.scale_stride * across, across, 0),
            scales.storage_offset() + r.scale_start * down + c.scale_start * across,
        )


@dataclass(frozen=True)
class Layout:
    """How tiles lie over a matrix [rows, columns]; see tiles.py for segments and offsets."""

    rows: int
    columns: int
    tile: Tile
    row_segment: int = 0
    column_segment: int = 0
    offsets: Tensor | None = None

    @property
    def scale_shape(self) -> tuple[int, int]:
        groups = 0 if self.offsets is None else self.offsets.numel() - 1
        return scale_shape(self.rows, self.columns, self.tile, self.row_segment, self.column_segment, groups)

    def pieces(self) -> Iterator[Piece]:
        """Pieces that cover the matrix; none of them is empty."""
        if self.offsets is not None and self.tile.rows == TILE:
            down = _group_spans(self.offsets.tolist())
        else:
            down = _spans(self.rows, self.tile.rows, self.row_segment)
        return (Piece(*spans) for spans in product(down, _spans(self.columns, self.tile.columns, self.column_segment)))

    def row_tiles(self, device: torch.device) -> Tensor:
        """int64 [R]: the row of the scales that each row lies in."""
        position = torch.arange(self.rows, device=device)
        if self.offsets is not None and self.tile.rows == TILE:
            group = torch.searchsorted(self.offsets[1:].contiguous(), position, right=True)
            first = self.offsets[group]
            return first // TILE + group + (position - first) // TILE
        return _tiles(position, self.tile.rows, self.row_segment)

    def column_tiles(self, device: torch.device) -> Tensor:
        """int64 [C]: the column of the scales that each column lies in."""
        return _tiles(torch.arange(self.columns, device=device), self.tile.columns, self.column_segment)


def _spans(extent: int, tile: int, segment: int) -> Iterator[Span]:
    if extent == 0:
        return
    if tile == 1:
        yield Span(0, 1, 0, extent, 1, 0, 0)
        return
    segment = segment or extent
    if tile == 0:
        yield Span(0, extent // segment, segment, 1, segment, 0, 1)
        return
    whole, rest = divmod(segment, TILE)
    segments, tiles = extent // segment, whole + (rest > 0)
    if whole:
        yield Span(0, segments, segment, whole, TILE, 0, tiles)
    if rest:
        yield Span(whole * TILE, segments, segment, 1, rest, whole, tiles)


def _group_spans(bounds: list[int]) -> Iterator[Span]:
    for g, (start, end) in enumerate(pairwise(bounds)):
        whole, rest = divmod(end - start, TILE)
        first = start // TILE + g  # tiles.py gives the rule
        if whole:
            yield Span(start, 1, 0, whole, TILE, first, 0)
        if rest:
            yield Span(start + whole * TILE, 1, 0, 1, rest, first + whole, 0)


def _tiles(position: Tensor, tile: int, segment: int) -> Tensor:
    if tile == 0:
        return position // segment if segment else torch.zeros_like(position)
    if tile == 1 or segment == 0:
        return position // tile
    return position // segment * -(-segment // tile) + position % segment // tile
