"""The table of precisions is true: it is held against what autograd keeps and what the roles quantise, byte by byte."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import accounting
from tessera.model import Transformer
from tessera.model.precision_table import precision_table
from tessera.numerics import Policy, Recorder
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops import dense_linear
from tessera.ops.chunked_loss import chunked_loss
from tessera.recipe import ModelSection, load_recipe
from tests.model import shapes

BATCH, LENGTH = 3, 14
TOKENS = BATCH * LENGTH
# Widths beyond a tile and no multiple of one, an odd width for 12-bit codes, two MTP blocks.
SECTION = shapes.section(
    hidden_size=136,
    intermediate_size=200,
    moe_intermediate_size=132,
    v_head_dim=45,
    num_nextn_predict_layers=2,
)
POLICIES = {
    "fp8": Policy(),
    "bf16": Policy(precision="bf16"),
    "fp32": Policy(precision="fp32"),
    "deepseek-v3": Policy(scales="deepseek-v3"),
    "row": Policy(tiles="row"),
}
WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "int64", torch.complex64: "complex64"}


class Kept:
    """Every tensor that autograd keeps, once, as (where, kind, bytes); codes together with their scales."""

    def __init__(self, model: Transformer) -> None:
        self.where = "trunk"
        self.found: list[tuple[str, str, int]] = []
        self._known: set[tuple[int, torch.dtype, int]] = {_key(p) for p in model.parameters()}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._codes_just_seen = False
        experts = model.section.n_routed_experts
        self._left_out = [(), (experts + 1,), (BATCH, experts)]  # counters, offsets, frequencies

    def pack(self, tensor: Tensor) -> Tensor:
        is_scale, self._codes_just_seen = self._codes_just_seen, False
        if _key(tensor) in self._known or tuple(tensor.shape) in self._left_out:
            self._codes_just_seen = tensor.dtype == torch.uint8
            return tensor
        self._known.add(_key(tensor))
        self._alive.append(tensor)
        if is_scale:
            where, kind, size = self.found.pop()
            self.found.append((where, kind, size + tensor.nbytes))
        else:
            self._codes_just_seen = tensor.dtype == torch.uint8
            kind = "codes" if self._codes_just_seen else WORDS[tensor.dtype]
            self.found.append(("rotation" if kind == "complex64" else self.where, kind, tensor.nbytes))
        return tensor

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        before, self.where = self.where, where
        yield
        self.where = before

    def watch(self, name: str, module: nn.Module) -> None:
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self.where)
            self.where = name

        def leave(*_: Any) -> None:
            self.where = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _key(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    return tensor.data_ptr(), tensor.dtype, tensor.numel()


def kept_in_a_step(model: Transformer) -> list[tuple[str, str, int]]:
    """Forward, both drafts and their losses, as training does them."""
    kept = Kept(model)
    for i, layer in enumerate(model.model.layers):
        kept.watch(f"model.layers.{i}.self_attn", layer.self_attn)
        kept.watch(f"model.layers.{i}.mlp", layer.mlp)
    tokens = shapes.tokens(model.section, BATCH, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        output = model(tokens)
        for depth in range(model.section.num_nextn_predict_layers + 1):
            if depth:
                with kept.at(f"draft {depth}"):
                    output = model.draft(depth, output.carry, tokens.roll(-depth, dims=1))
            with kept.at("lm_head"):
                chunked_loss(output.hidden.flatten(0, 1), model.lm_head.weight, tokens.flatten())
    return kept.found


def promised(section: ModelSection, policy: Policy) -> list[tuple[str, str, int]]:
    """The table's rows for one step, spelled out layer by layer, as (where, kind, bytes)."""
    found = []
    trunk, depths = section.num_hidden_layers, section.num_nextn_predict_layers
    for row in precision_table(section, policy, "bf16").cached:
        kind = "codes" if row["format"].startswith("e") else row["format"]
        size = TOKENS * row["bytes_per_token"] + row["bytes"]
        match row["part"]:
            case "model":
                found += [("rotation", kind, size // BATCH)] * row["layers"]
            case "model.embed_tokens":
                found += [(where, kind, size) for where in ["trunk", *(f"draft {d + 1}" for d in range(depths))]]
            case "model.norm":
                found.append(("trunk", kind, size))
            case "lm_head":
                found += [("lm_head", kind, size)] * row["layers"]
            case part:
                for name, layer in spelled(part):
                    if name.endswith((".self_attn", ".mlp")):
                        found.append((name, kind, size))
                    else:
                        found.append((f"draft {layer - trunk + 1}", kind, size))
    return [entry for entry in found if entry[2]]


def spelled(name: str) -> Iterator[tuple[str, int]]:
    """ "model.layers.[1-2].mlp" -> ("model.layers.1.mlp", 1), ("model.layers.2.mlp", 2)."""
    match = re.fullmatch(r"(model\.layers\.)(?:\[(\d+)-(\d+)\]|(\d+))(.*)", name)
    assert match, name
    first, last = (int(match[2]), int(match[3])) if match[2] else (int(match[4]), int(match[4]))
    for layer in range(first, last + 1):
        yield f"{match[1]}{layer}{match[5]}", layer


def sums(entries: list[tuple[str, str, int]]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for where, kind, size in entries:
        total[where, kind] += size
    return total


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0, "norm_topk_prob": False}])
def test_bytes_kept_for_backward_are_those_that_autograd_keeps(name: str, changes: dict[str, Any]) -> None:
    section = ModelSection(**(SECTION.model_dump(exclude_none=True) | changes))
    policy = POLICIES[name]
    found, owed = kept_in_a_step(Transformer(section, policy)), promised(section, policy)
    assert sums(found) == sums(owed)
    assert Counter(e for e in found if e[1] == "codes") == Counter(e for e in owed if e[1] == "codes")


class Watching(Recorder):
    """Remembers every operand that a role makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: dict[str, TiledTensor] = {}

    def observe(self, name: str, source: Tensor, quantised: TiledTensor, *, requantised: bool = False) -> None:
        self.operands[name] = quantised


@pytest.mark.parametrize("name", ["fp8", "deepseek-v3", "row"])
def test_operands_are_those_that_the_roles_make(name: str) -> None:
    recorder = Watching()
    model = Transformer(SECTION, POLICIES[name], recorder=recorder)
    tokens = shapes.tokens(SECTION, BATCH, LENGTH)
    output = model(tokens)
    carry, loss = output.carry, output.hidden.float().square().sum()
    for depth in (1, 2):
        output = model.draft(depth, carry, tokens)
        carry, loss = output.carry, loss + output.hidden.float().square().sum()
    loss.backward()

    table: dict[str, dict[str, Any]] = {}
    for row in precision_table(SECTION, POLICIES[name], "bf16").parameters:
        for parameter, _ in spelled(row["name"]) if "layers" in row["name"] else [(row["name"], 0)]:
            table[parameter.removesuffix(".weight")] = row
    assert len(table) == len(model.state_dict())
    for operand_name, made in recorder.operands.items():
        parameter, _, operand = operand_name.rpartition(".")
        if operand.endswith("_cache"):
            continue
        format, tile, scale = table[parameter][operand].split()
        extents = "x".join("all" if extent == 0 else str(extent) for extent in (made.tile.rows, made.tile.columns))
        assert (made.format.name, extents) == (format, tile), operand_name
        mantissa, _ = made.scales.frexp()
        assert bool((mantissa == 0.5).all()) == (scale == "power_of_two"), operand_name
    quantised = {name for name, row in table.items() if row["weight"].startswith("e4m3")}
    for operand in ("weight", "gradient_rows", "gradient_columns"):
        assert {f"{name}.{operand}" for name in quantised} <= recorder.operands.keys()


def test_router_and_mtp_projection_multiply_in_the_precision_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(SECTION, Policy())
    shape_of = {tuple(p.shape): name for name, p in model.named_parameters() if "gate.weight" in name or "eh_" in name}
    seen: dict[str, set[str]] = {}

    def spy(a: Tensor, b: Tensor) -> Tensor:
        name = shape_of[tuple(b.t().shape)].rsplit(".", 2)[1]
        seen.setdefault(name, set()).update({WORDS[a.dtype], WORDS[b.dtype]})
        return a @ b

    monkeypatch.setattr(dense_linear, "matmul_rows", spy)
    tokens = shapes.tokens(SECTION, 1, 8)
    model.draft(1, model(tokens).carry, tokens)
    table = precision_table(SECTION, Policy(), "bf16").parameters
    rows = {row["name"].rsplit(".", 2)[1]: row for row in table if row["name"].endswith(".weight")}
    assert seen == {name: {rows[name]["input"], rows[name]["weight"]} for name in ("gate", "eh_proj")}
    assert seen == {"gate": {"fp32"}, "eh_proj": {"bf16"}}


def test_masters_gradients_and_moments_are_those_of_a_run() -> None:
    rows = {row["name"]: row for row in precision_table(SECTION, Policy(), "bf16").parameters}
    assert {row["master"] for row in rows.values()} == {"fp32"}
    trained = {name for name, row in rows.items() if row["moments"] == "bf16" and row["gradient"] == "fp32"}
    assert {name for name in rows if name not in trained} == {
        "model.layers.[1-2].mlp.gate.e_score_correction_bias",
        "model.layers.[3-4].mlp.gate.e_score_correction_bias",
    }


def test_the_671b_model_takes_a_readable_table_and_no_memory() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "deepseek-v3.toml")
    table = precision_table(recipe.model, Policy(**recipe.numerics.model_dump()), recipe.optimizer.moments)
    assert len(table.parameters) < 50 and len(table.cached) < 50
    assert len({(row["part"], row["name"]) for row in table.cached}) == len(table.cached)
    counts = accounting.parameters(recipe.model)
    trained = [row for row in table.parameters if row["gradient"] != "none"]
    assert sum(row["layers"] * math.prod(row["shape"]) for row in trained) == counts.total + counts.mtp_total
    experts = next(r for r in trained if r["name"] == "model.layers.[3-60].mlp.experts.down_proj")
    assert experts["shape"] == [256, 7168, 2048] and experts["layers"] == 58
