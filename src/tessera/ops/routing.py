"""The router's two searches for the largest affinities: the choice of experts, and the balance loss.

Of equal affinities the expert with the lower index is chosen (torch.topk leaves that open), so a choice depends on
the affinities alone: on every device, with compiled kernels and without.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.ops.kernels import routing, usable


def best(values: Tensor, count: int) -> Tensor:
    """values float32 [..., N] -> int64 [..., count]: the places of the largest, of equals the lower first."""
    bits = values.contiguous().view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # an integer that sorts as the float does
    place = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    return (order.long() << 32 | place).topk(count, dim=-1).indices


def select(
    affinity: Tensor,
    bias: Tensor,
    choices: int,
    groups: int,
    chosen_groups: int,
    excluded: float,
    kernel: str = "",
) -> Tensor:
    """affinity float32 [T, E], bias float32 [E] -> int64 [T, choices], the best affinity + bias first.

    With `groups` > `chosen_groups` only experts of the groups with the best scores keep their biased affinity, all
    others have `excluded`; a group's score is the sum of its two best.
    """
    if _room(kernel, affinity, bias) and (chosen_groups >= groups or affinity.shape[1] >= 2 * groups):
        return routing.select_experts(affinity, bias, groups, chosen_groups, choices, excluded, kernel)
    biased = affinity + bias
    if chosen_groups < groups:
        grouped = biased.unflatten(1, (groups, -1))
        score = grouped.gather(-1, best(grouped, 2)).sum(dim=-1)
        outside = torch.ones_like(score, dtype=torch.bool).scatter_(1, best(score, chosen_groups), False)
        biased = grouped.masked_fill(outside[..., None], excluded).flatten(1)
    return best(biased, choices)


class _BalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, affinity: Tensor, num_sequences: int, choices: int, kernel: str) -> Tensor:
        frequency, share = _frequency_and_share(affinity, num_sequences, choices, kernel)
        ctx.factor = affinity.shape[1] / (choices * affinity.shape[0])
        ctx.length, ctx.kernel = affinity.shape[0] // num_sequences, kernel
        ctx.save_for_backward(affinity, frequency)
        return ((frequency * share).sum() * (ctx.factor / ctx.length)).float()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        affinity, frequency = ctx.saved_tensors
        factor = ctx.factor / ctx.length
        if _room(ctx.kernel, affinity):
            return routing.balance_backward(affinity, frequency, factor, ctx.kernel) * dloss, None, None, None
        by_sequence = affinity.unflatten(0, (len(frequency), -1))
        whole = by_sequence.sum(dim=-1, keepdim=True)
        mean = (by_sequence * frequency[:, None]).sum(dim=-1, keepdim=True) / whole
        gradient = (frequency[:, None] - mean) * (factor / whole)
        return gradient.flatten(0, 1) * dloss, None, None, None


def balance_loss(affinity: Tensor, num_sequences: int, choices: int, kernel: str = "") -> Tensor:
    """Sum over experts of f_i P_i, mean over sequences; affinity float32 [T, E] -> float32 scalar.

    f_i = E / (k L) * (how often i is among the k largest of a sequence's L tokens), P_i the mean of i's share of a
    token's affinities (report, equations 17 to 20). Gradients go through P alone; f counts.
    """
    loss: Tensor = _BalanceLoss.apply(affinity, num_sequences, choices, kernel)
    return loss


def _frequency_and_share(affinity: Tensor, num_sequences: int, choices: int, kernel: str) -> tuple[Tensor, Tensor]:
    """For each sequence and expert, [B, E]: how often it is among the best; the sum of its shares, float64."""
    if _room(kernel, affinity):
        return routing.balance(affinity, num_sequences, choices, kernel)
    by_sequence = affinity.unflatten(0, (num_sequences, -1))
    chosen = best(by_sequence, choices).flatten(1)
    frequency = affinity.new_zeros(num_sequences, affinity.shape[1])
    frequency.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=affinity.dtype))
    share = by_sequence / by_sequence.sum(dim=-1, keepdim=True)
    return frequency, share.sum(dim=1, dtype=torch.float64)


def _room(kernel: str, *tensors: Tensor) -> bool:
    float32 = all(x.dtype == torch.float32 for x in tensors)
    return usable(kernel, *tensors) and float32 and tensors[0].shape[-1] <= routing.MOST
