"""A layer with experts in plain PyTorch: what automatic differentiation keeps where nobody looks after memory.

The yardstick of `tessera inspect memory --measure`, not a part of the model: the same mathematics and shapes as
`Layer` with `MixtureOfExperts`, every parameter and activation in BF16, written with torch's own functions: its
RMSNorm and SiLU, flash attention (values padded to the keys' width, without which a CPU keeps the whole square of
scores), experts one after the other. No groups, routing bias or balance loss, which keep next to nothing.

On a CPU torch composes RMSNorm of other operations, which keep two FP32 values an element; a fused one would keep none.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.model.rope import rotation, softmax_scale
from tessera.recipe.model import ModelSection


class PlainLayer(nn.Module):
    """x [B, L, H] bfloat16 -> the same."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.section, self.scale = section, softmax_scale(section)
        self.rotation = rotation(section)
        hidden, heads = section.hidden_size, section.num_attention_heads
        rank, kv_rank = section.q_lora_rank, section.kv_lora_rank
        width = section.moe_intermediate_size
        epsilon = section.rms_norm_eps
        self.input_norm, self.mlp_norm, self.kv_norm = (_norm(n, epsilon) for n in (hidden, hidden, kv_rank))
        self.q_down = nn.Sequential() if rank is None else nn.Sequential(_linear(hidden, rank), _norm(rank, epsilon))
        self.q = _linear(rank or hidden, heads * section.qk_head_dim)
        self.kv_down = _linear(hidden, kv_rank + section.qk_rope_head_dim)
        self.kv = _linear(kv_rank, heads * (section.qk_nope_head_dim + section.v_head_dim))
        self.out = _linear(heads * section.v_head_dim, hidden)
        self.router = _linear(hidden, section.n_routed_experts)
        self.experts = nn.ModuleList(_Mlp(hidden, width) for _ in range(section.n_routed_experts))
        self.shared = _Mlp(hidden, section.n_shared_experts * width) if section.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.input_norm(x))
        y: Tensor = self.mlp_norm(x)
        return x + self._mixture(y.flatten(0, 1)).view(x.shape)

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
        y: Tensor = self.out(out[..., : s.v_head_dim].transpose(1, 2).flatten(2))
        return y

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
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = _linear(hidden, width), _linear(hidden, width), _linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def _linear(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)


def _norm(width: int, epsilon: float) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=epsilon, dtype=torch.bfloat16)


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
