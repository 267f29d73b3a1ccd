"""The compiled SwiGLU against float64, and its codes against the product quantised afterwards."""

import math

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.numerics import COLUMN, E4M3, VECTOR, quantise
from tessera.ops.kernels import swiglu
from tessera.ops.swiglu import activate, activate_backward
from tests.ops.float64 import BF16, normal
from tests.ops.kernels.sets import apart, each_set, misaligned, threads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16])
SIZES = [(0, 5), (1, 1), (3, 0), (5, 7), (17, 16), (64, 17), (131, 129), (300, 256)]
MODES = pytest.mark.parametrize("mode", ["power_of_two", "float32"])


def a_case(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up, weight, d."""
    gate_up, d = 3 * normal(rows, 2 * columns), normal(rows, columns, seed=2)
    return gate_up.to(dtype), 0.1 + normal(rows, seed=1).abs(), d.to(dtype)


def exact(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    product = gate / (1 + (-gate).exp()) * up
    return product if weight is None else product * weight[:, None]


@each_set
@DTYPES
@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_those_of_float64(
    rows: int, columns: int, weighted: bool, dtype: torch.dtype, isa: str
) -> None:
    gate_up, weight, d = a_case(rows, columns, dtype)
    w = weight if weighted else None
    leaves = [gate_up.double().requires_grad_(), weight.double().requires_grad_()]
    owed = exact(leaves[0], leaves[1] if weighted else None)
    owed.backward(d.double())
    product = swiglu.swiglu(gate_up, w, isa)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), owed.detach(), rtol=6e-7, atol=1e-30)
    for given in (gate_up, gate_up.float()):
        dgate_up, dweight = swiglu.swiglu_backward(d, given, w, isa)
        assert dgate_up.dtype == dtype
        assert float64.relative(dgate_up, leaves[0].grad) < (1e-6 if dtype == torch.float32 else 2.0**-8)
        assert (dweight is None) == (not weighted)
        if weighted:
            assert float64.relative(dweight, leaves[1].grad) < 2e-6


@each_set
def test_the_ends_of_float32_are_those_of_the_formula(isa: str) -> None:
    gate = torch.tensor([1e4, 3e38, -1e4, -3e38, 0.0, -0.0, torch.nan, torch.inf])
    gate_up = torch.stack([torch.cat([gate, torch.ones(8)]), torch.cat([torch.ones(8), gate])])
    found = swiglu.swiglu(gate_up, None, isa)
    assert torch.equal(found[0, :6], gate[:6].clamp(min=0.0)) and found[0, 6].isnan() and found[0, 7].isinf()
    d, _ = swiglu.swiglu_backward(torch.ones(2, 8), gate_up, None, isa)
    assert d[0, :4].tolist() == [1.0, 1.0, 0.0, 0.0] and d[0, 6].isnan()  # the slope
    torch.testing.assert_close(found, activate(gate_up, None, "torch"), equal_nan=True)
    assert math.isclose(float(found[1, 0]), 1e4 / (1 + math.exp(-1)), rel_tol=1e-6)


@each_set
@DTYPES
def test_an_element_has_the_same_bits_wherever_it_lies(dtype: torch.dtype, isa: str) -> None:
    gate_up, weight, d = a_case(700, 67, dtype)
    product, (dgate_up, dweight) = swiglu.swiglu(gate_up, weight, isa), swiglu.swiglu_backward(d, gate_up, weight, isa)
    for place in (misaligned(gate_up), apart(gate_up), gate_up.t().contiguous().t()):
        assert torch.equal(swiglu.swiglu(place, misaligned(weight), isa), product)
        moved = swiglu.swiglu_backward(apart(d), place, weight, isa)
        assert torch.equal(moved[0], dgate_up) and torch.equal(moved[1], dweight)
    for rows in (slice(0, 1), slice(3, 20)):
        assert torch.equal(swiglu.swiglu(gate_up[rows], weight[rows], isa), product[rows])
        part = swiglu.swiglu_backward(d[rows], gate_up[rows], weight[rows], isa)
        assert torch.equal(part[0], dgate_up[rows]) and torch.equal(part[1], dweight[rows])
    narrow = torch.cat([gate_up[:, 5:20], gate_up[:, 72:87]], dim=1)  # columns 5 to 20 as a matrix of their own
    assert torch.equal(swiglu.swiglu(narrow, weight, isa), product[:, 5:20])
    with threads(3):
        assert torch.equal(swiglu.swiglu(gate_up, weight, isa), product)
        assert torch.equal(swiglu.swiglu_backward(d, gate_up, weight, isa)[1], dweight)


def some_groups(rows: int) -> list[Tensor | None]:
    """No groups; groups of 0, 1 and many rows; one for every row."""
    uneven = sorted([0, 0, min(1, rows), min(1, rows), rows // 2, rows, rows])
    return [None, torch.tensor(uneven), torch.arange(rows + 1)]


@each_set
@DTYPES
@MODES
@pytest.mark.parametrize("rows, columns", SIZES)
def test_codes_and_scales_are_those_of_the_product_quantised_afterwards(
    rows: int, columns: int, mode: str, dtype: torch.dtype, isa: str
) -> None:
    gate_up, weight, d = a_case(rows, columns, dtype)
    gate_up *= torch.logspace(-30, 6, rows)[:, None].to(dtype)  # scales at their smallest, subnormal codes, zeros
    power = mode == "power_of_two"
    for w in (weight, None):
        owed = quantise(swiglu.swiglu(gate_up, w, isa), E4M3, VECTOR, scale_mode=mode)
        codes, scales, nonfinite = swiglu.swiglu_row_tiles(apart(gate_up), w, power, isa)
        assert torch.equal(codes, owed.codes) and torch.equal(scales, owed.scales) and int(nonfinite) == 0
    cache = quantise(gate_up, E4M3, VECTOR, scale_mode=mode, column_segment=columns)
    decoded = cache.decode()
    for offsets in some_groups(rows):
        owed = quantise(swiglu.swiglu(decoded, weight, isa), E4M3, COLUMN, scale_mode=mode, offsets=offsets)
        codes, scales, _ = swiglu.swiglu_column_tiles(cache.codes, cache.scales, weight, offsets, power, isa)
        assert torch.equal(codes, owed.codes) and torch.equal(scales, owed.scales)
    found = swiglu.swiglu_backward_codes(d, cache.codes, cache.scales, weight, isa)
    assert all(torch.equal(a, b) for a, b in zip(found, swiglu.swiglu_backward(d, decoded, weight, isa), strict=True))


@each_set
def test_codes_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    gate_up, weight, _ = a_case(700, 200, BF16)
    cache, offsets = quantise(gate_up, E4M3, VECTOR, column_segment=200), torch.tensor([0, 3, 300, 300, 700])

    def run() -> list[Tensor]:
        rows = swiglu.swiglu_row_tiles(gate_up, weight, True, isa)
        return [*rows, *swiglu.swiglu_column_tiles(cache.codes, cache.scales, weight, offsets, True, isa)]

    alone = run()
    with threads(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), alone, strict=True))


@each_set
@MODES
def test_products_that_are_not_finite_are_counted_and_leave_their_tiles_scale_alone(mode: str, isa: str) -> None:
    gate_up, weight, _ = a_case(130, 140, torch.float32)
    gate_up[3, 7], gate_up[5, 140 + 139], gate_up[129, 0] = torch.nan, torch.inf, -torch.inf
    product = swiglu.swiglu(gate_up, weight, isa)
    owed = quantise(product, E4M3, VECTOR, scale_mode=mode)
    codes, scales, nonfinite = swiglu.swiglu_row_tiles(gate_up, weight, mode == "power_of_two", isa)
    assert int(nonfinite) == int(owed.nonfinite) == 3
    assert torch.equal(codes, owed.codes) and torch.equal(scales, owed.scales)
    cache = quantise(gate_up, E4M3, VECTOR, scale_mode=mode, column_segment=140)
    owed = quantise(swiglu.swiglu(cache.decode(), weight, isa), E4M3, COLUMN, scale_mode=mode)
    power = mode == "power_of_two"
    codes, scales, nonfinite = swiglu.swiglu_column_tiles(cache.codes, cache.scales, weight, None, power, isa)
    assert int(nonfinite) == int(owed.nonfinite) == 3
    assert torch.equal(codes, owed.codes) and torch.equal(scales, owed.scales)


@each_set
@DTYPES
def test_both_paths_agree_to_a_rounding(dtype: torch.dtype, isa: str) -> None:
    gate_up, weight, d = a_case(130, 129, dtype)
    results = [
        [activate(gate_up, weight, kernel), *activate_backward(d, gate_up, weight, dtype, kernel)]
        for kernel in (isa, "torch")
    ]
    for found, owed in zip(*results, strict=True):
        bar = 2.0**-8 if found.dtype == BF16 else 1e-6
        assert found.dtype == owed.dtype and float64.relative(found, owed) < bar


@each_set
def test_shapes_that_do_not_fit_are_refused(isa: str) -> None:
    gate_up, weight, d = a_case(4, 130, torch.float32)
    cache = quantise(gate_up, E4M3, VECTOR, column_segment=130)
    wrong = [
        lambda: swiglu.swiglu(gate_up[:, 1:], weight, isa=isa),
        lambda: swiglu.swiglu(gate_up, weight[:3], isa=isa),
        lambda: swiglu.swiglu_backward(d[:, 1:], gate_up, weight, isa=isa),
        lambda: swiglu.swiglu_row_tiles(gate_up, weight[:3], True, isa=isa),
        lambda: swiglu.swiglu_column_tiles(cache.codes, cache.scales[:, 1:], weight, None, True, isa=isa),
        lambda: swiglu.swiglu_backward_codes(d, cache.codes, cache.scales[:3], weight, isa=isa),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            call()
