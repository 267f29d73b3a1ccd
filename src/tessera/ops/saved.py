"""Saving values for backward through autograd, so that hooks on saved tensors see every byte that is kept.

A value is a plain tensor, an operand (a TiledTensor is taken apart into its codes, its scales and its facts), or an
`Again`: a value that is not kept but made again from others that are, by the same function on the same bits. Several
ops may keep the same Again; the first whose backward comes makes the value, the last lets go of it, so that a norm
or an up-projection is computed a second time, never a third.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from tessera.numerics.formats import Format
from tessera.numerics.gemm import Operand
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.numerics.tiles import Tile


class Again:
    """The value of `make(*sources)`; kept for backward are the sources, which may be Agains themselves.

    `make` must give the bits that forward had, and have no effect beside: it runs once in each backward pass.
    """

    def __init__(self, make: Callable[..., Any], *sources: "Saved") -> None:
        self.sources = sources
        self.made = _Made(make)


Saved = Operand | Tensor | Again | None


class _Made:
    """The part of an Again that backward holds: no tensors, but between its first and its last reader the value.

    `readers`: how often a backward pass asks for it.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.readers = 0
        self._left = 0
        self._value: Any = None

    def read(self, sources: Callable[[], list[Any]]) -> Any:
        """The value; `sources` is called only where it has to be made."""
        if not self._left:
            self._left, self._value = self.readers, self.make(*sources())
        self._left -= 1
        value = self._value
        if not self._left:
            self._value = None
        return value


class _Facts(NamedTuple):
    """What a TiledTensor is beside its tensors."""

    tile: Tile
    format: Format
    shape: tuple[int, int]
    row_segment: int
    column_segment: int


class _Plan(NamedTuple):
    """How a saved Again is put together: from the plans of its sources."""

    made: _Made
    sources: list[Any]


def save(ctx: Any, *values: Saved) -> None:
    """Keep `values` for backward; call once in a Function's forward."""
    tensors: list[Tensor | None] = []
    ctx.saved_plans = [_take_apart(value, tensors) for value in values]
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> list[Any]:
    """The values given to `save`, in order; those of Agains are made where no earlier reader did."""
    tensors = iter(ctx.saved_tensors)
    return [_put_together(plan, tensors)() for plan in ctx.saved_plans]


def _take_apart(value: Saved, tensors: list[Tensor | None]) -> Any:
    """Append the tensors of `value`; returns its plan: None for a plain tensor, _Facts, or a _Plan."""
    if isinstance(value, Again):
        plan = _Plan(value.made, [])
        known = value.made.readers > 0  # then its sources are read already, once, when it is made
        value.made.readers += 1
        for source in value.sources:
            plan.sources.append(_take_apart(source, tensors))
            if known and isinstance(source, Again):
                source.made.readers -= 1
        return plan
    if isinstance(value, TiledTensor):
        tensors += [value.codes, value.scales, value.nonfinite, value.offsets]
        return _Facts(value.tile, value.format, value.shape, value.row_segment, value.column_segment)
    tensors.append(None if value is None else value.detach())
    return None


def _put_together(plan: Any, tensors: Iterator[Any]) -> Callable[[], Any]:
    """Take the tensors of one value from the iterator; the value is made when the result is called."""
    if isinstance(plan, _Plan):
        sources = [_put_together(source, tensors) for source in plan.sources]
        return lambda: plan.made.read(lambda: [source() for source in sources])
    if plan is None:
        tensor = next(tensors)
        return lambda: tensor
    codes, scales, nonfinite, offsets = (next(tensors) for _ in range(4))
    tile, format, shape, row_segment, column_segment = plan
    tiled = TiledTensor(codes, scales, nonfinite, tile, format, shape, row_segment, column_segment, offsets)
    return lambda: tiled
