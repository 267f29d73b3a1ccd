"""The reference against facts it did not compute: torch's float8 types, float16's bits, libm's fmaf, literals
worked out by hand from the law (the comments hold the working).
"""

import ctypes
import ctypes.util
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.numerics.oracle as oracle
from tessera.numerics.kernels.reference import (
    decode,
    dequantise,
    encode,
    fma32,
    hopper_dot,
    matmul,
    quantise,
)
from tessera.numerics.tiles import BLOCK, COLUMN, TENSOR, VECTOR, Tile
from tests.numerics.oracle import Layout

INF, NAN = math.inf, math.nan


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def row(*values: float, columns: int = 0) -> Tensor:
    return torch.tensor([[*values, *[0.0] * (columns - len(values))]], dtype=torch.float32)


def vector_tiles(
    x: Tensor, format: str = "e4m3", scale_mode: str = "power_of_two", rounding: str = "nearest"
) -> tuple[list[int], list[float], int]:
    """Codes, scales and non-finite count of the first row of x under 1 x 128 tiles."""
    codes, scales, nonfinite = quantise(x, 1, 128, 0, 0, None, format, scale_mode, rounding)
    return codes[0].tolist(), scales[0].tolist(), int(nonfinite)


# Codes


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_decode_agrees_with_torch_float8_on_all_256_codes(format: str) -> None:
    owed = torch.arange(256, dtype=torch.uint8).view(oracle.FLOAT8[format]).double().tolist()
    assert all(same(decode(code, format), value) for code, value in enumerate(owed))


def test_e5m6_is_float16_without_its_last_four_fraction_bits() -> None:
    owed = (np.arange(4096, dtype=np.uint16) << 4).view(np.float16).astype(np.float64).tolist()
    assert all(same(decode(code, "e5m6"), value) for code, value in enumerate(owed))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_encode_agrees_with_torch_float8_at_all_values_midpoints_and_neighbours(format: str) -> None:
    x = oracle.borders(format).flatten()
    owed = x.to(oracle.FLOAT8[format]).view(torch.uint8).tolist()
    assert [encode(v, format) for v in x.tolist()] == owed


def test_encode_to_e5m6_agrees_with_integer_rounding_of_all_float16_bits() -> None:
    halves = np.arange(0x10000, dtype=np.uint32)
    values = halves.astype(np.uint16).view(np.float16).astype(np.float64)
    inside = np.abs(values) <= 65024.0  # NaN and what lies beyond the largest value are left out
    nearest_even = (halves + 7 + (halves >> 4 & 1)) >> 4
    for value, near, cut in zip(values[inside], nearest_even[inside], halves[inside] >> 4, strict=True):
        assert encode(float(value), "e5m6") == near
        assert encode(float(value), "e5m6", "toward_zero") == cut


@pytest.mark.parametrize(
    ("value", "nearest", "toward_zero"),
    [
        (448.0, 0x7E, 0x7E),
        (1000.0, 0x7E, 0x7E),  # the nearest of all values is the largest
        (-464.0, 0xFE, 0xFE),  # where an IEEE-like format would already round to infinity
        (1.0625, 0x38, 0x38),  # tie between 1.0 (0x38) and 1.125 (0x39): even
        (1.1875, 0x3A, 0x39),  # tie between 1.125 (0x39) and 1.25 (0x3A): even
        (-1.1875, 0xBA, 0xB9),
        (1.0625 + 2**-40, 0x39, 0x38),  # nearer than float32 resolves
        (2.0**-10, 0x00, 0x00),  # tie between 0 and the smallest subnormal 2^-9
        (-(2.0**-10), 0x80, 0x80),
        (3 * 2.0**-10, 0x02, 0x01),  # tie between 2^-9 and 2^-8
        (2.0**-6 - 2.0**-10, 0x08, 0x07),  # tie between the largest subnormal and the smallest normal
        (-0.0, 0x80, 0x80),
        (INF, 0x7F, 0x7F),
        (-INF, 0x7F, 0x7F),
        (NAN, 0x7F, 0x7F),
    ],
)
def test_e4m3_codes_worked_out_by_hand(value: float, nearest: int, toward_zero: int) -> None:
    assert encode(value, "e4m3") == nearest
    assert encode(value, "e4m3", "toward_zero") == toward_zero


# Scales


@pytest.mark.parametrize(
    ("amax", "scale", "code"),
    [
        (448.0, 1.0, 0x7E),
        (448.0 + 2.0**-15, 2.0, 0x76),  # float32 after 448: 224.00.. is 1.75 * 2^7, exponent 14, 14 << 3 | 6
        (448.0 - 2.0**-15, 1.0, 0x7E),
        (224.0, 0.5, 0x7E),
        (1.75 * 2.0**-100, 2.0**-108, 0x7E),
        (2.0**-100, 2.0**-108, 0x78),  # 2^8: exponent 15, fraction 0
        (448.0 * 2.0**-126, 2.0**-126, 0x7E),
        (224.0 * 2.0**-126, 2.0**-126, 0x76),  # k = -127 is clamped
        (2.0**-126, 2.0**-126, 0x38),
        (2.0**-135, 2.0**-126, 0x01),  # float32 subnormal to the smallest code
        (2.0**-149, 2.0**-126, 0x00),
        (3e38, 2.0**120, 0x76),  # 3e38 = 1.763 * 2^127: k = 127 - 7; 225.7 is nearer to 224 than to 240
    ],
)
def test_power_of_two_scales_worked_out_by_hand(amax: float, scale: float, code: int) -> None:
    codes, scales, _ = vector_tiles(row(-amax, 0.0, -0.0))
    assert scales == [scale]
    assert codes == [code | 0x80, 0x00, 0x80]


def test_float32_scales_are_two_ieee_divisions_and_one_product() -> None:
    codes, _, _ = vector_tiles(row(1.0), scale_mode="float32")
    _, scales, _ = quantise(row(1.0), 1, 128, 0, 0, None, "e4m3", "float32", "nearest")
    # 1 / 448 = 2^-9 * 1.142857...; 0.142857... * 2^23 = 1198372.57, so the fraction is 1198373 = 0x124925.
    assert scales.view(torch.int32).item() == 0x3B124925
    assert codes == [0x7E]
    # amax = 19: 448 / 19 = 0x1.79435E5.. * 2^4, but fl(1 / fl(19 / 448)) = 0x1.794360 * 2^4, a step above it.
    # x = 57 * 2^-16 divided by 19 / 448 is 21 * 2^-10, a tie of codes 0x0A and 0x0B; the law is above.
    codes, scales, _ = vector_tiles(row(19.0, 57 * 2.0**-16), scale_mode="float32")
    assert scales == [0x15B6DB6 * 2.0**-29]
    assert codes == [0x7E, 0x0B]  # 0x0A if x were divided by the scale, or multiplied with fl(448 / 19)


def test_float32_scales_whose_reciprocal_overflows_fall_back_to_the_power_of_two_rule() -> None:
    # 448 * 2^-127: scale 2^-127, reciprocal 2^127: still finite.
    assert vector_tiles(row(448.0 * 2.0**-127), scale_mode="float32")[:2] == ([0x7E], [2.0**-127])
    # 448 * 2^-128: scale 2^-128, reciprocal 2^128 overflows; k = -128 is clamped to -126, 448 / 4 is 0x6E.
    assert vector_tiles(row(448.0 * 2.0**-128), scale_mode="float32")[:2] == ([0x6E], [2.0**-126])
    # 2^-149: the scale itself is 0, its reciprocal infinite.
    assert vector_tiles(row(2.0**-149), scale_mode="float32")[:2] == ([0x00], [2.0**-126])
    # Tile for tile: the neighbour keeps its float32 scale.
    _, scales, _ = vector_tiles(row(*[2.0**-149] * 128, 448.0 * 3), scale_mode="float32")
    assert scales == [2.0**-126, 3.0]


@pytest.mark.parametrize(
    ("format", "amax", "scale", "code"),
    [
        ("e5m2", 57344.0, 1.0, 0x7B),
        ("e5m2", 1.0, 2.0**-15, 0x78),  # m = 1 <= 1.75: k = 0 - 15; 2^15 is exponent 30
        ("e5m6", 65024.0, 1.0, 0x7BF),
        ("e5m6", 1.984375, 2.0**-15, 0x7BF),
        ("e5m6", 1.99, 2.0**-14, 0x77F),  # m > 1.984375: k = -14; 1.99 * 2^14 -> 1.984375 * 2^14
    ],
)
def test_other_formats_replace_448_by_their_largest_value(format: str, amax: float, scale: float, code: int) -> None:
    codes, scales, _ = quantise(row(amax), 1, 128, 0, 0, None, format, "power_of_two", "nearest")
    assert scales.tolist() == [[scale]]
    assert int.from_bytes(bytes(codes[0].tolist()), "little") == code


@pytest.mark.parametrize("mode", ["power_of_two", "float32"])
def test_nonfinite_elements_are_counted_coded_nan_and_kept_out_of_amax(mode: str) -> None:
    assert vector_tiles(row(NAN, 448.0, INF, -INF, -1.0), scale_mode=mode) == (
        [0x7F, 0x7E, 0x7F, 0x7F, 0xB8],
        [1.0],
        3,
    )
    assert vector_tiles(row(NAN, -INF), scale_mode=mode) == ([0x7F, 0x7F], [1.0], 2)
    assert vector_tiles(row(INF, -0.0), scale_mode=mode) == ([0x7F, 0x80], [1.0], 1)
    assert vector_tiles(row(0.0, -0.0), scale_mode=mode) == ([0x00, 0x80], [1.0], 0)
    packed, _, count = vector_tiles(row(NAN, INF), "e5m6", mode)
    assert (int.from_bytes(bytes(packed), "little"), count) == (0x7FF | 0x7FF << 12, 2)


def test_decoding_is_one_float32_product_and_may_overflow_beside_the_largest_float32() -> None:
    largest = 3.4028234663852886e38  # k = 120; 255.99.. rounds to 256, and 256 * 2^120 is beyond float32
    codes, scales, _ = quantise(row(largest, 2.0**127), 1, 128, 0, 0, None, "e4m3", "power_of_two", "nearest")
    assert dequantise(codes, scales, 1, 128, 0, 0, None, "e4m3", 2).tolist() == [[INF, 2.0**127]]
    third = torch.tensor([[1 / 3]])  # fl(1/3) = 11184811 * 2^-25; times 1.875 = 20971520.6 * 2^-25 -> 20971520
    product = dequantise(torch.tensor([[0x3F]], dtype=torch.uint8), third, 1, 128, 0, 0, None, "e4m3", 1)
    assert product.item() == 20971520 * 2.0**-25


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_quantising_random_rows_agrees_with_torch_casts_of_scaled_values(format: str) -> None:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).exp()
    codes, scales, _ = quantise(x, 1, 128, 0, 0, None, format, "power_of_two", "nearest")
    spread = scales.repeat_interleave(128, dim=1)
    assert torch.equal(codes, (x / spread).to(oracle.FLOAT8[format]).view(torch.uint8))
    relative_amax = x.reshape(6, 2, 128).amax(-1) / scales / torch.finfo(oracle.FLOAT8[format]).max
    assert bool(((relative_amax > 0.5) & (relative_amax <= 1)).all())
    assert bool((torch.frexp(scales).mantissa == 0.5).all())


# Packing and tiles


def test_e5m6_codes_are_packed_two_in_three_bytes_lowest_first() -> None:
    # amax = 2 = 1.0 * 2^1: k = 1 - 15, exponents rise by 14. 1 is 29 << 6 = 0x740, -2 is 0x800 | 30 << 6,
    # 0.5 is 28 << 6 = 0x700. 0x740 | 0xF80 << 12 = 0xF80740; the odd last code is paired with 0.
    codes, scales, _ = quantise(row(1.0, -2.0, 0.5), 1, 128, 0, 0, None, "e5m6", "power_of_two", "nearest")
    assert bytes(codes[0].tolist()).hex() == "4007f8" + "000700"
    assert dequantise(codes, scales, 1, 128, 0, 0, None, "e5m6", 3).tolist() == [[1.0, -2.0, 0.5]]


def test_segments_and_ragged_edges_are_tiles_of_their_own() -> None:
    x = torch.ones(96, 300)
    x[48:] = 2.0  # the second of two matrices of 48 rows
    x[:, 150:] *= 4.0  # and of two of 150 columns: tiles of 128, 22, 128, 22
    x[:, 128:150] *= 64.0
    _, scales, _ = quantise(x, 128, 128, 48, 150, None, "e4m3", "power_of_two", "nearest")
    first = [2.0**-8, 2.0**-2, 2.0**-6, 2.0**-6]
    assert scales.tolist() == [first, [2 * s for s in first]]


def test_groups_restart_tiles_at_the_index_the_rule_gives_and_leave_the_others_at_one() -> None:
    offsets = torch.tensor([0, 0, 1, 128, 130, 259])  # groups of 0, 1, 127, 2 and 129 rows
    x = torch.zeros(259, 1)
    for power, (first, last) in enumerate([(0, 1), (1, 128), (128, 130), (130, 258), (258, 259)]):
        x[first:last] = 2.0**power
    _, scales, _ = quantise(x, 128, 1, 0, 0, offsets, "e4m3", "power_of_two", "nearest")
    # offsets[g] // 128 + g: 0, 1, 2, 4, 5 and 6; 259 // 128 + 5 = 7 rows of scales
    assert scales[:, 0].tolist() == [1.0, 2.0**-8, 2.0**-7, 1.0, 2.0**-6, 2.0**-5, 2.0**-4]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(Tile(0, 0)),
        Layout(Tile(1, 0)),
        Layout(Tile(0, 1)),
        Layout(COLUMN, offsets=torch.tensor([0, 0, 127, 130])),
        Layout(BLOCK, 65, 100),
        Layout(BLOCK, 0, 100, torch.tensor([0, 1, 129, 130])),
    ],
)
@pytest.mark.parametrize("mode", ["power_of_two", "float32"])
def test_decoded_values_lie_within_half_a_step_of_the_input(layout: Layout, mode: str) -> None:
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(2))
    operand = oracle.quantised(x, layout, mode)
    decoded = dequantise(operand.codes, operand.scales, *layout.arguments(), "e4m3", 300)
    assert torch.equal(decoded.double(), operand.decoded().float().double())
    scale = oracle.scale_of_each_element(operand.scales, x.shape, layout)
    bound = torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)
    assert bool(((decoded - x).abs() <= bound).all())


# The fused multiply-add


def test_fma_rounds_once_where_float64_would_round_twice() -> None:
    # 7361 * 9335617 = 2^36 + 1: the exact sum is 1 + 2^-24 + 2^-60, above a tie. In float64 it is the tie.
    a, b = 7361 * 2.0**-36, 9335617 * 2.0**-24
    assert float(np.float32(a * b + 1.0)) == 1.0
    assert fma32(a, b, 1.0) == 1.0 + 2.0**-23
    assert fma32(a, -b, -1.0) == -1.0 - 2.0**-23
    assert fma32(2.0**-12, 2.0**-12, 1.0) == 1.0  # a true tie stays even
    assert fma32(3e38, 2.0, -3e38) == float(np.float32(3e38))  # no overflow in between
    assert fma32(3e38, 2.0, 3e38) == INF
    assert same(fma32(-(2.0**-100), 2.0**-100, 0.0), -0.0)
    assert same(fma32(1.0, -1.0, 1.0), 0.0)
    assert math.isnan(fma32(NAN, 0.0, 1.0)) and fma32(-INF, 1.0, 5.0) == -INF


def test_fma_agrees_with_the_c_library() -> None:
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C mathematics library to compare with")
    fmaf = ctypes.CDLL(name).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    random = np.random.default_rng(3)
    for _ in range(4000):
        a, b = np.ldexp(random.uniform(-2, 2, 2), random.integers(-70, 30, 2)).astype(np.float32).tolist()
        near = random.integers(-26, 27)  # sums of alike and of very different magnitudes, cancelling or not
        c = float(np.float32(-a * b * 2.0**near * (1 + random.integers(0, 2) * random.uniform(-1e-7, 1e-7))))
        assert same(fma32(a, b, c), fmaf(a, b, c)), (a, b, c)


# The tensor core


def dot(*pairs: tuple[float, float], format: str = "e4m3") -> float:
    """hopper_dot of values that E4M3 has."""
    codes = [(encode(a, format), encode(b, format)) for a, b in pairs]
    assert all(decode(c, format) == v for pair, cs in zip(pairs, codes, strict=True)
               for v, c in zip(pair, cs, strict=True))  # fmt: skip
    return hopper_dot([a for a, _ in codes], [b for _, b in codes], format, format)


ONE, ZERO = (1.0, 1.0), (0.0, 0.0)


def test_tensor_core_sums_exactly_what_fits() -> None:
    assert dot(*[ONE] * 32) == 32.0
    assert dot(*[ONE] * 100) == 100.0
    assert dot((1.875, 1.875), (-0.5, 3.0)) == 2.015625
    assert same(dot(ONE, (-1.0, 1.0)), 0.0) and same(dot(), 0.0)


def test_tensor_core_cuts_terms_below_the_thirteenth_fraction_bit_toward_zero() -> None:
    # e_max = 0, so the unit is 2^-13.
    assert dot(ONE, (2.0**-6, 2.0**-7)) == 1 + 2.0**-13
    assert dot(ONE, (2.0**-7, 2.0**-7)) == 1.0  # 2^-14 is cut, not rounded
    assert dot(ONE, (3 * 2.0**-7, 2.0**-7)) == 1 + 2.0**-13  # 1.5 units -> 1, no rounding to 2
    assert dot(ONE, *[(2.0**-7, 2.0**-7)] * 31) == 1.0  # each term is cut before the sum
    assert dot(ONE, (-(2.0**-7), 2.0**-7)) == 1.0  # toward zero: the floor would give 1 - 2^-13
    assert dot(ONE, (-3 * 2.0**-7, 2.0**-7)) == 1 - 2.0**-13
    assert dot((-1.0, 1.0), (3 * 2.0**-7, 2.0**-7)) == -1 + 2.0**-13


def test_tensor_core_takes_the_exponent_of_subnormals_from_the_format() -> None:
    # 2^-9 is subnormal: exponent -6. With 256 (8) the product 2^-1 has exponent 2, the unit is 2^-11.
    assert dot((2.0**-9, 256.0), (2.0**-6, 2.0**-6)) == 0.5
    # The normal 2^-6 with 32 (5) has exponent -1, the unit is 2^-14: the same value keeps its neighbour.
    assert dot((2.0**-6, 32.0), (2.0**-6, 2.0**-6)) == 0.5 + 2.0**-12
    # E5M2's smallest exponent is -14: 2^-16 with 2^15 has exponent 1, the unit is 2^-12.
    assert dot((2.0**-16, 2.0**15), (2.0**-6, 2.0**-6), (2.0**-6, 2.0**-7), format="e5m2") == 0.5 + 2.0**-12


def test_tensor_core_does_not_normalise_products() -> None:
    # 1.75 * 1.75 = 3.0625 has exponent 0: two terms of 2^-13 survive (after normalisation both would be cut).
    assert dot((1.75, 1.75), *[(2.0**-6, 2.0**-7)] * 2) == 3.0625 + 2.0**-12


def test_tensor_core_cuts_the_sum_to_fourteen_bits() -> None:
    # 3.0625 + 2^-13 fits the sum, whose leading bit is 2^1, but not the 13 fraction bits below it.
    assert dot((1.75, 1.75), (2.0**-6, 2.0**-7)) == 3.0625
    assert dot((-1.75, 1.75), (2.0**-6, -(2.0**-7))) == -3.0625
    # 448 * 448 = 3.0625 * 2^16: the unit of the terms is 8, of the result 16.
    assert dot((448.0, 448.0), (1.0, 8.0)) == 200704.0
    assert dot((448.0, 448.0), (1.0, 8.0), (1.0, 8.0)) == 200720.0


def test_zeros_take_no_part_in_the_largest_exponent() -> None:
    tiny = (2.0**-9, 2.0**-9)  # 2^-18
    assert dot((0.0, 448.0), tiny) == 2.0**-18  # as a product of exponent 2, 0 * 448 would cut it away
    assert dot((-0.0, 448.0), tiny) == 2.0**-18
    assert dot(*[ZERO] * 32, tiny) == 2.0**-18  # nor does a zero accumulator
    assert dot(ONE, (-1.0, 1.0), *[ZERO] * 30, tiny) == 2.0**-18  # nor one that cancelled to zero


def test_the_accumulator_is_a_term_of_the_next_instruction() -> None:
    large, eight, padding = (448.0, 448.0), (1.0, 8.0), [ZERO] * 31
    # The accumulator 200704 has exponent 17 (it is normalised), so the unit is 16 and each 8 is cut.
    assert dot(large, *padding, eight, eight) == 200704.0
    assert dot(eight, eight, *padding[1:], large) == 200720.0
    # The other way: an accumulator of 8 + 1 is cut by a large product (unit 8).
    assert dot(eight, ONE, *padding[1:], large, eight) == 200720.0
    assert dot((-1.0, 8.0), (-1.0, 1.0), *padding[1:], large) == 200704.0 - 16  # 200696 has 18 bits: cut to 200688
    # A zero instruction leaves it alone.
    assert dot((1.0, 1.125), *padding, *[ZERO] * 32) == 1.125


def test_nan_codes_give_nan_in_the_tensor_core() -> None:
    assert math.isnan(hopper_dot([0x7F, 0x38], [0x00, 0x38], "e4m3", "e4m3"))
    assert math.isnan(hopper_dot([0x38] * 40, [0x38] * 39 + [0xFF], "e4m3", "e4m3"))


# The three GEMMs


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "segment"),
    [([5], 130, 200, 0), ([4], 96, 70, 48), ([3, 0, 1, 130], 20, 9, 10), ([1], 1, 1, 0)],
)
@pytest.mark.parametrize("mode", ["power_of_two", "float32"])
def test_float32_products_agree_with_float64(
    kind: str, tokens: list[int], n: int, k: int, segment: int, mode: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    problem = oracle.problem_of(
        kind, tokens, n, k, lambda r, c: torch.randn(r, c, generator=generator), None, segment, mode
    )
    result = problem.run(oracle.reference)
    assert result.shape == problem.exact().shape
    assert oracle.relative_norm(result, problem.exact()) < 1e-7


def test_scales_that_vary_inside_a_block_are_decoded_before_the_sum_and_refused_by_the_tensor_core() -> None:
    generator = torch.Generator().manual_seed(5)
    tiles = (VECTOR, Tile(1, 0))  # W in row tiles, contracted over its rows
    problem = oracle.problem_of("dgrad", [3], 150, 4, lambda r, c: torch.randn(r, c, generator=generator), tiles)
    assert oracle.relative_norm(problem.run(oracle.reference), problem.exact()) < 1e-7
    with pytest.raises(ValueError, match="scale varies"):
        oracle.replace(problem, accumulation="hopper").run(oracle.reference)


def test_promotion_starts_each_block_at_zero_and_ends_it_in_float32() -> None:
    # Contraction of 64: 448 * 448, 31 zeros, then 8. One block: the 8 is below the accumulator's unit of 16
    # and lost. Blocks of 32: it starts from zero and is added in float32.
    a = torch.zeros(1, 64)
    a[0, 0], a[0, 32] = 448.0, 1.0
    b = torch.zeros(1, 64)
    b[0, 0], b[0, 32] = 448.0, 8.0

    def product(accumulation: str, interval: int) -> float:
        x, w = (oracle.quantised(m, Layout(TENSOR), "power_of_two") for m in (a, b))
        problem = oracle.Problem("fprop", x, w, 0, None, accumulation, interval)
        return problem.run(oracle.reference).item()

    assert product("hopper", 32) == 200712.0
    assert product("hopper", 64) == 200704.0
    assert product("hopper_unpromoted", 32) == 200704.0
    assert product("float32", 32) == 200712.0


def test_the_order_of_promotion_matters_for_float32_scales_only() -> None:
    generator = torch.Generator().manual_seed(6)
    for mode, agree in (("power_of_two", True), ("float32", False)):
        problem = oracle.problem_of(
            "fprop", [8], 8, 256, lambda r, c: torch.randn(r, c, generator=generator), scale_mode=mode
        )
        law, a_first, b_first = (
            oracle.replace(problem, accumulation="hopper").run(oracle.reference, order=order)
            for order in ("product", "a_first", "b_first")
        )
        assert torch.equal(law, a_first) is agree and torch.equal(law, b_first) is agree
        assert oracle.relative_norm(a_first, law.double()) < 1e-6


def test_a_nan_code_reaches_the_outputs_it_takes_part_in_and_no_others() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = NAN
    w = torch.ones(2, 4)
    for accumulation in ("float32", "hopper"):
        a, b = (oracle.quantised(m, Layout(VECTOR), "power_of_two") for m in (x, w))
        y = oracle.Problem("fprop", a, b, 0, None, accumulation).run(oracle.reference)
        assert y.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_unknown_names_and_shapes_that_do_not_fit_are_refused() -> None:
    x = row(1.0, 2.0)
    for arguments in (
        (1, 128, 0, 0, None, "e3m4", "power_of_two", "nearest"),
        (1, 128, 0, 0, None, "e4m3", "octal", "nearest"),
        (1, 128, 0, 0, None, "e4m3", "float32", "up"),
        (7, 7, 0, 0, None, "e4m3", "float32", "nearest"),
        (128, 1, 0, 0, torch.tensor([0, 2]), "e4m3", "float32", "nearest"),
        (1, 128, 0, 3, None, "e4m3", "float32", "nearest"),
    ):
        with pytest.raises(ValueError):
            quantise(x, *arguments)
    code, scale = torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 1)
    good = ["fprop", code, scale, 1, 128, "e4m3", code, scale, 128, 128, "e4m3", 0, None]
    for kind, accumulation in (("forward", "float32"), ("fprop", "tf32")):
        with pytest.raises(ValueError):
            matmul(kind, *good[1:], accumulation, 128, torch.float32)
