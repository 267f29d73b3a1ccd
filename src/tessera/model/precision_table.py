"""In which numbers a model is stored, computed and kept for backward: docs/numerics.md as two tables for one recipe.

The model is built on device "meta", so nothing is allocated, and its modules are asked for the Precision objects
that `ops` computes with. What an op keeps is written down here a second time, beside its `save`; a test compares it
with what autograd really keeps, byte by byte.

`parameters`, a row for each parameter and routing bias, equal ones of consecutive layers in one row
("model.layers.[3-60].mlp.experts.down_proj"), MTP blocks apart:

    name, shape, layers (how many the row stands for), master, gradient, moments,
    input, weight (fprop); gradient_rows (dgrad, with the same weight); gradient_columns, input_columns (wgrad);
    accumulation

`cached`, a row for each tensor kept for backward, MTP blocks among the layers that they are:

    part, layers, op, name, format, tile, scale, bytes_per_token (of one layer), bytes (whatever the number of tokens)

An operand reads "e4m3 1x128 power_of_two", or "bf16", or "-" where there is no such GEMM. What two ops keep in common
is counted once; a position of the rotation counts as a token. Not listed: parameters and FP8 weight codes, which live
anyway; the mask of data.cross_document_attention = false (4 bytes a token and key, once for all layers); expert
offsets, the balance loss's frequencies and the quantiser's counters, a few kilobytes a layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tessera.model.attention import LatentAttention
from tessera.model.experts import DenseMlp, GatedMlp, MixtureOfExperts, RoutedExperts
from tessera.model.layer import Layer
from tessera.model.mtp import MtpBlock, PlainProjection
from tessera.model.projection import Norm, Projection
from tessera.model.router import Router
from tessera.model.transformer import TokenTable, Transformer
from tessera.numerics import Policy
from tessera.numerics.precision import Precision, Quantisation
from tessera.numerics.tiles import tiles_along
from tessera.recipe.model import ModelSection

WORDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "int64",
    torch.complex64: "complex64",
}
EXTENT = {0: "all"}  # of a tile: the whole row or column
NO_GEMM = "-"
OPERANDS = ("input", "weight", "gradient_rows", "gradient_columns", "input_columns")


@dataclass(frozen=True)
class PrecisionTable:
    """The rows of both tables, as plain JSON values; see the module docstring."""

    parameters: list[dict[str, Any]]
    cached: list[dict[str, Any]]


def precision_table(section: ModelSection, policy: Policy, moments: str) -> PrecisionTable:
    """Both tables of a model; `moments` is the recipe's optimizer.moments."""
    model = Transformer(section, policy, device="meta")
    return PrecisionTable(
        _grouped(_parameters(model, moments), "name", apart=section.num_hidden_layers),
        _grouped(_cached(model), "part"),
    )


# Parameters


def _parameters(model: Transformer, moments: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """(layer or None, row) of every parameter and persistent buffer, in the order of the model."""
    activations = WORDS[model.policy.activation_dtype]
    modules, trained = dict(model.named_modules()), {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        layer, name = _place(name)
        yield (
            layer,
            {
                "name": name,
                "shape": list(tensor.shape),
                "layers": 1,
                "master": WORDS[tensor.dtype],
                "gradient": WORDS[tensor.dtype] if f"{owner}.{leaf}" in trained else "none",
                "moments": moments if f"{owner}.{leaf}" in trained else "none",
                **_gemms(modules[owner], leaf, activations, is_head=modules[owner] is model.lm_head),
            },
        )


def _gemms(module: nn.Module, leaf: str, activations: str, *, is_head: bool) -> dict[str, str]:
    """The operands of the three GEMMs of a parameter, and how they add up."""
    match module:
        case Projection():
            return _of_role(module.role.precision)
        case RoutedExperts():
            return _of_role((module._gate_up if leaf == "gate_up_proj" else module._down).role.precision)
        case Router() if leaf == "weight":
            return dict.fromkeys(OPERANDS, "fp32") | {"accumulation": "fp32"}
        case PlainProjection():
            return dict.fromkeys(OPERANDS, activations) | {"accumulation": "fp32"}
        case TokenTable() if is_head:
            return dict.fromkeys(OPERANDS, activations) | {"accumulation": "fp32"}
        case TokenTable():  # rows are looked up in the master and rounded afterwards
            return dict.fromkeys(OPERANDS, NO_GEMM) | {"weight": activations, "accumulation": NO_GEMM}
        case Norm() | Router():
            return dict.fromkeys(OPERANDS, NO_GEMM) | {"weight": "fp32", "accumulation": NO_GEMM}
    raise TypeError(f"precision of {leaf} in a {type(module).__name__} is not known here")


def _of_role(precision: Precision) -> dict[str, str]:
    if not precision.quantised:
        return dict.fromkeys(OPERANDS, WORDS[precision.activation_dtype]) | {"accumulation": "fp32"}
    how = precision.accumulation
    operands = {operand: _words(getattr(precision, operand)) for operand in OPERANDS}
    return operands | {"accumulation": "fp32" if how.model == "float32" else f"{how.model} {how.interval}"}


def _words(q: Quantisation) -> str:
    words = [q.format.name, _tile(q), q.scale_mode]
    return " ".join(words if q.rounding == "nearest" else [*words, q.rounding])


def _tile(q: Quantisation) -> str:
    rows, columns = (EXTENT.get(extent, str(extent)) for extent in (q.tile.rows, q.tile.columns))
    return f"{rows}x{columns}"


# Kept for backward


@dataclass(frozen=True)
class _Kept:
    op: str
    name: str
    format: str
    tile: str
    scale: str
    bytes_per_token: int
    bytes: int = 0


def _plain(op: str, name: str, dtype: torch.dtype, per_token: int, fixed: int = 0) -> _Kept:
    """`per_token` and `fixed` elements of a plain tensor."""
    return _Kept(op, name, WORDS[dtype], "", "", per_token * dtype.itemsize, fixed * dtype.itemsize)


def _coded(op: str, name: str, p: Precision, q: Quantisation | None, columns: int, *, segment: int = 0) -> _Kept:
    """A row of `columns` elements a token, in codes where the role is FP8; tiles restart every `segment` columns."""
    if not p.quantised or q is None:
        return _plain(op, name, p.activation_dtype, columns)
    scales = tiles_along(columns, q.tile.columns, segment) if q.tile.rows == 1 else 0
    return _Kept(op, name, q.format.name, _tile(q), q.scale_mode, q.format.code_bytes(columns) + 4 * scales)


def _cached(model: Transformer) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """(layer or None, row) of everything that one training step of forward, drafts and losses keeps."""
    section, dtype = model.section, model.policy.activation_dtype
    hidden, predictions = section.hidden_size, 1 + section.num_nextn_predict_layers

    def rows(part: str, kept: Iterable[_Kept], layers: int = 1) -> Iterator[tuple[int | None, dict[str, Any]]]:
        layer, part = _place(part)
        for one in kept:
            yield layer, {"part": part, "layers": layers, **asdict(one)}

    yield from rows("model.embed_tokens", [_plain("embedding", "token ids", torch.int64, 1)], predictions)
    rotation = _plain("latent_attention", "rotation (all layers)", torch.complex64, section.qk_rope_head_dim // 2)
    yield from rows("model", [rotation], predictions)
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        name = f"model.layers.{i}"
        if isinstance(layer, MtpBlock):
            yield from rows(name, _join(dtype, hidden, first=i == section.num_hidden_layers))
        yield from rows(f"{name}.self_attn", _attention(layer.self_attn, dtype))
        yield from rows(f"{name}.mlp", _mlp(layer.mlp, section, dtype))
        if isinstance(layer, MtpBlock):
            yield from rows(f"{name}.shared_head", _norm("rms_norm", "block's output", dtype, hidden))
    yield from rows("model.norm", _norm("rms_norm", "residual stream", dtype, hidden))
    yield from rows(
        "lm_head", [_plain("chunked_loss", "gradient of hidden states", torch.float32, hidden)], predictions
    )
    head = _plain("chunked_loss", "gradient of the head", torch.float32, 0, section.vocab_size * hidden)
    yield from rows("lm_head", [head], predictions)


def _norm(op: str, name: str, dtype: torch.dtype, width: int) -> Iterator[_Kept]:
    yield _plain(op, name, dtype, width)
    yield _plain(op, f"1 / rms, {name}", torch.float32, 1)


def _normed_linear(name: str, dtype: torch.dtype, width: int, *weights: tuple[str, Projection]) -> Iterator[_Kept]:
    """ops.linear.normed_linear: its input, and the operand that all `weights` read."""
    op, precision = "normed_linear", weights[0][1].role.precision
    yield from _norm(op, name, dtype, width)
    yield _coded(op, f"input of {', '.join(leaf for leaf, _ in weights)}", precision, precision.input, width)


def _attention(attention: LatentAttention, dtype: torch.dtype) -> Iterator[_Kept]:
    section = attention.section
    hidden, heads, rank = section.hidden_size, section.num_attention_heads, section.q_lora_rank
    down = ("kv_a_proj", attention.kv_a_proj_with_mqa)
    if rank is None:
        yield from _normed_linear("residual stream", dtype, hidden, ("q_proj", attention.q_proj), down)
    else:
        yield from _normed_linear("residual stream", dtype, hidden, ("q_a_proj", attention.q_a_proj), down)
        yield from _normed_linear("query latent", dtype, rank, ("q_b_proj", attention.q_b_proj))
    up = ("kv_b_proj", attention.kv_b_proj)
    yield from _normed_linear("key-value latent", dtype, section.kv_lora_rank, up)
    op, output = "latent_attention", attention.o_proj.role.precision
    yield _plain(op, "rotary key", dtype, section.qk_rope_head_dim)
    yield _plain(op, "queries", dtype, heads * section.qk_head_dim)
    yield _plain(op, "keys and values", dtype, heads * (section.qk_nope_head_dim + section.v_head_dim))
    yield _plain(op, "log-sum-exp of the scores", torch.float32, heads)
    yield _coded(op, "input of o_proj", output, output.input_cache or output.input, heads * section.v_head_dim)


def _mlp(mlp: DenseMlp | MixtureOfExperts, section: ModelSection, dtype: torch.dtype) -> Iterator[_Kept]:
    if isinstance(mlp, DenseMlp):
        yield from _normed_linear("residual stream", dtype, section.hidden_size, ("gate_up_proj", mlp.gate_up_proj))
        yield _gate_up("swiglu_linear", "gate and up", mlp)
        return
    yield from _norm("rms_norm", "residual stream", dtype, section.hidden_size)
    experts, chosen = section.n_routed_experts, section.num_experts_per_tok
    codes = mlp.experts._gate_up.role.precision
    readers = "expert_mlp" if mlp.shared_experts is None else "expert_mlp, linear"
    if codes.quantised:
        yield _plain("router", "normalised input", dtype, section.hidden_size)
        yield _coded(readers, "input of the experts", codes, codes.input, section.hidden_size)
    else:
        yield _plain(f"router, {readers}", "normalised input", dtype, section.hidden_size)
    yield _plain("router", "affinities", torch.float32, experts)
    yield _plain("router", "experts chosen", torch.int64, chosen)
    if section.norm_topk_prob:
        yield _plain("router", "weights and their sum", torch.float32, chosen + 1)
    yield _plain("router", "sum of the affinities", torch.float32, 1)
    width = 2 * section.moe_intermediate_size
    segment = section.moe_intermediate_size
    one = _coded("expert_mlp", f"gate and up, {chosen} experts", codes, codes.gate_up_cache, width, segment=segment)
    yield _Kept(**asdict(one) | {"bytes_per_token": chosen * one.bytes_per_token})
    yield _plain("expert_mlp", "routing weights by slot", torch.float32, chosen)
    yield _plain("expert_mlp", "slots: token, choice, position", torch.int64, 3 * chosen)
    if mlp.shared_experts is not None:
        yield _gate_up("swiglu_linear", "gate and up, shared experts", mlp.shared_experts)


def _gate_up(op: str, name: str, mlp: GatedMlp) -> _Kept:
    precision, width = mlp.gate_up_proj.role.precision, mlp.gate_up_proj.weight.shape[0]
    return _coded(op, name, precision, precision.gate_up_cache, width, segment=width // 2)


def _join(dtype: torch.dtype, hidden: int, *, first: bool) -> Iterator[_Kept]:
    """The two norms and eh_proj of an MTP block; from the second block on, h is what the block before keeps."""
    yield from _norm("rms_norm", "next token's embedding", dtype, hidden)
    if first:
        yield _plain("rms_norm", "h", dtype, hidden)
    yield _plain("rms_norm", "1 / rms, h", torch.float32, 1)
    yield _plain("dense_linear", "input of eh_proj", dtype, 2 * hidden)


# Grouping


def _place(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp.gate.weight" -> (3, "model.layers.{}.mlp.gate.weight")."""
    _, _, rest = name.partition("model.layers.")
    if not rest:
        return None, name
    number, dot, tail = rest.partition(".")
    return int(number), f"model.layers.{{}}{dot}{tail}"


def _grouped(
    rows: Iterable[tuple[int | None, dict[str, Any]]], title: str, apart: int | None = None
) -> list[dict[str, Any]]:
    """Rows that differ in their layer only as one, layers from `apart` on for themselves; in order of appearance."""
    groups: dict[tuple[bool, str], tuple[dict[str, Any], list[int]]] = {}
    for layer, row in rows:
        is_apart = layer is not None and apart is not None and layer >= apart
        _, layers = groups.setdefault((is_apart, str(row)), (row, []))
        layers += [] if layer is None else [layer]
    return [_over(row, title, layers) for row, layers in groups.values()]


def _over(row: dict[str, Any], title: str, layers: list[int]) -> dict[str, Any]:
    """`row` under the name of its layers, which are consecutive: dense ones come first, MTP blocks last."""
    if not layers:
        return row
    name = str(layers[0]) if len(layers) == 1 else f"[{layers[0]}-{layers[-1]}]"
    return row | {title: row[title].format(name), "layers": len(layers)}
