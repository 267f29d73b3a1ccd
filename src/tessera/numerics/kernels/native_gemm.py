"""The three GEMMs in compiled code (native/source/gemm.cpp): codes or BF16 in, float32 sums, float32 or BF16 out.

Kinds and shapes are those of kernels/__init__.py. Where all scales are powers of two near enough to 1 they are folded
into BF16 values, which is exact, and the sum runs through; otherwise the sum is the law's, a float32 sum for each 128
of the contraction and then y = fma(s_a * s_b, p, y).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.native.scratch import scratch
from tessera.numerics.tiles import TILE, VECTOR, Tile

KINDS = ("fprop", "dgrad", "wgrad")
TYPES = {"float32": 0, "bfloat16": 1, "e4m3": 2, "e5m2": 3}  # OperandType of source/operand.h
OUT_FLOAT32, OUT_BFLOAT16, OUT_ADDED = range(3)
CHUNK = 32  # of the contraction, and columns of a panel

PACK = Kernel("gemm_pack", "p")
GEMM = Kernel("gemm", "p")
FOLDABLE = Kernel("foldable", "pipiii", counts=True)

# Scales are folded where neither a value nor a product can leave BF16's normal numbers, which matrix units flush to
# zero: values are 2^-16 (E5M2's smallest) to 2^16 times their scale.
VALUE_RANGE, PRODUCT_RANGE = 100, 80


@dataclass(frozen=True)
class Side:
    """One operand: codes uint8 with `scales`, or values (`scales` None); rows are read through `index` int64."""

    data: Tensor
    format: str
    scales: Tensor | None = None
    tile: Tile = VECTOR
    row_segment: int = 0
    column_segment: int = 0
    index: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0] if self.index is None else self.index.numel()


class _Operand(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "scales", "index")] + [
        (name, ctypes.c_int64)
        for name in (
            "type",
            "stride",
            "scale_stride",
            "tile_rows",
            "tile_columns",
            "row_segment",
            "column_segment",
        )
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        ("a", _Operand),
        ("b", _Operand),
        *((name, ctypes.c_int64) for name in ("kind", "groups", "fold", "tokens", "m", "n", "k")),
        ("offsets", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_type", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
    ]


def values(x: Tensor, index: Tensor | None = None) -> Side:
    """BF16 or float32 values (these are rounded to BF16) as an operand."""
    return Side(
        x if x.stride(-1) == 1 else x.contiguous(), "float32" if x.dtype == torch.float32 else "bfloat16", index=index
    )


def matmul(
    kind: str,
    a: Side,
    b: Side,
    offsets: Tensor | None,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    add: bool = False,
    packed: Tensor | None = None,
    isa: str = "",
) -> Tensor | None:
    """See kernels/__init__.py; None where the scales do not allow it (`promotes`).

    `out`: where the result goes, rows contiguous; with `add` (float32 alone) it is added to what is there.
    `packed`: b as `pack` left it, for products that share it.
    """
    fold = foldable(a, b, isa)
    if not fold and not promotes(kind, a, b):
        return None
    groups = 1 if offsets is None else offsets.numel() - 1
    rows, k = a.rows, a.data.shape[1]
    height, n = output_shape(kind, (rows, k), (b.rows, b.data.shape[1]), groups)
    if out is None:
        out = a.data.new_empty(height, n, dtype=out_dtype)
    contraction = rows if kind == "wgrad" else k
    problem = _Problem(
        _operand(a),
        _operand(b),
        KINDS.index(kind),
        groups,
        fold,
        rows,
        height // groups if kind == "wgrad" else height,
        n,
        k,
        None if offsets is None else offsets.data_ptr(),
        None,
        out.data_ptr(),
        OUT_ADDED if add else OUT_FLOAT32 if out.dtype == torch.float32 else OUT_BFLOAT16,
        out.stride(0),
    )
    if packed is None:
        packed = scratch(_packed_bytes(kind, rows, n, k, groups))
        problem.packed = packed.data_ptr()
        PACK(groups * -(-n // CHUNK), ctypes.addressof(problem), work=CHUNK * contraction, isa=isa)
    problem.packed = packed.data_ptr()
    GEMM(height, ctypes.addressof(problem), work=n * contraction // 16, grain=CHUNK, isa=isa)
    return out


def pack(kind: str, b: Side, isa: str = "") -> Tensor:
    """b of "fprop" or "dgrad", values without groups, as `matmul` takes it; for products that follow in turn."""
    rows, columns = b.data.shape
    n, k = (rows, columns) if kind == "fprop" else (columns, rows)
    packed = b.data.new_empty(packed_bytes(kind, rows, columns), dtype=torch.uint8)
    problem = _Problem(b=_operand(b), kind=KINDS.index(kind), groups=1, fold=True, n=n, k=k, packed=packed.data_ptr())
    PACK(-(-n // CHUNK), ctypes.addressof(problem), work=CHUNK * k, isa=isa)
    return packed


def packed_bytes(kind: str, rows: int, columns: int) -> int:
    """Of what `pack` makes of a matrix."""
    n, k = (rows, columns) if kind == "fprop" else (columns, rows)
    return _packed_bytes(kind, 0, n, k, 1)


def _packed_bytes(kind: str, rows: int, n: int, k: int, groups: int) -> int:
    chunks = rows // CHUNK + groups if kind == "wgrad" else groups * -(-k // CHUNK)
    return -(-n // CHUNK) * chunks * CHUNK * CHUNK * 2


def output_shape(kind: str, a: Sequence[int], b: Sequence[int], groups: int) -> tuple[int, int]:
    """Shape of the product of operands of shapes a and b; see kernels/__init__.py."""
    return {"fprop": (a[0], b[0] // groups), "dgrad": (a[0], b[1]), "wgrad": (groups * a[1], b[1])}[kind]


def foldable(a: Side, b: Side, isa: str = "") -> bool:
    """True where both sides' scales, powers of two all of them, can be folded into BF16 values."""
    counts = [0 if side.scales is None else side.scales.numel() for side in (a, b)]
    if not any(counts):
        return True
    return FOLDABLE(1, a.scales, counts[0], b.scales, counts[1], VALUE_RANGE, PRODUCT_RANGE, isa=isa) == 1


def promotes(kind: str, a: Side, b: Side) -> bool:
    """True where each block of 128 of the contraction has one scale a row and a column."""
    along = {
        "fprop": (a.tile.columns, b.tile.columns),
        "dgrad": (a.tile.columns, b.tile.rows),
        "wgrad": (a.tile.rows, b.tile.rows),
    }[kind]
    if any(extent not in (0, TILE) for extent in along) or a.scales is None or b.scales is None:
        return False
    whole = a.data.shape[1]  # a segment as long as the contraction never restarts the tiles inside it
    segments = (a.column_segment, b.row_segment) if kind == "dgrad" else ()
    return not any(segment % TILE and segment != whole for segment in segments)


def _operand(side: Side) -> _Operand:
    scales = side.scales
    return _Operand(
        side.data.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if side.index is None else side.index.data_ptr(),
        TYPES[side.format],
        side.data.stride(0),
        0 if scales is None else scales.stride(0),
        side.tile.rows,
        side.tile.columns,
        side.row_segment or side.rows,
        side.column_segment or side.data.shape[1],
    )
