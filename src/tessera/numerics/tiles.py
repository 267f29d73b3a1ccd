"""Tiles: which elements share one scale.

A tile is `rows x columns`; an extent of 0 is the whole matrix in that direction (each of them, where several are
stored as one: see segments). Ragged edges are tiles of their own, so any shape works. Three things start a new tile
before 128 elements are full:

- the edge of the matrix;
- a *segment*: several published matrices stored as one (gate_proj over up_proj, expert over expert) are tiled
  each for itself, so tiles restart every `segment` rows or columns;
- a *group* of rows, given by `offsets` [G + 1]: the tokens of one expert. Tiles of height 128 restart at each
  group's first row. Group g's first tile has index offsets[g] // 128 + g, which never overlaps the previous
  group's tiles and needs no table; the scales then have R // 128 + G rows, and the unused ones are 1.

Sources: DeepSeek-V3 report, section 3.3.2 (1 x 128 activations, 128 x 128 weights); the index rule is ours.
"""

from dataclasses import dataclass

TILE = 128  # elements a scale covers along a tiled direction; report section 3.3.2


@dataclass(frozen=True)
class Tile:
    """Extent of a tile: 1, 128 or 0 (whole) in each direction."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if (self.rows, self.columns) not in {(1, 128), (128, 1), (128, 128), (1, 0), (0, 1), (0, 0)}:
            raise ValueError(f"tile {self.rows}x{self.columns} is none of 1x128, 128x1, 128x128, row, column, tensor")


VECTOR = Tile(1, TILE)  # along the contraction: activations in fprop, dY in dgrad
COLUMN = Tile(TILE, 1)  # 128 tokens of one channel: both operands of wgrad
BLOCK = Tile(TILE, TILE)  # weights
ROW = Tile(1, 0)  # baseline: a scale a row
ROW_OF_TRANSPOSED = Tile(0, 1)  # baseline: a scale a column, the row tile of the transposed matrix
TENSOR = Tile(0, 0)  # baseline: one scale


def tiles_along(extent: int, tile: int, segment: int = 0) -> int:
    """Number of tiles along a direction of `extent` elements; tiles restart every `segment` elements (0: never)."""
    if tile == 0:
        return extent // segment if segment else 1
    if segment == 0:
        return -(-extent // tile)
    return extent // segment * -(-segment // tile)


def scale_shape(
    rows: int, columns: int, tile: Tile, row_segment: int = 0, column_segment: int = 0, groups: int = 0
) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] matrix; `groups` > 0 when `offsets` of groups + 1 entries are given."""
    grouped = groups > 0 and tile.rows == TILE
    row_tiles = rows // TILE + groups if grouped else tiles_along(rows, tile.rows, row_segment)
    return row_tiles, tiles_along(columns, tile.columns, column_segment)
