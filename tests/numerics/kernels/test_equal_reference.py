"""Every kernel against the law: bit for bit where the law says so, within its bars elsewhere.

The vectorised kernel, and the native one in each instruction set that this machine can run.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.numerics.oracle as oracle
from tessera.native import instruction_sets
from tessera.numerics.kernels import cpu, reference
from tessera.numerics.kernels import torch as vectorised
from tessera.numerics.kernels.twelve_bits import pack
from tessera.numerics.tiles import BLOCK, COLUMN, ROW, ROW_OF_TRANSPOSED, TENSOR, VECTOR, Tile
from tests.numerics.oracle import (
    FLOAT32_BAR,
    RANDOM_SIGN_BAR,
    SAME_SIGN_BAR,
    Layout,
    Operand,
    Problem,
    assert_matmul_bits,
    assert_matmul_within,
    assert_quantises_as_the_law,
    problem_of,
    relative_norm,
    same_bits,
    with_random_codes,
)

ALL_TILES = [VECTOR, COLUMN, BLOCK, ROW, ROW_OF_TRANSPOSED, TENSOR]
FORMATS, MODES, ROUNDINGS = ["e4m3", "e5m2", "e5m6"], ["power_of_two", "float32"], ["nearest", "toward_zero"]
KINDS = ["fprop", "dgrad", "wgrad"]
FINITE_E4M3 = [code for code in range(256) if code & 0x7F != 0x7F]
SUBNORMAL_HEAVY = [0x00, 0x80, *range(1, 8), *range(0x81, 0x88), 0x08, 0x7E, 0xFE]


@pytest.fixture(params=["torch", *instruction_sets()])
def kernel(request: pytest.FixtureRequest) -> Any:
    return vectorised if request.param == "torch" else cpu.Kernels(request.param)


# The compiled tensor core is held to the reference, in every instruction set, in test_hopper_native.py.
PYTORCH_FORM = pytest.mark.parametrize("kernel", ["torch"], indirect=True)


class Draw:
    """Matrices of one distribution, from one seed."""

    def __init__(self, seed: int, distribution: str = "normal") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.distribution = distribution

    def __call__(self, rows: int, columns: int) -> Tensor:
        if self.distribution == "same_sign":
            return torch.rand(rows, columns, generator=self.generator)
        x = torch.randn(rows, columns, generator=self.generator)
        if self.distribution == "lognormal":
            return x * torch.randn(rows, columns, generator=self.generator).exp()
        return x


# The quantiser


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_right_at_every_value_midpoint_and_neighbour(
    kernel: Any, format: str, mode: str, rounding: str
) -> None:
    x = oracle.borders(format)
    assert_quantises_as_the_law(kernel, x, Layout(VECTOR), format, mode, rounding)
    assert_quantises_as_the_law(kernel, x * 2.0**-110, Layout(VECTOR), format, mode, rounding)
    assert_quantises_as_the_law(kernel, x[:24] * 3.0, Layout(VECTOR), format, mode, rounding)


@pytest.mark.parametrize("exponent", [60, -50, -61, -64, -67, -110, -118])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float32_ties_are_broken_by_their_last_bits_in_every_tile(kernel: Any, format: str, exponent: int) -> None:
    # Powers of two are coded in 16 bits where nothing is lost by it, which ends near tiles of 2^-60.
    x = oracle.borders(format) * 2.0**exponent
    assert_quantises_as_the_law(kernel, x, Layout(VECTOR), format)
    assert_quantises_as_the_law(kernel, x.T.contiguous(), Layout(COLUMN), format)
    assert_quantises_as_the_law(kernel, x, Layout(BLOCK), format)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_scales_and_codes_are_right_where_a_scale_rule_turns(
    kernel: Any, format: str, mode: str, rounding: str
) -> None:
    x = oracle.extremes(format)
    for layout, dtype in itertools.product((Layout(VECTOR), Layout(ROW)), (torch.float32, torch.bfloat16)):
        assert_quantises_as_the_law(kernel, x.to(dtype), layout, format, mode, rounding)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_nonfinite_and_zero_tiles_follow_the_law(kernel: Any, format: str, mode: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(8, 130)
    x[1] = -0.0
    x[2] = nan
    x[3, ::2], x[3, 1::2] = inf, -inf
    x[4, :3] = torch.tensor([nan, -0.0, -inf])
    x[5, 5:9] = torch.tensor([nan, 1e-45, -inf, 3e38])
    x[6] = 2.0**-149
    x[7, 128:] = torch.tensor([-nan, 448.0])
    for tile in ALL_TILES:
        assert_quantises_as_the_law(kernel, x, Layout(tile), format, mode)
        assert_quantises_as_the_law(kernel, x.T.contiguous().bfloat16(), Layout(tile), format, mode)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda t: f"{t.rows}x{t.columns}")
@pytest.mark.parametrize("shape", [(1, 1), (1, 127), (1, 129), (5, 300), (127, 3)], ids=str)
def test_any_small_shape_tile_mode_and_dtype_follows_the_law(
    kernel: Any, shape: tuple[int, int], tile: Tile, format: str
) -> None:
    x = oracle.unruly(*shape, seed=sum(shape))
    for mode, rounding, dtype in itertools.product(MODES, ROUNDINGS, (torch.float32, torch.bfloat16)):
        assert_quantises_as_the_law(kernel, x.to(dtype), Layout(tile), format, mode, rounding)


@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda t: f"{t.rows}x{t.columns}")
@pytest.mark.parametrize("shape", [(128, 128), (129, 257), (130, 131)], ids=str)
def test_ragged_shapes_of_several_tiles_follow_the_law(kernel: Any, shape: tuple[int, int], tile: Tile) -> None:
    x = oracle.unruly(*shape, seed=sum(shape))
    assert_quantises_as_the_law(kernel, x, Layout(tile))
    assert_quantises_as_the_law(kernel, x.bfloat16(), Layout(tile), "e4m3", "float32")
    if shape == (130, 131):
        assert_quantises_as_the_law(kernel, x, Layout(tile), "e5m6")
        assert_quantises_as_the_law(kernel, x.T, Layout(tile), "e5m2", "float32")  # not contiguous


@pytest.mark.parametrize("exponent", [-126, -30, 0, 119])
def test_every_bf16_number_that_a_tile_can_hold_gets_the_code_of_the_law(kernel: Any, exponent: int) -> None:
    bits = torch.arange(0x7F80, dtype=torch.int16)
    amax = torch.tensor(448.0 * 2.0**exponent).bfloat16()
    values = bits.view(torch.bfloat16)
    values = values[values <= amax]
    values = torch.cat([values, -values, values.new_zeros(-2 * len(values) % 127)]).view(-1, 127)
    x = torch.cat([amax.expand(len(values), 1), values], dim=1)
    for format in ("e4m3", "e5m6"):
        assert_quantises_as_the_law(kernel, x, Layout(VECTOR), format)
    assert_quantises_as_the_law(kernel, x[::3], Layout(VECTOR), "e4m3", "float32")
    assert_quantises_as_the_law(kernel, x[::3], Layout(VECTOR), "e4m3", "power_of_two", "toward_zero")


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_decoded_exactly_under_any_scale(kernel: Any, format: str) -> None:
    powers = [-149, -133, -127, -126, -50, -1, 0, 1, 6, 7, 8, 14, 15, 16, 100, 119, 127]
    scales = torch.tensor([2.0**k for k in powers] + [1 / 3, 3.4e38, 1.1754942e-38])[:, None]
    if format == "e5m6":
        codes = torch.arange(4096, dtype=torch.int16).view(1, -1)
        codes = pack(codes)
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    columns = 4096 if format == "e5m6" else 256
    for some in (scales, scales[:9], scales[9:]):  # largest scales alone and beside small ones
        arguments = (codes.expand(len(some), -1).contiguous(), some, 1, 0, 0, 0, None, format, columns)
        assert same_bits(kernel.dequantise(*arguments), reference.dequantise(*arguments))


LAYOUTS = {
    "two matrices of 48 rows": ((96, 130), Layout(BLOCK, 48)),
    "three matrices of 130 rows": ((390, 5), Layout(COLUMN, 130)),
    "two matrices of 192 columns": ((3, 384), Layout(VECTOR, 0, 192)),
    "two by two of 96 by 150": ((192, 300), Layout(BLOCK, 96, 150)),
    "groups in columns": ((512, 3), Layout(COLUMN, offsets=torch.tensor([0, 0, 1, 128, 256, 385, 512]))),
    "groups in blocks": ((130, 384), Layout(BLOCK, 0, 192, torch.tensor([0, 127, 127, 128, 130]))),
    "groups of one row": ((3, 4), Layout(COLUMN, offsets=torch.tensor([0, 1, 2, 3]))),
    "two matrices of one scale": ((96, 130), Layout(TENSOR, 48)),
    "two by three of one scale": ((96, 150), Layout(TENSOR, 48, 50)),
    "rows of two matrices side by side": ((5, 300), Layout(ROW, 0, 150)),
    "columns of two matrices, one below the other": ((300, 5), Layout(ROW_OF_TRANSPOSED, 150)),
    "groups do not matter": ((6, 200), Layout(VECTOR, offsets=torch.tensor([0, 2, 6]))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_and_groups_follow_the_law(kernel: Any, name: str, mode: str) -> None:
    shape, layout = LAYOUTS[name]
    x = oracle.unruly(*shape, seed=11)
    # Rows differ in magnitude, so a tile that reaches into its neighbour gets another scale.
    x = x * 3.0 ** (torch.arange(shape[0]) % 7)[:, None]
    assert_quantises_as_the_law(kernel, x, layout, "e4m3", mode)
    assert_quantises_as_the_law(kernel, x.bfloat16(), layout, "e5m6" if shape[1] < 10 else "e5m2", mode)


@pytest.mark.parametrize("columns", [14, 30, 34, 258, 300])
def test_codes_of_12_bits_follow_the_law_where_tiles_begin_inside_a_pair(kernel: Any, columns: int) -> None:
    x = oracle.unruly(5, columns, seed=columns)
    layout = Layout(VECTOR, 0, columns // 2)
    assert_quantises_as_the_law(kernel, x, layout, "e5m6")
    codes, scales, _ = kernel.quantise(x, *layout.arguments(), "e5m6", "power_of_two", "nearest")
    arguments = (codes, scales, *layout.arguments(), "e5m6", columns)
    assert same_bits(kernel.dequantise(*arguments), reference.dequantise(*arguments))


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_without_rows_is_quantised_to_no_codes(kernel: Any, format: str) -> None:
    for layout in (
        Layout(COLUMN, offsets=torch.tensor([0, 0, 0])),
        Layout(VECTOR),
        Layout(BLOCK),
        Layout(TENSOR),
    ):
        assert_quantises_as_the_law(kernel, torch.zeros(0, 5), layout, format)


# `hopper`: bit for bit

SHAPES = {
    "one": ([1], 1, 1, 0),
    "ragged": ([3], 7, 127, 0),
    "tails": ([2], 130, 129, 0),
    "several blocks": ([4], 3, 385, 0),
    "segments of 96": ([3], 192, 70, 96),
    "segments of 150": ([2], 300, 40, 150),
    "groups": ([3, 0, 1, 2], 96, 40, 48),
    "long groups": ([0, 127, 1, 129, 128], 4, 3, 2),
}


@PYTORCH_FORM
@pytest.mark.parametrize("interval", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_core_products_of_quantised_data_are_bit_equal(
    kernel: Any, shape: str, kind: str, interval: int
) -> None:
    tokens, n, k, segment = SHAPES[shape]
    for mode, distribution in zip(MODES, ["lognormal", "same_sign"], strict=True):
        draw = Draw(interval, distribution)
        problem = problem_of(kind, tokens, n, k, draw, segment=segment, scale_mode=mode, kernel=kernel)
        assert_matmul_bits(kernel, replace(problem, accumulation="hopper", interval=interval))


@PYTORCH_FORM
@pytest.mark.parametrize("scales", ["powers", "floats", "tiny"])
@pytest.mark.parametrize("codes", [FINITE_E4M3, SUBNORMAL_HEAVY, list(range(256))], ids=["all", "small", "nan"])
def test_tensor_core_products_of_random_codes_are_bit_equal(kernel: Any, codes: list[int], scales: str) -> None:
    generator = torch.Generator().manual_seed(12)
    for kind, tokens in itertools.product(KINDS, ([5], [3, 2, 129])):
        problem = problem_of(kind, tokens, 66, 9, Draw(0), kernel=kernel)
        for accumulation in ("hopper", "float32") if codes == SUBNORMAL_HEAVY else ("hopper",):
            drawn = with_random_codes(problem, generator, codes, scales)
            drawn = replace(drawn, accumulation=accumulation, interval=64)
            if accumulation == "hopper":
                assert_matmul_bits(kernel, drawn)
            elif scales != "tiny":
                assert_matmul_within(kernel, drawn, FLOAT32_BAR)


@PYTORCH_FORM
@pytest.mark.parametrize("formats", [("e5m2", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e5m2")], ids=str)
def test_tensor_core_products_with_e5m2_operands_are_bit_equal(kernel: Any, formats: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(13)
    finite = [code for code in range(256) if code & 0x7F < 0x7C]
    for kind in KINDS:
        problem = problem_of(kind, [20], 20, 20, Draw(1, "lognormal"), formats=formats, kernel=kernel)
        assert_matmul_bits(kernel, replace(problem, accumulation="hopper"))
        pool = [c for c in finite if c in FINITE_E4M3]
        assert_matmul_bits(
            kernel, replace(with_random_codes(problem, generator, pool, "floats"), accumulation="hopper")
        )


WHOLE_TILES = [
    ("fprop", ROW, ROW),
    ("fprop", ROW, TENSOR),
    ("fprop", TENSOR, TENSOR),
    ("dgrad", ROW, TENSOR),
    ("dgrad", TENSOR, TENSOR),
    ("dgrad", ROW, ROW_OF_TRANSPOSED),
    ("wgrad", ROW_OF_TRANSPOSED, ROW_OF_TRANSPOSED),
    ("wgrad", TENSOR, TENSOR),
]


@PYTORCH_FORM
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "a", "b"), WHOLE_TILES, ids=str)
def test_scales_constant_along_the_contraction_take_any_interval(
    kernel: Any, kind: str, a: Tile, b: Tile, mode: str
) -> None:
    tokens, n, k = {"fprop": ([3], 4, 600), "dgrad": ([3], 600, 4), "wgrad": ([1, 0, 600], 3, 4)}[kind]
    problem = problem_of(kind, tokens, n, k, Draw(2, "same_sign"), (a, b), scale_mode=mode, kernel=kernel)
    for interval in (32, 128, 256):
        assert_matmul_bits(kernel, replace(problem, accumulation="hopper", interval=interval))
    assert_matmul_bits(kernel, replace(problem, accumulation="hopper_unpromoted"))
    assert_matmul_within(kernel, problem, FLOAT32_BAR)


@PYTORCH_FORM
def test_promotion_rounds_once_even_where_float64_would_round_twice(kernel: Any) -> None:
    # Block 1 gives y = 1. Block 2 gives p = 7361 = 16 * 448 + 192 + 1 with the scale 9335617 * 2^-60, and
    # 7361 * 9335617 = 2^36 + 1: the exact sum is 1 + 2^-24 + 2^-60, which rounds up.
    a, b = torch.zeros(1, 256), torch.ones(1, 256)
    a[0, 0], a[0, 128:130], b[0, 130] = 1.0, torch.tensor([448.0, 192.0]), 1.0
    a[0, 130], b[0, 128] = 1.0, 16.0
    codes = [m.to(torch.float8_e4m3fn).view(torch.uint8) for m in (a, b)]
    scales = [torch.tensor([[1.0, 9335617 * 2.0**-24]]), torch.tensor([[1.0, 2.0**-36]])]
    operands = [Operand(c, s, Layout(VECTOR)) for c, s in zip(codes, scales, strict=True)]
    operands[1] = replace(operands[1], layout=Layout(BLOCK))
    problem = Problem("fprop", *operands, accumulation="hopper")
    assert problem.run(reference).item() == 1 + 2.0**-23
    assert_matmul_bits(kernel, problem)
    assert problem.run(kernel).item() == 1 + 2.0**-23


@PYTORCH_FORM
@pytest.mark.parametrize(
    "exponents", [(-67, -70, -74, -90), (40, 50), (52, 54, 58)], ids=["subnormal", "large", "overflowing"]
)
def test_tensor_core_products_at_the_ends_of_float32_are_bit_equal(kernel: Any, exponents: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(14)
    problem = problem_of("fprop", [9], 9, 256, Draw(3), kernel=kernel)
    for exponent in exponents:
        drawn = with_random_codes(problem, generator, FINITE_E4M3, "floats")
        a, b = (replace(o, scales=o.scales * 2.0**exponent) for o in (drawn.a, drawn.b))
        assert_matmul_bits(kernel, replace(drawn, a=a, b=b, accumulation="hopper"))


@PYTORCH_FORM
def test_every_segment_of_dgrad_is_an_unpromoted_sum_of_its_own(kernel: Any) -> None:
    problem = problem_of("dgrad", [3], 192, 5, Draw(19, "same_sign"), (TENSOR, TENSOR), 96, kernel=kernel)
    assert_matmul_bits(kernel, replace(problem, accumulation="hopper", interval=256))
    assert_matmul_bits(kernel, replace(problem, accumulation="hopper_unpromoted"))


@PYTORCH_FORM
def test_a_scale_that_varies_inside_a_block_is_refused_by_the_tensor_core(kernel: Any) -> None:
    problem = problem_of("dgrad", [3], 150, 4, Draw(4), (VECTOR, ROW), kernel=kernel)
    for accumulation in ("hopper", "hopper_unpromoted"):
        with pytest.raises(ValueError):
            replace(problem, accumulation=accumulation).run(kernel)
    unpromoted = replace(problem_of("fprop", [3], 4, 300, Draw(4), kernel=kernel), accumulation="hopper_unpromoted")
    with pytest.raises(ValueError):
        unpromoted.run(kernel)


# `float32` and the bars


@pytest.mark.parametrize("distribution", ["normal", "lognormal", "same_sign"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_accumulation_stays_within_its_bar(kernel: Any, kind: str, mode: str, distribution: str) -> None:
    draw = Draw(5, distribution)
    long = {"fprop": ([33], 40, 4096), "dgrad": ([33], 4096, 40), "wgrad": ([4096], 33, 40)}[kind]
    shapes = [(*long, 0), ([7], 96, 704, 48), ([5, 0, 1, 130], 192, 129, 96), ([64, 200, 1], 130, 33, 0)]
    for tokens, n, k, segment in shapes:
        problem = problem_of(kind, tokens, n, k, draw, segment=segment, scale_mode=mode, kernel=kernel)
        assert_matmul_within(kernel, problem, FLOAT32_BAR)


@pytest.mark.parametrize(
    ("tokens", "n", "segment"),
    [([150], 192, 0), ([150], 192, 96), ([3, 0, 129], 128, 0), ([3, 0, 129], 192, 96)],
    ids=["plain", "segments", "groups", "groups of segments"],
)
@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_gradients_in_128_x_128_tiles_are_multiplied_with_their_own_scales(
    kernel: Any, kind: str, tokens: list[int], n: int, segment: int
) -> None:
    tiles = (BLOCK, BLOCK if kind == "dgrad" else COLUMN)

    def draw(rows: int, columns: int) -> Tensor:
        # Neighbouring tiles, segments and groups differ in magnitude.
        return Draw(6)(rows, columns) * 1.02 ** (torch.arange(rows)[:, None] + torch.arange(columns))

    problem = problem_of(kind, tokens, n, 8, draw, tiles, segment, kernel=kernel)
    assert_matmul_within(kernel, problem, FLOAT32_BAR)
    few = [count % 7 for count in tokens]
    problem = problem_of(kind, few, n, 3, draw, tiles, segment, kernel=kernel)
    assert_matmul_bits(kernel, replace(problem, accumulation="hopper"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_accumulation_survives_operands_of_extreme_magnitude(kernel: Any, kind: str, mode: str) -> None:
    # Decoded values of the small operand are subnormal in float32 and BF16; the codes, and the product of the
    # scales, are ordinary numbers.
    for small, large in ((2.0**-125, 2.0**100), (2.0**-60, 2.0**60)):
        magnitudes = iter([small, large])
        problem = problem_of(
            kind,
            [70],
            66,
            130,
            lambda r, c, m=magnitudes: Draw(21)(r, c) * next(m),
            scale_mode=mode,
            kernel=kernel,
        )
        assert_matmul_within(kernel, problem, FLOAT32_BAR)
        if kind != "wgrad":
            problem = replace(problem, out_dtype=torch.bfloat16)
            assert_matmul_within(kernel, problem, 2.0**-9)  # half a BF16 step, at most 2^-8 of an element


def test_float32_accumulation_takes_scales_that_vary_inside_a_block(kernel: Any) -> None:
    for mode in MODES:
        problem = problem_of("dgrad", [5], 300, 40, Draw(7), (VECTOR, ROW), scale_mode=mode, kernel=kernel)
        assert_matmul_within(kernel, problem, FLOAT32_BAR)
        problem = problem_of("dgrad", [2, 3], 96, 40, Draw(7), (ROW, ROW), scale_mode=mode, kernel=kernel)
        assert_matmul_within(kernel, problem, FLOAT32_BAR)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_bf16_output_is_rounded_once(kernel: Any, kind: str, mode: str) -> None:
    for tokens, n, k in (([9, 40], 96, 130), ([70], 704, 704)):
        problem = problem_of(kind, tokens, n, k, Draw(8), scale_mode=mode, kernel=kernel)
        problem = replace(problem, out_dtype=torch.bfloat16)
        result, exact = problem.run(kernel), problem.exact()
        assert result.dtype == torch.bfloat16
        # Sums of magnitudes bound the float32 error of a sum: 3e-7 of them is 5 float32 roundings.
        magnitudes = replace(problem, a=magnitude(problem.a), b=magnitude(problem.b)).exact()
        # Rounding is monotonic: one rounding of a value within the error lies between those of its ends.
        low, high = ((exact + sign * 3e-7 * magnitudes).float().bfloat16() for sign in (-1, 1))
        assert bool(((low <= result) & (result <= high)).all())
        assert float((low == high).double().mean()) > 0.98  # elsewhere the sum lies at a tie
        problem = replace(problem_of(kind, [9], 9, 130, Draw(8), kernel=kernel), accumulation="hopper")
        rounded = replace(problem, out_dtype=torch.bfloat16).run(kernel)
        assert same_bits(rounded, problem.run(kernel).bfloat16())


def magnitude(operand: Operand) -> Operand:
    return replace(operand, codes=operand.codes & 0x7F)


@pytest.mark.parametrize("accumulation", ["float32", "hopper"])
def test_a_nan_code_reaches_only_the_outputs_it_takes_part_in(kernel: Any, accumulation: str) -> None:
    problem = problem_of("fprop", [5], 6, 200, Draw(9), kernel=kernel)
    problem = replace(problem, accumulation=accumulation)
    problem.a.codes[3, 150] = 0x7F
    problem.b.codes[2, 7] = 0xFF
    owed = torch.zeros(5, 6, dtype=torch.bool)
    owed[3], owed[:, 2] = True, True
    assert torch.equal(problem.run(kernel).isnan(), owed)


@PYTORCH_FORM
@pytest.mark.parametrize("k", [512, 4096, 16384])
def test_promoted_tensor_core_stays_within_bars_that_do_not_grow_with_k(kernel: Any, k: int) -> None:
    for tiles, mode in (((VECTOR, BLOCK), "power_of_two"), ((TENSOR, TENSOR), "float32")):
        for distribution, bar in (("normal", RANDOM_SIGN_BAR), ("same_sign", SAME_SIGN_BAR)):
            problem = problem_of("fprop", [12], 12, k, Draw(k, distribution), tiles, 0, mode, kernel=kernel)
            assert_matmul_within(kernel, replace(problem, accumulation="hopper"), bar)


@PYTORCH_FORM
def test_without_promotion_the_error_is_the_few_percent_the_report_saw(kernel: Any) -> None:
    # Report, section 3.3.2: "nearly 2 %" at K = 4096; largest error over mean magnitude, on random signs.
    problem = problem_of("fprop", [48], 48, 4096, Draw(10), (TENSOR, TENSOR), kernel=kernel)
    exact = problem.exact()

    def worst(accumulation: str) -> float:
        result = replace(problem, accumulation=accumulation).run(kernel)
        return float((result - exact).abs().max() / exact.abs().mean())

    assert 0.008 < worst("hopper_unpromoted") < 0.025
    assert worst("hopper") < 0.0015
    same_sign = problem_of("fprop", [12], 12, 4096, Draw(10, "same_sign"), (TENSOR, TENSOR), kernel=kernel)
    result = replace(same_sign, accumulation="hopper_unpromoted").run(kernel)
    assert 0.05 < relative_norm(result, same_sign.exact()) < 0.1


# Row invariance

ROWS = [1, 2, 3, 16, 64, 200, 2048]


def rows_of(problem: Problem, rows: slice) -> Problem:
    a = problem.a
    return replace(problem, a=replace(a, codes=a.codes[rows], scales=a.scales[rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(96, 128), (128, 96), (33, 704), (704, 130)], ids=str)
@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_a_row_does_not_depend_on_how_many_rows_it_shares(
    kernel: Any, kind: str, n: int, k: int, dtype: torch.dtype
) -> None:
    problem = problem_of(kind, [ROWS[-1]], n, k, Draw(15), scale_mode="float32", kernel=kernel)
    problem = replace(problem, out_dtype=dtype)
    whole = problem.run(kernel)
    for rows in ROWS:
        assert torch.equal(rows_of(problem, slice(0, rows)).run(kernel), whole[:rows]), f"{rows} first rows"
        last = slice(ROWS[-1] - rows, ROWS[-1])
        assert torch.equal(rows_of(problem, last).run(kernel), whole[last]), f"{rows} last rows"


@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_a_row_of_a_single_output_does_not_depend_on_how_many_rows_it_shares(kernel: Any, kind: str) -> None:
    n, k = (1, 130) if kind == "fprop" else (130, 1)
    problem = problem_of(kind, [300], n, k, Draw(20), scale_mode="float32", kernel=kernel)
    whole = problem.run(kernel)
    for rows in (1, 2, 64, 65, 95, 127, 200, 257):
        assert torch.equal(rows_of(problem, slice(0, rows)).run(kernel), whole[:rows]), f"{rows} first rows"


@PYTORCH_FORM
@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_a_row_of_a_tensor_core_product_does_not_depend_on_the_others(kernel: Any, kind: str) -> None:
    problem = problem_of(kind, [70], 9, 200, Draw(16), kernel=kernel)
    problem = replace(problem, accumulation="hopper")
    whole = problem.run(kernel)
    for rows in (1, 2, 3, 16, 64):
        assert torch.equal(rows_of(problem, slice(0, rows)).run(kernel), whole[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_depend_on_each_other_or_on_their_order(kernel: Any, kind: str, dtype: torch.dtype) -> None:
    sizes, n, k = [3, 0, 200, 1, 64, 70, 16], 96, 130
    a = Draw(17)(sum(sizes), k if kind == "fprop" else n).split(sizes)
    b = Draw(18)(sum(sizes), k).split(sizes) if kind == "wgrad" else Draw(18)(len(sizes) * n, k).split(n)

    def results(order: list[int]) -> list[Tensor]:
        """Results of the groups `order`, laid out and multiplied in this order."""
        operands = iter([torch.cat([a[g] for g in order]), torch.cat([b[g] for g in order])])
        taken = [sizes[g] for g in order]
        problem = problem_of(kind, taken, n, k, lambda r, c: next(operands), scale_mode="float32", kernel=kernel)
        result = replace(problem, out_dtype=dtype).run(kernel)
        return list(result.split([n] * len(order) if kind == "wgrad" else taken))

    together = results(list(range(len(sizes))))
    for order in ([5, 2, 0, 6, 1, 4, 3], [6, 5, 4, 3, 2, 1, 0], [0, 6], *([g] for g in range(len(sizes)))):
        for g, result in zip(order, results(order), strict=True):
            assert torch.equal(result, together[g]), f"group {g} in {order}"
