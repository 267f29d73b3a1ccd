"""Multi-token prediction, block k: from h at position i and the token at i + k, predict the token at i + k + 1.

    x = eh_proj [enorm(Emb(t_{i+k})); hnorm(h)], one layer, shared_head.norm, then the trunk's own output head

(DeepSeek-V3 report, section 2.2; the order of the two halves is the published checkpoint's, not the formula's.)
h is the trunk's output after its final norm for k = 1, and the block before's output before its shared_head.norm
for k > 1. Embedding and head are not here: they are the trunk's.
"""

import torch
from torch import Tensor, nn

from tessera.model.attention import Place
from tessera.model.blueprint import Blueprint
from tessera.model.layer import Layer
from tessera.model.projection import Norm
from tessera.model.router import Routing
from tessera.ops.dense_linear import dense_linear
from tessera.ops.rms_norm import rms_norm
from tessera.ops.saved import Again


class PlainProjection(nn.Module):
    """`weight` float32 [out, in] of a linear that is never quantised."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))


class SharedHead(nn.Module):
    """The norm before the output head, under its published name `shared_head.norm`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = Norm(hidden)


class MtpBlock(Layer):
    """A layer with experts, and what joins its two inputs."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        super().__init__(blueprint, name, dense=False)
        hidden = blueprint.section.hidden_size
        self.keep = blueprint.keep
        self.enorm = Norm(hidden)
        self.hnorm = Norm(hidden)
        self.eh_proj = PlainProjection(hidden, 2 * hidden)
        self.shared_head = SharedHead(hidden)

    def join(self, embedded: Tensor, carry: Tensor) -> Tensor:
        """embedded, carry [T, H] -> the layer's input [T, H]."""
        e, kept_e = rms_norm(embedded, self.enorm.weight, self.epsilon, self.keep)
        h, kept_h = rms_norm(carry, self.hnorm.weight, self.epsilon, self.keep)
        both = torch.cat([e, h], dim=-1)
        kept = Again(_beside, kept_e, kept_h) if self.keep.recompute_norms else both
        return dense_linear(both, kept, self.eh_proj.weight, both.dtype)

    def draft(
        self, embedded: Tensor, carry: Tensor, place: Place, replayed: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """-> (hidden [T, H] ready for the head, carry [T, H] for the next block, routing)."""
        x, routing = super().forward(self.join(embedded, carry), place, replayed)
        assert routing is not None  # MTP layers have experts
        hidden, _ = rms_norm(x, self.shared_head.norm.weight, self.epsilon, self.keep)
        return hidden, x, routing


def _beside(e: Tensor, h: Tensor) -> Tensor:
    return torch.cat([e, h], dim=-1)
