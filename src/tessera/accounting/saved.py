"""What one training step keeps for backward: every tensor of every layer, in bytes a token.

The ops say beside each `save` what they keep; here it is written down a second time, from the recipe's words alone, so
that a model of any size can be looked at without building it. A test holds the list to what autograd keeps, byte by
byte, for every switch of [memory].

What two ops keep in common is counted once; a position of the rotation counts as a token. Not listed: parameters and
FP8 weight codes, which live anyway (see `memory`); where each token's document begins, of
data.cross_document_attention = false (4 bytes a token, once for all layers); the balance loss's frequencies and the
quantiser's counters, a few kilobytes a layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from tessera.accounting.grouping import grouped, place
from tessera.recipe import MemorySection, ModelSection, NumericsSection

TILE = 128  # columns of an activation, and rows and columns of a weight, that share a scale
_BYTES = {"fp32": 4, "bf16": 2, "int64": 8, "complex64": 8}
_TILES = {"block": "1x128", "row": "1xall", "tensor": "allxall"}

RESIDUAL, LATENT, INPUT = "residual stream", "latents of attention", "inputs of linears"
UP, ATTENTION, SWIGLU = "queries, keys, values", "output of attention", "inputs of SwiGLU"
ROUTING, HEAD, OTHER = "routing", "head and loss", "other"
KINDS = (RESIDUAL, LATENT, INPUT, UP, ATTENTION, SWIGLU, ROUTING, HEAD, OTHER)


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that backward needs: `bytes_per_token` times the tokens of a micro-batch, plus `bytes`.

    part: the module ("model.layers.3.mlp"); layer: its number, MTP blocks after the trunk's, or None. kind: one of
    KINDS. op: who keeps it. A tensor in codes has a tile and a scale; its scales are counted in.
    """

    part: str
    layer: int | None
    kind: str
    op: str
    name: str
    format: str
    tile: str
    scale: str
    bytes_per_token: int
    bytes: int = 0


def saved_tensors(model: ModelSection, numerics: NumericsSection, memory: MemorySection) -> list[SavedTensor]:
    """Everything that forward, drafts and losses of one micro-batch keep, in the order of the model."""
    return list(_Saved(model, numerics, memory).all())


def saved_rows(tensors: Iterable[SavedTensor]) -> list[dict[str, Any]]:
    """The tensors as plain JSON values, equal ones of consecutive layers in one row, with "layers": how many."""
    rows = []
    for tensor in tensors:
        layer, part = place(tensor.part)
        rows.append((layer, asdict(tensor) | {"part": part, "layer": None}))
    return [{key: value for key, value in row.items() if key != "layer"} for row in grouped(rows, "part")]


class _Saved:
    """The tensors of each op, one method an op or a module; a `part` is filled in by whoever knows it."""

    def __init__(self, model: ModelSection, numerics: NumericsSection, memory: MemorySection) -> None:
        self.model, self.memory = model, memory
        self.fp8 = numerics.precision == "fp8"
        self.dtype = "fp32" if numerics.precision == "fp32" else "bf16"  # of activations
        self.tile, self.scales = _TILES[numerics.tiles], numerics.scales

    def all(self) -> Iterator[SavedTensor]:
        model, hidden = self.model, self.model.hidden_size
        trunk, drafts = model.num_hidden_layers, model.num_nextn_predict_layers
        for _ in range(1 + drafts):
            yield self.plain(OTHER, "embedding", "token ids", "int64", 1, part="model.embed_tokens")
        for _ in range(1 + drafts):
            name, pairs = "rotation (all layers)", model.qk_rope_head_dim // 2
            yield self.plain(OTHER, "latent_attention", name, "complex64", pairs, part="model")
        for i in range(trunk + drafts):
            name = f"model.layers.{i}"
            if i >= trunk:
                yield from _of(name, i, self.join(first=i == trunk))
            yield from _of(f"{name}.self_attn", i, self.attention())
            dense = i < model.first_k_dense_replace
            yield from _of(f"{name}.mlp", i, self.dense_mlp() if dense else self.mixture())
            if i >= trunk:
                yield from _of(f"{name}.shared_head", i, self.norm(RESIDUAL, "rms_norm", "block's output", hidden))
        yield from _of("model.norm", None, self.norm(RESIDUAL, "rms_norm", "residual stream", hidden))
        for _ in range(1 + drafts):
            yield from _of("lm_head", None, self.head())

    def plain(
        self, kind: str, op: str, name: str, dtype: str, per_token: int, fixed: int = 0, part: str = ""
    ) -> SavedTensor:
        """`per_token` and `fixed` elements of a plain tensor."""
        size = _BYTES[dtype]
        return SavedTensor(part, None, kind, op, name, dtype, "", "", per_token * size, fixed * size)

    def coded(
        self, kind: str, op: str, name: str, columns: int, tile: str, scale: str, segments: int = 1
    ) -> SavedTensor:
        """A row of `columns` E4M3 elements a token; tiles restart in each of `segments` equal parts."""
        scales = {"1x128": segments * -(-columns // segments // TILE), "1xall": segments, "allxall": 0}[tile]
        fixed = 4 * segments if tile == "allxall" else 0
        return SavedTensor("", None, kind, op, name, "e4m3", tile, scale, columns + 4 * scales, fixed)

    def norm(self, kind: str, op: str, name: str, width: int) -> Iterator[SavedTensor]:
        yield self.plain(kind, op, name, self.dtype, width)
        yield self.plain(OTHER, op, f"1 / rms, {name}", "fp32", 1)

    def scale(self, *, power_of_two: bool = False) -> str:
        """Scales of an operand: the preset "deepseek-v3" has powers of two where the report has them."""
        if self.scales != "deepseek-v3":
            return self.scales
        return "power_of_two" if power_of_two else "float32"

    def operand(self, op: str, name: str, width: int, *, power_of_two: bool = False) -> SavedTensor:
        """A linear's input that is kept: in codes, or in the activations' dtype."""
        if self.fp8 and self.memory.fp8_linear_inputs:
            return self.coded(INPUT, op, name, width, self.tile, self.scale(power_of_two=power_of_two))
        return self.plain(INPUT, op, name, self.dtype, width)

    def normed_linear(self, kind: str, name: str, width: int, weights: str) -> Iterator[SavedTensor]:
        yield from self.norm(kind, "normed_linear", name, width)
        if not self.memory.recompute_norms:
            yield self.operand("normed_linear", f"input of {weights}", width)

    def attention(self) -> Iterator[SavedTensor]:
        m, op = self.model, "latent_attention"
        heads, rank = m.num_attention_heads, m.q_lora_rank
        into = "q_proj, kv_a_proj" if rank is None else "q_a_proj, kv_a_proj"
        yield from self.normed_linear(RESIDUAL, "residual stream", m.hidden_size, into)
        if rank is not None:
            yield from self.normed_linear(LATENT, "query latent", rank, "q_b_proj")
        yield from self.normed_linear(LATENT, "key-value latent", m.kv_lora_rank, "kv_b_proj")
        yield self.plain(LATENT, op, "rotary key", self.dtype, m.qk_rope_head_dim)
        if rank is None or not self.memory.recompute_up_projections:
            yield self.plain(UP, op, "queries", self.dtype, heads * m.qk_head_dim)
        if not self.memory.recompute_up_projections:
            yield self.plain(UP, op, "keys and values", self.dtype, heads * (m.qk_nope_head_dim + m.v_head_dim))
        yield self.plain(ATTENTION, op, "log-sum-exp of the scores", "fp32", heads)
        width = heads * m.v_head_dim
        output = self.plain(ATTENTION, op, "input of o_proj", self.dtype, width)
        if self.fp8 and self.memory.e5m6_attention_output:
            size = -(-width // 2) * 3 + 4 * -(-width // TILE)  # two codes of 12 bits in three bytes
            output = replace(output, format="e5m6", tile="1x128", scale="power_of_two", bytes_per_token=size)
        yield output

    def gate_up(self, op: str, name: str, intermediate: int) -> SavedTensor:
        if self.fp8 and self.memory.fp8_swiglu_inputs:
            return self.coded(SWIGLU, op, name, 2 * intermediate, "1x128", self.scale(), segments=2)
        return self.plain(SWIGLU, op, name, self.dtype, 2 * intermediate)

    def dense_mlp(self) -> Iterator[SavedTensor]:
        m = self.model
        yield from self.normed_linear(RESIDUAL, "residual stream", m.hidden_size, "gate_up_proj")
        yield self.gate_up("swiglu_linear", "gate and up", m.intermediate_size)

    def mixture(self) -> Iterator[SavedTensor]:
        m, chosen = self.model, self.model.num_experts_per_tok
        yield from self.norm(RESIDUAL, "rms_norm", "residual stream", m.hidden_size)
        yield from self.experts_input()
        yield self.plain(ROUTING, "router", "affinities", "fp32", m.n_routed_experts)
        yield self.plain(ROUTING, "router, expert_mlp", "experts chosen", "int64", chosen)
        if m.norm_topk_prob:
            yield self.plain(ROUTING, "router", "weights and their sum", "fp32", chosen + 1)
        yield self.plain(ROUTING, "expert_mlp", "routing weights", "fp32", chosen)
        one = self.gate_up("expert_mlp", f"gate and up, {chosen} experts", m.moe_intermediate_size)
        yield _times(one, chosen)
        if m.n_shared_experts:
            width = m.n_shared_experts * m.moe_intermediate_size
            yield self.gate_up("swiglu_linear", "gate and up, shared experts", width)

    def experts_input(self) -> Iterator[SavedTensor]:
        """The normalised tokens: as the router reads them, as all experts read them, and gathered by expert."""
        m, memory = self.model, self.memory
        readers = ["expert_mlp"] if memory.regather_tokens else []
        readers += ["linear"] if m.n_shared_experts else []
        coded = self.fp8 and memory.fp8_linear_inputs
        if not memory.recompute_norms:
            plain_readers = ["router"] if coded else ["router", *readers]
            yield self.plain(INPUT, ", ".join(plain_readers), "normalised input", self.dtype, m.hidden_size)
            if coded and readers:
                yield self.operand(", ".join(readers), "input of the experts", m.hidden_size, power_of_two=True)
        if not memory.regather_tokens:
            name = f"input of {m.num_experts_per_tok} experts, gathered"
            one = self.operand("expert_mlp", name, m.hidden_size, power_of_two=True)
            yield _times(one, m.num_experts_per_tok)

    def join(self, *, first: bool) -> Iterator[SavedTensor]:
        """The two norms and eh_proj of an MTP block. Its h is kept elsewhere from the second block on, by the block
        before, and in the first where the head keeps its input."""
        hidden = self.model.hidden_size
        yield from self.norm(RESIDUAL, "rms_norm", "next token's embedding", hidden)
        if first and self.memory.chunked_head:
            yield self.plain(RESIDUAL, "rms_norm", "h", self.dtype, hidden)
        yield self.plain(OTHER, "rms_norm", "1 / rms, h", "fp32", 1)
        if not self.memory.recompute_norms:
            yield self.plain(INPUT, "dense_linear", "input of eh_proj", self.dtype, 2 * hidden)

    def head(self) -> Iterator[SavedTensor]:
        hidden, vocabulary, op = self.model.hidden_size, self.model.vocab_size, "chunked_loss"
        if self.memory.chunked_head:
            yield self.plain(HEAD, op, "gradient of hidden states", self.dtype, hidden)
            yield self.plain(HEAD, op, "gradient of the head", "fp32", 0, vocabulary * hidden)
        else:
            yield self.plain(HEAD, op, "hidden states", self.dtype, hidden)
            yield self.plain(HEAD, op, "logits", "fp32", vocabulary)
            yield self.plain(HEAD, op, "targets", "int64", 1)


def _times(tensor: SavedTensor, count: int) -> SavedTensor:
    return replace(tensor, bytes_per_token=count * tensor.bytes_per_token)


def _of(part: str, layer: int | None, tensors: Iterable[SavedTensor]) -> Iterator[SavedTensor]:
    for tensor in tensors:
        yield replace(tensor, part=part, layer=layer)
