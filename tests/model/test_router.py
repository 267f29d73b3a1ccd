"""Routing, its bias and its balance loss against plain loops; the router stays FP32 whatever happens around it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.model import router as router_module
from tessera.model.router import Router, Routing
from tessera.recipe import ModelSection
from tests.model import shapes, slow_model

CASES: dict[str, dict[str, Any]] = {
    "no groups": {},
    "groups": shapes.GROUPS,
    "one group of many": {"n_routed_experts": 32, "n_group": 8, "topk_group": 1},
    "all groups allowed": {"n_routed_experts": 12, "n_group": 4, "topk_group": 4},
    "unnormalised": {"norm_topk_prob": False, **shapes.GROUPS},
    "one expert": {"num_experts_per_tok": 1},
}
BIASES = ("zero", "both signs", "all negative", "large")


def a_router(section: ModelSection, bias: str = "zero", seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    router = Router(section)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.3)
    noise = torch.randn(section.n_routed_experts, generator=generator)
    value = {"zero": noise * 0, "both signs": noise, "all negative": -3 - noise.abs(), "large": noise * 100}[bias]
    router.e_score_correction_bias.copy_(value)
    return router


def hidden(section: ModelSection, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, section.hidden_size, generator=torch.Generator().manual_seed(seed))


def assert_routes_as_the_loops(section: ModelSection, bias: str) -> None:
    router, x = a_router(section, bias), hidden(section, 60)
    routing = router(x, num_sequences=3)
    counts = [0] * section.n_routed_experts
    for t, row in enumerate(x.double() @ router.weight.detach().double().T):
        affinity = [1 / (1 + math.exp(-v)) for v in row.tolist()]
        owed = slow_model.chosen_experts(affinity, router.e_score_correction_bias.tolist(), section)
        assert routing.experts[t].tolist() == owed
        weights = slow_model.routing_weights(affinity, owed, section)
        assert routing.weights[t].tolist() == pytest.approx(weights, rel=1e-5)
        for expert in owed:
            counts[expert] += 1
    assert routing.counts.dtype == torch.int64 and routing.counts.tolist() == counts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", BIASES)
def test_experts_weights_and_counts_are_those_of_the_loops(case: str, bias: str) -> None:
    assert_routes_as_the_loops(shapes.section(**CASES[case]), bias)


def test_masking_other_groups_with_zero_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "EXCLUDED", 0.0)
    with pytest.raises(AssertionError):
        assert_routes_as_the_loops(shapes.section(**shapes.GROUPS), "all negative")


def test_the_bias_chooses_but_never_weighs() -> None:
    section = shapes.section(num_experts_per_tok=8)  # all experts: the choice cannot differ, only the order
    x = hidden(section, 20)
    plain, biased = (a_router(section, bias)(x, 1) for bias in ("zero", "large"))
    assert not torch.equal(plain.experts, biased.experts)
    for routing in (plain, biased):
        order = routing.experts.argsort(dim=1)
        in_order = routing.weights.gather(1, order)
        assert torch.allclose(in_order, plain.weights.gather(1, plain.experts.argsort(dim=1)), rtol=1e-6)


def test_replayed_experts_are_weighed_by_own_affinities() -> None:
    section = shapes.section(**shapes.GROUPS)
    router, x = a_router(section, "both signs"), hidden(section, 30)
    experts = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(t))[:3] for t in range(30)])
    routing = router(x, 1, experts)
    assert torch.equal(routing.experts, experts)
    assert torch.equal(routing.counts, torch.bincount(experts.flatten(), minlength=12))
    for t, row in enumerate(x.double() @ router.weight.detach().double().T):
        owed = slow_model.routing_weights(torch.sigmoid(row).tolist(), experts[t].tolist(), section)
        assert routing.weights[t].tolist() == pytest.approx(owed, rel=1e-5)
    own = router(x, 1)
    again = router(x, 1, own.experts)
    assert torch.equal(again.weights, own.weights) and torch.equal(again.balance_loss, own.balance_loss)


def test_the_bias_moves_by_its_speed_against_the_load() -> None:
    router = a_router(shapes.section(), "both signs")
    before = router.e_score_correction_bias.tolist()
    counts = [0, 10, 5, 4, 6, 5, 9, 1]  # mean 5
    router.update_bias(torch.tensor(counts), 0.001)
    for old, new, load in zip(before, router.e_score_correction_bias.tolist(), counts, strict=True):
        step = 0.001 if load < 5 else -0.001 if load > 5 else 0.0
        assert new == pytest.approx(old + step, abs=1e-7)


def test_a_load_at_a_mean_that_float32_cannot_hold_stays() -> None:
    router = a_router(shapes.section(n_routed_experts=3, num_experts_per_tok=1))
    huge = 2**40
    router.update_bias(torch.tensor([huge + 1, huge, huge - 1]), 0.5)
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5]
    router.update_bias(torch.tensor([0, 0, 0]), 0.5)
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5]


def test_updates_balance_a_skewed_load() -> None:
    section = shapes.section()
    router = a_router(section)
    with torch.no_grad():
        router.weight[0] += 0.4
    x = hidden(section, 400) + 1
    first = router(x, 1).counts
    for _ in range(300):
        router.update_bias(router(x, 1).counts, 0.01)
    last = router(x, 1).counts
    assert first.max() > 2 * first.double().mean() and last.max() < 1.3 * last.double().mean()


@pytest.mark.parametrize("bias", ["zero", "both signs"])
def test_the_balance_loss_is_the_reports_sum_for_each_sequence(bias: str) -> None:
    section = shapes.section(**shapes.GROUPS)
    router, x = a_router(section, bias), hidden(section, 60)
    experts, chosen, length = 12, 3, 20
    affinity = torch.sigmoid(x.double() @ router.weight.detach().double().T)
    owed = 0.0
    for sequence in range(3):
        frequency, share = [0.0] * experts, [0.0] * experts
        for row in affinity[sequence * length : (sequence + 1) * length].tolist():
            for expert in sorted(range(experts), key=lambda e: -row[e])[:chosen]:  # of s, without bias or groups
                frequency[expert] += experts / (chosen * length)
            for expert in range(experts):
                share[expert] += row[expert] / sum(row) / length
        owed += sum(f * p for f, p in zip(frequency, share, strict=True)) / 3
    loss = router(x, num_sequences=3).balance_loss
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(owed, rel=1e-5)


def test_the_balance_loss_is_one_when_balanced_and_falls_along_its_gradient() -> None:
    section = shapes.section()
    router, x = a_router(section), hidden(section, 64)
    with torch.no_grad():
        router.weight.zero_()
    assert float(router(x, 4).balance_loss.detach()) == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad():
        router.weight.copy_(a_router(section).weight)
        router.weight[2] += 0.3
    losses = []
    for _ in range(20):
        router.zero_grad()
        loss = router(x + 1, 4).balance_loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            router.weight -= 0.05 * router.weight.grad
    assert losses[-1] < losses[0]


def cast_bf16(module: Any) -> Any:
    return module.bfloat16()


def cast_half_and_back(module: Any) -> Any:
    return module.half().float()


def cast_to_dtype(module: Any) -> Any:
    return module.to(torch.bfloat16)


def cast_with_a_device(module: Any) -> Any:
    return module.to("cpu", torch.float16).to(dtype=torch.float64)


@pytest.mark.parametrize("cast", [cast_bf16, cast_half_and_back, cast_to_dtype, cast_with_a_device])
def test_weight_and_bias_keep_every_bit_through_casts_of_the_model(cast: Any) -> None:
    model = shapes.with_biases(shapes.model(shapes.section(num_nextn_predict_layers=1)))
    before = [copy.deepcopy(router) for _, router in model.routers()]
    assert len(before) == 3
    cast(model)
    for old, (_, new) in zip(before, model.routers(), strict=True):
        assert new.e_score_correction_bias.dtype == new.weight.dtype == torch.float32
        assert torch.equal(new.e_score_correction_bias, old.e_score_correction_bias)
        assert torch.equal(new.weight, old.weight)


def test_the_bias_is_saved_and_is_no_parameter() -> None:
    model = shapes.model(shapes.section())
    assert sum(name.endswith("gate.e_score_correction_bias") for name in model.state_dict()) == 2
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("changes", [{}, shapes.GROUPS])
def test_a_token_is_routed_the_same_in_any_company(rows: int, changes: dict[str, Any]) -> None:
    section = shapes.section(hidden_size=640, **changes)
    router, x = a_router(section, "both signs"), hidden(section, 200).bfloat16()
    whole, parts = router(x, 1), [router(part, 1) for part in x.split(rows)]
    assert torch.equal(torch.cat([part.experts for part in parts]), whole.experts)
    assert torch.equal(torch.cat([part.weights for part in parts]), whole.weights)


def test_bf16_input_is_routed_in_float32() -> None:
    section = shapes.section()
    router, x = a_router(section), hidden(section, 50).bfloat16()
    routing: Routing = router(x, 1)
    exact = torch.sigmoid(x.double() @ router.weight.detach().double().T)
    owed = exact.gather(1, routing.experts)
    owed = owed / owed.sum(dim=1, keepdim=True) * section.routed_scaling_factor
    assert routing.weights.dtype == torch.float32 and shapes.relative(routing.weights, owed) < 1e-6
