"""Sorting tokens by expert and adding their results up (native/source/slots.cpp), on plain tensors.

Indices are checked where they are used: one out of range raises IndexError, and nothing is read or written for it.
The gather between the two is torch's index_select, which a compiled loop of copies does not beat.
"""

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.ops.kernels import TYPES, define, require

SORT = Kernel("sort_slots", "piiipppp", counts=True)
COMBINE = {t: Kernel(f"combine_{t}", "pppiii", counts=True) for t in TYPES.values()}


def sort_slots(experts: Tensor, num_experts: int, isa: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """experts int64 [T, k] -> (token [T * k], choice [T * k], position [T * k], offsets [E + 1]), all int64."""
    return torch.ops.tessera.sort_slots(experts, num_experts, isa)


def combine(rows: Tensor, position: Tensor, num_tokens: int, isa: str = "") -> Tensor:
    """rows [S, H], position int64 [T * k] -> [T, H]: the k rows of each token added in float32, in order."""
    return torch.ops.tessera.combine(rows, position, num_tokens, isa)


def _sort_slots(experts: Tensor, num_experts: int, isa: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, choices = experts.long().contiguous(), experts.numel()
    found = _like_sort_slots(experts, num_experts, isa)
    if SORT(1, experts, choices, experts.shape[1], num_experts, *found, isa=isa):
        raise IndexError(f"expert ids reach from {experts.min()} to {experts.max()}; there are {num_experts} experts")
    return found


def _like_sort_slots(experts: Tensor, num_experts: int, isa: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choices = experts.shape[0] * experts.shape[1]
    token, choice, position = (experts.new_empty(choices, dtype=torch.int64) for _ in range(3))
    return token, choice, position, experts.new_empty(num_experts + 1, dtype=torch.int64)


def _combine(rows: Tensor, position: Tensor, num_tokens: int, isa: str) -> Tensor:
    rows, position = rows.contiguous(), position.long().contiguous()
    out = _like_combine(rows, position, num_tokens, isa)
    slots, columns = rows.shape
    choices = position.numel() // max(1, num_tokens)
    require("combine", position.numel() == num_tokens * choices, rows, position)
    kernel = COMBINE[TYPES[rows.dtype]]
    outside = kernel(num_tokens, rows, position, out, slots, choices, columns, work=choices * columns, isa=isa)
    if outside:
        raise IndexError(f"positions reach from {position.min()} to {position.max()}; there are {slots} rows")
    return out


def _like_combine(rows: Tensor, position: Tensor, num_tokens: int, isa: str) -> Tensor:
    return rows.new_empty((num_tokens, rows.shape[1]))


define(
    "sort_slots(Tensor experts, int num_experts, str isa) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort_slots,
    _like_sort_slots,
)
define("combine(Tensor rows, Tensor position, int num_tokens, str isa) -> Tensor", _combine, _like_combine)
