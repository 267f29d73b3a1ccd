"""The ops' compiled kernels as torch operators, `torch.ops.tessera.*`: those of tessera.native, on a CPU.

What is computed is stated by the op that calls (rms_norm, swiglu, dispatch, routing, latent_attention with
attention_strips) or, of the cross-entropy, beside it; the PyTorch code is the path of
other devices and of installations without a compiler. Every op takes `kernel`: "" is the best there is, "torch" the
PyTorch code, otherwise the instruction set to use. Gradients are the ops' own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera import native

LIBRARY = torch.library.Library("tessera", "FRAGMENT")
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # elements that kernels read, and their suffix in a name


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one operator; `fake` gives shapes and dtypes alone."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"tessera::{name}", fake, lib=LIBRARY)


def usable(kernel: str, *tensors: Tensor) -> bool:
    """Whether a compiled kernel can take `tensors`, and `kernel` allows one."""
    return (
        kernel != "torch" and all(x.device.type == "cpu" and x.dtype in TYPES for x in tensors) and native.available()
    )


def require(operator: str, holds: bool, *tensors: Tensor) -> None:
    """Raise ValueError unless `holds`: a kernel trusts the shapes it is given."""
    if not holds:
        raise ValueError(f"{operator}: shapes {', '.join(str(tuple(x.shape)) for x in tensors)} do not fit each other")


def strided(x: Tensor) -> tuple[Tensor, int]:
    """x [R, C] -> (x, or a copy where its columns lie apart; elements from a row to the next)."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    return x, x.stride(0)


def float32(x: Tensor) -> Tensor:
    return x.float().contiguous()
