"""Saving operands for backward through autograd, so that hooks on saved tensors see every byte that is kept.

An operand is a plain tensor or a TiledTensor; autograd saves tensors. `save` takes a TiledTensor apart into its codes,
its scales and its facts, `load` puts it back.
"""

from typing import Any, NamedTuple

from torch import Tensor

from tessera.numerics.formats import Format
from tessera.numerics.gemm import Operand
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.numerics.tiles import Tile

Saved = Operand | Tensor | None


class _Facts(NamedTuple):
    """What a TiledTensor is beside its tensors."""

    tile: Tile
    format: Format
    shape: tuple[int, int]
    row_segment: int
    column_segment: int


def save(ctx: Any, *values: Saved) -> None:
    """Keep `values` (operands, tensors, None) for backward; call once in a Function's forward."""
    tensors: list[Tensor | None] = []
    facts: list[_Facts | None] = []
    for value in values:
        if isinstance(value, TiledTensor):
            tensors += [value.codes, value.scales, value.nonfinite, value.offsets]
            facts.append(_Facts(value.tile, value.format, value.shape, value.row_segment, value.column_segment))
        else:
            tensors.append(value)
            facts.append(None)
    ctx.save_for_backward(*tensors)
    ctx.saved_facts = facts


def load(ctx: Any) -> list[Any]:
    """The values given to `save`, in order."""
    tensors = iter(ctx.saved_tensors)
    values: list[Any] = []
    for fact in ctx.saved_facts:
        if fact is None:
            values.append(next(tensors))
            continue
        codes, scales, nonfinite, offsets = (next(tensors) for _ in range(4))
        tile, format, shape, row_segment, column_segment = fact
        values.append(TiledTensor(codes, scales, nonfinite, tile, format, shape, row_segment, column_segment, offsets))
    return values
