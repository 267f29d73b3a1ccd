"""Values made again in backward: once a pass however many read them, of the same bits, and gone afterwards."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops.saved import Again, load, save
from tests.ops.float64 import BF16, normal


class _Reader(torch.autograd.Function):
    """Passes x on; in backward hands what it loaded to `see`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Any, see: Any) -> Tensor:
        ctx.see = see
        save(ctx, value)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.see(*load(ctx))
        return dy, None, None


class Maker:
    """Doubles a tensor, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: weakref.ref[Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        made = 2 * x
        self.last = weakref.ref(made)
        return made


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_a_value_is_made_once_for_all_its_readers(readers: int) -> None:
    x, seen, maker = normal(4).requires_grad_(), [], Maker()
    value = Again(maker, x)
    y = x
    for _ in range(readers):
        y = _Reader.apply(y, value, lambda v: seen.append(v.clone()))
    assert maker.calls == 0
    y.sum().backward()
    assert maker.calls == 1 and len(seen) == readers and all(torch.equal(v, 2 * x) for v in seen)


def test_a_value_does_not_outlive_its_last_reader() -> None:
    x, maker, alive = normal(4).requires_grad_(), Maker(), []

    def see(_: Tensor) -> None:
        gc.collect()
        alive.append(maker.last is not None and maker.last() is not None)

    value = Again(maker, x)
    y = _Reader.apply(_Reader.apply(x, value, see), value, see)
    y.sum().backward(retain_graph=True)
    gc.collect()
    assert alive == [True, True] and maker.last is not None and maker.last() is None


def test_a_second_backward_makes_it_again() -> None:
    x, maker, seen = normal(4).requires_grad_(), Maker(), []
    value = Again(maker, x)
    y = _Reader.apply(_Reader.apply(x, value, seen.append), value, seen.append)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert maker.calls == 2 and len(seen) == 4


def test_values_made_of_made_values_are_shared_at_every_level() -> None:
    x, inner, outer, seen = normal(4).requires_grad_(), Maker(), Maker(), []
    base = Again(inner, x)
    top = Again(outer, base)
    y = x
    for value in (base, top, base, top):
        y = _Reader.apply(y, value, lambda v: seen.append(v.clone()))
    for _ in range(3):
        seen.clear()
        y.sum().backward(retain_graph=True)
        assert [float(v[0] / x.detach()[0]) for v in seen] == [4.0, 2.0, 4.0, 2.0]
    assert (inner.calls, outer.calls) == (3, 3)
    gc.collect()
    assert inner.last is not None and inner.last() is None  # the levels let go of theirs too


def test_only_sources_are_kept() -> None:
    x = normal(8, 4).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _Reader.apply(x, Again(Maker(), x), lambda v: None)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_an_operand_comes_back_whole_and_may_be_made_again() -> None:
    role, x = float64.role(), normal(70, 200).to(BF16).requires_grad_()
    operand, seen = role.input(x.detach()), []
    y = _Reader.apply(_Reader.apply(x, operand, seen.append), Again(role.input_again, x), seen.append)
    y.sum().backward()
    for found in seen:
        assert isinstance(found, TiledTensor) and torch.equal(found.codes, operand.codes)
        assert torch.equal(found.scales, operand.scales) and found.shape == operand.shape
        assert (found.tile, found.format) == (operand.tile, operand.format)


def test_a_source_changed_in_between_is_noticed() -> None:
    x = normal(4).requires_grad_()
    source = x.detach().clone()
    y = _Reader.apply(x, Again(Maker(), source), lambda v: None)
    source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
