"""A layer with experts in plain PyTorch: what automatic differentiation keeps where nobody looks after memory.

The yardstick of `tessera inspect memory --measure`, not a part of the model: the same mathematics and shapes as
`Layer` with `MixtureOfExperts`, every parameter and activation in BF16, written with torch's own functions in the form
that they save least in: fused RMSNorm and SiLU, flash attention (values padded to the keys' width, without which a
CPU keeps the whole square of scores), experts one after the other.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.model.rope import rotation, softmax_scale
from tessera.recipe.model import ModelSection


class PlainLayer(nn.Module):
    """x [B, L, H] bfloat16 -> the same; routing without groups, bias and balance loss, which keep next to nothing."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.section, self.scale = section, softmax_scale(section)
        self.rotation = rotation(section)
        hidden, heads = section.hidden_size, section.num_attention_heads
        rank, kv_rank = section.q_lora_rank, section.kv_lora_rank
        width = section.moe_intermediate_size

        def linear(columns: int, rows: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)

        def norm(width: int) -> nn.RMSNorm:
            return nn.RMSNorm(width, eps=section.rms_norm_eps, dtype=torch.bfloat16)

        self.input_norm, self.mlp_norm, self.kv_norm = norm(hidden), norm(hidden), norm(kv_rank)
        if rank is None:
            self.q_down, self.q = nn.Identity(), linear(hidden, heads * section.qk_head_dim)
        else:
            self.q_down = nn.Sequential(linear(hidden, rank), norm(rank))
            self.q = linear(rank, heads * section.qk_head_dim)
        self.kv_down = linear(hidden, kv_rank + section.qk_rope_head_dim)
        self.kv = linear(kv_rank, heads * (section.qk_nope_head_dim + section.v_head_dim))
        self.out = linear(heads * section.v_head_dim, hidden)
        self.router = linear(hidden, section.n_routed_experts)
        self.experts = nn.ModuleList(_Mlp(hidden, width, linear) for _ in range(section.n_routed_experts))
        shared = section.n_shared_experts
        self.shared = _Mlp(hidden, shared * width, linear) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.input_norm(x))
        return x + self._mixture(self.mlp_norm(x).flatten(0, 1)).view(x.shape)

    def _attention(self, x: Tensor) -> Tensor:
        s, (batch, length, _) = self.section, x.shape
        heads, nope, rope = s.num_attention_heads, s.qk_nope_head_dim, s.qk_rope_head_dim
        turn = self.rotation.table(torch.arange(length))
        q = self.q(self.q_down(x)).view(batch, length, heads, -1)
        latent, k_rope = self.kv_down(x).split([s.kv_lora_rank, rope], dim=-1)
        kv = self.kv(self.kv_norm(latent)).view(batch, length, heads, -1)
        q = torch.cat([q[..., :nope], _rotated(q[..., nope:], turn[:, :, None])], dim=-1)
        k_rope = _rotated(k_rope, turn)[:, :, None].expand(-1, -1, heads, -1)
        k, v = torch.cat([kv[..., :nope], k_rope], dim=-1), kv[..., nope:]
        v = F.pad(v, (0, q.shape[-1] - s.v_head_dim))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(out[..., : s.v_head_dim].transpose(1, 2).flatten(2))

    def _mixture(self, x: Tensor) -> Tensor:
        s = self.section
        weights, chosen = self.router(x).float().sigmoid().topk(s.num_experts_per_tok, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True) * s.routed_scaling_factor).to(x.dtype)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return out if self.shared is None else out + self.shared(x)


class _Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, linear: "type[nn.Linear] | object") -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(hidden, width), linear(hidden, width), linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
