"""The attention core as torch operators: `torch.ops.tessera.attention` and `torch.ops.tessera.attention_backward`.

BF16 parts on a CPU go to the native kernels (native/source/attention_forward.cpp, attention_backward.cpp); all else,
and all of it where there is no native library, to attention_strips. `kernel` names one explicitly: "torch", or one of
the native library's instruction sets. All keep the same law (docs/numerics.md), with sums in orders of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tessera import native
from tessera.native import Kernel
from tessera.ops import attention_strips
from tessera.ops.attention_strips import AttentionShape
from tessera.ops.kernels import LIBRARY

_PARTS = "Tensor q, Tensor kv, Tensor k_rope, Tensor rotation, Tensor? first"
_SHAPE = "int batch, int length, int heads, int nope, int rope, int value, float softmax_scale, str kernel"
LIBRARY.define(f"attention({_PARTS}, {_SHAPE}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"attention_backward(Tensor dout, Tensor out, Tensor log_sum_exp, {_PARTS}, {_SHAPE}) -> (Tensor, Tensor, Tensor)"
)

_FORWARD = Kernel("attention_forward", "pfpppppppp")
_BACKWARD = Kernel("attention_backward", "pfpppppppppppp")
_ROTARY_KEY_GRADIENT = Kernel("attention_rotary_key_gradient", "pppp")
_FORWARD_ROOM = Kernel("attention_forward_room", "p", counts=True)
_BACKWARD_ROOM = Kernel("attention_backward_room", "p", counts=True)
_WORTH_A_THREAD = 1 << 17  # multiplications of queries with keys


class Parts(NamedTuple):
    """What goes into the attention core; T = B * L tokens.

    q [T, heads * (nope + rope)], kv [T, heads * (nope + value)], k_rope [T, rope]: one dtype, rows at any distance.
    rotation complex64 [1 or B, L, rope / 2]. first int32 [B, L]: the first key that a query sees, at most its own
    position, or None: it sees all up to itself.
    """

    q: Tensor
    kv: Tensor
    k_rope: Tensor
    rotation: Tensor
    first: Tensor | None


def attention(parts: Parts, shape: AttentionShape, kernel: str = "") -> tuple[Tensor, Tensor]:
    """-> out [T, heads * value] in the dtype of the parts, log-sum-exp of the scaled scores float32 [B * heads, L].

    Raises ValueError for a kernel that there is not here, or one that does not take these parts.
    """
    out, log_sum_exp = torch.ops.tessera.attention(*parts, *_sizes(shape), kernel)
    return out, log_sum_exp


def attention_backward(
    dout: Tensor, out: Tensor, log_sum_exp: Tensor, parts: Parts, shape: AttentionShape, kernel: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope, in their dtype, from dout [T, heads * value] in that dtype too.

    `out` [T, heads * value] is float32: the output as backward has it.
    """
    dq, dkv, dk_rope = torch.ops.tessera.attention_backward(dout, out, log_sum_exp, *parts, *_sizes(shape), kernel)
    return dq, dkv, dk_rope


def _sizes(s: AttentionShape) -> tuple[int | float, ...]:
    return (s.batch, s.length, s.heads, s.nope, s.rope, s.value, s.softmax_scale)


def _is_native(q: Tensor, kernel: str) -> bool:
    able = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if kernel == "":
        return able and native.available()
    if kernel != "torch" and not able:
        raise ValueError(f"attention: kernel {kernel!r} takes bfloat16 on a CPU, not {q.dtype} on {q.device}")
    return kernel != "torch"


def _attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Tensor, first: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor]:
    parts, s, kernel = Parts(q, kv, k_rope, rotation, first), _shape(*rest), str(rest[-1])
    if not _is_native(q, kernel):
        return attention_strips.forward(*parts, s)
    parts = _readable(parts)
    out, log_sum_exp = q.new_empty(len(q), s.heads * s.value), _log_sum_exp(q, s)
    sizes, memory, workers = _arrangement(parts, s, _FORWARD_ROOM, kernel)
    _FORWARD(workers, sizes, s.softmax_scale, *parts, out, log_sum_exp, memory, work=native.SMALLEST_SHARE, isa=kernel)
    return out, log_sum_exp


def _attention_backward(
    dout: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    rotation: Tensor,
    first: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    parts, s, kernel = Parts(q, kv, k_rope, rotation, first), _shape(*rest), str(rest[-1])
    if not _is_native(q, kernel):
        return attention_strips.backward(dout, out, log_sum_exp, *parts, s)
    parts = _readable(parts)
    dq, dkv, dk_rope = _gradients(*parts[:3])
    by_head = log_sum_exp.new_empty(s.batch * s.heads, s.length, s.rope)
    sizes, memory, workers = _arrangement(parts, s, _BACKWARD_ROOM, kernel)
    upstream = (dout.contiguous(), out.contiguous(), log_sum_exp.contiguous())
    made, work = (dq, dkv, by_head, memory), native.SMALLEST_SHARE
    _BACKWARD(workers, sizes, s.softmax_scale, *parts, *upstream, *made, work=work, isa=kernel)
    _ROTARY_KEY_GRADIENT(len(q), sizes, by_head, parts.rotation, dk_rope, work=s.heads * s.rope, isa=kernel)
    return dq, dkv, dk_rope


def _shape(*sizes: object) -> AttentionShape:
    """From an operator's last arguments, `kernel` and all. Raises ValueError for a scale that is no scale."""
    shape = AttentionShape(*sizes[:-1])  # type: ignore[arg-type]  # by the schema
    if not shape.softmax_scale > 0:
        raise ValueError(f"attention: the softmax scale must be positive, got {shape.softmax_scale}")
    return shape


def _readable(parts: Parts) -> Parts:
    """Rows in one piece, the rotation as pairs of float32, `first` in one piece."""
    q, kv, k_rope = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in parts[:3])
    first = None if parts.first is None else parts.first.to(torch.int32).contiguous()
    return Parts(q, kv, k_rope, torch.view_as_real(parts.rotation.resolve_conj()).contiguous(), first)


def _arrangement(p: Parts, s: AttentionShape, room: Kernel, kernel: str) -> tuple[Tensor, Tensor, int]:
    """`Sizes` of native/source/attention.h, the workers' memory, and how many there are."""
    pairs = s.batch * s.heads
    worth = pairs * s.length * (s.length + 1) // 2 // _WORTH_A_THREAD
    workers = max(1, min(torch.get_num_threads(), pairs, worth))
    turn_stride = 0 if p.rotation.shape[0] == 1 else s.length * s.rope
    strides = (p.q.stride(0), p.kv.stride(0), p.k_rope.stride(0), turn_stride)
    sizes = torch.tensor([s.batch, s.length, s.heads, s.nope, s.rope, s.value, *strides, workers, 0])
    sizes[-1] = size = room(1, sizes, isa=kernel)
    return sizes, torch.empty(workers, size, dtype=torch.uint8), workers


def _log_sum_exp(q: Tensor, s: AttentionShape) -> Tensor:
    return q.new_empty(s.batch * s.heads, s.length, dtype=torch.float32)


def _gradients(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_rope.new_empty(k_rope.shape)


def _fake_attention(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    s = _shape(*rest[4:])
    return q.new_empty(q.shape[0], s.heads * s.value), _log_sum_exp(q, s)


def _fake_attention_backward(
    dout: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, kv, k_rope)


for _name, _implementation, _fake in (
    ("attention", _attention, _fake_attention),
    ("attention_backward", _attention_backward, _fake_attention_backward),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"tessera::{_name}", _fake, lib=LIBRARY)
