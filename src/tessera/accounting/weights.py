"""Every weight of the architecture, as a shape and a number of copies.

Names are those of the published checkpoint without the layer's number; gate_proj and up_proj are counted apart, as
it stores them. The shared experts of a layer are one MLP of their summed width. A layer of experts uses all of its
weights but n_routed_experts - num_experts_per_tok experts, so `used` differs from `copies` there and nowhere else.

The routing bias (n_routed_experts numbers a layer) is a buffer that no gradient reaches, and is not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tessera.recipe import ModelSection


@dataclass(frozen=True)
class Weight:
    """A weight that occurs in the model `copies` times, and which a token passes through `used` times."""

    part: str  # "embedding", "attention", "dense MLP", ...: what tables sum up
    name: str
    shape: tuple[int, ...]  # [out, in] of a linear; [width] of a norm
    copies: int = 1
    used: int = 1

    @property
    def size(self) -> int:
        """Numbers in one copy."""
        return prod(self.shape)

    @property
    def multiplies(self) -> bool:
        """Whether a token is multiplied by it as a matrix: not a norm, and not the embedding, which is looked up."""
        return len(self.shape) == 2 and self.part != "embedding"


def trunk_weights(model: ModelSection) -> list[Weight]:
    """The weights without those of multi-token prediction."""
    hidden, dense = model.hidden_size, model.first_k_dense_replace
    return [
        Weight("embedding", "embed_tokens", (model.vocab_size, hidden)),
        *_attention(model, model.num_hidden_layers),
        *_mlp("dense MLP", "mlp", hidden, model.intermediate_size, dense, dense),
        *_experts(model, model.num_moe_layers),
        Weight("norms", "norm", (hidden,)),
        Weight("head", "lm_head", (model.vocab_size, hidden)),
    ]


def mtp_weights(model: ModelSection) -> list[Weight]:
    """The weights that multi-token prediction adds: one block of attention and experts a depth, and its entrance.

    Embedding and head are the trunk's own, and are not counted again.
    """
    depth, hidden = model.num_nextn_predict_layers, model.hidden_size
    if depth == 0:
        return []
    return [
        Weight("norms", "enorm", (hidden,), depth, depth),
        Weight("norms", "hnorm", (hidden,), depth, depth),
        Weight("projection", "eh_proj", (hidden, 2 * hidden), depth, depth),
        *_attention(model, depth),
        *_experts(model, depth),
        Weight("norms", "shared_head.norm", (hidden,), depth, depth),
    ]


def _attention(model: ModelSection, layers: int) -> Iterator[Weight]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * model.qk_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if model.q_lora_rank is None:
        shapes["q_proj"] = (queries, hidden)
    else:
        shapes["q_a_proj"] = (model.q_lora_rank, hidden)
        shapes["q_a_layernorm"] = (model.q_lora_rank,)
        shapes["q_b_proj"] = (queries, model.q_lora_rank)
    shapes["kv_a_proj_with_mqa"] = (model.kv_lora_rank + model.qk_rope_head_dim, hidden)
    shapes["kv_a_layernorm"] = (model.kv_lora_rank,)
    shapes["kv_b_proj"] = (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
    shapes["o_proj"] = (hidden, heads * model.v_head_dim)
    shapes["input_layernorm"] = shapes["post_attention_layernorm"] = (hidden,)
    for name, shape in shapes.items():
        part = "norms" if "layernorm" in name else "attention"
        yield Weight(part, name, shape, layers, layers)


def _experts(model: ModelSection, layers: int) -> Iterator[Weight]:
    hidden, width = model.hidden_size, model.moe_intermediate_size
    if layers == 0:
        return
    yield Weight("router", "mlp.gate", (model.n_routed_experts, hidden), layers, layers)
    if model.n_shared_experts:
        shared = model.n_shared_experts * width
        yield from _mlp("shared experts", "mlp.shared_experts", hidden, shared, layers, layers)
    copies, used = layers * model.n_routed_experts, layers * model.num_experts_per_tok
    yield from _mlp("routed experts", "mlp.experts", hidden, width, copies, used)


def _mlp(part: str, name: str, hidden: int, width: int, copies: int, used: int) -> Iterator[Weight]:
    if copies:
        yield Weight(part, f"{name}.gate_proj", (width, hidden), copies, used)
        yield Weight(part, f"{name}.up_proj", (width, hidden), copies, used)
        yield Weight(part, f"{name}.down_proj", (hidden, width), copies, used)
