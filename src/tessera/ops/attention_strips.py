"""The attention core in PyTorch, on any device and in any dtype: what the native kernels are held to.

Queries are taken strip by strip, each against the keys up to its end only: little work above the diagonal, and memory
for one strip of scores. Values keep their own width. On a CPU this takes as long as torch's flash kernel at equal
widths, which it does not need.

A row's result depends on the keys it sees, not on how long the sequence goes on: sequences are laid out in whole
strips, so that every product has the height and depth that its place in the sequence gives it.

Shapes: B sequences of L positions, T = B * L, D = nope + rope; S = L rounded up to whole strips. `first` int32 [B, L]
is the first key that each query sees; None: all of them up to itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

QUERY_BLOCK = 64  # queries a strip of scores; larger strips waste more above the diagonal


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

    @property
    def padded(self) -> int:
        """The length in whole strips."""
        return -(-self.length // QUERY_BLOCK) * QUERY_BLOCK


def forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Tensor, first: Tensor | None, s: AttentionShape
) -> tuple[Tensor, Tensor]:
    """-> out [T, heads * value] in the dtype of q, log-sum-exp of the scaled scores float32 [B * heads, L]."""
    queries, keys, values = _assemble(q, kv, k_rope, rotation, s)
    out, log_sum_exp = _attend(queries, keys, values, first, q.dtype, s)
    return _rows(out, s).to(q.dtype), log_sum_exp[:, : s.length].contiguous()


def backward(
    dout: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    rotation: Tensor,
    first: Tensor | None,
    s: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout in the dtype of q, out float32, both [T, heads * value] -> gradients of q, kv and k_rope in their dtype."""
    upstream = _heads(dout, s)
    dq, dk, dv = _attend_backward(
        upstream,
        (upstream * _heads(out, s)).sum(dim=-1),
        *_assemble(q, kv, k_rope, rotation, s),
        pad(log_sum_exp, (0, s.padded - s.length)),
        first,
        q.dtype,
        s,
    )
    return _disassemble(dq, dk, dv, rotation, s, q.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn interleaved pairs: x [..., R] float32 by rotation complex64 [..., R / 2]. The transpose: its conjugate.

    In real products and sums: torch's complex product rounds the last few numbers of a tensor in another way.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = rotation.real, rotation.imag
    turned = torch.empty_like(x)
    turned[..., 0::2] = even * cosine - odd * sine
    turned[..., 1::2] = even * sine + odd * cosine
    return turned


def _assemble(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Tensor, s: AttentionShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts -> queries, keys [B * heads, S, D], values [B * heads, S, value]: float32, of the parts' precision."""
    dtype = q.dtype
    q = q.view(s.batch, s.length, s.heads, s.nope + s.rope)
    kv = kv.view(s.batch, s.length, s.heads, s.nope + s.value)
    queries, keys = _strips_of(q, s.nope + s.rope, s), _strips_of(q, s.nope + s.rope, s)
    values = _strips_of(q, s.value, s)
    seen = slice(0, s.length)
    queries[:, :, seen, : s.nope] = q[..., : s.nope].transpose(1, 2)
    keys[:, :, seen, : s.nope] = kv[..., : s.nope].transpose(1, 2)
    values[:, :, seen] = kv[..., s.nope :].transpose(1, 2)
    q_rotated = rotate(q[..., s.nope :].float(), rotation[:, :, None])
    k_rotated = rotate(k_rope.float().view(s.batch, s.length, s.rope), rotation)
    queries[:, :, seen, s.nope :] = q_rotated.to(dtype).transpose(1, 2)
    keys[:, :, seen, s.nope :] = k_rotated.to(dtype)[:, None]
    return queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)


def _strips_of(like: Tensor, width: int, s: AttentionShape) -> Tensor:
    """float32 [B, heads, S, width] to be filled up to position L; what follows is zero."""
    x = torch.empty(s.batch, s.heads, s.padded, width, device=like.device)
    x[:, :, s.length :] = 0.0
    return x


def _disassemble(
    dq: Tensor, dk: Tensor, dv: Tensor, rotation: Tensor, s: AttentionShape, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of `_assemble`: gradients of the parts, in `dtype`."""
    back = torch.conj_physical(rotation)  # inside an operator nobody may look at a lazy conjugate
    dq, dk, dv = (x[:, : s.length].unflatten(0, (s.batch, s.heads)).transpose(1, 2) for x in (dq, dk, dv))
    q = torch.empty(dq.shape, dtype=dtype, device=dq.device)
    kv = q.new_empty(s.batch, s.length, s.heads, s.nope + s.value)
    q[..., : s.nope], q[..., s.nope :] = dq[..., : s.nope], rotate(dq[..., s.nope :], back[:, :, None])
    kv[..., : s.nope], kv[..., s.nope :] = dk[..., : s.nope], dv
    k_rope = rotate(dk[..., s.nope :].sum(dim=2), back).to(dtype)
    return q.flatten(2).flatten(0, 1), kv.flatten(2).flatten(0, 1), k_rope.flatten(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, dtype: torch.dtype, s: AttentionShape
) -> tuple[Tensor, Tensor]:
    """-> (out [B * heads, S, value], log-sum-exp of the scaled scores [B * heads, S])."""
    out = torch.empty_like(v)
    log_sum_exp = v.new_empty(v.shape[:2])
    for start, end in _strips(s):
        scores = _scores(q[:, start:end], k[:, :end], v.new_zeros(()), s)
        _exclude(scores, start, end, first, s)
        largest = scores.amax(dim=-1)
        probability = torch.softmax(scores, dim=-1)
        # The largest score's probability is 1 / sum(exp(score - largest)), at least 1 / L.
        log_sum_exp[:, start:end] = largest - probability.amax(dim=-1).log()
        out[:, start:end] = torch.bmm(_rounded(probability, dtype), v[:, :end])
    return out, log_sum_exp


def _attend_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sum_exp: Tensor,
    first: Tensor | None,
    dtype: torch.dtype,
    s: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; delta [B * heads, S] = sum of dout * out over a head's width."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, end in _strips(s):
        rows = slice(start, end)
        scores = _scores(q[:, rows], k[:, :end], log_sum_exp[:, rows, None].neg(), s)
        _exclude(scores, start, end, first, s)
        probability = scores.exp_()
        offset = delta[:, rows, None].neg().expand(-1, -1, end)
        dscores = torch.baddbmm(offset, dout[:, rows], v[:, :end].transpose(1, 2)).mul_(probability)
        dv[:, :end].baddbmm_(_rounded(probability, dtype).transpose(1, 2), dout[:, rows])
        dscores = _rounded(dscores, dtype)
        dq[:, rows] = torch.bmm(dscores, k[:, :end])
        dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, rows])
    return dq.mul_(s.softmax_scale), dk.mul_(s.softmax_scale), dv


def _scores(q: Tensor, k: Tensor, offset: Tensor, s: AttentionShape) -> Tensor:
    """Scaled scores plus `offset` (a number, or one a query): the scale is applied to sums, never to an operand."""
    offset = offset.expand(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(offset, q, k.transpose(1, 2), alpha=s.softmax_scale)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32, rounded to `dtype` in place."""
    return x if dtype == torch.float32 else x.copy_(x.to(dtype))


def _strips(s: AttentionShape) -> Iterator[tuple[int, int]]:
    for start in range(0, s.padded, QUERY_BLOCK):
        yield start, start + QUERY_BLOCK


def _exclude(scores: Tensor, start: int, end: int, first: Tensor | None, s: AttentionShape) -> None:
    """Put -inf where queries start .. end must not look; scores [B * heads, end - start, end], in place."""
    if first is None:
        square = scores[:, :, start:]
        square += torch.full(square.shape[1:], -torch.inf, device=scores.device).triu_(1)
        return
    query, key = (torch.arange(begin, end, device=scores.device) for begin in (start, 0))
    seen = pad(first[:, start:end], (0, max(0, end - s.length)))  # the padding is causal, so that it stays finite
    hidden = (key > query[:, None]) | (key < seen[:, :, None])
    scores.unflatten(0, (s.batch, s.heads)).masked_fill_(hidden[:, None], -torch.inf)


def _heads(x: Tensor, s: AttentionShape) -> Tensor:
    """[T, heads * value] -> float32 [B * heads, S, value]."""
    strips = _strips_of(x, s.value, s)
    strips[:, :, : s.length] = x.view(s.batch, s.length, s.heads, s.value).transpose(1, 2)
    return strips.flatten(0, 1)


def _rows(x: Tensor, s: AttentionShape) -> Tensor:
    """Inverse of `_heads`."""
    return x[:, : s.length].unflatten(0, (s.batch, s.heads)).transpose(1, 2).flatten(2).flatten(0, 1)
