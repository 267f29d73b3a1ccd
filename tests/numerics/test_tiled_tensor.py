"""TiledTensor: what it holds, what it refuses, and that it travels through pytrees unharmed."""

import pytest
import torch
from torch.utils import _pytree as pytree

import tests.numerics.oracle as oracle
from tessera.numerics import BLOCK, COLUMN, E4M3, E5M6, ROW, TENSOR, VECTOR, TiledTensor, quantise
from tessera.numerics.formats import E5M2, Format
from tessera.numerics.tiles import Tile
from tests.numerics.oracle import Layout

OFFSETS = torch.tensor([0, 3, 3, 130, 200])


@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("tile", [VECTOR, COLUMN, BLOCK, ROW, TENSOR], ids=lambda t: f"{t.rows}x{t.columns}")
def test_decoded_values_are_codes_times_scales(tile: Tile, format: Format) -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).exp()
    q = quantise(x, format, tile)
    owed = oracle.reference.dequantise(q.codes, q.scales, *Layout(tile).arguments(), format.name, 300)
    assert torch.equal(q.decode(), owed)
    assert q.decode(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.decode(torch.bfloat16).float(), q.decode())  # exact: powers of two
    assert q.nbytes == q.codes.numel() + 4 * q.scales.numel()
    assert (q.shape, int(q.nonfinite)) == ((200, 300), 0)


def test_twelve_bit_codes_take_three_bytes_for_two() -> None:
    assert quantise(torch.zeros(2, 256), E5M6, VECTOR).codes.shape == (2, 384)
    assert quantise(torch.zeros(2, 7), E5M6, VECTOR).codes.shape == (2, 12)


def test_non_finite_values_are_counted_and_stay_nan() -> None:
    x = torch.tensor([[1.0, torch.inf, -torch.nan, 3.0], [-torch.inf, 0.0, 1.0, 2.0]])
    for format in (E4M3, E5M2, E5M6):
        q = quantise(x, format, VECTOR)
        assert int(q.nonfinite) == 3
        assert torch.equal(q.decode().isnan(), ~x.isfinite())


@pytest.mark.parametrize("tile", [VECTOR, ROW, TENSOR], ids=["1x128", "row", "tensor"])
def test_rows_take_their_codes_and_scales_along_in_any_order(tile: Tile) -> None:
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(6)[:, None]
    index = torch.tensor([5, 0, 0, 3])
    taken = quantise(x, E4M3, tile).rows(index)
    assert torch.equal(taken.decode(), quantise(x, E4M3, tile).decode()[index])
    assert taken.shape == (4, 300)
    nothing = quantise(x, E4M3, tile).rows(torch.zeros(0, dtype=torch.int64))
    assert nothing.decode().shape == (0, 300)


@pytest.mark.parametrize("tile", [COLUMN, BLOCK], ids=["128x1", "128x128"])
def test_rows_that_share_scales_do_not_travel(tile: Tile) -> None:
    with pytest.raises(ValueError, match="share scales"):
        quantise(torch.ones(4, 4), E4M3, tile).rows(torch.tensor([0]))


def test_what_cannot_be_tiled_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix"):
        quantise(torch.ones(2, 3, 4), E4M3, VECTOR)
    with pytest.raises(ValueError, match="row_segment 3"):
        quantise(torch.ones(4, 4), E4M3, BLOCK, row_segment=3)
    with pytest.raises(ValueError, match="column_segment 3"):
        quantise(torch.ones(4, 4), E4M3, VECTOR, column_segment=3)
    with pytest.raises(ValueError, match="none of"):
        Tile(64, 64)


def test_a_strided_or_transposed_matrix_gives_the_codes_of_its_copy() -> None:
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    for view in (x.t(), x[::2, 1::3], x[10:, 7:], x.bfloat16().t()):
        for tile in (VECTOR, COLUMN, BLOCK):
            one, two = quantise(view, E4M3, tile), quantise(view.contiguous(), E4M3, tile)
            assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)
            assert one.codes.is_contiguous()


@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["plain", "groups"])
def test_a_tiled_tensor_survives_a_pytree_round_trip(offsets: torch.Tensor | None) -> None:
    q = quantise(torch.randn(200, 96), E4M3, COLUMN, column_segment=48, offsets=offsets)
    leaves, spec = pytree.tree_flatten([q, {"x": torch.ones(2)}, None])
    back, other, nothing = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, TiledTensor) and nothing is None and torch.equal(other["x"], torch.ones(2))
    assert torch.equal(back.decode(), q.decode())
    assert (back.tile, back.format, back.shape) == (q.tile, q.format, q.shape)
    assert (back.row_segment, back.column_segment) == (0, 48)
    assert (back.offsets is None) == (offsets is None)
    moved = pytree.tree_map_only(torch.Tensor, torch.clone, q)
    assert moved.codes.data_ptr() != q.codes.data_ptr() and torch.equal(moved.decode(), q.decode())


@pytest.mark.parametrize("tile", [ROW, TENSOR], ids=["row", "tensor"])
def test_a_whole_matrix_is_each_published_one_where_several_are_stored_as_one(tile: Tile) -> None:
    gate, up = (torch.randn(7, 50, generator=torch.Generator().manual_seed(i)) * 1e3**i for i in (0, 1))
    parts = [quantise(x, E4M3, tile) for x in (gate, up)]
    below = quantise(torch.cat([gate, up]), E4M3, tile, row_segment=7)
    assert torch.equal(below.codes, torch.cat([q.codes for q in parts]))
    assert torch.equal(below.scales, torch.cat([q.scales for q in parts]))
    beside = quantise(torch.cat([gate, up], dim=1), E4M3, tile, column_segment=50)
    assert torch.equal(beside.codes, torch.cat([q.codes for q in parts], dim=1))
    assert torch.equal(beside.scales, torch.cat([q.scales for q in parts], dim=1))
    assert torch.equal(beside.decode(), torch.cat([q.decode() for q in parts], dim=1))
