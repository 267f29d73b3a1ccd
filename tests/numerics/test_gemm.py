"""The GEMMs of quantised operands as a caller makes them: against FP64 of the same codes, and with outliers."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

import tests.numerics.oracle as oracle
from tessera.numerics import BLOCK, COLUMN, E4M3, TENSOR, VECTOR, Accumulation, TiledTensor, gemm, quantise
from tests.numerics.oracle import FLOAT32_BAR, Layout, Operand, Problem, relative_norm

FLOAT32, BF16 = torch.float32, torch.bfloat16
SUMS = Accumulation()


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def exact(kind: str, a: TiledTensor, b: TiledTensor, segment: int = 0, offsets: Tensor | None = None) -> Tensor:
    """FP64 product of the codes times their scales, decoded by the oracle."""
    operands = [Operand(q.codes, q.scales, Layout(q.tile, q.row_segment, q.column_segment, q.offsets)) for q in (a, b)]
    return Problem(kind, *operands, segment, offsets).exact()


@pytest.mark.parametrize("scale_mode", ["power_of_two", "float32"])
@pytest.mark.parametrize("tokens", [[200], [0, 1, 127, 129]], ids=["dense", "groups"])
def test_long_ragged_products_equal_fp64_of_the_same_codes(tokens: list[int], scale_mode: str) -> None:
    n, k = 2 * 72, 2125  # no multiples of 128; two matrices of 72 rows in each weight
    total, groups = sum(tokens), len(tokens)
    offsets = torch.tensor([0, *accumulate(tokens)]) if groups > 1 else None
    x, dy, w = normal(total, k, 1), normal(total, n, 2), normal(groups * n, k, 3)

    def made(m: Tensor, tile: oracle.Tile, **layout: object) -> TiledTensor:
        return quantise(m, E4M3, tile, scale_mode=scale_mode, **layout)  # type: ignore[arg-type]

    weight = made(w, BLOCK, row_segment=72)
    pairs = {
        "fprop": (made(x, VECTOR), weight),
        "dgrad": (made(dy, VECTOR, column_segment=72), weight),
        "wgrad": (made(dy, COLUMN, offsets=offsets), made(x, COLUMN, offsets=offsets)),
    }
    for kind, (a, b) in pairs.items():
        owed = exact(kind, a, b, 72, offsets)
        if kind == "wgrad":
            assert relative_norm(gemm.wgrad(a, b, SUMS, offsets), owed) < FLOAT32_BAR
            continue
        run = {"fprop": gemm.fprop, "dgrad": gemm.dgrad}[kind]
        assert relative_norm(run(a, b, SUMS, FLOAT32, offsets), owed) < FLOAT32_BAR
        rounded = run(a, b, SUMS, BF16, offsets)
        assert rounded.dtype == BF16
        # One rounding: half a step of BF16 at most from the exact value, and a little more where the sum is not exact.
        error, half_step = (rounded.double() - owed).abs(), owed.abs() * 2.0**-8
        assert bool((error <= half_step + owed.abs().mean() * 1e-5).all())


def test_a_sum_over_4096_tokens_stays_within_the_bar() -> None:
    dy, x = quantise(normal(4096, 70, 1), E4M3, COLUMN), quantise(normal(4096, 90, 2), E4M3, COLUMN)
    assert relative_norm(gemm.wgrad(dy, x, SUMS), exact("wgrad", dy, x)) < FLOAT32_BAR


@pytest.mark.parametrize("scale_mode", ["power_of_two", "float32"])
@pytest.mark.parametrize("weights", ["of nothing", "that undo it"])
def test_one_channel_of_outliers_costs_block_scales_less_than_a_quarter_of_one_scale(
    weights: str, scale_mode: str
) -> None:
    k = 4096
    x, w = normal(64, k, 1), normal(96, k, 2)
    x[:, 1000] *= 1e5
    w[:, 1000] *= 0.0 if weights == "of nothing" else 1e-5
    owed = x.double() @ w.double().T

    def error(x_tile: oracle.Tile, w_tile: oracle.Tile) -> float:
        operands = [quantise(m, E4M3, t, scale_mode=scale_mode) for m, t in ((x, x_tile), (w, w_tile))]
        return relative_norm(gemm.fprop(*operands, SUMS, FLOAT32), owed)

    block, tensor = error(VECTOR, BLOCK), error(TENSOR, TENSOR)
    assert block < 0.08  # ordinary data: 0.037; one tile in 32 holds the outliers
    assert block < tensor / 4


def test_one_token_of_outliers_is_felt_by_no_other_token_under_block_scales() -> None:
    x, w = normal(64, 512, 1), normal(96, 512, 2)
    x[5] *= 1e5
    owed = x.double() @ w.double().T
    others = torch.arange(64) != 5

    def error(x_tile: oracle.Tile, w_tile: oracle.Tile) -> float:
        y = gemm.fprop(quantise(x, E4M3, x_tile), quantise(w, E4M3, w_tile), SUMS, FLOAT32)
        return relative_norm(y[others], owed[others])

    assert error(VECTOR, BLOCK) < 0.045 < 4 * 0.045 < error(TENSOR, TENSOR)


def test_operands_that_do_not_go_together_are_refused() -> None:
    x, w = normal(4, 20), normal(6, 20)
    with pytest.raises(TypeError, match="both operands"):
        gemm.fprop(quantise(x, E4M3, VECTOR), w, SUMS, BF16)
    with pytest.raises(TypeError, match="both operands"):
        gemm.fprop(x, quantise(w, E4M3, BLOCK), SUMS, BF16)


def test_tiles_that_do_not_follow_the_groups_are_refused_instead_of_read_wrongly() -> None:
    offsets = torch.tensor([0, 1, 4])
    x, dy, w = normal(4, 20), normal(4, 6), normal(12, 20)
    grouped, plain = quantise(dy, E4M3, COLUMN, offsets=offsets), quantise(dy, E4M3, COLUMN)
    x_grouped, x_plain = quantise(x, E4M3, COLUMN, offsets=offsets), quantise(x, E4M3, COLUMN)
    for a, b, by in ((plain, x_grouped, offsets), (grouped, x_plain, offsets), (grouped, x_grouped, None)):
        with pytest.raises(ValueError, match="offsets"):
            gemm.wgrad(a, b, SUMS, by)
    weight = quantise(w, E4M3, BLOCK, row_segment=6)
    with pytest.raises(ValueError, match="offsets"):
        gemm.dgrad(quantise(dy, E4M3, BLOCK), weight, SUMS, BF16, offsets)


def test_columns_tiled_otherwise_than_the_weights_rows_are_refused() -> None:
    weight = quantise(normal(192, 20), E4M3, BLOCK, row_segment=96)
    for segment in (0, 48):
        with pytest.raises(ValueError, match="column_segment"):
            gemm.dgrad(quantise(normal(4, 192), E4M3, VECTOR, column_segment=segment), weight, SUMS, BF16)
    whole = quantise(normal(192, 20), E4M3, TENSOR, row_segment=96)
    with pytest.raises(ValueError, match="column_segment"):
        gemm.dgrad(quantise(normal(4, 192), E4M3, TENSOR), whole, SUMS, BF16)
    aligned = quantise(normal(256, 20), E4M3, BLOCK, row_segment=128)  # the same tiles either way
    assert gemm.dgrad(quantise(normal(4, 256), E4M3, VECTOR), aligned, SUMS, BF16).shape == (4, 20)
