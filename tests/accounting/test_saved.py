"""The list of what is kept for backward is true: held against what autograd keeps, byte by byte, for every switch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.accounting import memory, saved_rows, saved_tensors
from tessera.accounting.saved import KINDS
from tessera.model import Transformer
from tessera.numerics import Policy, RoleKind, Weight
from tessera.ops.chunked_loss import chunked_loss
from tessera.ops.keep import Keep
from tessera.recipe import MemorySection, ModelSection, NumericsSection, load_recipe
from tests.model import shapes

RECIPES = Path(__file__).parents[2] / "recipes"
BATCH, LENGTH = 3, 14
TOKENS = BATCH * LENGTH
SECTION = shapes.section(**shapes.BEYOND_A_TILE)
OTHER_SHAPE: dict[str, Any] = {"q_lora_rank": None, "n_shared_experts": 0, "norm_topk_prob": False}
NUMERICS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
    "deepseek-v3": {"scales": "deepseek-v3"},
    "row": {"tiles": "row"},
    "tensor": {"tiles": "tensor"},
}
SWITCHES = list(MemorySection.model_fields)
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
        self._left_out = [(), (BATCH, experts)]  # counters, frequencies

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
                whole = not model.keep.chunked_head
                targets = tokens.flatten().clone() if whole else tokens.flatten()
                chunked_loss(output.hidden.flatten(0, 1), model.lm_head.weight, targets, chunked=not whole)
    return kept.found


def promised(section: ModelSection, numerics: NumericsSection, saved: MemorySection) -> list[tuple[str, str, int]]:
    """The list for one step, as (where, kind, bytes)."""
    found, trunk, times = [], section.num_hidden_layers, Counter[str]()
    for tensor in saved_tensors(section, numerics, saved):
        kind = "codes" if tensor.format.startswith("e") else tensor.format
        size = TOKENS * tensor.bytes_per_token + tensor.bytes
        if tensor.part == "model":
            found.append(("rotation", kind, size // BATCH))
        elif tensor.part == "lm_head":
            found.append(("lm_head", kind, size))
        elif tensor.part == "model.embed_tokens":
            found.append((f"draft {times['ids']}" if times["ids"] else "trunk", kind, size))
            times["ids"] += 1
        elif tensor.layer is None:
            found.append(("trunk", kind, size))
        elif tensor.part.endswith((".self_attn", ".mlp")):
            found.append((tensor.part, kind, size))
        else:
            found.append((f"draft {tensor.layer - trunk + 1}", kind, size))
    return [entry for entry in found if entry[2]]


def sums(entries: list[tuple[str, str, int]]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for where, kind, size in entries:
        total[where, kind] += size
    return total


def without(*switches: str) -> MemorySection:
    return MemorySection(**dict.fromkeys(switches, False))


@pytest.mark.parametrize("changes", [{}, OTHER_SHAPE], ids=["V3", "no latent, no shared expert"])
@pytest.mark.parametrize("switches", [[], SWITCHES, *([s] for s in SWITCHES)], ids=lambda s: ",".join(s) or "all on")
@pytest.mark.parametrize("name", NUMERICS)
def test_what_is_listed_is_what_autograd_keeps(name: str, switches: list[str], changes: dict[str, Any]) -> None:
    section = ModelSection(**(SECTION.model_dump(exclude_none=True) | changes))
    numerics, saved = NumericsSection(**NUMERICS[name]), without(*switches)
    model = Transformer(section, Policy(**numerics.model_dump()), keep=Keep(**saved.model_dump()))
    found, owed = kept_in_a_step(model), promised(section, numerics, saved)
    assert sums(found) == sums(owed)
    assert Counter(e for e in found if e[1] == "codes") == Counter(e for e in owed if e[1] == "codes")


@pytest.mark.parametrize("name", ["fp8", "deepseek-v3", "row", "tensor"])
def test_formats_tiles_and_scales_are_those_of_the_roles(name: str) -> None:
    """Bytes do not show them: the preset "deepseek-v3" has other scales in as many bytes."""
    numerics = NumericsSection(**NUMERICS[name])
    policy = Policy(**numerics.model_dump())
    owed = {
        "input of q_a_proj, kv_a_proj": policy.role(RoleKind.ATTENTION_INPUT).input,
        "input of q_b_proj": policy.role(RoleKind.ATTENTION_UP).input,
        "input of kv_b_proj": policy.role(RoleKind.ATTENTION_UP).input,
        "input of o_proj": policy.role(RoleKind.ATTENTION_OUTPUT).input_cache,
        "input of gate_up_proj": policy.role(RoleKind.DENSE_GATE_UP).input,
        "gate and up": policy.role(RoleKind.DENSE_GATE_UP).gate_up_cache,
        "input of the experts": policy.role(RoleKind.EXPERT_GATE_UP).input,
        "input of 3 experts, gathered": policy.role(RoleKind.EXPERT_GATE_UP).input,
        "gate and up, 3 experts": policy.role(RoleKind.EXPERT_GATE_UP).gate_up_cache,
        "gate and up, shared experts": policy.role(RoleKind.EXPERT_GATE_UP).gate_up_cache,
    }
    coded = [t for t in saved_tensors(SECTION, numerics, without("recompute_norms", "regather_tokens")) if t.tile]
    assert {tensor.name for tensor in coded} == owed.keys()
    for tensor in coded:
        q = owed[tensor.name]
        assert q is not None
        tile = "x".join(str(extent or "all") for extent in (q.tile.rows, q.tile.columns))
        assert (tensor.format, tensor.tile, tensor.scale) == (q.format.name, tile, q.scale_mode), tensor.name


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_saves_something_by_itself_or_before_the_others(switch: str) -> None:
    """Codes of a norm's output are not kept where the norm itself is made again."""
    before = [s for s in SWITCHES if s != "fp8_linear_inputs"] if switch == "fp8_linear_inputs" else []

    def kept(*off: str) -> int:
        return sum(t.bytes_per_token for t in saved_tensors(SECTION, NumericsSection(), without(*off)))

    assert kept(*before) < kept(*before, switch)


def test_kinds_and_layers_add_up() -> None:
    found = memory(load_recipe(RECIPES / "tiny.toml"))
    assert set(found.kinds()) <= set(KINDS) and sum(found.kinds().values()) == found.saved_per_token
    layers = {tensor.layer for tensor in found.tensors if tensor.layer is not None}
    assert layers == {0, 1, 2, 3, 4}
    rest = sum(tensor.bytes_per_token for tensor in found.tensors if tensor.layer is None)
    assert sum(found.layer(i) for i in layers) + rest == found.saved_per_token
    assert found.saved == 2048 * found.saved_per_token + found.saved_fixed


def test_the_671b_model_takes_no_memory_and_a_readable_table() -> None:
    recipe = load_recipe(RECIPES / "deepseek-v3.toml")
    found = memory(recipe)
    rows = saved_rows(found.tensors)
    assert len(rows) < 50 and len({(row["part"], row["name"]) for row in rows}) == len(rows)
    assert sum(row["layers"] * row["bytes_per_token"] for row in rows) == found.saved_per_token
    assert sum(row["layers"] * row["bytes"] for row in rows) == found.saved_fixed
    # 671.0B and 11.6B of MTP: 4 bytes each for masters and gradients, twice 2 for the moments
    assert found.masters == found.gradients == found.moments and 2.72e12 < found.masters < 2.74e12


def test_operands_are_counted_as_the_model_holds_them() -> None:
    for name, fields in NUMERICS.items():
        recipe = load_recipe(RECIPES / "tiny.toml", [f'numerics.{k}="{v}"' for k, v in fields.items()])
        model = Transformer(recipe.model, Policy(**recipe.numerics.model_dump()))
        tokens = shapes.tokens(recipe.model, 1, 8)
        model.draft(1, model(tokens).carry, tokens)
        masters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = [weight._operand for weight in weights_of(model)]
        tensors = [t for o in held for t in ([o] if isinstance(o, Tensor) else [o.codes, o.scales])]
        own = [t for t in tensors if t.untyped_storage().data_ptr() not in masters]
        assert sum(t.nbytes for t in own) == memory(recipe).operands, name


def weights_of(model: Transformer) -> Iterator[Weight]:
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Weight):
                yield value


def test_average_and_moments_follow_the_recipe() -> None:
    plain = memory(load_recipe(RECIPES / "tiny.toml"))
    found = memory(load_recipe(RECIPES / "tiny.toml", ["training.ema_decay=0.9", 'optimizer.moments="fp32"']))
    assert plain.ema == 0 and found.ema == found.masters and found.moments == 2 * plain.moments
    assert found.total - plain.total == 2 * (found.ema + plain.moments)  # a checkpoint is written from a copy
    at_once = memory(load_recipe(RECIPES / "tiny.toml", ["checkpoint.asynchronous=false"]))
    assert at_once.checkpoint_copy == 0 and plain.total - at_once.total == plain.masters + plain.moments


def test_tokens_are_those_of_a_micro_batch() -> None:
    whole, micro = (load_recipe(RECIPES / "tiny.toml", s) for s in ([], ["training.micro_batch_size=2"]))
    assert (memory(whole).tokens, memory(micro).tokens) == (8 * 256, 2 * 256)
