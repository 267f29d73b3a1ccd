"""SwiGLU as compiled kernels (native/source/swiglu.cpp): swiglu.py's functions on plain tensors.

An element's bits depend on its own inputs alone; a row's weight gradient is added up in an order that depends on the
row's length alone. Codes and scales are those of the product quantised afterwards, which never is in memory.
"""

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.numerics.tiles import COLUMN, TILE, VECTOR, scale_shape
from tessera.ops.kernels import TYPES, define, float32, require, strided

FORWARD = {t: Kernel(f"swiglu_{t}", "pippi") for t in TYPES.values()}
ROW_TILES = {t: Kernel(f"swiglu_row_tiles_{t}", "pipippi", counts=True) for t in TYPES.values()}
COLUMN_TILES = Kernel("swiglu_columns", "ppipipiippi", counts=True)
BACKWARD = {t: Kernel(f"swiglu_backward_{t}", "ppipppi") for t in ("f32_f32", "bf16_f32", "bf16_bf16")}
BACKWARD_CODES = {t: Kernel(f"swiglu_backward_codes_{t}", "pppipppi") for t in TYPES.values()}
WORK = 8  # an exponential and a division cost what so many loads and stores do

Quantised = tuple[Tensor, Tensor, Tensor]  # codes uint8, scales float32, nonfinite int64 []: kernels of numerics


def swiglu(gate_up: Tensor, weight: Tensor | None, isa: str = "") -> Tensor:
    """gate_up [S, 2 I], weight [S] float32 or None -> float32 [S, I]."""
    return torch.ops.tessera.swiglu(gate_up, weight, isa)


def swiglu_backward(d: Tensor, gate_up: Tensor, weight: Tensor | None, isa: str = "") -> tuple[Tensor, Tensor | None]:
    """d [S, I], gate_up [S, 2 I] float32 or in d's dtype -> (d gate_up in d's dtype, d weight [S] float32 or None)."""
    dgate_up, dweight = torch.ops.tessera.swiglu_backward(d, gate_up, weight, isa)
    return dgate_up, None if weight is None else dweight


def swiglu_backward_codes(
    d: Tensor, codes: Tensor, scales: Tensor, weight: Tensor | None, isa: str = ""
) -> tuple[Tensor, Tensor | None]:
    """`swiglu_backward` of the decoded E4M3 codes [S, 2 I] of gate_up, in 1 x 128 tiles, gate and up tiled apart."""
    dgate_up, dweight = torch.ops.tessera.swiglu_backward_codes(d, codes, scales, weight, isa)
    return dgate_up, None if weight is None else dweight


def swiglu_row_tiles(gate_up: Tensor, weight: Tensor | None, power_of_two: bool, isa: str = "") -> Quantised:
    """E4M3 codes [S, I] and scales of `swiglu` in 1 x 128 tiles."""
    return torch.ops.tessera.swiglu_row_tiles(gate_up, weight, power_of_two, isa)


def swiglu_column_tiles(
    codes: Tensor, scales: Tensor, weight: Tensor | None, offsets: Tensor | None, power_of_two: bool, isa: str = ""
) -> Quantised:
    """E4M3 codes [S, I] and scales of `swiglu` in 128 x 1 tiles, which restart with each group of `offsets`.

    codes [S, 2 I] and scales are gate_up as in `swiglu_backward_codes`.
    """
    return torch.ops.tessera.swiglu_column_tiles(codes, scales, weight, offsets, power_of_two, isa)


def _swiglu(gate_up: Tensor, weight: Tensor | None, isa: str) -> Tensor:
    (gate_up, stride), weight = strided(gate_up), _float32(weight)
    product = _like_swiglu(gate_up, weight, isa)
    rows, columns = product.shape
    _require_fit("swiglu", gate_up, product, weight)
    FORWARD[TYPES[gate_up.dtype]](rows, gate_up, stride, weight, product, columns, work=WORK * columns, isa=isa)
    return product


def _like_swiglu(gate_up: Tensor, weight: Tensor | None, isa: str) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=torch.float32)


def _swiglu_backward(d: Tensor, gate_up: Tensor, weight: Tensor | None, isa: str) -> tuple[Tensor, Tensor]:
    d, (gate_up, stride), weight = d.contiguous(), strided(gate_up), _float32(weight)
    dgate_up, dweight = _like_swiglu_backward(d, gate_up, weight, isa)
    rows, columns = d.shape
    _require_fit("swiglu_backward", gate_up, d, weight)
    kernel = BACKWARD[f"{TYPES[d.dtype]}_{TYPES[gate_up.dtype]}"]
    kernel(rows, d, gate_up, stride, weight, dgate_up, dweight, columns, work=WORK * columns, isa=isa)
    return dgate_up, dweight


def _like_swiglu_backward(d: Tensor, gate_up: Tensor, weight: Tensor | None, isa: str) -> tuple[Tensor, Tensor]:
    """The second is empty where there is no weight: an operator's tensors are all there."""
    rows = 0 if weight is None else d.shape[0]
    return d.new_empty(gate_up.shape), d.new_empty(rows, dtype=torch.float32)


def _swiglu_backward_codes(
    d: Tensor, codes: Tensor, scales: Tensor, weight: Tensor | None, isa: str
) -> tuple[Tensor, Tensor]:
    d, codes, scales, weight = d.contiguous(), codes.contiguous(), scales.contiguous(), _float32(weight)
    dgate_up, dweight = _like_swiglu_backward_codes(d, codes, scales, weight, isa)
    rows, columns = d.shape
    _require_fit("swiglu_backward_codes", codes, d, weight, scales)
    kernel, tiles = BACKWARD_CODES[TYPES[d.dtype]], scales.shape[1] // 2
    kernel(rows, d, codes, scales, tiles, weight, dgate_up, dweight, columns, work=WORK * columns, isa=isa)
    return dgate_up, dweight


def _like_swiglu_backward_codes(
    d: Tensor, codes: Tensor, scales: Tensor, weight: Tensor | None, isa: str
) -> tuple[Tensor, Tensor]:
    return _like_swiglu_backward(d, codes, weight, isa)


def _swiglu_row_tiles(gate_up: Tensor, weight: Tensor | None, power_of_two: bool, isa: str) -> Quantised:
    (gate_up, stride), weight = strided(gate_up), _float32(weight)
    codes, scales, nonfinite = _like_swiglu_row_tiles(gate_up, weight, power_of_two, isa)
    rows, columns = codes.shape
    _require_fit("swiglu_row_tiles", gate_up, codes, weight)
    kernel = ROW_TILES[TYPES[gate_up.dtype]]
    operands = (gate_up, stride, weight, power_of_two, codes, scales, columns)
    return codes, scales, nonfinite.fill_(kernel(rows, *operands, work=WORK * columns, isa=isa))


def _like_swiglu_row_tiles(gate_up: Tensor, weight: Tensor | None, power_of_two: bool, isa: str) -> Quantised:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    return _like_quantised(gate_up, rows, columns, scale_shape(rows, columns, VECTOR))


def _swiglu_column_tiles(
    codes: Tensor, scales: Tensor, weight: Tensor | None, offsets: Tensor | None, power_of_two: bool, isa: str
) -> Quantised:
    codes, scales, weight = codes.contiguous(), scales.contiguous(), _float32(weight)
    offsets = None if offsets is None else offsets.contiguous()
    found = _like_swiglu_column_tiles(codes, scales, weight, offsets, power_of_two, isa)
    rows, columns = found[0].shape
    _require_fit("swiglu_column_tiles", codes, found[0], weight, scales)
    groups = 0 if offsets is None else offsets.numel() - 1
    source = (codes, scales, scales.shape[1] // 2, weight, rows, offsets, groups, power_of_two)
    nonfinite = 0
    if columns:
        work = WORK * TILE * columns
        nonfinite = COLUMN_TILES(found[1].shape[0], *source, found[0], found[1], columns, work=work, isa=isa)
    return found[0], found[1], found[2].fill_(nonfinite)


def _like_swiglu_column_tiles(
    codes: Tensor, scales: Tensor, weight: Tensor | None, offsets: Tensor | None, power_of_two: bool, isa: str
) -> Quantised:
    rows, columns = codes.shape[0], codes.shape[1] // 2
    groups = 0 if offsets is None else offsets.shape[0] - 1
    return _like_quantised(codes, rows, columns, scale_shape(rows, columns, COLUMN, groups=groups))


def _like_quantised(x: Tensor, rows: int, columns: int, scales: tuple[int, int]) -> Quantised:
    codes = x.new_empty((rows, columns), dtype=torch.uint8)
    return codes, x.new_empty(scales, dtype=torch.float32), x.new_empty((), dtype=torch.int64)


def _require_fit(
    operator: str, gate_up: Tensor, product: Tensor, weight: Tensor | None, scales: Tensor | None = None
) -> None:
    rows, columns = product.shape
    fits = gate_up.shape == (rows, 2 * columns) and (weight is None or weight.shape == (rows,))
    fits = fits and (scales is None or scales.shape == scale_shape(rows, 2 * columns, VECTOR, 0, columns))
    require(operator, fits, *(x for x in (gate_up, product, weight, scales) if x is not None))


def _float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else float32(weight)


define("swiglu(Tensor gate_up, Tensor? weight, str isa) -> Tensor", _swiglu, _like_swiglu)
define(
    "swiglu_backward(Tensor d, Tensor gate_up, Tensor? weight, str isa) -> (Tensor, Tensor)",
    _swiglu_backward,
    _like_swiglu_backward,
)
define(
    "swiglu_backward_codes(Tensor d, Tensor codes, Tensor scales, Tensor? weight, str isa) -> (Tensor, Tensor)",
    _swiglu_backward_codes,
    _like_swiglu_backward_codes,
)
define(
    "swiglu_row_tiles(Tensor gate_up, Tensor? weight, bool power_of_two, str isa) -> (Tensor, Tensor, Tensor)",
    _swiglu_row_tiles,
    _like_swiglu_row_tiles,
)
define(
    "swiglu_column_tiles(Tensor codes, Tensor scales, Tensor? weight, Tensor? offsets, bool power_of_two, str isa) "
    "-> (Tensor, Tensor, Tensor)",
    _swiglu_column_tiles,
    _like_swiglu_column_tiles,
)
