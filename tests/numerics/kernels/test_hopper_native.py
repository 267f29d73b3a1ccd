"""The compiled tensor-core model against the scalar oracle, bit for bit, in every instruction set of this machine."""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tessera import native
from tessera.numerics.kernels import cpu, reference
from tessera.numerics.kernels import torch as kernel
from tessera.numerics.tiles import BLOCK, COLUMN, ROW, TENSOR, VECTOR, Tile, scale_shape
from tests.numerics.oracle import Layout, Operand, Problem, differences, same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason=native.problem())

SETS = [name for name in native.instruction_sets() if name in ("avx512", "avx2", "portable")]
KINDS = ["fprop", "dgrad", "wgrad"]
FORMATS = list(itertools.product(["e4m3", "e5m2"], repeat=2))
FINITE = {"e4m3": [c for c in range(256) if c & 0x7F < 0x7F], "e5m2": [c for c in range(256) if c & 0x7F < 0x7C]}
SUBNORMALS = {"e4m3": [c for c in range(256) if c & 0x7F < 8], "e5m2": [c for c in range(256) if c & 0x7F < 4]}


class Draw:
    """Codes and scales from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, rows: int, columns: int, pool: list[int]) -> Tensor:
        index = torch.randint(len(pool), (rows, columns), generator=self.generator)
        return torch.tensor(pool, dtype=torch.uint8)[index]

    def scales(self, shape: tuple[int, int], exponents: tuple[int, int]) -> Tensor:
        powers = torch.randint(*exponents, shape, generator=self.generator)
        return torch.ldexp(1 + torch.rand(shape, generator=self.generator), powers)


def problem_of(
    kind: str,
    groups: list[int],
    n: int,
    k: int,
    draw: Draw,
    pools: tuple[list[int], list[int]] | None = None,
    formats: tuple[str, str] = ("e4m3", "e4m3"),
    tiles: tuple[Tile, Tile] = (TENSOR, TENSOR),
    segment: int = 0,
    exponents: tuple[int, int] = (-6, 7),
) -> Problem:
    """The GEMM `kind` of random codes; `groups`: rows of each group. Codes of `pools`, by default any number."""
    offsets = torch.tensor([0, *itertools.accumulate(groups)]) if len(groups) > 1 else None
    segment = segment or (n if offsets is not None else 0)
    tokens, wgrad = sum(groups), kind == "wgrad"
    pools = pools or (FINITE[formats[0]], FINITE[formats[1]])
    layouts = (
        Layout(tiles[0], 0, 0 if kind == "fprop" else segment, offsets),
        Layout(tiles[1], 0 if wgrad else segment, 0, offsets if wgrad else None),
    )
    shapes = ((tokens, k if kind == "fprop" else n), (tokens if wgrad else len(groups) * n, k))
    operands = []
    for (rows, columns), pool, format, layout in zip(shapes, pools, formats, layouts, strict=True):
        count = 0 if layout.offsets is None else len(groups)
        shape = scale_shape(rows, columns, layout.tile, layout.row_segment, layout.column_segment, count)
        operands.append(
            Operand(draw.codes(rows, columns, pool), draw.scales(shape, exponents), layout, format),
        )
    return Problem(kind, *operands, segment, offsets, "hopper")


def assert_equal_in_every_set(problem: Problem, owed: Tensor | None = None) -> None:
    owed = problem.run(reference) if owed is None else owed
    for isa in SETS:
        result = kernel_of(problem, isa)
        assert same_bits(result, owed), f"{isa}, {problem.kind}: {differences(result, owed)}"


def kernel_of(problem: Problem, isa: str | None) -> Tensor:
    return problem.run(kernel, isa=isa)


def accumulations(problem: Problem) -> list[Problem]:
    promoted = [replace(problem, interval=interval) for interval in (32, 64, 128, 256)]
    return [*promoted, replace(problem, accumulation="hopper_unpromoted")]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 127, 128, 129, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_any_length_and_promotion_interval_is_bit_equal(kind: str, length: int) -> None:
    tokens, n, k = {"fprop": (5, 3, length), "dgrad": (5, length, 3), "wgrad": (length, 5, 3)}[kind]
    for problem in accumulations(problem_of(kind, [tokens], n, k, Draw(length))):
        assert_equal_in_every_set(problem)
    tiles = (COLUMN, COLUMN) if kind == "wgrad" else (VECTOR, BLOCK)
    for interval in (64, 128):
        problem = problem_of(kind, [tokens], n, k, Draw(length + 1), tiles=tiles)
        assert_equal_in_every_set(replace(problem, interval=interval))


@pytest.mark.parametrize("formats", FORMATS, ids="x".join)
@pytest.mark.parametrize("kind", KINDS)
def test_formats_subnormals_and_zeros_are_bit_equal(kind: str, formats: tuple[str, str]) -> None:
    a, b = formats
    zeros = [0x00, 0x80]
    mostly_zero = [*zeros * 20, 0x01, 0x81, 0x3A, 0xBB]
    pools = [
        (FINITE[a], FINITE[b]),
        (SUBNORMALS[a], SUBNORMALS[b]),
        (SUBNORMALS[a] + [0x7B, 0xFB], SUBNORMALS[b] + [0x7A]),
        (zeros, FINITE[b]),
        (zeros, zeros),
        (mostly_zero, mostly_zero),
    ]
    for i, both in enumerate(pools):
        sizes = {"fprop": ([6], 7, 40), "dgrad": ([6], 40, 7), "wgrad": ([40], 6, 7)}[kind]
        problem = problem_of(kind, *sizes, Draw(i), both, formats)
        assert_equal_in_every_set(replace(problem, interval=64))


@pytest.mark.parametrize("formats", FORMATS, ids="x".join)
def test_codes_that_are_no_numbers_make_nan_of_what_they_take_part_in(formats: tuple[str, str]) -> None:
    draw = Draw(1)
    for kind in KINDS:
        tokens, n, k = {"fprop": (9, 70, 100), "dgrad": (9, 100, 70), "wgrad": (100, 9, 70)}[kind]
        problem = problem_of(kind, [tokens], n, k, draw, formats=formats)
        for operand, (row, column) in ((problem.a, (3, 5)), (problem.b, (7, 2))):
            not_numbers = [c for c in range(256) if c not in FINITE[operand.format]]
            for i, code in enumerate(not_numbers):
                operand.codes[row, (column + i) % 9] = code
        assert_equal_in_every_set(problem)
    assert bool(problem.run(reference).isnan().any()) and not bool(problem.run(reference).isnan().all())


@pytest.mark.parametrize("segment", [0, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_any_size_are_bit_equal(kind: str, segment: int) -> None:
    for groups in ([3, 0, 1, 2], [0, 0, 5], [1], [2, 129, 0]):
        n, k = (96, 9) if kind == "dgrad" else (48, 35)
        tiles = (COLUMN, COLUMN) if kind == "wgrad" else (VECTOR, BLOCK)
        assert_equal_in_every_set(problem_of(kind, groups, n, k, Draw(2), tiles=tiles, segment=segment))
    nothing = kernel_of(problem_of(kind, [0], 4, 5, Draw(3)), SETS[0])
    assert torch.equal(nothing, {"fprop": torch.zeros(0, 4), "dgrad": torch.zeros(0, 5)}.get(kind, torch.zeros(4, 5)))


@pytest.mark.parametrize(
    "exponents", [(-126, -125), (100, 101), (60, 64), (-75, -60), (-149, -140)], ids=lambda e: f"2^{e[0]}"
)
def test_scales_at_the_ends_of_float32_are_bit_equal(exponents: tuple[int, int]) -> None:
    for kind in KINDS:
        problem = problem_of(kind, [9], 9, 9, Draw(4), exponents=exponents)
        assert_equal_in_every_set(problem)
        mixed = replace(problem.b, scales=torch.full_like(problem.b.scales, 2.0**100))
        assert_equal_in_every_set(replace(problem, b=mixed))
        zeros = replace(problem.a, codes=problem.a.codes & 0x80)  # infinity times zero
        assert_equal_in_every_set(replace(problem, a=zeros))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 64), (5, 65), (127, 15), (130, 129), (257, 200)], ids=str)
def test_whole_and_ragged_blocks_of_rows_and_columns_equal_the_pytorch_form(rows: int, columns: int) -> None:
    for formats, interval in zip(FORMATS, (32, 64, 128, 256), strict=True):
        problem = problem_of("fprop", [rows], columns, 300, Draw(rows), formats=formats, tiles=(ROW, ROW))
        problem = replace(problem, interval=interval)
        assert_equal_in_every_set(problem, kernel_of(problem, None))


def test_every_pair_of_codes_meets_every_kind_of_accumulator() -> None:
    # One product beside a larger one of either sign, so that each is cut at every place, and an accumulator before.
    for a_format, b_format in FORMATS:
        a_codes = torch.tensor(FINITE[a_format], dtype=torch.uint8)
        b_codes = torch.tensor(FINITE[b_format], dtype=torch.uint8)
        for larger in (0x30, 0xB4, 0x7A, 0xFA, 0x08):
            a, b = torch.zeros(len(a_codes), 34, dtype=torch.uint8), torch.zeros(len(b_codes), 34, dtype=torch.uint8)
            a[:, 0], b[:, 0] = a_codes.roll(5), b_codes.roll(9)
            a[:, 32], b[:, 32] = a_codes, b_codes
            a[:, 33], b[:, 33] = larger, 0x34
            one = torch.ones(1, 1)
            operands = [Operand(codes, one, Layout(TENSOR), f) for codes, f in ((a, a_format), (b, b_format))]
            problem = Problem("fprop", *operands, accumulation="hopper")
            assert_equal_in_every_set(problem, kernel_of(problem, None))


def test_changing_the_sign_of_an_operand_changes_that_of_the_result() -> None:
    problem = problem_of("fprop", [33], 65, 900, Draw(5))
    negated = replace(problem.a, codes=problem.a.codes ^ 0x80)
    for one in accumulations(problem):
        for isa in SETS:
            assert torch.equal(kernel_of(replace(one, a=negated), isa), -kernel_of(one, isa))


def test_a_long_unpromoted_sum_of_one_sign_is_bit_equal() -> None:
    for sign in (0x00, 0x80):
        pools = ([c | sign for c in range(0x60, 0x7F)], list(range(0x7F)))
        problem = problem_of("fprop", [6], 20, 16384, Draw(6), pools)
        problem = replace(problem, accumulation="hopper_unpromoted")
        assert_equal_in_every_set(problem, kernel_of(problem, None))


def test_zeros_add_nothing_to_the_largest_accumulator_there_is() -> None:
    # 2^45, where products of the largest E5M2 numbers are cut to nothing; then zero times the smallest, below zero.
    for zero, smallest in ((0x00, 0x81), (0x80, 0x01)):
        a = torch.tensor([[0x7B] * 16384 + [zero] * 64], dtype=torch.uint8)
        b = torch.tensor([[0x7B] * 16384 + [smallest] * 64], dtype=torch.uint8)
        operands = [Operand(codes, torch.ones(1, 1), Layout(TENSOR), "e5m2") for codes in (a, b)]
        problem = Problem("fprop", *operands, accumulation="hopper_unpromoted")
        assert 2.0**45 <= problem.run(reference).item() < 2.0**46
        assert_equal_in_every_set(problem)
        assert_equal_in_every_set(replace(problem, a=operands[1], b=operands[0]))


def test_strides_and_storage_offsets_do_not_matter() -> None:
    for kind in KINDS:
        problem = problem_of(kind, [37], 41, 70, Draw(7))
        for change in (
            lambda x: x.t().contiguous().t(),
            lambda x: torch.cat([x[:, :3], x, x[:, :2]], dim=1)[:, 3:-2],
            lambda x: torch.stack([x, x], dim=2)[:, :, 1],
            lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
        ):
            a, b = (replace(o, codes=change(o.codes)) for o in (problem.a, problem.b))
            assert_equal_in_every_set(replace(problem, a=a, b=b), kernel_of(problem, None))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_other_rows_do_not_matter(kind: str) -> None:
    problem = problem_of(kind, [70, 0, 131], 140, 66, Draw(8))
    threads = torch.get_num_threads()
    for isa in SETS:
        owed = kernel_of(problem, isa)
        try:
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert torch.equal(kernel_of(problem, isa), owed)
        finally:
            torch.set_num_threads(threads)
    if kind != "wgrad":
        problem = problem_of(kind, [140], 140, 66, Draw(9))
        for isa, (first, last) in itertools.product(SETS, [(0, 1), (1, 3), (3, 8), (60, 140), (139, 140)]):
            part = replace(problem, a=replace(problem.a, codes=problem.a.codes[first:last]))
            assert torch.equal(kernel_of(part, isa), kernel_of(problem, isa)[first:last])


def test_the_native_backend_takes_the_compiled_kernel_and_the_torch_backend_its_own_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = problem_of("fprop", [5], 6, 70, Draw(10))
    owed = kernel_of(problem, None)
    with monkeypatch.context() as without:
        without.delattr(kernel, "native_hopper")
        assert torch.equal(problem.run(kernel), owed)
    monkeypatch.delattr(kernel, "hopper_matmul")
    assert torch.equal(problem.run(cpu.Kernels()), owed)
    with pytest.raises(ValueError, match="no instruction set"):
        kernel_of(problem, "sse9")


def test_the_compiled_kernel_is_ten_times_as_fast_as_the_pytorch_form() -> None:
    problem = problem_of("fprop", [128], 128, 512, Draw(11))
    times: dict[str | None, list[float]] = {None: [], "": []}
    for _, isa in itertools.product(range(3), times):
        start = time.thread_time()
        kernel_of(problem, isa)
        times[isa].append(time.thread_time() - start)
    assert min(times[None]) > 10 * min(times[""])
