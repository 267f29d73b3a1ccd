"""RMSNorm as compiled kernels (native/source/norm.cpp): rms_norm.py's functions on plain tensors.

A row's sums have an order that depends on its length alone; dgamma is added up by chunks of rows, then over the chunks
in order. So nothing depends on the batch or on the number of threads.
"""

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.ops.kernels import TYPES, define, float32, require, strided

CHUNK = 64  # rows whose share of dgamma is one partial sum; norm.cpp has it too
NORM = {t: Kernel(f"norm_{t}", "pipppif") for t in TYPES.values()}
ADD = {t: Kernel(f"add_norm_{t}", "ppppppif") for t in TYPES.values()}
AGAIN = {t: Kernel(f"norm_again_{t}", "pipppi") for t in TYPES.values()}
BACKWARD = {t: Kernel(f"norm_backward_{t}", "ppipppppi") for t in ("f32_f32", "f32_bf16", "bf16_bf16")}
DGAMMA = Kernel("norm_dgamma", "ppii")


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, isa: str = "") -> tuple[Tensor, Tensor]:
    """x [T, H], gamma [H] float32 -> (y [T, H] in x's dtype, 1 / rms [T, 1] float32)."""
    return torch.ops.tessera.rms_norm(x, gamma, epsilon, isa)


def add_rms_norm(
    x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, isa: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta [T, H] of one dtype, gamma [H] float32 -> (x + delta, its norm, 1 / rms [T, 1] float32)."""
    return torch.ops.tessera.add_rms_norm(x, delta, gamma, epsilon, isa)


def rms_norm_again(x: Tensor, gamma: Tensor, inverse_rms: Tensor, isa: str = "") -> Tensor:
    """x [T, H] and its 1 / rms [T, 1] -> y [T, H], the bits of `rms_norm`."""
    return torch.ops.tessera.rms_norm_again(x, gamma, inverse_rms, isa)


def rms_norm_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, inverse_rms: Tensor, passing: Tensor | None, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """dy [T, H] float32 or in x's dtype, passing [T, H] in x's dtype -> (dx in x's dtype, dgamma [H] float32)."""
    return torch.ops.tessera.rms_norm_backward(dy, x, gamma, inverse_rms, passing, isa)


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float, isa: str) -> tuple[Tensor, Tensor]:
    require("rms_norm", gamma.shape == x.shape[1:], x, gamma)
    (x, stride), (rows, columns) = strided(x), x.shape
    y, inverse_rms = _like_rms_norm(x, gamma, epsilon, isa)
    kernel = NORM[TYPES[x.dtype]]
    kernel(rows, x, stride, float32(gamma), y, inverse_rms, columns, epsilon, work=columns, isa=isa)
    return y, inverse_rms


def _like_rms_norm(x: Tensor, gamma: Tensor, epsilon: float, isa: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _add_rms_norm(x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, isa: str) -> tuple[Tensor, Tensor, Tensor]:
    require("add_rms_norm", x.shape == delta.shape and gamma.shape == x.shape[1:], x, delta, gamma)
    x, delta, (rows, columns) = x.contiguous(), delta.contiguous(), x.shape
    total, y, inverse_rms = _like_add_rms_norm(x, delta, gamma, epsilon, isa)
    kernel = ADD[TYPES[x.dtype]]
    kernel(rows, x, delta, float32(gamma), total, y, inverse_rms, columns, epsilon, work=columns, isa=isa)
    return total, y, inverse_rms


def _like_add_rms_norm(
    x: Tensor, delta: Tensor, gamma: Tensor, epsilon: float, isa: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_like_rms_norm(x, gamma, epsilon, isa)


def _rms_norm_again(x: Tensor, gamma: Tensor, inverse_rms: Tensor, isa: str) -> Tensor:
    require("rms_norm_again", (len(inverse_rms), *gamma.shape) == x.shape, x, gamma, inverse_rms)
    (x, stride), (rows, columns) = strided(x), x.shape
    y = _like_rms_norm_again(x, gamma, inverse_rms, isa)
    kernel = AGAIN[TYPES[x.dtype]]
    kernel(rows, x, stride, float32(gamma), float32(inverse_rms), y, columns, work=columns, isa=isa)
    return y


def _like_rms_norm_again(x: Tensor, gamma: Tensor, inverse_rms: Tensor, isa: str) -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, inverse_rms: Tensor, passing: Tensor | None, isa: str
) -> tuple[Tensor, Tensor]:
    fits = x.shape == dy.shape == (x if passing is None else passing).shape == (len(inverse_rms), *gamma.shape)
    require("rms_norm_backward", fits, dy, x, gamma, inverse_rms)
    (x, stride), (rows, columns) = strided(x), x.shape
    dy, passing = dy.contiguous(), None if passing is None else passing.contiguous()
    dx, dgamma = _like_rms_norm_backward(dy, x, gamma, inverse_rms, passing, isa)
    chunks = -(-rows // CHUNK)
    partial = torch.empty(chunks, columns)
    operands = (dy, x, stride, float32(gamma), float32(inverse_rms), passing, dx, partial, columns)
    BACKWARD[f"{TYPES[dy.dtype]}_{TYPES[x.dtype]}"](rows, *operands, work=columns, grain=CHUNK, isa=isa)
    DGAMMA(columns, partial, dgamma, chunks, columns, work=chunks, grain=16, isa=isa)
    return dx, dgamma


def _like_rms_norm_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, inverse_rms: Tensor, passing: Tensor | None, isa: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape, dtype=torch.float32)


define("rms_norm(Tensor x, Tensor gamma, float epsilon, str isa) -> (Tensor, Tensor)", _rms_norm, _like_rms_norm)
define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor gamma, float epsilon, str isa) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    _like_add_rms_norm,
)
define(
    "rms_norm_again(Tensor x, Tensor gamma, Tensor inverse_rms, str isa) -> Tensor",
    _rms_norm_again,
    _like_rms_norm_again,
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor gamma, Tensor inverse_rms, Tensor? passing, str isa) "
    "-> (Tensor, Tensor)",
    _rms_norm_backward,
    _like_rms_norm_backward,
)
