"""The attention core, forward and backward, beside torch's scaled_dot_product_attention.

    python benchmarks/attention.py [--threads N] [--rounds N] [--isa NAME] [--json] [--out FILE]

tessera reads queries, keys, values and rotary keys as the projections of multi-head latent attention leave them, in
BF16; the peer gets query, key and value put together and contiguous, in FP32, the value padded with zeros to the width
of the key (unequal widths would send it to an unfused path), which is outside its time. Rotations are by zero, so that
both compute the same. A row is timed between two runs of the peer; `times_as_fast` is the median over rounds.
`relative_error`: norm of the error of the output and of the gradients together, against FP64 of the same BF16 values.

Exit code 1: an error is above 1 %, several times what BF16 operands give.
"""

import argparse
import json
import math
import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported; waiting is no work

import torch
from kernel_options import add_options, apply_options
from machine import machine
from paired import Clock, Timed, keep_memory, measure
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tessera import native
from tessera.ops.attention_strips import AttentionShape
from tessera.ops.kernels.attention import Parts, attention, attention_backward

ERROR_BAR = 0.01
SHAPES = {  # batch, length, heads, and widths: key without rotation, rotary key, value
    "benchmark model": (8, 256, 8, 32, 16, 32),
    "benchmark model, 2,048": (1, 2048, 8, 32, 16, 32),
    "deepseek-v3 heads": (1, 1024, 4, 128, 64, 128),
}
Row = dict[str, Any]


class Peer:
    """The same attention through torch, in `dtype`."""

    def __init__(self, parts: Parts, dout: Tensor, shape: AttentionShape, dtype: torch.dtype, padded: bool) -> None:
        s = shape
        heads = (s.batch, s.length, s.heads)
        kv = parts.kv.view(*heads, s.nope + s.value)
        rope = parts.k_rope.view(s.batch, s.length, 1, s.rope).expand(*heads, s.rope)
        width = s.nope + s.rope
        values = (
            parts.q.view(*heads, width),
            torch.cat([kv[..., : s.nope], rope], dim=-1),
            pad(kv[..., s.nope :], (0, width - s.value if padded else 0)),
        )
        made = (value.transpose(1, 2).to(dtype).contiguous().requires_grad_() for value in values)
        self.q, self.k, self.v = made
        self.dout = pad(dout.view(*heads, s.value), (0, self.v.shape[-1] - s.value)).transpose(1, 2).to(dtype)
        self.shape, self.scale = s, s.softmax_scale

    def __call__(self) -> tuple[Tensor, ...]:
        out = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, scale=self.scale)
        return (out, *torch.autograd.grad(out, (self.q, self.k, self.v), self.dout))

    def as_tessera(self) -> tuple[Tensor, ...]:
        """Output and gradients of q, kv and k_rope, as tessera lays them out."""
        s = self.shape
        out, dq, dk, dv = (x.detach().transpose(1, 2) for x in self())
        tokens = s.batch * s.length
        dkv = torch.cat([dk[..., : s.nope], dv[..., : s.value]], dim=-1)
        dk_rope = dk[..., s.nope :].sum(dim=2)
        return tuple(x.reshape(tokens, -1) for x in (out[..., : s.value], dq, dkv, dk_rope))


def measure_shape(name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one shape."""
    shape = AttentionShape(*SHAPES[name], 1 / math.sqrt(SHAPES[name][3] + SHAPES[name][4]))
    s, random = shape, torch.Generator().manual_seed(0)
    tokens = s.batch * s.length

    def normal(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=random).bfloat16()

    rotation = torch.ones(1, s.length, s.rope // 2, dtype=torch.complex64)
    parts = Parts(
        normal(s.heads * (s.nope + s.rope)), normal(s.heads * (s.nope + s.value)), normal(s.rope), rotation, None
    )
    dout = normal(s.heads * s.value)

    def ours() -> tuple[Tensor, ...]:
        out, log_sum_exp = attention(parts, shape, options.isa)
        return (out, *attention_backward(dout, out.float(), log_sum_exp, parts, shape, options.isa))

    exact = Peer(parts, dout, shape, torch.float64, padded=False).as_tessera()
    error = math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in zip(ours(), exact, strict=True)))
    error /= math.sqrt(sum(float(b.square().sum()) for b in exact))
    peer = Timed(Peer(parts, dout, shape, torch.float32, padded=True))
    systems = {
        "torch FP32, value padded": peer,
        "torch BF16, value padded": Timed(Peer(parts, dout, shape, torch.bfloat16, padded=True), peer),
        "torch FP32, value as it is": Timed(Peer(parts, dout, shape, torch.float32, padded=False), peer),
        "tessera BF16": Timed(ours, peer),
    }
    measure(list(systems.values()), options.rounds, Clock(options.threads))
    rows = []
    for system, timed in systems.items():
        figures = timed.figures()
        row = {"shape": name, "sizes": SHAPES[name], "system": system, "threads": options.threads}
        row |= figures | {"times_as_fast": 1 / figures["ratio"], "wall_times_as_fast": 1 / figures["wall_ratio"]}
        rows.append(row | {"relative_error": error if timed is systems["tessera BF16"] else None})
    return rows


def show(rows: list[Row]) -> None:
    batch, length, heads, nope, rope, value = rows[0]["sizes"]
    print(f"\n{rows[0]['shape']}: {batch} x {length} tokens, {heads} heads of {nope} + {rope} and {value}")
    for row in rows:
        low, high = row["quartiles"]
        error = "" if row["relative_error"] is None else f"   error {row['relative_error']:.1e}"
        print(
            f"  {row['system']:<28} {row['median_ms']:8.2f} ms CPU {low:8.2f}-{high:<8.2f} "
            f"{row['median_wall_ms']:8.2f} ms wall {row['times_as_fast']:6.2f} times as fast{error}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    options = parser.parse_args()
    apply_options(options)
    facts = machine(["torch"]) | {"memory": "kept by the allocator" if keep_memory() else "given back"}
    facts["isa"] = options.isa or (native.instruction_sets() or ("torch",))[0]
    if not options.json:
        print("; ".join(f"{key}: {value}" for key, value in facts.items()))
    rows: list[Row] = []
    for name in SHAPES:
        rows += (found := measure_shape(name, options))
        if not options.json:
            show(found)
    text = json.dumps({"rows": rows, "machine": facts}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    if wrong := [row for row in rows if row["relative_error"] is not None and not row["relative_error"] <= ERROR_BAR]:
        raise SystemExit("\n".join(f"{row['shape']}: relative error {row['relative_error']:.1e}" for row in wrong))


if __name__ == "__main__":
    main()
