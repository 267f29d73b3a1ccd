"""Multi-head latent attention (DeepSeek-V3 report, section 2.1.1): one layer's linears around the attention core.

Queries go through a latent of q_lora_rank (or straight from the hidden state), keys and values through one of
kv_lora_rank; next to it the down-projection gives the rotary key that all heads share. Both down-projections read
the same normalised hidden state, which is quantised once for the two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera.model.blueprint import Blueprint
from tessera.model.projection import Norm, Projection
from tessera.model.rope import softmax_scale
from tessera.numerics import RoleKind
from tessera.numerics.gemm import Operand
from tessera.ops.latent_attention import AttentionShape, Up, latent_attention
from tessera.ops.linear import fprop, normed_linear
from tessera.ops.saved import Again

LATENT_EPSILON = 1e-6  # of the latents' norms, whatever rms_norm_eps says: so in the published code


@dataclass(frozen=True)
class Place:
    """Where the tokens of one forward pass stand; shared by all layers.

    batch, length: the T = batch * length tokens, sequence by sequence. rotation: see rope.Rotation.table.
    first: int32 [B, L], the first key that each query sees, or None for plain causal attention.
    """

    batch: int
    length: int
    rotation: Tensor
    first: Tensor | None


def document_starts(document_ids: Tensor) -> Tensor:
    """document_ids [B, L], each document in one piece -> int32 [B, L]: where the document of each position begins."""
    position = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(begins, position, 0).cummax(dim=1).values


class LatentAttention(nn.Module):
    """The module `self_attn` of a layer; its input norm belongs to the layer."""

    def __init__(self, blueprint: Blueprint, name: str) -> None:
        super().__init__()
        section = blueprint.section
        self.section = section
        self.keep = blueprint.keep
        self.scale = softmax_scale(section)
        heads, hidden = section.num_attention_heads, section.hidden_size
        query_width = heads * section.qk_head_dim

        def projection(part: str, kind: RoleKind, rows: int, columns: int) -> Projection:
            return Projection(rows, columns, blueprint.role(f"{name}.{part}", kind))

        if section.q_lora_rank is None:
            self.q_proj = projection("q_proj", RoleKind.ATTENTION_INPUT, query_width, hidden)
        else:
            rank = section.q_lora_rank
            self.q_a_proj = projection("q_a_proj", RoleKind.ATTENTION_INPUT, rank, hidden)
            self.q_a_layernorm = Norm(rank)
            self.q_b_proj = projection("q_b_proj", RoleKind.ATTENTION_UP, query_width, rank)
        latent_width = section.kv_lora_rank + section.qk_rope_head_dim
        self.kv_a_proj_with_mqa = projection("kv_a_proj_with_mqa", RoleKind.ATTENTION_INPUT, latent_width, hidden)
        self.kv_a_layernorm = Norm(section.kv_lora_rank)
        up_width = heads * (section.qk_nope_head_dim + section.v_head_dim)
        self.kv_b_proj = projection("kv_b_proj", RoleKind.ATTENTION_UP, up_width, section.kv_lora_rank)
        self.o_proj = projection("o_proj", RoleKind.ATTENTION_OUTPUT, hidden, heads * section.v_head_dim)

    def forward(self, x: Tensor, norm: Norm, place: Place) -> Tensor:
        """x [T, H] residual stream, norm of the layer's input -> [T, H], to be added to x."""
        section, keep = self.section, self.keep
        epsilon = section.rms_norm_eps
        kept_q: Tensor | Again
        if section.q_lora_rank is None:
            (q, down), _ = normed_linear(
                x, norm.weight, epsilon, keep, self.q_proj.operand, self.kv_a_proj_with_mqa.operand
            )
            kept_q = q  # no latent to make it from
        else:
            (query_latent, down), _ = normed_linear(
                x, norm.weight, epsilon, keep, self.q_a_proj.operand, self.kv_a_proj_with_mqa.operand
            )
            q, kept_q = self._up(query_latent, self.q_a_layernorm, self.q_b_proj)
        latent, k_rope = down.split([section.kv_lora_rank, section.qk_rope_head_dim], dim=-1)
        kv, kept_kv = self._up(latent, self.kv_a_layernorm, self.kv_b_proj)
        shape = AttentionShape(
            place.batch,
            place.length,
            section.num_attention_heads,
            section.qk_nope_head_dim,
            section.qk_rope_head_dim,
            section.v_head_dim,
            self.scale,
        )
        up = Up(kept_q, kept_kv)
        return latent_attention(q, kv, k_rope, up, place.rotation, place.first, shape, self.o_proj.operand, keep)

    def _up(self, latent: Tensor, norm: Norm, projection: Projection) -> tuple[Tensor, Tensor | Again]:
        """A latent's up-projection, and what stands for it in backward."""
        weight = projection.operand
        (up,), operand = normed_linear(latent, norm.weight, LATENT_EPSILON, self.keep, weight)
        if not self.keep.recompute_up_projections:
            return up, up

        def again(operand: Operand) -> Tensor:
            return fprop(operand, weight)

        return up, Again(again, operand)
