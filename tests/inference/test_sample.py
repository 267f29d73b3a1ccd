"""Sampling against the definition."""

import math

import pytest
import torch

from tessera.inference.sample import choose, continue_tokens
from tessera.model import Transformer
from tessera.numerics import Policy
from tessera.recipe import ModelSection

SECTION = ModelSection(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=12,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SECTION, Policy())


def greedy(model: Transformer, prompt: list[int], number: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(number):
        hidden = model(torch.tensor([tokens[-12:]])).hidden
        tokens.append(int(model.logits(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_temperature_zero_is_greedy_also_beyond_the_longest_context(model: Transformer) -> None:
    found = list(continue_tokens(model, [3, 5], max_new_tokens=16, temperature=0))
    assert found == greedy(model, [3, 5], 16)


def test_the_same_seed_gives_the_same_text_and_another_another(model: Transformer) -> None:
    draws = [tuple(continue_tokens(model, [1], max_new_tokens=12, temperature=1.5, seed=s)) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_it_ends_before_the_stop_token(model: Transformer) -> None:
    whole = greedy(model, [3, 5], 8)
    stop = whole[4]
    found = list(continue_tokens(model, [3, 5], max_new_tokens=8, temperature=0, stop=stop))
    assert found == whole[: whole.index(stop)]


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="no token"):
        next(continue_tokens(model, [], max_new_tokens=1))


def slow_distribution(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """What is drawn from, in Python's own numbers: e^(logit / temperature) of the smallest set that reaches top_p."""
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-powers[token], token))
    kept: list[int] = []
    while not kept or (sum(powers[token] for token in kept) < top_p * sum(powers) and len(kept) < len(order)):
        kept.append(order[len(kept)])
    whole = sum(powers[token] for token in kept)
    return [powers[token] / whole if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.62, 0.9, 1.0])
def test_draws_follow_the_slow_distribution(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, generator=generator) * 1.5
    draws = torch.tensor([choose(logits, temperature, top_p, generator) for _ in range(2000)])
    shares = torch.bincount(draws, minlength=6).double() / 2000
    expected = torch.tensor(slow_distribution(logits.tolist(), temperature, top_p), dtype=torch.float64)
    assert torch.equal(shares[expected == 0], torch.zeros(int((expected == 0).sum()), dtype=torch.float64))
    assert (shares - expected).abs().max() < 0.04  # 3.6 standard deviations of a share of one half


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    generator = torch.Generator().manual_seed(0)
    quarters = torch.zeros(4)  # of equally probable tokens the first ones are kept
    for top_p, number in ((0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        assert {choose(quarters, 1.0, top_p, generator) for _ in range(200)} == set(range(number))


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-320, 5e-324])
def test_a_temperature_near_zero_is_greedy_and_draws_among_equals(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([5.0, 80.0, 79.0, -1e30])
    assert {choose(logits, temperature, top_p, generator) for top_p in (1.0, 0.9, 0.0) for _ in range(20)} == {1}
    assert {choose(-logits, temperature, 1.0, generator) for _ in range(20)} == {3}
    tie = torch.tensor([1.0, 7.0, 7.0])
    assert {choose(tie, temperature, 1.0, generator) for _ in range(60)} == {1, 2}


def test_top_p_0_is_greedy_also_among_many_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (500,), generator=generator).float()
    assert choose(logits, 0.8, 0.0, generator) == choose(logits, 0, 1.0, generator) == logits.tolist().index(2.0)
