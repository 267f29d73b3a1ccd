"""Pieces of a tiled matrix against a loop over its elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.numerics.kernels.layout import Layout
from tessera.numerics.tiles import BLOCK, COLUMN, ROW, ROW_OF_TRANSPOSED, TENSOR, VECTOR, Tile

TILES = [VECTOR, COLUMN, BLOCK, ROW, ROW_OF_TRANSPOSED, TENSOR]


def tile_of(position: int, tile: int, segment: int, extent: int) -> int:
    """Index of a position's tile by counting tiles from the start."""
    tile = tile or segment or extent
    segment, index, at = segment or extent, 0, 0
    while True:
        end = min(at + tile, (at // segment + 1) * segment)
        if position < end:
            return index
        index, at = index + 1, end


def group_tile_of(row: int, bounds: list[int]) -> int:
    g = next(g for g in range(len(bounds) - 1) if bounds[g] <= row < bounds[g + 1])
    return bounds[g] // 128 + g + (row - bounds[g]) // 128


@settings(max_examples=60, deadline=None)
@given(
    tile=st.sampled_from(TILES),
    row_parts=st.tuples(st.integers(1, 3), st.integers(1, 300)),
    column_parts=st.tuples(st.integers(1, 3), st.integers(1, 300)),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    grouped=st.booleans(),
    transposed=st.booleans(),
)
def test_every_element_lies_in_one_piece_and_meets_the_scale_of_its_tile(
    tile: Tile,
    row_parts: tuple[int, int],
    column_parts: tuple[int, int],
    cuts: list[int],
    grouped: bool,
    transposed: bool,
) -> None:
    (row_segments, row_segment), (column_segments, column_segment) = row_parts, column_parts
    rows, columns = row_segments * row_segment, column_segments * column_segment
    bounds = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    layout = Layout(
        rows,
        columns,
        tile,
        0 if grouped else row_segment,
        column_segment,
        torch.tensor(bounds) if grouped else None,
    )
    down = [
        group_tile_of(r, bounds)
        if grouped and tile.rows == 128
        else r
        if tile.rows == 1
        else tile_of(r, tile.rows, 0 if grouped else row_segment, rows)
        for r in range(rows)
    ]
    across = [c if tile.columns == 1 else tile_of(c, tile.columns, column_segment, columns) for c in range(columns)]
    assert layout.row_tiles(torch.device("cpu")).tolist() == down
    assert layout.column_tiles(torch.device("cpu")).tolist() == across

    row_tiles, column_tiles = layout.scale_shape
    scales = torch.arange(row_tiles * column_tiles, dtype=torch.float32).view(row_tiles, column_tiles)
    x = torch.zeros(columns, rows).t() if transposed else torch.zeros(rows, columns)
    visits = torch.zeros_like(x)
    for piece in layout.pieces():
        piece.of(x).copy_(piece.scales_of(scales).expand(piece.of(x).shape))
        piece.of(visits).add_(1)
    assert torch.equal(visits, torch.ones(rows, columns))
    assert torch.equal(x, scales[down][:, across])


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_matrix_without_elements_has_no_pieces(tile: Tile) -> None:
    assert not list(Layout(0, 5, tile).pieces())
    assert not list(Layout(5, 0, tile).pieces())
    assert not list(Layout(0, 5, COLUMN, offsets=torch.tensor([0, 0, 0])).pieces())
