"""Working memory of kernels that is written before it is read: one buffer a thread, kept from call to call.

Fresh buffers of this size come as pages that the system has to clear, which costs a CPU more than their contents.
"""

import threading

import torch
from torch import Tensor

LARGEST_KEPT = 1 << 26  # bytes; a larger one is let go of after its call

_local = threading.local()


def scratch(size: int) -> Tensor:
    """At least `size` bytes, uint8, aligned for any kernel; valid until the thread's next call."""
    kept: Tensor | None = getattr(_local, "buffer", None)
    if kept is not None and kept.numel() >= size:
        return kept
    buffer = torch.empty(size, dtype=torch.uint8)
    if size <= LARGEST_KEPT:
        _local.buffer = buffer
    return buffer
