"""Seeing a matrix as tiles, and back: the index arithmetic that the vectorised kernels share.

[R, C] becomes [row tiles, tile height, column tiles, tile width]. Where a segment or a group is no multiple of 128
the missing elements are zeros, which change neither an amax nor a product. Whole matrices that divide evenly are
views; nothing is copied.
"""

import torch
from torch import Tensor

from tessera.numerics.tiles import TILE


def to_tiles(
    x: Tensor, tile_rows: int, tile_columns: int, row_segment: int, column_segment: int, offsets: Tensor | None
) -> Tensor:
    """x [R, C] -> [row tiles, height, column tiles, width], padded with zeros."""
    rows, columns = x.shape
    if tile_rows == TILE and offsets is not None:
        groups = offsets.numel() - 1
        padded = x.new_zeros((rows // TILE + groups) * TILE, columns)
        x = padded.index_copy_(0, _padded_position(rows, offsets), x)
    else:
        x = _split(x, 0, tile_rows, row_segment)
    height = 1 if tile_rows == 1 else _tile_extent(rows, tile_rows, row_segment, offsets)
    x = _split(x, 1, tile_columns, column_segment)
    width = 1 if tile_columns == 1 else _tile_extent(columns, tile_columns, column_segment, None)
    return x.reshape(x.shape[0] // height if height else 1, height, x.shape[1] // width if width else 1, width)


def from_tiles(
    tiles: Tensor,
    rows: int,
    columns: int,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
) -> Tensor:
    """Inverse of `to_tiles`: [R, C], contiguous."""
    x = tiles.flatten(2, 3).flatten(0, 1)
    if tile_rows == TILE and offsets is not None:
        x = x.index_select(0, _padded_position(rows, offsets))
    else:
        x = _join(x, 0, rows, tile_rows, row_segment)
    return _join(x, 1, columns, tile_columns, column_segment).contiguous()


def tile_index(extent: int, tile: int, segment: int, offsets: Tensor | None, device: torch.device) -> Tensor:
    """int64 [extent]: the tile, along one direction, that each element lies in."""
    position = torch.arange(extent, device=device)
    if tile == 0:
        return torch.zeros_like(position)
    if tile == 1:
        return position
    if offsets is not None:
        return _padded_position(extent, offsets) // tile
    segment = segment or max(extent, 1)
    return position // segment * -(-segment // tile) + position % segment // tile


def _padded_position(rows: int, offsets: Tensor) -> Tensor:
    """Row of each token when every group starts at a tile of its own (tiles.py gives the rule)."""
    row = torch.arange(rows, device=offsets.device)
    group = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    return (offsets[group] // TILE + group) * TILE + row - offsets[group]


def _tile_extent(extent: int, tile: int, segment: int, offsets: Tensor | None) -> int:
    """A tile's padded extent; one that would be wider than its segment shrinks to it, which saves the padding."""
    if tile == 0:
        return extent
    return tile if offsets is not None else min(tile, segment or extent)


def _split(x: Tensor, dim: int, tile: int, segment: int) -> Tensor:
    """Pad each segment of direction `dim` to whole tiles."""
    extent = x.shape[dim]
    if tile in (0, 1) or extent == 0:
        return x
    segment = segment or extent
    width = min(tile, segment)
    missing = -segment % width
    if missing == 0:
        return x
    x = x.unflatten(dim, (-1, segment))
    pad = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return torch.nn.functional.pad(x, pad).flatten(dim, dim + 1)


def _join(x: Tensor, dim: int, extent: int, tile: int, segment: int) -> Tensor:
    """Cut the padding that `_split` added."""
    if tile in (0, 1) or extent == 0 or x.shape[dim] == extent:
        return x
    segment = segment or extent
    padded = x.shape[dim] // (extent // segment)
    return x.unflatten(dim, (-1, padded)).narrow(dim + 1, 0, segment).flatten(dim, dim + 1)
