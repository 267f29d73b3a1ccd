"""The same weights in transformers' DeepseekV3ForCausalLM give the same logits and the same gradients, in FP32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.model import hugging_face_state
from tessera.ops.chunked_loss import chunked_loss
from tests.model import shapes

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries without a latent": {"q_lora_rank": None},
    "groups": shapes.GROUPS,
    "YaRN": shapes.YARN,
    "YaRN, equal magnitudes": {"rope_scaling": {**shapes.YARN["rope_scaling"], "mscale_all_dim": 1.0}},
    "two shared experts, unnormalised weights": {"n_shared_experts": 2, "norm_topk_prob": False},
    "no dense layer, wide values": {"first_k_dense_replace": 0, "v_head_dim": 32, "rope_theta": 500.0},
    "another epsilon": {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    section = shapes.section(**CASES[case])
    theirs, ours = shapes.transformers_twin(section, tmp_path)
    tokens = shapes.tokens(section, batch=2, length=100)
    targets = shapes.tokens(section, batch=2, length=100, seed=1)

    expected = theirs(input_ids=tokens, use_cache=False).logits
    output = ours(tokens)
    assert shapes.relative(ours.logits(output.hidden), expected) <= 1e-5

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    loss = chunked_loss(output.hidden.flatten(0, 1), ours.lm_head.weight, targets.flatten()) / targets.numel()
    loss.backward()
    owed = {name: p.grad for name, p in theirs.named_parameters()}
    given = {name: p.grad for name, p in ours.named_parameters()}
    assert all(g is not None and g.dtype == torch.float32 for g in given.values())
    for name, gradient in owed.items():
        if ".gate_proj." in name:  # dense and shared: two matrices there, one here
            gradient = torch.cat([gradient, owed[name.replace("gate_proj", "up_proj")]])
        name = name.replace(".gate_proj.", ".gate_up_proj.")
        if ".up_proj." not in name:
            assert shapes.relative(given.pop(name), gradient) <= 2e-5, name
    assert not given


def test_published_names_are_those_transformers_saves(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, ours = shapes.transformers_twin(shapes.section(), tmp_path)
    saved, state = load_file(tmp_path / "model.safetensors"), hugging_face_state(ours)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_positions_turn_queries_and_keys_as_in_transformers(tmp_path: Path) -> None:
    section = shapes.section(**shapes.YARN)
    theirs, ours = shapes.transformers_twin(section, tmp_path)
    tokens = shapes.tokens(section, batch=2, length=40)
    positions = torch.stack([torch.arange(40) * 3, torch.arange(40) + 200])
    # With a mask given, transformers does not take jumps of the positions for borders of documents.
    expected = theirs(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    assert shapes.relative(ours.logits(ours(tokens, positions=positions).hidden), expected) <= 1e-5
    unmoved = ours.logits(ours(tokens).hidden)
    assert shapes.relative(unmoved, expected) > 1e-3
