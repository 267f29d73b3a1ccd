"""The attention core of MLA and its output projection, from the up-projected parts.

q_h = [q_nope; rope(q_rope)], k_h = [k_nope; rope(k_rope)] with one k_rope for all heads, causal softmax,
o = concat_h(P_h v_h) W_o^T (DeepSeek-V3 report, section 2.1.1). The rotation works on interleaved pairs, as the
published checkpoint has them: a pair is a complex number.

Every operand of a product is rounded to the activation dtype and multiplied in FP32: q, k and v, the output's
gradient, and (ours, the report says no more than "BF16") P in P v and P^T dO, dS in dS k and dS^T q. In between all is
FP32: scores and their scale, the softmax, dS = P (dO v^T - delta) from the unrounded P. kernels.attention has the
kernels. A row's result depends on the keys it sees, not on how long the sequence goes on.

Kept for backward: what stands for the up-projected parts (they are made again from the latents, or kept), the
softmax's log-sum-exp, and the attention output in the output projection's own cache format (E5M6 when it is FP8):
decoded, it serves both the softmax's backward and wgrad.

Shapes: B sequences of L positions, T = B * L.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.role import Weight
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops.attention_strips import AttentionShape
from tessera.ops.gradient_room import room_for_large_gradient
from tessera.ops.keep import Keep
from tessera.ops.kernels.attention import Parts, attention, attention_backward
from tessera.ops.saved import Again, load, save

__all__ = ["AttentionShape", "Up", "latent_attention"]


@dataclass(frozen=True)
class Up:
    """What stands for the up-projected q and kv in backward: they themselves, or the way to make them again."""

    q: Tensor | Again
    kv: Tensor | Again


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        kept: Up,
        rotation: Tensor,
        first: Tensor | None,
        shape: AttentionShape,
        output: Weight,
        keep: Keep | None,
        parameter: Tensor,
    ) -> Tensor:
        role = output.role
        out, log_sum_exp = attention(Parts(q, kv, k_rope, rotation, first), shape)
        operand = role.input(out)
        if keep:
            ctx.shape, ctx.output = shape, output
            cache = keep.attention_output(role, out, operand)
            save(ctx, kept.q, kept.kv, k_rope, rotation, first, log_sum_exp, cache)
        return gemm.fprop(operand, output.operand(), role.precision.accumulation, role.precision.activation_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *parts, log_sum_exp, cached = load(ctx)
        output, p = ctx.output, ctx.output.role.precision
        out = cached.decode() if isinstance(cached, TiledTensor) else cached.float()
        rows, columns = output.role.gradient(dy.contiguous())
        room = room_for_large_gradient(output.parameter)
        dw = gemm.wgrad(columns, output.role.input_columns(out), p.accumulation, out=room)
        dout = gemm.dgrad(rows, output.operand(), p.accumulation, p.activation_dtype)
        gradients = attention_backward(dout, out, log_sum_exp, Parts(*parts), ctx.shape)
        return (*gradients, *[None] * 6, dw.view_as(output.parameter))


def latent_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    kept: Up,
    rotation: Tensor,
    first: Tensor | None,
    shape: AttentionShape,
    output: Weight,
    keep: Keep,
) -> Tensor:
    """q [T, heads * (nope + rope)], kv [T, heads * (nope + value)], k_rope [T, rope] -> [T, H]; T = batch * length.

    rotation complex64 [1 or B, L, rope / 2]; first int32 [B, L], the first key that each query sees, at most its own
    position, or None for plain causal attention. `kept` stands for q and kv in backward.
    """
    how = keep if torch.is_grad_enabled() else None
    y: Tensor = _LatentAttention.apply(q, kv, k_rope, kept, rotation, first, shape, output, how, output.parameter)
    return y
