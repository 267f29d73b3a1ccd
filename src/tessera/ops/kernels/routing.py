"""The router's choice and its balance loss as compiled kernels (native/source/routing.cpp), on plain tensors."""

import torch
from torch import Tensor

from tessera.native import Kernel
from tessera.ops.kernels import define, require

MOST = 1024  # experts the kernels have room for; routing.cpp has it too
SELECT = Kernel("select_experts", "pppiiiif")
BALANCE = Kernel("balance", "pppiii")
BALANCE_BACKWARD = Kernel("balance_backward", "pppiif")


def select_experts(
    affinity: Tensor, bias: Tensor, groups: int, chosen_groups: int, choices: int, excluded: float, isa: str = ""
) -> Tensor:
    """affinity float32 [T, E], bias float32 [E] -> int64 [T, choices]; E at most MOST."""
    return torch.ops.tessera.select_experts(affinity, bias, groups, chosen_groups, choices, excluded, isa)


def balance(affinity: Tensor, num_sequences: int, choices: int, isa: str = "") -> tuple[Tensor, Tensor]:
    """affinity float32 [T, E] -> (how often an expert is among the best, float32 [B, E]; its shares' sum, float64)."""
    return torch.ops.tessera.balance(affinity, num_sequences, choices, isa)


def balance_backward(affinity: Tensor, frequency: Tensor, factor: float, isa: str = "") -> Tensor:
    """Gradient float32 [T, E] of factor * sum(frequency * share), `frequency` [B, E] taken as given."""
    return torch.ops.tessera.balance_backward(affinity, frequency, factor, isa)


def _select_experts(
    affinity: Tensor, bias: Tensor, groups: int, chosen_groups: int, choices: int, excluded: float, isa: str
) -> Tensor:
    affinity, (rows, experts) = affinity.contiguous(), affinity.shape
    _require_room(experts, choices)
    require("select_experts", bias.shape == (experts,), affinity, bias)
    if experts % groups or not 0 < chosen_groups <= groups or (chosen_groups < groups and experts // groups < 2):
        raise ValueError(f"{chosen_groups} of {groups} groups of {experts} experts: groups are equal, of 2 or more")
    out = _like_select_experts(affinity, bias, groups, chosen_groups, choices, excluded, isa)
    sizes = (experts, groups, chosen_groups, choices)
    SELECT(rows, affinity, bias.contiguous(), out, *sizes, excluded, work=4 * experts, isa=isa)
    return out


def _like_select_experts(
    affinity: Tensor, bias: Tensor, groups: int, chosen_groups: int, choices: int, excluded: float, isa: str
) -> Tensor:
    return affinity.new_empty((affinity.shape[0], choices), dtype=torch.int64)


def _balance(affinity: Tensor, num_sequences: int, choices: int, isa: str) -> tuple[Tensor, Tensor]:
    affinity, (rows, experts) = affinity.contiguous(), affinity.shape
    _require_room(experts, choices)
    frequency, share = _like_balance(affinity, num_sequences, choices, isa)
    length = rows // num_sequences
    require("balance", length * num_sequences == rows, affinity, frequency)
    BALANCE(num_sequences, affinity, frequency, share, length, experts, choices, work=4 * length * experts, isa=isa)
    return frequency, share


def _like_balance(affinity: Tensor, num_sequences: int, choices: int, isa: str) -> tuple[Tensor, Tensor]:
    shape = (num_sequences, affinity.shape[1])
    return affinity.new_empty(shape), affinity.new_empty(shape, dtype=torch.float64)


def _balance_backward(affinity: Tensor, frequency: Tensor, factor: float, isa: str) -> Tensor:
    affinity, (rows, experts) = affinity.contiguous(), affinity.shape
    gradient = _like_balance_backward(affinity, frequency, factor, isa)
    length = rows // max(1, len(frequency))
    require("balance_backward", frequency.shape[1] == experts and length * len(frequency) == rows, affinity, frequency)
    BALANCE_BACKWARD(
        rows, affinity, frequency.contiguous(), gradient, length, experts, factor, work=2 * experts, isa=isa
    )
    return gradient


def _require_room(experts: int, choices: int) -> None:
    if not choices <= experts <= MOST:
        raise ValueError(f"{choices} of {experts} experts: at most all of them, and {MOST}")


def _like_balance_backward(affinity: Tensor, frequency: Tensor, factor: float, isa: str) -> Tensor:
    return affinity.new_empty(affinity.shape)


define(
    "select_experts(Tensor affinity, Tensor bias, int groups, int chosen_groups, int choices, float excluded, str isa) "
    "-> Tensor",
    _select_experts,
    _like_select_experts,
)
define("balance(Tensor affinity, int num_sequences, int choices, str isa) -> (Tensor, Tensor)", _balance, _like_balance)
define(
    "balance_backward(Tensor affinity, Tensor frequency, float factor, str isa) -> Tensor",
    _balance_backward,
    _like_balance_backward,
)
