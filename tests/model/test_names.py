"""Published names out of a model and back."""

from pathlib import Path

import pytest
import torch

from tessera.model import hugging_face_state, load_hugging_face
from tessera.recipe import UserError
from tests.model import shapes

SECTION = shapes.section(num_nextn_predict_layers=1, n_routed_experts=4)


def test_the_names_are_the_published_ones() -> None:
    names = hugging_face_state(shapes.model(SECTION)).keys()
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    owed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(4):
        layer = f"model.layers.{i}"
        owed |= {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"}
        owed |= {f"{layer}.self_attn.{part}.weight" for part in attention}
        mlps = [""] if i == 0 else ["shared_experts.", *(f"experts.{e}." for e in range(4))]
        owed |= {f"{layer}.mlp.{mlp}{part}_proj.weight" for mlp in mlps for part in ("gate", "up", "down")}
        if i:
            owed |= {f"{layer}.mlp.gate.weight", f"{layer}.mlp.gate.e_score_correction_bias"}
    owed |= {f"model.layers.3.{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    owed |= {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert names == owed


def test_a_model_filled_from_another_one_computes_the_same() -> None:
    one, other = shapes.with_biases(shapes.model(SECTION)), shapes.model(SECTION, seed=8)
    load_hugging_face(other, hugging_face_state(one))
    tokens = shapes.tokens(SECTION, batch=2, length=10)
    drafts = [m.draft(1, m(tokens).carry, tokens).hidden for m in (one, other)]
    assert torch.equal(*drafts)


def test_the_tensors_are_the_models_own_memory() -> None:
    model = shapes.model(SECTION)
    state = hugging_face_state(model)
    state["model.layers.1.mlp.experts.2.up_proj.weight"].zero_()
    assert (model.model.layers[1].mlp.experts.gate_up_proj[2, 24:] == 0).all()
    assert (model.model.layers[1].mlp.experts.gate_up_proj[2, :24] != 0).all()


def test_bf16_tensors_and_a_checkpoint_without_the_repeated_ones_are_taken() -> None:
    model, other = shapes.model(SECTION), shapes.model(SECTION, seed=8)
    state = {n: t.bfloat16() for n, t in hugging_face_state(model).items()}
    for name in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        del state[name]
    load_hugging_face(other, state)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("model.layers.2.mlp.experts.3.up_proj.weight", "remove", "missing"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "remove", "missing"),
        ("model.layers.9.input_layernorm.weight", "add", "no such tensor"),
        ("model.norm.weight", "cut", r"shape \(47,\), this model needs \(48,\)"),
        ("model.layers.3.shared_head.head.weight", "alter", "differs from lm_head.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(name: str, change: str, message: str) -> None:
    model = shapes.model(SECTION)
    before = {n: t.clone() for n, t in hugging_face_state(model).items()}
    state = {n: t.clone() + 1 for n, t in before.items()}
    if change == "remove":
        del state[name]
    elif change == "add":
        state[name] = torch.ones(3)
    else:
        state[name] = state[name][:-1] if change == "cut" else state[name] + 1
    with pytest.raises(UserError, match=message) as raised:
        load_hugging_face(model, state)
    assert str(raised.value).startswith(name)
    assert all(torch.equal(before[n], t) for n, t in hugging_face_state(model).items())


def test_a_checkpoint_of_transformers_with_other_layers_is_refused(tmp_path: Path) -> None:
    theirs, _ = shapes.transformers_twin(shapes.section(), tmp_path)
    with pytest.raises(UserError, match="no such tensor in this model"):
        load_hugging_face(shapes.model(shapes.section(num_hidden_layers=2)), theirs.state_dict())
