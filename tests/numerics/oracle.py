"""Comparisons every kernel is held to, and the data they are made on.

A kernel is anything with `quantise`, `dequantise` and `matmul` (see `tessera.numerics.kernels`). Each
`assert_...` raises AssertionError where the kernel differs from `reference` by more than the law owes;
`test_mutations` shows that each can fail.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.numerics.formats import FORMATS
from tessera.numerics.kernels import reference
from tessera.numerics.tiles import BLOCK, COLUMN, VECTOR, Tile

Kernel = Any  # a module or a namespace
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

FLOAT32_BAR = 2e-6  # relative norm owed by `float32` accumulation, K <= 4096
RANDOM_SIGN_BAR = 2e-4  # `hopper`, promoted every 128, at any K
SAME_SIGN_BAR = 7e-4


class Layout(NamedTuple):
    """How tiles lie over a matrix; the arguments of `quantise` after x."""

    tile: Tile
    row_segment: int = 0
    column_segment: int = 0
    offsets: Tensor | None = None

    def arguments(self) -> tuple[int, int, int, int, Tensor | None]:
        return self.tile.rows, self.tile.columns, self.row_segment, self.column_segment, self.offsets


@dataclass(frozen=True)
class Operand:
    codes: Tensor
    scales: Tensor
    layout: Layout
    format: str = "e4m3"

    def decoded(self) -> Tensor:
        """Exact values, float64 (a code of 4 bits times a scale of 24)."""
        values = self.codes.view(FLOAT8[self.format]).double()
        return values * scale_of_each_element(self.scales.double(), self.codes.shape, self.layout)


@dataclass(frozen=True)
class Problem:
    """A GEMM on codes, and how to accumulate it."""

    kind: str
    a: Operand
    b: Operand
    segment: int = 0
    offsets: Tensor | None = None
    accumulation: str = "float32"
    interval: int = 128
    out_dtype: torch.dtype = torch.float32

    def run(self, kernel: Kernel, **keywords: str | None) -> Tensor:
        a, b = self.a, self.b
        return kernel.matmul(
            self.kind,
            a.codes, a.scales, a.layout.tile.rows, a.layout.tile.columns, a.format,
            b.codes, b.scales, b.layout.tile.rows, b.layout.tile.columns, b.format,
            self.segment, self.offsets, self.accumulation, self.interval, self.out_dtype,
            **keywords,
        )  # fmt: skip

    def exact(self) -> Tensor:
        """The product of the decoded operands in float64, by torch's matmul, group by group."""
        a, b = self.a.decoded(), self.b.decoded()
        bounds = [0, len(a)] if self.offsets is None else self.offsets.tolist()
        groups = len(bounds) - 1
        results = []
        for g in range(groups):
            rows = slice(bounds[g], bounds[g + 1])
            if self.kind == "wgrad":
                results.append(a[rows].T @ b[rows])
            else:
                w = b.reshape(groups, -1, b.shape[1])[g]
                results.append(a[rows] @ (w.T if self.kind == "fprop" else w))
        return torch.cat(results)


def scale_of_each_element(scales: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """[R, C] from [row tiles, column tiles], by index arithmetic (the reference loops over tiles instead)."""
    tile, row_segment, column_segment, offsets = layout
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    if tile.rows > 1 and offsets is not None:
        group = torch.searchsorted(offsets, rows, right=True) - 1
        i = offsets[group] // tile.rows + group + (rows - offsets[group]) // tile.rows
    else:
        i = _tile_index(rows, tile.rows, row_segment)
    return scales[i][:, _tile_index(columns, tile.columns, column_segment)]


def _tile_index(position: Tensor, tile: int, segment: int) -> Tensor:
    if tile == 0:
        return position // segment if segment else torch.zeros_like(position)
    if tile == 1 or not segment:
        return position // tile
    return position // segment * -(-segment // tile) + position % segment // tile


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits; the sign of zero counts, the payload of NaN does not."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def relative_norm(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def assert_quantises_as_the_law(
    kernel: Kernel,
    x: Tensor,
    layout: Layout,
    format: str = "e4m3",
    scale_mode: str = "power_of_two",
    rounding: str = "nearest",
) -> None:
    arguments = (*layout.arguments(), format)
    codes, scales, nonfinite = kernel.quantise(x, *arguments, scale_mode, rounding)
    owed_codes, owed_scales, owed_nonfinite = reference.quantise(x, *arguments, scale_mode, rounding)
    assert same_bits(scales, owed_scales), f"scales differ: {differences(scales, owed_scales)}"
    assert same_bits(codes, owed_codes), f"codes differ: {differences(codes, owed_codes)}"
    assert nonfinite.dtype == torch.int64 and nonfinite.shape == ()
    assert int(nonfinite) == int(owed_nonfinite), f"{int(nonfinite)} non-finite, not {int(owed_nonfinite)}"
    decoded = kernel.dequantise(owed_codes, owed_scales, *arguments, x.shape[1])
    owed = reference.dequantise(owed_codes, owed_scales, *arguments, x.shape[1])
    assert same_bits(decoded, owed), f"decoded values differ: {differences(decoded, owed)}"


def assert_matmul_bits(kernel: Kernel, problem: Problem) -> None:
    result, owed = problem.run(kernel), problem.run(reference)
    assert same_bits(result, owed), f"{problem.kind}: {differences(result, owed)}"


def assert_matmul_within(kernel: Kernel, problem: Problem, bar: float) -> None:
    result, exact = problem.run(kernel), problem.exact()
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    error = relative_norm(result, exact)
    assert error <= bar, f"{problem.kind}: relative norm {error:.2e} > {bar:.0e}"


def differences(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
    places = (~((a == b) & (a.signbit() == b.signbit()) | (a != a) & (b != b))).nonzero()
    first = [f"{tuple(p.tolist())}: {a[tuple(p)].item()!r} not {b[tuple(p)].item()!r}" for p in places[:4]]
    return f"{len(places)} of {a.numel()}; {', '.join(first)}"


# Data


def quantised(x: Tensor, layout: Layout, scale_mode: str, format: str = "e4m3", kernel: Kernel = reference) -> Operand:
    codes, scales, _ = kernel.quantise(x, *layout.arguments(), format, scale_mode, "nearest")
    return Operand(codes, scales, layout, format)


def problem_of(
    kind: str,
    tokens: list[int],
    n: int,
    k: int,
    draw: Callable[[int, int], Tensor],
    tiles: tuple[Tile, Tile] | None = None,
    segment: int = 0,
    scale_mode: str = "power_of_two",
    formats: tuple[str, str] = ("e4m3", "e4m3"),
    kernel: Kernel = reference,
) -> Problem:
    """The GEMM `kind` on groups of `tokens` rows, N = n, K = k; operands drawn by `draw(rows, columns)`."""
    groups, total = len(tokens), sum(tokens)
    offsets = torch.tensor([0, *np.cumsum(tokens)]) if groups > 1 else None
    if groups > 1 and not segment:
        segment = n
    default = (COLUMN, COLUMN) if kind == "wgrad" else (VECTOR, BLOCK)
    a_tile, b_tile = tiles or default
    a_layout = Layout(a_tile, 0, 0 if kind == "fprop" else segment, offsets)
    a = quantised(draw(total, k if kind == "fprop" else n), a_layout, scale_mode, formats[0], kernel)
    b_layout = Layout(b_tile, 0, 0, offsets) if kind == "wgrad" else Layout(b_tile, segment, 0)
    b = quantised(draw(total if kind == "wgrad" else groups * n, k), b_layout, scale_mode, formats[1], kernel)
    return Problem(kind, a, b, segment, offsets)


def with_random_codes(problem: Problem, generator: torch.Generator, codes: list[int], scales: str) -> Problem:
    """The problem with codes drawn from `codes` and scales that are random "powers", "floats" or "tiny"."""
    pool = torch.tensor(codes, dtype=torch.uint8)

    def redrawn(operand: Operand) -> Operand:
        index = torch.randint(len(pool), operand.codes.shape, generator=generator)
        exponents = torch.randint(-6, 7, operand.scales.shape, generator=generator)
        exponents -= 69 if scales == "tiny" else 0
        significands = torch.ones(operand.scales.shape)
        if scales == "floats":
            significands += torch.rand(operand.scales.shape, generator=generator)
        return replace(operand, codes=pool[index], scales=torch.ldexp(significands, exponents))

    return replace(problem, a=redrawn(problem.a), b=redrawn(problem.b))


def finite_magnitudes(format: str) -> list[float]:
    """All finite values >= 0 of a format, ascending, from torch's float8 types and float16's bits."""
    fmt = FORMATS[format]
    codes = torch.arange(2 ** (fmt.bits - 1), dtype=torch.int32)
    if format == "e5m6":
        values = (codes << 4).to(torch.int16).view(torch.float16).double()
    else:
        values = codes.to(torch.uint8).view(FLOAT8[format]).double()
    return [v for v in values.tolist() if v < float("inf")]


def borders(format: str) -> Tensor:
    """Rows of 128 with scale 1: all values of a format, all midpoints, the float32 numbers beside them."""
    values = np.array(finite_magnitudes(format))
    marks = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    above, below = np.nextafter(marks, np.float32(np.inf)), np.nextafter(marks, np.float32(0))
    inside = np.concatenate([marks, above, below])
    inside = inside[inside <= np.float32(FORMATS[format].largest)]
    signed = np.concatenate([inside, -inside])
    padded = np.concatenate([signed, np.zeros(-len(signed) % 127, dtype=np.float32)]).reshape(-1, 127)
    amax = np.full((len(padded), 1), FORMATS[format].largest, dtype=np.float32)
    return torch.from_numpy(np.concatenate([amax, padded], axis=1))


def extremes(format: str) -> Tensor:
    """Rows of 128, each with an amax where a scale rule turns."""
    largest = FORMATS[format].largest
    powers = (-149, -135, -130, -129, -128, -127, -126, -125, -20, -1, 0, 1, 7, 100, 119)
    turning = [largest * 2.0**k for k in powers]
    turning += [1.75 * 2.0**e for e in (-140, -126, -118, -7, 0, 5, 127)]
    turning += [2.0**-149, 2.0**-126, 1.0, 3.0, 2.0**127, 1e-40, 3e38, 3.4028234663852886e38]
    turning += [largest * 2.0**-128 * 1.01, largest * 2.0**-127 / 1.01]
    with np.errstate(over="ignore"):
        amax = np.array(turning).astype(np.float32)
        amax = np.concatenate([amax, np.nextafter(amax, np.float32(np.inf)), np.nextafter(amax, np.float32(0))])
    amax = amax[np.isfinite(amax) & (amax > 0)]
    parts = np.random.default_rng(7).uniform(-1, 1, size=(len(amax), 128)).astype(np.float32)
    parts[:, ::5] *= np.float32(1e-3)
    parts[:, :4] = [1.0, -0.0, 0.0, -(2.0**-9)]
    return torch.from_numpy(amax[:, None] * parts)


def unruly(rows: int, columns: int, seed: int) -> Tensor:
    """Lognormal, some outliers 1e4 to 1e5 times the rest, zeros of both signs, a few NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    normal, logarithm = torch.randn(2, rows, columns, generator=generator)
    dice = torch.rand(rows, columns, generator=generator)
    x = normal * logarithm.exp()
    x = torch.where(dice < 0.01, x * 10 ** (4 + dice * 100), x)
    for share, value in ((0.02, 0.0), (0.04, -0.0)):
        x = torch.where((dice > 0.5) & (dice < 0.5 + share), torch.tensor(value), x)
    for start, value in ((0.9, float("nan")), (0.902, float("inf")), (0.904, -float("inf"))):
        x = torch.where((dice > start) & (dice < start + 0.002), torch.tensor(value), x)
    return x


def fma_cases() -> tuple[Tensor, Tensor, Tensor]:
    """float32 a, b, c whose a * b + c is hard to round: cancelling, far apart, subnormal, overflowing, not finite."""
    random = np.random.default_rng(15)
    a, b = np.ldexp(random.uniform(-2, 2, (2, 3000)), random.integers(-70, 40, (2, 3000))).astype(np.float32)
    near = random.integers(-27, 28, 3000)
    c = (-a * b.astype(np.float64) * 2.0**near * (1 + random.uniform(-1e-7, 1e-7, 3000))).astype(np.float32)
    inf, nan, tiny, large = np.inf, np.nan, 2.0**-149, 3.4028234663852886e38
    edges = [0.0, -0.0, 1.0, -1.0, tiny, -tiny, 2.0**-126, large, -large, inf, -inf, nan]
    grid = np.array(np.meshgrid(edges, edges, edges), dtype=np.float32).reshape(3, -1)
    columns = np.concatenate([np.stack([a, b, c]), grid], axis=1)
    return tuple(torch.from_numpy(column.copy()) for column in columns)  # type: ignore[return-value]
