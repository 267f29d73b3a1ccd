"""The products that benchmarks/gemm.py measures at one shape: tessera's and torch's, on the same operands.

X [M, K], W [N, K], dY [M, N]; fprop X W^T, dgrad dY W, wgrad dY^T X, and grouped: fprop over 16 ragged groups of the
M rows, each with a W of its own. The peer of a product is torch's BF16 mm of the same kind (of grouped: a loop of
mm). Results are BF16, of tessera's wgrad FP32, as in training. "includes" names the quantisation that is in the time;
W, quantised once a step, never is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from paired import Clock, Timed
from torch import Tensor

from tessera.numerics import BLOCK, COLUMN, E4M3, VECTOR, Tile, TiledTensor, dense, operators

GROUPS = 16
KINDS = ("fprop", "dgrad", "wgrad")
SCALES = ("power_of_two", "float32")  # folded into the values; promoted every 128 of the contraction
COMPARED_ROWS = 256  # of a product, with FP64
LONGEST = 0.3  # seconds of one call of torch's FP8 product; a corner of it is timed where the whole takes longer
CORNER = 16
FP8 = torch.float8_e4m3fn


@dataclass
class Product:
    """A row before it is measured. `timed` is None where the library does not have it; `note` says why."""

    kind: str
    system: str
    precision: str
    timed: Timed | None
    scales: str = ""
    includes: str = ""
    relative_error: float | None = None
    note: str = ""


class Arithmetic:
    """tessera's products and quantisers on one instruction set; "" is the machine's best."""

    def __init__(self, isa: str) -> None:
        self.isa, self.backend = isa, f"cpu:{isa}" if isa else ""

    def quantise(self, x: Tensor, tile: Tile, scales: str, row_segment: int = 0) -> TiledTensor:
        how = (tile.rows, tile.columns, row_segment, 0, None, E4M3.name, scales, "nearest")
        made = operators.quantise(x, *how, backend=self.backend)
        return TiledTensor(*made, tile, E4M3, (x.shape[0], x.shape[1]), row_segment)

    def columnwise(self, x: TiledTensor, scales: str) -> TiledTensor:
        made = operators.requantise_columns(
            x.codes, x.scales, x.format.name, x.shape[1], None, scales, backend=self.backend
        )
        return TiledTensor(*made, COLUMN, E4M3, x.shape)

    def decode(self, x: TiledTensor) -> Tensor:
        """[R, C] float32."""
        segments = (x.row_segment, x.column_segment, x.offsets)
        tile = (x.tile.rows, x.tile.columns)
        return operators.dequantise(
            x.codes, x.scales, *tile, *segments, x.format.name, x.shape[1], backend=self.backend
        )

    def fp8(self, kind: str, a: TiledTensor, b: TiledTensor, out: torch.dtype, offsets: Tensor | None = None) -> Tensor:
        operands = (a.codes, a.scales, a.tile, a.format.name, b.codes, b.scales, b.tile, b.format.name)
        segment = a.column_segment if kind == "wgrad" else b.row_segment
        return operators.matmul(kind, *operands, segment, offsets, "float32", 128, out, backend=self.backend)

    def bf16(self, kind: str, a: Tensor, b: Tensor, out: torch.dtype, offsets: Tensor | None = None) -> Tensor:
        if self.isa:
            return torch.ops.tessera.bf16_matmul(kind, a, b, offsets, out, self.isa)
        return dense.matmul(kind, a, b, offsets, out)


def products(m: int, n: int, k: int, grouped: bool, arithmetic: Arithmetic, clock: Clock) -> list[Product]:
    """All of a shape, errors found, nothing timed."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(m + n + k), dtype=torch.bfloat16)
    x, dy = draw(m, k), draw(m, n) * 2.0**-10
    found = dense_products(x, draw(n, k) * 2.0**-5, dy, arithmetic, clock)
    if grouped:
        found += grouped_products(x, draw(GROUPS * n, k) * 2.0**-5, ragged(m), arithmetic)
    return found


def dense_products(x: Tensor, w: Tensor, dy: Tensor, arithmetic: Arithmetic, clock: Clock) -> list[Product]:
    mm = {
        "fprop": Timed(lambda: torch.mm(x, w.t())),
        "dgrad": Timed(lambda: torch.mm(dy, w)),
        "wgrad": Timed(lambda: torch.mm(dy.t(), x)),
    }
    x32, w32 = x.float(), w.float()
    found = [Product(kind, "torch", "bf16", mm[kind]) for kind in KINDS]
    found.append(Product("fprop", "torch", "fp32", Timed(lambda: torch.mm(x32, w32.t()), mm["fprop"])))
    found += [torch_fp8(x, w, scales, mm["fprop"], clock) for scales in ("tensor", "row")]

    sides = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}
    outs = {"fprop": torch.bfloat16, "dgrad": torch.bfloat16, "wgrad": torch.float32}

    def add(kind: str, precision: str, call: Callable[[], Tensor], *described: str, error: float) -> None:
        found.append(Product(kind, "tessera", precision, Timed(call, mm[kind]), *described, relative_error=error))

    for kind, (a, b) in sides.items():
        error = relative_error(kind, arithmetic.bf16(kind, a, b, torch.float32), a, b)
        add(kind, "bf16", partial(arithmetic.bf16, kind, a, b, outs[kind]), error=error)
    for scales in SCALES:
        rows = arithmetic.quantise(x, VECTOR, scales)
        weight = arithmetic.quantise(w, BLOCK, scales)
        coded = {
            "fprop": (rows, weight),
            "dgrad": (arithmetic.quantise(dy, VECTOR, scales), weight),
            "wgrad": (arithmetic.quantise(dy, COLUMN, scales), arithmetic.columnwise(rows, scales)),
        }
        for kind, (qa, qb) in coded.items():
            exact = arithmetic.fp8(kind, qa, qb, torch.float32)
            error = relative_error(kind, exact, arithmetic.decode(qa), arithmetic.decode(qb))
            add(kind, "fp8", partial(arithmetic.fp8, kind, qa, qb, outs[kind]), scales, error=error)
            add(kind, "fp8", _quantising(arithmetic, kind, sides[kind][0], qa.tile, scales, qb, outs[kind]), scales,
                "quantise x" if kind == "fprop" else "quantise dy", error=error)  # fmt: skip
    return found


def grouped_products(x: Tensor, weights: Tensor, offsets: Tensor, arithmetic: Arithmetic) -> list[Product]:
    """x [M, K], weights [16 N, K], offsets int64 [17]."""
    stacked = weights.unflatten(0, (GROUPS, -1)).transpose(1, 2)
    bounds = list(pairwise(offsets.tolist()))

    def loop() -> Tensor:
        y = x.new_empty(x.shape[0], stacked.shape[2])
        for group, (start, end) in enumerate(bounds):
            torch.mm(x[start:end], stacked[group], out=y[start:end])
        return y

    mm = Timed(loop)
    found = [Product("grouped", "torch", "bf16", mm, note="a loop of mm")]
    ends = offsets[1:].int()
    grouped_mm = getattr(torch, "_grouped_mm", None)
    found.append(_tried("bf16", lambda: grouped_mm(x, stacked, offs=ends), "grouped", mm, note="_grouped_mm"))

    def add(precision: str, call: Callable[[], Tensor], *described: str, error: float) -> None:
        found.append(Product("grouped", "tessera", precision, Timed(call, mm), *described, relative_error=error))

    bf16 = partial(arithmetic.bf16, "fprop", x, weights)
    error = relative_error("fprop", bf16(torch.float32, offsets), x, weights, offsets)
    add("bf16", partial(bf16, torch.bfloat16, offsets), error=error)
    for scales in SCALES:
        rows = arithmetic.quantise(x, VECTOR, scales)
        weight = arithmetic.quantise(weights, BLOCK, scales, row_segment=stacked.shape[2])
        exact = arithmetic.fp8("fprop", rows, weight, torch.float32, offsets)
        error = relative_error("fprop", exact, arithmetic.decode(rows), arithmetic.decode(weight), offsets)
        add("fp8", partial(arithmetic.fp8, "fprop", rows, weight, torch.bfloat16, offsets), scales, error=error)
        call = _quantising(arithmetic, "fprop", x, VECTOR, scales, weight, torch.bfloat16, offsets)
        add("fp8", call, scales, "quantise x", error=error)
    return found


def ragged(rows: int) -> Tensor:
    """Offsets int64 [17] of groups that shrink by a fifth each, as experts' loads do; few `rows` leave some empty."""
    shares = torch.cumsum(0.8 ** torch.arange(GROUPS, dtype=torch.float64), 0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), (rows * shares / shares[-1]).round().long()])


def torch_fp8(x: Tensor, w: Tensor, scales: str, mm: Timed, clock: Clock) -> Product:
    """torch._scaled_mm with one scale a tensor or a row; a corner of the product where all of it takes too long.

    Without FP8 units its CPU library may take a plain loop a thousand times slower, whose time is the number of
    multiplications times a constant; a fast one is timed whole.
    """
    whole = x.shape[0] * w.shape[0]
    m, n = min(CORNER, x.shape[0]), min(CORNER, w.shape[0])
    while True:
        call = _scaled_mm(x[:m], w[:n], scales)
        product = _tried("fp8", call, "fprop", mm, scales=scales)
        if product.timed is None:
            return product
        seconds = clock(product.timed)[1]
        if m * n == whole or seconds * 4 > LONGEST:
            break
        m, n = min(2 * m, x.shape[0]), min(2 * n, w.shape[0])
    if m * n < whole:
        product.timed.scale = whole / (m * n)
        product.note = f"scaled from {m} x {n} of it"
    return product


def _scaled_mm(x: Tensor, w: Tensor, scales: str) -> Callable[[], Tensor]:
    scaled = getattr(torch, "_scaled_mm", None)
    ones = (torch.ones(()),) * 2 if scales == "tensor" else (torch.ones(x.shape[0], 1), torch.ones(1, w.shape[0]))
    a, b = (side.float().mul(1 / side.abs().max()).to(FP8) for side in (x, w))
    return lambda: scaled(a, b.t(), *ones, out_dtype=torch.bfloat16)


def _tried(
    precision: str, call: Callable[[], Tensor], kind: str, mm: Timed, scales: str = "", note: str = ""
) -> Product:
    """torch's product, or the row that says it is not there."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:  # TypeError: the function does not exist
        first = str(error).partition("\n")[0]
        return Product(kind, "torch", precision, None, scales, note=f"{note} not supported: {first}".lstrip())
    return Product(kind, "torch", precision, Timed(call, mm), scales, note=note)


def _quantising(
    arithmetic: Arithmetic,
    kind: str,
    a: Tensor,
    tile: Tile,
    scales: str,
    b: TiledTensor,
    out: torch.dtype,
    offsets: Tensor | None = None,
) -> Callable[[], Tensor]:
    return lambda: arithmetic.fp8(kind, arithmetic.quantise(a, tile, scales), b, out, offsets)


def relative_error(kind: str, y: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> float:
    """|y - exact| / |exact| with FP64 sums of the operands' values, over at most 256 rows, spread over the product."""
    rows = torch.arange(0, y.shape[0], -(-y.shape[0] // COMPARED_ROWS))
    if kind == "wgrad":
        exact = a[:, rows].double().t() @ b.double()
    elif kind == "dgrad":
        exact = a[rows].double() @ b.double()
    elif offsets is None:
        exact = a[rows].double() @ b.double().t()
    else:
        weights = b.unflatten(0, (GROUPS, -1))
        group = torch.searchsorted(offsets[1:], rows, right=True)
        parts = [a[rows[group == g]].double() @ weights[g].double().t() for g in range(GROUPS)]
        exact = torch.cat(parts)
    return float((y[rows].double() - exact).norm() / exact.norm())
