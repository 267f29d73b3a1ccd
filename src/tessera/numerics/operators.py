"""The kernels as torch operators, `torch.ops.tessera.*`: torch.compile, FSDP and profilers see them.

The device of the arguments picks the kernel; `backend` names one explicitly (tests hold backends against each
other that way): "reference", "torch", "cpu", or "cpu:avx2" and the other names of native.instruction_sets(). Fake
kernels give shapes and dtypes without computing. Gradients are not defined here: the autograd Functions of
numerics/linear.py and ops/ decide what is saved and in which precision a gradient is made.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tessera import native
from tessera.numerics.formats import E4M3, FORMATS
from tessera.numerics.kernels import cpu, native_gemm
from tessera.numerics.kernels import torch as vectorised
from tessera.numerics.tiles import COLUMN, VECTOR, Tile, scale_shape

BACKENDS = ("cpu", "torch", "reference")
LIBRARY = torch.library.Library("tessera", "DEF")

LIBRARY.define(
    "quantise(Tensor x, int tile_rows, int tile_columns, int row_segment, int column_segment, Tensor? offsets, "
    "str format, str scale_mode, str rounding, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "dequantise(Tensor codes, Tensor scales, int tile_rows, int tile_columns, int row_segment, int column_segment, "
    "Tensor? offsets, str format, int columns, str backend) -> Tensor"
)
LIBRARY.define(
    "requantise_columns(Tensor codes, Tensor scales, str format, int columns, Tensor? offsets, str scale_mode, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_PRODUCT = (
    "str kind, Tensor a_codes, Tensor a_scales, int a_tile_rows, int a_tile_columns, str a_format, "
    "Tensor b_codes, Tensor b_scales, int b_tile_rows, int b_tile_columns, str b_format, int segment, "
    "Tensor? offsets, str accumulation, int interval, ScalarType out_dtype, str backend"
)
LIBRARY.define(f"matmul({_PRODUCT}) -> Tensor")
LIBRARY.define(f"matmul_into(Tensor(a!) out, {_PRODUCT}) -> ()")


Kernels = Any  # a module or an object with the functions of kernels/__init__.py


def kernels(backend: str, device: torch.device) -> Kernels:
    """The kernels named `backend`; "" is the device's default: native ones on a CPU where they are built, else `torch`.

    Raises ValueError for a name that does not exist, and for native kernels or an instruction set that are not there.
    """
    if backend == "":
        return native_kernels("") if device.type == "cpu" and native.available() else vectorised
    name, _, isa = backend.partition(":")
    if name == "cpu":
        return native_kernels(isa)
    if backend not in BACKENDS:
        raise ValueError(f"no kernel backend {backend!r}; there are {', '.join(BACKENDS)}")
    return importlib.import_module(f"tessera.numerics.kernels.{backend}")


@cache
def native_kernels(isa: str) -> cpu.Kernels:
    native.require(isa)
    return cpu.Kernels(isa)


def quantise(
    x: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
    format: str,
    scale_mode: str,
    rounding: str,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/__init__.py."""
    return torch.ops.tessera.quantise(
        x, tile_rows, tile_columns, row_segment, column_segment, offsets, format, scale_mode, rounding, backend
    )


def dequantise(
    codes: Tensor,
    scales: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
    format: str,
    columns: int,
    backend: str = "",
) -> Tensor:
    """See kernels/__init__.py."""
    return torch.ops.tessera.dequantise(
        codes, scales, tile_rows, tile_columns, row_segment, column_segment, offsets, format, columns, backend
    )


def requantise_columns(
    codes: Tensor,
    scales: Tensor,
    format: str,
    columns: int,
    offsets: Tensor | None,
    scale_mode: str,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in 1 x 128 tiles -> E4M3 codes in 128 x 1 tiles: the `quantise` of the `dequantise`, in one visit."""
    return torch.ops.tessera.requantise_columns(codes, scales, format, columns, offsets, scale_mode, backend)


def matmul(
    kind: str,
    a_codes: Tensor,
    a_scales: Tensor,
    a_tile: Tile,
    a_format: str,
    b_codes: Tensor,
    b_scales: Tensor,
    b_tile: Tile,
    b_format: str,
    segment: int,
    offsets: Tensor | None,
    accumulation: str,
    interval: int,
    out_dtype: torch.dtype,
    backend: str = "",
    out: Tensor | None = None,
) -> Tensor:
    """See kernels/__init__.py. `out`: memory for the result, in its shape and dtype, rows contiguous."""
    arguments = (
        kind,
        a_codes,
        a_scales,
        a_tile.rows,
        a_tile.columns,
        a_format,
        b_codes,
        b_scales,
        b_tile.rows,
        b_tile.columns,
        b_format,
        segment,
        offsets,
        accumulation,
        interval,
        out_dtype,
        backend,
    )
    if out is None:
        return torch.ops.tessera.matmul(*arguments)
    torch.ops.tessera.matmul_into(out, *arguments)
    return out


def _quantise(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = arguments
    return kernels(str(backend), x.device).quantise(x, *rest)


def _dequantise(codes: Tensor, *arguments: object) -> Tensor:
    *rest, backend = arguments
    return kernels(str(backend), codes.device).dequantise(codes, *rest)


def _requantise_columns(
    codes: Tensor,
    scales: Tensor,
    format: str,
    columns: int,
    offsets: Tensor | None,
    scale_mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = kernels(backend, codes.device)
    if isinstance(chosen, cpu.Kernels) and columns:
        return chosen.requantise_columns(codes, scales, format, columns, offsets, scale_mode)
    values = chosen.dequantise(codes, scales, *_spread(VECTOR), None, format, columns)
    return chosen.quantise(values, *_spread(COLUMN), offsets, E4M3.name, scale_mode, "nearest")


def _spread(tile: Tile) -> tuple[int, int, int, int]:
    return tile.rows, tile.columns, 0, 0


def _matmul(kind: str, a_codes: Tensor, *arguments: object) -> Tensor:
    *rest, backend = arguments
    return kernels(str(backend), a_codes.device).matmul(kind, a_codes, *rest)


def _matmul_into(out: Tensor, kind: str, a_codes: Tensor, *arguments: object) -> None:
    *rest, backend = arguments
    chosen = kernels(str(backend), a_codes.device)
    in_place = isinstance(chosen, cpu.Kernels)
    if in_place:
        chosen.matmul(kind, a_codes, *rest, out=out)
    else:
        out.copy_(chosen.matmul(kind, a_codes, *rest))


def _fake_quantise(
    x: Tensor,
    tile_rows: int,
    tile_columns: int,
    row_segment: int,
    column_segment: int,
    offsets: Tensor | None,
    format: str,
    scale_mode: str,
    rounding: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    groups = 0 if offsets is None else offsets.numel() - 1
    shape = scale_shape(rows, columns, Tile(tile_rows, tile_columns), row_segment, column_segment, groups)
    return (
        x.new_empty(rows, FORMATS[format].code_bytes(columns), dtype=torch.uint8),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty((), dtype=torch.int64),
    )


def _fake_dequantise(codes: Tensor, scales: Tensor, *arguments: object) -> Tensor:
    columns = arguments[-2]
    assert isinstance(columns, int)  # by the schema
    return codes.new_empty(codes.shape[0], columns, dtype=torch.float32)


def _fake_requantise_columns(
    codes: Tensor,
    scales: Tensor,
    format: str,
    columns: int,
    offsets: Tensor | None,
    scale_mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = codes.new_empty(codes.shape[0], columns)
    return _fake_quantise(values, *_spread(COLUMN), offsets, E4M3.name, scale_mode, "nearest", backend)


def _fake_matmul(
    kind: str,
    a_codes: Tensor,
    a_scales: Tensor,
    a_tile_rows: int,
    a_tile_columns: int,
    a_format: str,
    b_codes: Tensor,
    b_scales: Tensor,
    b_tile_rows: int,
    b_tile_columns: int,
    b_format: str,
    segment: int,
    offsets: Tensor | None,
    accumulation: str,
    interval: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    groups = 1 if offsets is None else offsets.numel() - 1
    shape = native_gemm.output_shape(kind, a_codes.shape, b_codes.shape, groups)
    return a_codes.new_empty(shape, dtype=out_dtype)


for _name, _implementation, _fake in (
    ("quantise", _quantise, _fake_quantise),
    ("dequantise", _dequantise, _fake_dequantise),
    ("requantise_columns", _requantise_columns, _fake_requantise_columns),
    ("matmul", _matmul, _fake_matmul),
    ("matmul_into", _matmul_into, lambda *_: None),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"tessera::{_name}", _fake, lib=LIBRARY)
