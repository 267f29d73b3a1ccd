"""Memory that a gradient leaves for the next one."""

import weakref

import pytest
import torch

from tessera.ops.gradient_room import LARGE, leave_room, room_for_gradient, room_for_large_gradient


def parameter(*shape: int) -> torch.nn.Parameter:
    """With a gradient, made by an op that asks for room."""
    weight = torch.nn.Parameter(torch.ones(shape))
    room_for_gradient(weight)
    weight.grad = torch.full(shape, 3.0)
    return weight


def test_room_is_that_of_the_last_gradient_and_given_once() -> None:
    weight = parameter(4, 5)
    place = weight.grad.data_ptr()
    leave_room(weight)
    assert weight.grad is None
    first, second = room_for_gradient(weight), room_for_gradient(weight)
    assert first.data_ptr() == place != second.data_ptr()
    assert first.shape == second.shape == (4, 5) and first.dtype == second.dtype == torch.float32


def test_autograd_takes_room_as_the_gradient_itself() -> None:
    weight = parameter(4, 5)
    place = weight.grad.data_ptr()
    leave_room(weight)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w.sum()

        @staticmethod
        def backward(ctx, gradient):
            (w,) = ctx.saved_tensors
            return room_for_gradient(w).fill_(2.0)

    Op.apply(weight).backward()
    assert weight.grad.data_ptr() == place and (weight.grad == 2).all()
    Op.apply(weight).backward()  # a second micro-batch has room of its own, and is added
    assert weight.grad.data_ptr() == place and (weight.grad == 4).all()


def test_where_no_op_asks_for_room_no_memory_is_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 5))
    weight.grad = torch.ones(4, 5)
    gone = weakref.ref(weight.grad.untyped_storage())
    leave_room(weight)
    assert weight.grad is None and gone() is None


def test_without_a_gradient_room_is_fresh_and_what_was_left_stays() -> None:
    weight = parameter(4, 5)
    place = weight.grad.data_ptr()
    leave_room(weight)
    leave_room(weight)  # a step that made no gradient
    assert room_for_gradient(weight).data_ptr() == place
    assert room_for_gradient(torch.nn.Parameter(torch.ones(2))).shape == (2,)


@pytest.mark.parametrize("kind", ["strides", "dtype", "shape"])
def test_a_gradient_of_another_form_is_no_room(kind: str) -> None:
    weight = parameter(4, 5)
    old = weight.grad
    if kind == "strides":
        weight.grad = torch.ones(5, 4).t()
    elif kind == "dtype":
        weight = torch.nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16))
        weight.grad = torch.ones(4, 5, dtype=torch.bfloat16)
    leave_room(weight)
    if kind == "shape":
        weight.data = torch.ones(2, 5)
    room = room_for_gradient(weight)
    assert room.is_contiguous() and room.dtype == torch.float32 and room.shape == weight.shape
    assert room.data_ptr() != old.data_ptr()


def test_only_large_parameters_keep_room() -> None:
    small, large = torch.nn.Parameter(torch.ones(LARGE - 1)), torch.nn.Parameter(torch.ones(LARGE))
    assert room_for_large_gradient(small) is None
    room = room_for_large_gradient(large)
    assert room is not None and room.shape == large.shape
    large.grad, small.grad = room, torch.ones_like(small)
    place = room.data_ptr()
    leave_room(large), leave_room(small)
    again = room_for_large_gradient(large)
    assert again is not None and again.data_ptr() == place
