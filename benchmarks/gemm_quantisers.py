"""Quantisers and decoding beside a copy that moves as many bytes: `y.copy_(x)` of half of what they read and write.

Bytes are those of the operands and results, each once: a quantiser that reads its input twice from memory shows as a
smaller fraction.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gemm_systems import Arithmetic
from paired import Clock, Timed, measure
from torch import Tensor

from tessera.numerics import BLOCK, COLUMN, VECTOR, TiledTensor

# Rows and columns: 0.4 to 1.1 MiB moved, and 250 to 630 MiB. The columns are DeepSeek-V3's hidden size and an eighth of
# it: at a power of two the 128 rows of a tile would lie in the same few sets of the caches.
SIZES = {"l2": (256, 896), "memory": (18432, 7168)}
TILES = {"1x128": VECTOR, "128x1": COLUMN, "128x128": BLOCK}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALES = "power_of_two"


def quantiser_rows(place: str, rounds: int, threads: int, arithmetic: Arithmetic) -> list[dict[str, Any]]:
    """Measured rows at SIZES[place]."""
    rows, columns = SIZES[place]
    found, clock = [], Clock(threads)
    for (name, source, call, size), (*_, one, _) in zip(
        _calls(rows, columns, arithmetic), _calls(1, 1, arithmetic), strict=True
    ):
        half = torch.zeros(size // 2, dtype=torch.uint8)
        copy = Timed(_copy(half, torch.zeros_like(half)))
        timed, empty = Timed(call, copy), Timed(one)
        measure([copy, timed, empty], rounds, clock)
        own, other = timed.figures(), copy.figures()
        seconds, copied = own["median_ms"] / 1e3, other["median_ms"] / 1e3
        facts = {"quantiser": name, "from": source, "where": place, "rows": rows, "columns": columns}
        facts |= {"threads": threads, "isa": arithmetic.isa, "bytes": size}
        facts |= {key: own[key] for key in ("median_ms", "quartiles", "median_wall_ms", "wall_quartiles")}
        facts |= {"elements_per_s": rows * columns / seconds, "gb_per_s": size / seconds / 1e9}
        facts |= {"copy_gb_per_s": 2 * (size // 2) / copied / 1e9, "fraction_of_copy": 1 / own["ratio"]}
        facts |= {"call_ms": empty.figures()["median_ms"]}
        found.append(facts | {"wall_fraction_of_copy": 1 / own["wall_ratio"]})
    return found


def _calls(rows: int, columns: int, arithmetic: Arithmetic) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """(quantiser, from what, the call, bytes read and written)."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    for source, dtype in DTYPES.items():
        values = x.to(dtype)
        for name, tile in TILES.items():
            made = arithmetic.quantise(values, tile, SCALES)
            yield name, source, _quantise(arithmetic, values, tile), values.nbytes + made.nbytes
    coded = arithmetic.quantise(x, VECTOR, SCALES)
    made = arithmetic.columnwise(coded, SCALES)
    yield "requantise_columns", "1x128", lambda: arithmetic.columnwise(coded, SCALES), coded.nbytes + made.nbytes
    yield "decode", "1x128", lambda: arithmetic.decode(coded), coded.nbytes + x.nbytes


def _quantise(arithmetic: Arithmetic, x: Tensor, tile: Any) -> Callable[[], TiledTensor]:
    return lambda: arithmetic.quantise(x, tile, SCALES)


def _copy(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: y.copy_(x)
