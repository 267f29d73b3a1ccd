"""Sampling against the definition."""

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


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits, 0.7, 1.0, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    assert torch.allclose(shares.double(), torch.softmax(logits.double() / 0.7, 0), atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    for top_p, allowed in ((0.5, {0}), (0.6, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2}), (0.01, {0})):
        assert {choose(logits, 1.0, top_p, generator) for _ in range(300)} == allowed


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([5.0, 80.0, 79.0, -1e30])
    assert {choose(logits, temperature, top_p, generator) for top_p in (1.0, 0.9, 0.0) for _ in range(20)} == {1}
    assert {choose(-logits, temperature, 1.0, generator) for _ in range(20)} == {3}
    tie = torch.tensor([1.0, 7.0, 7.0])
    assert {choose(tie, temperature, 1.0, generator) for _ in range(60)} == {1, 2}
