"""One whole layer in FP8 at widths that are no multiple of 128: every GEMM, forward and backward, in float64."""

from collections import Counter

import pytest
import torch

import tests.ops.float64 as float64
from tessera.model.attention import Place
from tessera.model.blueprint import Blueprint
from tessera.model.initialise import initialise
from tessera.model.layer import Layer
from tessera.model.rope import rotation
from tessera.numerics import BLOCK, COLUMN, E4M3, VECTOR, Policy, Recorder, quantise
from tessera.ops.dispatch import LocalDispatcher
from tessera.ops.keep import Keep
from tests.model import shapes
from tests.ops.float64 import BF16, decoded, normal

SECTION = shapes.section(
    hidden_size=2056,
    moe_intermediate_size=136,
    q_lora_rank=264,
    kv_lora_rank=152,
    num_attention_heads=2,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=40,
    n_routed_experts=5,
    num_experts_per_tok=1,
)
GROUPS = [0, 1, 127, 129, 0]
TOKENS = sum(GROUPS)


def test_every_gemm_of_a_layer_is_exact_on_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    layer = Layer(Blueprint(SECTION, Policy(), recorder, LocalDispatcher(), Keep()), "layer", dense=False)
    initialise(layer, 0.03, seed=0)
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate(GROUPS)])
    experts = experts[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))][:, None]
    x = normal(TOKENS, SECTION.hidden_size).to(BF16).requires_grad_()
    place = Place(1, TOKENS, rotation(SECTION).table(torch.arange(TOKENS)), None)

    products = float64.spy_on_gemms(monkeypatch)
    y, routing = layer(x, place, experts)
    y.backward(normal(*y.shape, seed=1).to(BF16))

    assert routing.counts.tolist() == GROUPS
    assert Counter(p.kind for p in products) == {"fprop": 9 + 2, "dgrad": 9, "wgrad": 9}
    assert sum(p.offsets is not None for p in products) == 6
    for product in products:
        product.assert_exact()
    assert max(decoded(p.a).shape[1] for p in products if p.kind == "fprop") == 2056
    assert recorder.first_nonfinite() is None
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name

    q_a, kv_a, q_b, kv_b, _, routed_up, _, shared_up, _, *again = (p for p in products if p.kind == "fprop")
    for first, second in zip((q_b, kv_b), again, strict=True):  # made again in backward
        assert torch.equal(first.a.codes, second.a.codes) and torch.equal(first.result, second.result)
    assert q_a.a.codes is kv_a.a.codes  # quantised once for both
    slots = routed_up.offsets[-1]
    order = torch.cat([(experts[:, 0] == e).nonzero()[:, 0] for e in range(len(GROUPS))])
    assert slots == TOKENS and torch.equal(routed_up.a.codes, shared_up.a.codes[order])
    halves = [half for w in layer.mlp.experts.gate_up_proj.detach() for half in w.chunk(2)]
    assert torch.equal(decoded(routed_up.b), torch.cat([decoded(quantise(h, E4M3, BLOCK)) for h in halves]))
    halves = layer.mlp.shared_experts.gate_up_proj.weight.detach().chunk(2)
    assert torch.equal(decoded(shared_up.b), torch.cat([decoded(quantise(h, E4M3, BLOCK)) for h in halves]))

    # 128 x 1 operands of wgrad: from the cached codes, tiles along the tokens.
    wgrad = {p.result.shape: p for p in products if p.kind == "wgrad"}
    dw = wgrad[layer.self_attn.q_a_proj.weight.shape]
    assert torch.equal(decoded(dw.b), decoded(quantise(decoded(q_a.a).float(), E4M3, COLUMN)))
    assert torch.equal(layer.self_attn.q_a_proj.weight.grad, dw.result)
    # dY of the fused gate and up: 1 x 128 tiles restart at up's first column.
    dgrad = next(p for p in products if p.kind == "dgrad" and p.b is shared_up.b)
    halves = [decoded(quantise(half.float(), E4M3, VECTOR)) for half in decoded(dgrad.a).chunk(2, dim=1)]
    assert torch.equal(torch.cat(halves, dim=1), decoded(dgrad.a))
