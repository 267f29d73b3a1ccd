"""The switches of [memory] on a whole model: lossless ones change no bit, lossy ones round what they say, no more."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.model import Transformer
from tessera.numerics import Policy, Recorder, Role
from tessera.numerics.gemm import Operand
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops import rms_norm
from tessera.ops.chunked_loss import chunked_loss
from tessera.ops.keep import Keep
from tests.model import shapes

LOSSY = ("e5m6_attention_output", "fp8_swiglu_inputs")
LOSSLESS = tuple(name for name in vars(Keep()) if name not in LOSSY)
SECTION = shapes.section(hidden_size=136, moe_intermediate_size=132, num_nextn_predict_layers=2)
BATCH, LENGTH = 2, 70


@dataclass
class Step:
    """One step's results."""

    loss: Tensor
    counts: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def same(self, other: "Step") -> bool:
        names = self.gradients.keys() == other.gradients.keys()
        equal = all(torch.equal(g, other.gradients[name]) for name, g in self.gradients.items())
        counts = all(torch.equal(a, b) for a, b in zip(self.counts, other.counts, strict=True))
        return names and equal and counts and torch.equal(self.loss, other.loss)


def step(keep: Keep, section: Any = SECTION, recorder: Recorder | None = None, **policy: str) -> Step:
    model = shapes.with_biases(Transformer(section, Policy(**policy), keep=keep, recorder=recorder, seed=1))
    tokens = shapes.tokens(section, BATCH, LENGTH)
    documents = (torch.arange(LENGTH) // 30).expand(BATCH, -1)
    output = model(tokens, document_ids=documents)
    routings, total = list(output.router), torch.zeros(())
    for depth in range(section.num_nextn_predict_layers + 1):
        if depth:
            output = model.draft(depth, output.carry, tokens.roll(-depth, dims=1), document_ids=documents)
            routings += output.router
        hidden = output.hidden.flatten(0, 1)
        total = total + chunked_loss(hidden, model.lm_head.weight, tokens.flatten(), chunked=keep.chunked_head)
    balance = torch.stack([r.balance_loss for r in routings]).sum()
    (total + balance).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return Step(total.detach(), [r.counts for r in routings], gradients)


@pytest.mark.parametrize(
    "policy", [{}, {"precision": "bf16"}, {"precision": "fp32"}, {"scales": "deepseek-v3"}], ids=str
)
def test_lossless_switches_change_no_bit(policy: dict[str, str]) -> None:
    on = step(Keep(), **policy)
    for names in (*((name,) for name in LOSSLESS), LOSSLESS):
        assert on.same(step(Keep(**dict.fromkeys(names, False)), **policy)), names


@pytest.mark.parametrize("tiles", ["row", "tensor"])
def test_lossless_switches_change_no_bit_with_other_tiles(tiles: str) -> None:
    assert step(Keep(), tiles=tiles).same(step(Keep(**dict.fromkeys(LOSSLESS, False)), tiles=tiles))


def test_lossless_switches_change_no_bit_without_query_latent_and_shared_experts() -> None:
    section = SECTION.model_copy(update={"q_lora_rank": None, "n_shared_experts": 0})
    assert step(Keep(), section).same(step(Keep(**dict.fromkeys(LOSSLESS, False)), section))


class Rounding(Keep):
    """Keeps plain tensors, rounded as the switch in question would have them."""

    def attention_output(self, role: Role, value: Tensor, operand: Operand) -> Operand:
        if self.e5m6_attention_output:
            return super().attention_output(role, value, operand)
        cached = role.input_cache(value, operand)
        assert isinstance(cached, TiledTensor) and cached.format.name == "e5m6"
        return cached.decode()

    def swiglu_input(self, role: Role, gate_up: Tensor) -> Operand:
        if self.fp8_swiglu_inputs:
            return super().swiglu_input(role, gate_up)
        cached = role.gate_up_cache(gate_up, gate_up.shape[1] // 2)
        assert isinstance(cached, TiledTensor) and cached.format.name == "e4m3"
        return cached.decode()


@pytest.mark.parametrize("switch", LOSSY)
def test_a_lossy_switch_is_the_rounding_of_its_tensors_and_nothing_else(switch: str) -> None:
    on, off = step(Keep()), step(Keep(**{switch: False}))
    rounded = step(Rounding(**{switch: False}))
    assert on.same(rounded)
    assert torch.equal(on.loss, off.loss) and not on.same(off)  # the forward pass does not see it


@pytest.mark.parametrize("switch", LOSSY)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fp8_switches_do_nothing_where_nothing_is_quantised(switch: str, precision: str) -> None:
    assert step(Keep(), precision=precision).same(step(Keep(**{switch: False}), precision=precision))


class Counting(Recorder):
    """Counts what the roles show it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def count(self, name: str, quantised: TiledTensor) -> None:
        self.elements[name] = self.elements.get(name, 0) + quantised.codes.numel()


def test_recomputation_never_counts_twice() -> None:
    once, again = Counting(), Counting()
    kept = step(Keep(**dict.fromkeys(LOSSLESS, False)), recorder=once)
    made = step(Keep(), recorder=again)
    assert once.elements == again.elements and once.elements
    assert all(int(c.sum()) == BATCH * LENGTH * SECTION.num_experts_per_tok for c in made.counts)
    assert all(torch.equal(a, b) for a, b in zip(kept.counts, made.counts, strict=True))


def test_a_norm_is_made_again_once_for_all_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    scaled = rms_norm.scaled

    def spy(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return scaled(x, *rest)

    monkeypatch.setattr(rms_norm, "scaled", spy)
    kept = step(Keep(recompute_norms=False))
    without = len(calls)
    calls.clear()
    step(Keep())
    norms = sum(name.endswith("norm.weight") for name in kept.gradients)
    # Not made again: the trunk's last norm and each block's before the head, whose readers keep nothing of them.
    heads = 1 + SECTION.num_nextn_predict_layers
    assert len(calls) - without == norms - heads
