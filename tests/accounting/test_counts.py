"""Parameters, FLOPs and cache bytes, against an enumeration of tensors and products written here.

The enumeration walks through a model layer by layer and expert by expert, and knows nothing of parts and copies.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.accounting import (
    Count,
    cache_bytes_per_token,
    flops_per_token,
    mfu,
    mtp_cache_bytes_per_token,
    mtp_weights,
    parameters,
    trunk_weights,
)
from tessera.recipe import ModelSection, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ["tiny", "small", "moonlight-16b", "deepseek-v3"]

MODELS = st.builds(
    lambda layers, dense, experts, chosen, **fields: ModelSection(
        num_hidden_layers=layers,
        first_k_dense_replace=min(dense, layers),
        n_routed_experts=experts,
        num_experts_per_tok=min(chosen, experts),
        **fields,
    ),
    layers=st.integers(1, 4),
    dense=st.integers(0, 4),
    experts=st.integers(2, 6),
    chosen=st.integers(1, 6),
    n_shared_experts=st.integers(0, 3),
    vocab_size=st.integers(1, 50),
    hidden_size=st.integers(1, 20),
    intermediate_size=st.integers(1, 20),
    moe_intermediate_size=st.integers(1, 20),
    num_attention_heads=st.integers(1, 4),
    kv_lora_rank=st.integers(1, 9),
    q_lora_rank=st.none() | st.integers(1, 9),
    qk_nope_head_dim=st.integers(1, 9),
    qk_rope_head_dim=st.sampled_from([2, 4]),
    v_head_dim=st.integers(1, 9),
    num_nextn_predict_layers=st.integers(0, 3),
)


def shipped(name: str) -> ModelSection:
    return load_recipe(RECIPES / f"{name}.toml").model


def block(m: ModelSection, prefix: str, moe: bool, chosen_only: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of one layer, as the published checkpoint names and shapes it."""
    h, heads = m.hidden_size, m.num_attention_heads
    yield f"{prefix}.input_layernorm", (h,)
    yield f"{prefix}.post_attention_layernorm", (h,)
    attention = f"{prefix}.self_attn"
    q_out = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank:
        yield f"{attention}.q_a_proj", (m.q_lora_rank, h)
        yield f"{attention}.q_a_layernorm", (m.q_lora_rank,)
        yield f"{attention}.q_b_proj", (q_out, m.q_lora_rank)
    else:
        yield f"{attention}.q_proj", (q_out, h)
    yield f"{attention}.kv_a_proj_with_mqa", (m.kv_lora_rank + m.qk_rope_head_dim, h)
    yield f"{attention}.kv_a_layernorm", (m.kv_lora_rank,)
    yield f"{attention}.kv_b_proj", (heads * m.qk_nope_head_dim + heads * m.v_head_dim, m.kv_lora_rank)
    yield f"{attention}.o_proj", (h, heads * m.v_head_dim)
    widths = {f"{prefix}.mlp": m.intermediate_size}
    if moe:
        yield f"{prefix}.mlp.gate", (m.n_routed_experts, h)
        experts = m.num_experts_per_tok if chosen_only else m.n_routed_experts
        widths = {f"{prefix}.mlp.experts.{e}": m.moe_intermediate_size for e in range(experts)}
        if m.n_shared_experts:
            widths[f"{prefix}.mlp.shared_experts"] = m.moe_intermediate_size * m.n_shared_experts
    for mlp, width in widths.items():
        yield f"{mlp}.gate_proj", (width, h)
        yield f"{mlp}.up_proj", (width, h)
        yield f"{mlp}.down_proj", (h, width)


def trunk(m: ModelSection, chosen_only: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens", (m.vocab_size, m.hidden_size)
    for layer in range(m.num_hidden_layers):
        yield from block(m, f"model.layers.{layer}", layer >= m.first_k_dense_replace, chosen_only)
    yield "model.norm", (m.hidden_size,)
    yield "lm_head", (m.vocab_size, m.hidden_size)


def mtp(m: ModelSection, chosen_only: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for depth in range(m.num_nextn_predict_layers):
        prefix = f"model.layers.{m.num_hidden_layers + depth}"
        yield f"{prefix}.enorm", (m.hidden_size,)
        yield f"{prefix}.hnorm", (m.hidden_size,)
        yield f"{prefix}.eh_proj", (m.hidden_size, 2 * m.hidden_size)
        yield f"{prefix}.shared_head.norm", (m.hidden_size,)
        yield from block(m, prefix, True, chosen_only)


def numbers(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    return sum(prod(shape) for _, shape in tensors)


def multiply_adds(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    """Of one vector with every matrix; the embedding is looked up."""
    return sum(prod(shape) for name, shape in tensors if len(shape) == 2 and "embed" not in name)


def check(m: ModelSection, context: int) -> None:
    counted = parameters(m)
    assert counted.total == numbers(trunk(m))
    assert counted.active == numbers(trunk(m, chosen_only=True))
    assert counted.active_without_embedding == counted.active - m.vocab_size * m.hidden_size
    assert counted.mtp_total == numbers(mtp(m))
    assert counted.mtp_active == numbers(mtp(m, chosen_only=True))

    core = 0  # of one layer, over all positions of a sequence: scores with every key so far, then its value
    for position in range(context):
        for _ in range(position + 1):
            core += m.num_attention_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
            core += m.num_attention_heads * m.v_head_dim
    flops, depth = flops_per_token(m, context), m.num_nextn_predict_layers
    expected = 2 * (context * multiply_adds(trunk(m, chosen_only=True)) + m.num_hidden_layers * core)
    head = m.vocab_size * m.hidden_size
    of_mtp = 2 * (context * (multiply_adds(mtp(m, chosen_only=True)) + depth * head) + depth * core)
    assert context * flops.forward == pytest.approx(expected, rel=1e-12)
    assert context * flops.mtp_forward == pytest.approx(of_mtp, rel=1e-12)
    assert context * flops.training == pytest.approx(3 * (expected + of_mtp), rel=1e-12)

    layer = m.kv_lora_rank + m.qk_rope_head_dim
    assert cache_bytes_per_token(m) == sum(2 * layer for _ in range(m.num_hidden_layers))
    assert mtp_cache_bytes_per_token(m, 1) == sum(layer for _ in range(depth))


@settings(max_examples=150, deadline=None)
@given(MODELS, st.integers(1, 12))
def test_any_model_is_counted_as_its_tensors_are(m: ModelSection, context: int) -> None:
    check(m, context)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_models_are_counted_as_their_tensors_are(name: str) -> None:
    check(shipped(name), context=64)


@settings(max_examples=50, deadline=None)
@given(MODELS)
def test_parts_are_sums_over_the_weights_and_add_up(m: ModelSection) -> None:
    counted = parameters(m)
    for weights, parts in ((trunk_weights(m), counted.parts), (mtp_weights(m), counted.mtp_parts)):
        assert sum(w.size * w.copies for w in weights) == sum(part.total for part in parts.values())
        assert all(part.total >= part.active > 0 for part in parts.values())
    assert counted.parts["embedding"] == counted.parts["head"]
    assert ("dense MLP" in counted.parts) == (m.first_k_dense_replace > 0)
    assert ("routed experts" in counted.parts) == (m.num_moe_layers > 0)


@settings(max_examples=50, deadline=None)
@given(MODELS)
def test_the_names_and_shapes_of_weights_are_those_of_the_checkpoint(m: ModelSection) -> None:
    listed: dict[tuple[str, tuple[int, ...]], int] = {}
    for weight in [*trunk_weights(m), *mtp_weights(m)]:
        key = (weight.name, weight.shape)
        listed[key] = listed.get(key, 0) + weight.copies
    enumerated: dict[tuple[str, tuple[int, ...]], int] = {}
    above = ("model", "layers", "self_attn")  # a Weight's name begins below these, and has no numbers
    for name, shape in [*trunk(m), *mtp(m)]:
        below = [word for word in name.split(".") if word not in above and not word.isdigit()]
        key = (".".join(below), shape)
        enumerated[key] = enumerated.get(key, 0) + 1
    assert listed == enumerated


def test_deepseek_v3_has_the_published_figures() -> None:
    m = shipped("deepseek-v3")
    counted = parameters(m)
    assert f"{counted.total / 1e9:.1f}" == "671.0"
    assert f"{counted.active / 1e9:.1f}" == "37.6"
    assert f"{counted.active_without_embedding / 1e9:.1f}" == "36.6"
    # The published 11.5B of unique MTP parameters are the block; its entrance adds 0.1B.
    entrance = counted.mtp_parts["projection"].total
    assert entrance == 2 * 7168 * 7168
    assert f"{(counted.mtp_total - entrance) / 1e9:.1f}" == "11.5"
    assert cache_bytes_per_token(m) == 70_272
    assert mtp_cache_bytes_per_token(m) == 1_152
    flops = flops_per_token(m, 4096)
    assert f"{(flops.forward - flops.parts['attention core']) / 1e9:.1f}" == "73.2"
    assert f"{flops.parts['attention core'] / 1e9:.1f}" == "10.2"


@pytest.mark.parametrize(
    "name, total, active", [("moonlight-16b", 15.96, 2.91), ("small", 0.102, 0.050), ("tiny", 0.0028, 0.0019)]
)
def test_the_sizes_that_the_recipes_claim_are_theirs(name: str, total: float, active: float) -> None:
    counted = parameters(shipped(name))
    assert counted.total / 1e9 == pytest.approx(total, rel=0.02)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_builds_as_many_parameters(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    fields: dict[str, Any] = shipped(name).model_dump(exclude={"rope_scaling", "num_nextn_predict_layers"})
    config = transformers.DeepseekV3Config(**fields)
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)  # without multi-token prediction
    assert parameters(shipped(name)).total == sum(parameter.numel() for parameter in model.parameters())


def test_attention_is_half_the_square_of_the_context() -> None:
    m = shipped("tiny")
    one, many = flops_per_token(m, 1), flops_per_token(m, 4095)
    assert many.parts["attention core"] == 2048 * one.parts["attention core"]
    assert {k: v for k, v in one.parts.items() if k != "attention core"} == {
        k: v for k, v in many.parts.items() if k != "attention core"
    }
    with pytest.raises(ValueError, match="context 0"):
        flops_per_token(m, 0)


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(6e9, 1000.0, 1e13) == 0.6
    for peak in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            mfu(6e9, 1000.0, peak)


def test_a_model_without_multi_token_prediction_has_no_part_of_it() -> None:
    counted = parameters(shipped("moonlight-16b"))
    assert (counted.mtp_parts, counted.mtp_total) == ({}, 0)
    assert Count(1, 2) + Count(3, 4) == Count(4, 6)
