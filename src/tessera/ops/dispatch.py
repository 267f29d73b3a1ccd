"""Carrying tokens to their experts and the results back: the protocol and its local form.

A token and one of its experts make a *slot*; slots are sorted by expert, then by token (a counting sort's order, so
the result does not depend on anything else). What travels forward are operand rows (codes and scales, or values);
results come back as activations. Backward is the mirror image: the output's gradient goes out, the input's comes
back. An expert-parallel dispatcher implements the same four methods over an all-to-all.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tessera.numerics.gemm import Operand
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops.kernels import slots as slots_kernels
from tessera.ops.kernels import usable


@dataclass(frozen=True)
class Slots:
    """Where each (token, choice) sits after sorting by expert.

    token: int64 [S], the token of each sorted slot; choice: int64 [S], its index t * k + j in the routing tables;
    position: int64 [T * k], the sorted place of each (token, choice); offsets: int64 [E + 1], groups of experts.
    """

    token: Tensor
    choice: Tensor
    position: Tensor
    offsets: Tensor


def sort_slots(experts: Tensor, num_experts: int, kernel: str = "") -> Slots:
    """experts int64 [T, k] -> Slots; S = T * k, no slot is dropped."""
    if usable(kernel) and experts.device.type == "cpu":
        return Slots(*slots_kernels.sort_slots(experts, num_experts, kernel))
    flat = experts.flatten()
    choice = torch.sort(flat, stable=True).indices
    position = torch.empty_like(choice)
    position[choice] = torch.arange(choice.numel(), device=choice.device)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Slots(choice // experts.shape[1], choice, position, offsets)


def combine(rows: Tensor, position: Tensor, num_tokens: int, kernel: str = "") -> Tensor:
    """rows [S, H], position int64 [T * k] -> [T, H]: each token's k rows added in FP32 in order, in rows' dtype."""
    if usable(kernel, rows):
        return slots_kernels.combine(rows, position, num_tokens, kernel)
    # No sum over a dimension: torch's adds up the choices in an order of its own.
    first, *others = position.view(num_tokens, -1).unbind(1)
    total = rows.index_select(0, first).float()
    for place in others:
        total += rows.index_select(0, place)
    return total.to(rows.dtype)


class Dispatcher(Protocol):
    """Moves rows between token order and expert order. T tokens, S local slots, k choices a token."""

    def plan(self, experts: Tensor, num_experts: int) -> Slots:
        """experts [T, k] -> the slots this process computes; backward asks again and gets the same."""

    def dispatch(self, rows: Operand, slots: Slots) -> Operand:
        """Operand [T, H] with one-row tiles -> [S, H] in slot order."""

    def combine(self, rows: Tensor, slots: Slots, num_tokens: int) -> Tensor:
        """[S, H] -> [T, H]: each token's slots added in FP32 in the order of its choices, in rows' dtype."""


class LocalDispatcher:
    """Every expert is here: dispatch is a gather, combine a gather and a sum over the k choices."""

    def plan(self, experts: Tensor, num_experts: int) -> Slots:
        return sort_slots(experts, num_experts)

    def dispatch(self, rows: Operand, slots: Slots) -> Operand:
        if isinstance(rows, TiledTensor):
            return rows.rows(slots.token)
        return rows.index_select(0, slots.token)

    def combine(self, rows: Tensor, slots: Slots, num_tokens: int) -> Tensor:
        return combine(rows, slots.position, num_tokens)
