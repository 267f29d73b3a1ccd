"""Which experts a token goes to, and with what weight (DeepSeek-V3 report, section 2.1.2). FP32 throughout.

Affinity s = sigmoid(u W^T). Experts are chosen by s + b, where the bias b balances the load without a loss; the
weights are made of s alone. With groups, a token may use the `topk_group` groups whose two best biased affinities
have the largest sum; all experts of other groups are out, which takes -inf: 0 would beat a negative s + b.

The bias is moved once a step by `update_bias`, from exact counts of the whole batch. The complementary balance loss
is the report's equations 17 to 20, for each sequence: sum_i f_i P_i with f_i = E / (k L) * (how often i is among
the k largest unbiased affinities) and P_i the mean normalised affinity. Its factor alpha is the trainer's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera.ops import routing
from tessera.ops.dense_linear import dense_linear
from tessera.ops.saved import Again
from tessera.ops.sigmoid import sigmoid
from tessera.recipe.model import ModelSection

EXCLUDED = -torch.inf  # biased affinity of experts in groups that a token may not use


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    experts: int64 [T, k]; weights: float32 [T, k]; counts: int64 [E], tokens an expert got; balance_loss: float32
    scalar, without its factor.
    """

    experts: Tensor
    weights: Tensor
    counts: Tensor
    balance_loss: Tensor


class Router(nn.Module):
    """The module `mlp.gate`: `weight` [E, H], `e_score_correction_bias` [E], float32 whatever the model is cast to."""

    e_score_correction_bias: Tensor

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.section = section
        experts = section.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, section.hidden_size, dtype=torch.float32))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(
        self, x: Tensor, num_sequences: int, experts: Tensor | None = None, *, kept: Tensor | Again | None = None
    ) -> Routing:
        """x [T, H] -> Routing; T tokens in `num_sequences` sequences of equal length. `kept` stands for x in backward.

        `experts` int64 [T, k] replays a choice: weights are this router's own affinities of those experts.
        """
        affinity = sigmoid(dense_linear(x, x if kept is None else kept, self.weight, torch.float32))
        if experts is None:
            experts = select(affinity.detach(), self.e_score_correction_bias, self.section)
        weights = affinity.gather(1, experts)
        if self.section.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # 1e-20: as published
        return Routing(
            experts,
            weights * self.section.routed_scaling_factor,
            torch.bincount(experts.flatten(), minlength=self.section.n_routed_experts),
            routing.balance_loss(affinity, num_sequences, self.section.num_experts_per_tok),
        )

    @torch.no_grad()
    def update_bias(self, counts: Tensor, speed: float) -> None:
        """bias += speed * sign(mean load - load), with counts int64 [E] of the whole step."""
        above_mean = torch.sign(counts * counts.numel() - counts.sum())  # integers: a load at the mean stays
        self.e_score_correction_bias -= speed * above_mean.to(torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to another device, never to another dtype: a BF16 bias would lose its small steps."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def select(affinity: Tensor, bias: Tensor, section: ModelSection) -> Tensor:
    """affinity float32 [T, E], bias [E] -> int64 [T, k], the best biased affinities first."""
    groups = (section.n_group, section.topk_group)
    return routing.select(affinity, bias, section.num_experts_per_tok, *groups, EXCLUDED)
