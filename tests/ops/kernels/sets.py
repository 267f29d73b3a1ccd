"""The instruction sets whose kernels are tested, and rows in other places of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tessera import native

SETS = [name for name in native.instruction_sets() if name in ("avx512", "avx2", "portable")]
each_set = pytest.mark.parametrize("isa", SETS or [pytest.param("", marks=pytest.mark.skip(native.problem()))])
KERNELS = ["torch", *SETS]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def misaligned(x: Tensor) -> Tensor:
    """The same values at an odd place in memory, with NaN on both sides."""
    wide = torch.full((x.numel() + 6,), torch.nan).to(x.dtype)
    moved = wide[3 : 3 + x.numel()].view(x.shape)
    return moved.copy_(x)


def apart(x: Tensor, gap: int = 3) -> Tensor:
    """The same values with `gap` NaN between rows."""
    wide = torch.full((x.shape[0], x.shape[1] + gap), torch.nan).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]
