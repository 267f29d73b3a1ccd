"""The attention core of MLA and its output projection, from the up-projected parts.

q_h = [q_nope; rope(q_rope)], k_h = [k_nope; rope(k_rope)] with one k_rope for all heads, causal softmax in FP32 over
BF16 operands, o = concat_h(P_h v_h) W_o^T (DeepSeek-V3 report, section 2.1.1). The rotation works on interleaved
pairs, as the published checkpoint has them.

Kept for backward: the parts as the linears made them, the softmax's log-sum-exp, and the attention output in the
output projection's own cache format (E5M6 when it is FP8): decoded, it serves both the softmax's backward and wgrad.

On a CPU the core is torch's flash kernel in FP32 on operands rounded to the activation dtype, v padded to the query's
width (unequal widths would fall to the quadratic path); elsewhere it is the formula itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.gemm import Operand
from tessera.numerics.role import Weight
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops.saved import load, save


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and the softmax scale of one attention layer."""

    batch: int
    length: int
    heads: int
    nope: int
    rope: int
    value: int
    softmax_scale: float


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate interleaved pairs: x [..., L, R] float32 by cosine, sine [L or B x 1 x L, R / 2]. Inverse: -sine."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor | None,
        shape: AttentionShape,
        output: Weight,
        parameter: Tensor,
    ) -> Tensor:
        role = output.role
        queries, keys, values = _assemble(q, kv, k_rope, cosine, sine, shape)
        out, log_sum_exp = _core(queries, keys, values, mask, shape)
        out = out[..., : shape.value].transpose(1, 2).flatten(2).flatten(0, 1).to(q.dtype)
        operand = role.input(out)
        ctx.shape, ctx.output = shape, output
        save(ctx, q, kv, k_rope, cosine, sine, mask, log_sum_exp, role.input_cache(out, operand))
        return gemm.fprop(
            operand, output.operand(), role.precision.accumulation, role.precision.activation_dtype
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, kv, k_rope, cosine, sine, mask, log_sum_exp, cached = load(ctx)
        shape, output = ctx.shape, ctx.output
        p = output.role.precision
        dy = dy.contiguous()
        rows, columns = output.role.gradient(dy)
        dw = gemm.wgrad(columns, output.role.input_columns(cached), p.accumulation)
        dout = gemm.dgrad(rows, output.operand(), p.accumulation, p.activation_dtype)

        queries, keys, values = _assemble(q, kv, k_rope, cosine, sine, shape)
        width = shape.nope + shape.rope
        dq, dk, dv = _core_backward(
            _heads(dout.float(), shape, width),
            queries,
            keys,
            values,
            _heads(_decoded(cached), shape, width),
            log_sum_exp,
            mask,
            shape,
        )
        dq[..., shape.nope :] = rotate(dq[..., shape.nope :], cosine, -sine)
        dk_rope = rotate(dk[..., shape.nope :].sum(dim=1), cosine.flatten(0, -3), -sine.flatten(0, -3))
        dkv = torch.cat([dk[..., : shape.nope], dv[..., : shape.value]], dim=-1)
        return (
            _rows(dq).to(q.dtype),
            _rows(dkv).to(kv.dtype),
            dk_rope.flatten(0, 1).to(k_rope.dtype),
            None,
            None,
            None,
            None,
            None,
            dw.view_as(output.parameter),
        )


def latent_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    shape: AttentionShape,
    output: Weight,
) -> Tensor:
    """q [T, heads * (nope + rope)], kv [T, heads * (nope + value)], k_rope [T, rope] -> [T, H]; T = batch * length.

    cosine, sine float32 [L, rope / 2] or [B, 1, L, rope / 2]; mask float32 [B, 1, L, L], added to the scores
    (it must contain the causal part), or None for plain causal attention.
    """
    return _LatentAttention.apply(q, kv, k_rope, cosine, sine, mask, shape, output, output.parameter)


def _assemble(
    q: Tensor, kv: Tensor, k_rope: Tensor, cosine: Tensor, sine: Tensor, s: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts -> queries, keys, values [B, heads, L, nope + rope] float32, rounded to the parts' dtype; v zero-padded."""
    width = s.nope + s.rope
    queries = q.float().view(s.batch, s.length, s.heads, width).transpose(1, 2)
    q_rope = rotate(queries[..., s.nope :], cosine, sine).to(q.dtype).float()
    k = rotate(k_rope.float().view(s.batch, 1, s.length, s.rope), cosine, sine).to(q.dtype).float()
    parts = kv.float().view(s.batch, s.length, s.heads, s.nope + s.value).transpose(1, 2)
    keys = torch.cat([parts[..., : s.nope], k.expand(-1, s.heads, -1, -1)], dim=-1)
    values = torch.nn.functional.pad(parts[..., s.nope :], (0, max(0, width - s.value)))
    return torch.cat([queries[..., : s.nope], q_rope], dim=-1), keys, values.contiguous()


def _core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, s: AttentionShape) -> tuple[Tensor, Tensor]:
    """Causal attention -> (out [B, heads, L, width], log-sum-exp of the scaled scores [B, heads, L])."""
    if _flash(q, v):
        out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=s.softmax_scale
        )
        return out, log_sum_exp
    scores = _scores(q, k, mask, s)
    log_sum_exp = scores.logsumexp(dim=-1)
    return torch.exp(scores - log_sum_exp[..., None]) @ v, log_sum_exp


def _core_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    s: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values; `out` is the cached attention output."""
    if _flash(q, v):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, log_sum_exp, 0.0, mask is None, attn_mask=mask, scale=s.softmax_scale
        )
        return dq, dk, dv
    p = torch.exp(_scores(q, k, mask, s) - log_sum_exp[..., None])
    dv = p.transpose(-1, -2) @ dout
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(dim=-1, keepdim=True)) * s.softmax_scale
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def _flash(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, s: AttentionShape) -> Tensor:
    scores = q @ k.transpose(-1, -2) * s.softmax_scale
    if mask is None:
        future = torch.ones(s.length, s.length, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -torch.inf)
    return scores + mask


def _decoded(operand: Operand) -> Tensor:
    return operand.decode() if isinstance(operand, TiledTensor) else operand.float()


def _heads(x: Tensor, s: AttentionShape, width: int) -> Tensor:
    """[T, heads * value] -> [B, heads, L, max(width, value)], zero-padded."""
    x = x.view(s.batch, s.length, s.heads, s.value).transpose(1, 2)
    return torch.nn.functional.pad(x, (0, max(0, width - s.value))).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[B, heads, L, D] -> [T, heads * D]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
