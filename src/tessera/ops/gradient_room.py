"""Memory for the gradient of a large weight: that of the step before, whose pages are there already.

A gradient that an op makes anew in each step is memory that the system has to find and fill with zeros, page by page,
which takes a CPU twice as long as writing the gradient itself. So the optimizer leaves the memory with the parameter
when it lets go of a gradient, and the op that makes the next one takes it away. It is given once: autograd takes a
gradient as it is only where nobody else holds it, and a second micro-batch needs room of its own. Where no op has ever
asked for a parameter's room, none is kept.
"""

import torch
from torch import Tensor

LARGE = 1 << 20  # elements from which on it is worth keeping; smaller gradients lie in memory that the heap has anyway
_ROOM = "_room_for_gradient"  # attribute of the parameters whose op asks for room; None while it is away


def leave_room(parameter: Tensor) -> None:
    """Forget the parameter's gradient, and keep its memory for the next one; its values may be overwritten from now."""
    if parameter.grad is not None and _ROOM in parameter.__dict__:
        setattr(parameter, _ROOM, parameter.grad)
    parameter.grad = None


def room_for_gradient(parameter: Tensor) -> Tensor:
    """Memory in the shape of `parameter`, contiguous float32, its contents undefined; the caller owns it."""
    room: Tensor | None = parameter.__dict__.get(_ROOM)
    setattr(parameter, _ROOM, None)
    if room is not None and room.is_contiguous():
        wanted = (parameter.shape, parameter.device, torch.float32)
        if (room.shape, room.device, room.dtype) == wanted:
            return room
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def room_for_large_gradient(parameter: Tensor) -> Tensor | None:
    """The same for a parameter of LARGE elements and more on a CPU; None for others, of which no room is kept."""
    return room_for_gradient(parameter) if parameter.is_cpu and parameter.numel() >= LARGE else None
