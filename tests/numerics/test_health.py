"""Health statistics against counting one element at a time."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tessera.numerics import BLOCK, COLUMN, E4M3, E5M6, TENSOR, VECTOR, Recorder, TiledTensor, quantise
from tessera.numerics.formats import E5M2, Format
from tessera.numerics.health import measure
from tessera.numerics.kernels import reference
from tessera.numerics.tiles import Tile
from tests.numerics.oracle import Layout


def counted(x: Tensor, q: TiledTensor, twice: bool) -> dict[str, float | int | None]:
    """The statistics from their definitions, in Python numbers."""
    layout = Layout(q.tile, q.row_segment, q.column_segment, q.offsets).arguments()
    decoded = reference.dequantise(q.codes, q.scales, *layout, q.format.name, q.shape[1]).flatten().tolist()
    ones = torch.ones_like(q.scales)
    bare = reference.dequantise(q.codes, ones, *layout, q.format.name, q.shape[1]).flatten().tolist()
    source = x.float().flatten().tolist()
    pairs = [(s, d) for s, d in zip(source, decoded, strict=True) if math.isfinite(s)]
    squares = math.fsum(s * s for s, _ in pairs)
    used = q.scales.flatten().tolist()
    if q.offsets is not None and q.tile.rows == 128:
        columns = q.scales.shape[1]
        used = [
            s
            for g, (first, last) in enumerate(pairwise(q.offsets.tolist()))
            for tile in range(math.ceil((last - first) / 128))
            for s in q.scales[first // 128 + g + tile].tolist()
        ]
        assert len(used) % columns == 0
    return {
        "relative_rms": math.sqrt(math.fsum((d - s) ** 2 for s, d in pairs) / squares) if squares else 0.0,
        "saturated": sum(abs(b) == q.format.largest for b in bare) / len(bare),
        "flushed": sum(s != 0 and d == 0 for s, d in pairs) / len(source),
        "rounded_twice": sum(s != d for s, d in pairs) / len(source) if twice else None,
        "nonfinite": sum(not math.isfinite(s) for s in source),
        "scale_min": min(used),
        "scale_max": max(used),
        "elements": len(source),
    }


def assert_equal(found: dict[str, float | int | None], owed: dict[str, float | int | None]) -> None:
    assert found.keys() == owed.keys()
    assert found.pop("relative_rms") == pytest.approx(owed.pop("relative_rms"), rel=1e-4)  # float32 sums
    assert found == owed


@pytest.mark.parametrize("scale_mode", ["power_of_two", "float32"])
@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("tile", [VECTOR, COLUMN, BLOCK, TENSOR], ids=lambda t: f"{t.rows}x{t.columns}")
def test_statistics_equal_counting_element_by_element(tile: Tile, format: Format, scale_mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 150, generator=generator) * (4 * torch.randn(40, 150, generator=generator)).exp()
    x[3, 5:9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    x[7] = 0.0
    q = quantise(x, format, tile, scale_mode=scale_mode)
    found = measure(x, q, requantised=False)
    assert found["nonfinite"] == 3 and found["rounded_twice"] is None
    if format is E4M3 and tile is VECTOR:
        assert found["saturated"] > 0 and found["flushed"] > 0  # the data reach both ends
    assert_equal(found, counted(x, q, twice=False))
    if scale_mode == "float32":
        assert found["saturated"] > 0  # the amax of each tile itself


def test_the_range_of_scales_leaves_out_the_rows_that_no_group_uses() -> None:
    offsets = torch.tensor([0, 0, 3, 131, 131, 300])
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(2)) * 1e-3
    q = quantise(x, E4M3, COLUMN, offsets=offsets)
    assert (q.scales == 1).any()  # the unused ones
    found = measure(x, q, requantised=False)
    assert found["scale_max"] < 1e-4
    assert_equal(found, counted(x, q, twice=False))


def test_rounded_twice_counts_the_elements_that_a_second_quantisation_changed() -> None:
    # 256 tokens of one magnitude but for one channel, in which token 0 is 2^12 larger: its neighbours are subnormal
    # in the 128 x 1 tile and lose bits; the other channels keep every element.
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    x[0, 7] = 2.0**12
    first = quantise(x, E4M3, VECTOR)
    decoded = first.decode()
    second = quantise(decoded, E4M3, COLUMN)
    found = measure(decoded, second, requantised=True)
    assert_equal(dict(found), counted(decoded, second, twice=True))
    changed = second.decode() != decoded
    assert found["rounded_twice"] == int(changed.sum()) / x.numel() > 0
    assert set(changed.nonzero()[:, 1].tolist()) == {7}


def test_a_matrix_of_zeros_has_no_error_and_a_scale_of_one() -> None:
    x = torch.zeros(3, 4)
    found = measure(x, quantise(x, E4M3, VECTOR), requantised=True)
    assert found == {
        "relative_rms": 0.0,
        "saturated": 0.0,
        "flushed": 0.0,
        "rounded_twice": 0.0,
        "nonfinite": 0,
        "scale_min": 1.0,
        "scale_max": 1.0,
        "elements": 12,
    }


def observed(recorder: Recorder, name: str, *values: float) -> None:
    x = torch.tensor([values])
    recorder.observe(name, x, quantise(x, E4M3, VECTOR))


def test_the_first_tensor_that_met_a_non_finite_value_is_named_with_its_count() -> None:
    recorder = Recorder()
    assert recorder.first_nonfinite() is None
    observed(recorder, "a", 1.0, 2.0)
    assert recorder.first_nonfinite() is None
    observed(recorder, "b", 1.0, math.nan, math.inf)
    observed(recorder, "c", math.nan)
    observed(recorder, "a", -math.inf)  # met again, in a later micro-batch: `a` was met before `b`
    assert recorder.first_nonfinite() == ("a", 1)
    observed(recorder, "a", math.nan)
    assert recorder.first_nonfinite() == ("a", 2)
    recorder.clear()
    assert recorder.first_nonfinite() is None
    observed(recorder, "c", math.nan)
    assert recorder.first_nonfinite() == ("c", 1)


def test_tensors_are_measured_when_asked_for_and_never_otherwise() -> None:
    recorder = Recorder()
    observed(recorder, "a", 1.0)
    assert recorder.tensors == {}
    recorder.measuring = True
    observed(recorder, "a", 1.0, 3.0)
    assert recorder.tensors["a"]["elements"] == 2
    recorder.observe("empty", torch.zeros(0, 4), quantise(torch.zeros(0, 4), E4M3, VECTOR))
    assert "empty" not in recorder.tensors  # nothing to measure, nothing to divide by
    recorder.clear()
    assert recorder.tensors == {}


def test_what_a_pass_of_its_own_meets_is_forgotten_behind_it() -> None:
    recorder = Recorder(measuring=True)
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    recorder.observe("weight", x, quantise(x, E4M3, BLOCK))
    before = {name: dict(figures) for name, figures in recorder.tensors.items()}
    poisoned = x.clone()
    poisoned[0, 0] = torch.nan
    with recorder.undisturbed():
        recorder.clear()
        recorder.observe("weight", poisoned, quantise(poisoned, E4M3, BLOCK))
        assert recorder.first_nonfinite() == ("weight", 1) and recorder.tensors == {}
    assert recorder.measuring and recorder.tensors == before and recorder.first_nonfinite() is None
