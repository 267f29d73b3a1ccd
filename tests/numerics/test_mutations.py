"""Each defect a kernel could ship with fails the comparisons the suite makes (`oracle`).

A mutant is the vectorised kernel with one defect. Each test has a comparison that the healthy kernel passes
and the mutant fails.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.numerics.oracle as oracle
from tessera.numerics.kernels import torch as healthy
from tessera.numerics.tiles import BLOCK, COLUMN, TENSOR, VECTOR
from tests.numerics.oracle import FLOAT32_BAR, SAME_SIGN_BAR, Kernel, Layout, Problem, problem_of

PARAMETERS = (
    "kind", "a_codes", "a_scales", "a_tile_rows", "a_tile_columns", "a_format",
    "b_codes", "b_scales", "b_tile_rows", "b_tile_columns", "b_format",
    "segment", "offsets", "accumulation", "interval", "out_dtype",
)  # fmt: skip
Arguments = dict[str, Any]


def mutant(**functions: Callable[..., Any]) -> Kernel:
    """The healthy kernel with some functions replaced."""
    whole = {name: getattr(healthy, name) for name in ("quantise", "dequantise", "matmul")}
    return SimpleNamespace(**(whole | functions))


def with_arguments(change: Callable[[Arguments], Arguments]) -> Kernel:
    """The healthy kernel whose matmul sees changed arguments."""
    return mutant(matmul=lambda *args: healthy.matmul(**change(dict(zip(PARAMETERS, args, strict=True)))))


def rejects(comparison: Callable[..., None], kernel: Kernel, *arguments: Any) -> bool:
    """True when the comparison passes the healthy kernel and fails this one."""
    comparison(healthy, *arguments)
    try:
        comparison(kernel, *arguments)
    except AssertionError:
        return True
    return False


def normal(seed: int = 0) -> Callable[[int, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda rows, columns: torch.randn(rows, columns, generator=generator)


def same_sign(seed: int = 0) -> Callable[[int, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda rows, columns: torch.rand(rows, columns, generator=generator)


def hopper(problem: Problem) -> Problem:
    return replace(problem, accumulation="hopper")


# One wrong rounding


def test_a_quantiser_that_rounds_one_tie_away_from_even_is_rejected() -> None:
    x = torch.tensor([[448.0, 1.0625, 0.3]])  # 1.0625 lies between codes 0x38 and 0x39

    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales, nonfinite = healthy.quantise(x, *arguments)
        codes[x == 1.0625] += 1
        return codes, scales, nonfinite

    assert rejects(oracle.assert_quantises_as_the_law, mutant(quantise=quantise), x, Layout(VECTOR))


def test_a_quantiser_that_truncates_is_rejected() -> None:
    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return healthy.quantise(x, *arguments[:-1], "toward_zero")

    assert rejects(oracle.assert_quantises_as_the_law, mutant(quantise=quantise), normal()(3, 200), Layout(VECTOR))


def test_a_quantiser_that_multiplies_with_one_reciprocal_for_two_divisions_is_rejected() -> None:
    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        codes, _, nonfinite = healthy.quantise(x, *arguments)
        return codes, x.abs().amax(dim=1, keepdim=True) * (1 / 448), nonfinite

    comparison = oracle.assert_quantises_as_the_law
    x = normal()(20, 100)
    assert rejects(comparison, mutant(quantise=quantise), x, Layout(VECTOR), "e4m3", "float32")


def test_a_promotion_that_rounds_the_product_before_the_sum_is_rejected() -> None:
    def matmul(*args: Any) -> Tensor:
        arguments = dict(zip(PARAMETERS, args, strict=True))
        y = torch.zeros(())
        for i, start in enumerate(range(0, arguments["a_codes"].shape[1], 128)):
            block = {f"{o}_codes": arguments[f"{o}_codes"][:, start : start + 128] for o in "ab"}
            block |= {f"{o}_scales": arguments[f"{o}_scales"][:, i : i + 1] for o in "ab"}
            y = y + healthy.matmul(**(arguments | block))
        return y

    problem = hopper(problem_of("fprop", [6], 40, 512, normal(), scale_mode="float32"))
    assert rejects(oracle.assert_matmul_bits, mutant(matmul=matmul), problem)


def test_one_wrong_bit_of_one_output_is_rejected() -> None:
    def matmul(*args: Any) -> Tensor:
        y = healthy.matmul(*args)
        y.view(torch.int32)[-1, -1] ^= 1
        return y

    problem = hopper(problem_of("fprop", [3], 5, 150, normal()))
    assert rejects(oracle.assert_matmul_bits, mutant(matmul=matmul), problem)


def test_a_lost_sign_of_zero_is_rejected() -> None:
    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return healthy.quantise(x + 0.0, *arguments)

    x = torch.tensor([[1.0, -0.0, 0.0]])
    assert rejects(oracle.assert_quantises_as_the_law, mutant(quantise=quantise), x, Layout(VECTOR))


# The next block's scale


@pytest.mark.parametrize("operand", ["a_scales", "b_scales"])
@pytest.mark.parametrize(("kind", "dimension"), [("fprop", 1), ("dgrad", None), ("wgrad", 0)])
def test_the_next_blocks_scale_is_rejected(kind: str, dimension: int | None, operand: str) -> None:
    if dimension is None:  # dgrad contracts the columns of dY and the rows of W
        dimension = 1 if operand == "a_scales" else 0
    kernel = with_arguments(lambda a: a | {operand: a[operand].roll(-1, dimension)})

    def draw(rows: int, columns: int) -> Tensor:
        # Every tile meets the next one at another scale, in both directions.
        return normal(1)(rows, columns) * 2.0 ** (torch.arange(rows)[:, None] // 128 + torch.arange(columns) // 128)

    tokens, n, k = {"fprop": ([4], 5, 300), "dgrad": ([4], 300, 5), "wgrad": ([300], 4, 5)}[kind]
    problem = problem_of(kind, tokens, n, k, draw)
    assert rejects(oracle.assert_matmul_within, kernel, problem, FLOAT32_BAR)
    assert rejects(oracle.assert_matmul_bits, kernel, hopper(problem))


def test_decoding_with_the_next_tiles_scale_is_rejected() -> None:
    def dequantise(codes: Tensor, scales: Tensor, *arguments: Any) -> Tensor:
        return healthy.dequantise(codes, scales.roll(-1, 1), *arguments)

    x = normal()(2, 300) * 4.0 ** (torch.arange(300) // 128)
    assert rejects(oracle.assert_quantises_as_the_law, mutant(dequantise=dequantise), x, Layout(VECTOR))


# The tail not masked


@pytest.mark.parametrize("operand", ["a", "b"])
def test_a_tail_of_the_contraction_that_reads_on_into_the_next_row_is_rejected(operand: str) -> None:
    other = "b" if operand == "a" else "a"

    def overrun(arguments: Arguments) -> Arguments:
        """K padded to whole blocks: with ones for one operand, with what follows in memory for the other."""
        rows, k = arguments[f"{operand}_codes"].shape
        missing = -k % 128
        memory = torch.cat([arguments[f"{operand}_codes"].flatten(), torch.zeros(missing, dtype=torch.uint8)])
        read = memory.as_strided((rows, k + missing), (k, 1)).clone()
        ones = torch.nn.functional.pad(arguments[f"{other}_codes"], (0, missing), value=0x38)
        return arguments | {f"{operand}_codes": read, f"{other}_codes": ones}

    problem = problem_of("fprop", [5], 6, 200, normal())
    assert rejects(oracle.assert_matmul_within, with_arguments(overrun), problem, FLOAT32_BAR)
    assert rejects(oracle.assert_matmul_bits, with_arguments(overrun), hopper(problem))


def test_a_tail_of_a_group_that_reads_on_into_the_next_groups_tokens_is_rejected() -> None:
    def matmul(*args: Any) -> Tensor:
        """Every token decoded rightly, and summed in whole blocks of 128 tokens."""
        arguments = dict(zip(PARAMETERS, args, strict=True))
        offsets = arguments["offsets"]
        a, b = (
            healthy.dequantise(codes, arguments[f"{o}_scales"], 128, 1, 0, 0, offsets, "e4m3", codes.shape[1])
            for o, codes in (("a", arguments["a_codes"]), ("b", arguments["b_codes"]))
        )
        blocks = [slice(i, i + -(-(end - i) // 128) * 128) for i, end in pairwise(offsets.tolist())]
        return torch.cat([a[block].T @ b[block] for block in blocks])

    problem = problem_of("wgrad", [130, 0, 60, 200], 4, 5, normal())
    assert rejects(oracle.assert_matmul_within, mutant(matmul=matmul), problem, FLOAT32_BAR)
    aligned = problem_of("wgrad", [128, 0, 256], 4, 5, normal())  # without tails there is nothing to reject
    assert not rejects(oracle.assert_matmul_within, mutant(matmul=matmul), aligned, FLOAT32_BAR)


def test_an_amax_that_reads_beyond_the_ragged_edge_is_rejected() -> None:
    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128), value=1e3)  # whatever lies there
        codes, scales, nonfinite = healthy.quantise(padded, *arguments)
        return codes[:, : x.shape[1]].contiguous(), scales, nonfinite

    x = normal()(3, 200)
    assert rejects(oracle.assert_quantises_as_the_law, mutant(quantise=quantise), x, Layout(VECTOR))


# The wrong expert's offset


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_an_expert_that_starts_one_token_late_is_rejected(kind: str) -> None:
    def late(arguments: Arguments) -> Arguments:
        offsets = arguments["offsets"].clone()
        offsets[2] += 1
        return arguments | {"offsets": offsets}

    problem = problem_of(kind, [3, 0, 2, 4], 6, 7, normal())
    assert rejects(oracle.assert_matmul_within, with_arguments(late), problem, FLOAT32_BAR)
    assert rejects(oracle.assert_matmul_bits, with_arguments(late), hopper(problem))


@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_the_next_experts_weights_are_rejected(kind: str) -> None:
    kernel = with_arguments(lambda a: a | {"b_codes": a["b_codes"].roll(-6, 0), "b_scales": a["b_scales"].roll(-1, 0)})
    problem = problem_of(kind, [3, 0, 2, 4], 6, 7, normal())
    assert rejects(oracle.assert_matmul_within, kernel, problem, FLOAT32_BAR)
    assert rejects(oracle.assert_matmul_bits, kernel, hopper(problem))


def test_tiles_that_restart_at_another_experts_first_token_are_rejected() -> None:
    def quantise(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        offsets = arguments[4].clone()
        offsets[1] += 1
        return healthy.quantise(x, *arguments[:4], offsets, *arguments[5:])

    layout = Layout(COLUMN, offsets=torch.tensor([0, 127, 255, 256]))
    x = normal()(256, 3) * 1.1 ** torch.arange(256)[:, None]
    assert rejects(oracle.assert_quantises_as_the_law, mutant(quantise=quantise), x, layout)


# Promotion removed


def test_removed_promotion_fails_the_bar_for_same_sign_data_by_a_factor_of_fifty() -> None:
    kernel = with_arguments(lambda a: a | {"accumulation": "hopper_unpromoted"})
    problem = hopper(problem_of("fprop", [8], 8, 4096, same_sign(), (TENSOR, TENSOR), kernel=healthy))
    assert rejects(oracle.assert_matmul_within, kernel, problem, SAME_SIGN_BAR)
    assert oracle.relative_norm(problem.run(kernel), problem.exact()) > 50 * SAME_SIGN_BAR
    # Random signs at K = 4096 fail their own bar too; no margin is owed there.
    problem = hopper(problem_of("fprop", [8], 8, 4096, normal(), (TENSOR, TENSOR), kernel=healthy))
    assert rejects(oracle.assert_matmul_within, kernel, problem, oracle.RANDOM_SIGN_BAR)


@pytest.mark.parametrize("interval", [256, 512, 4096])
def test_rarer_promotion_is_rejected_bit_by_bit_and_by_the_bar(interval: int) -> None:
    kernel = with_arguments(lambda a: a | {"interval": interval})
    problem = hopper(problem_of("fprop", [4], 4, 1024, same_sign(), (TENSOR, TENSOR), kernel=healthy))
    assert rejects(oracle.assert_matmul_bits, kernel, problem)
    assert rejects(oracle.assert_matmul_within, kernel, problem, SAME_SIGN_BAR)


def test_plain_float32_accumulation_in_place_of_the_tensor_core_is_rejected() -> None:
    kernel = with_arguments(lambda a: a | {"accumulation": "float32"})
    problem = hopper(problem_of("fprop", [4], 4, 256, normal(), (VECTOR, BLOCK)))
    assert rejects(oracle.assert_matmul_bits, kernel, problem)
