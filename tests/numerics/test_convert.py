"""`convert`: somebody else's module trains in FP8 and stays what it was otherwise."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tessera.numerics import Policy, Recorder, convert
from tessera.numerics.linear import Linear

transformers = pytest.importorskip("transformers")


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def tokens() -> Tensor:
    """Sequences with a rule to learn: each token follows from the one before."""
    steps = torch.arange(32)
    return (torch.arange(8)[:, None] * 13 + 7 * steps) % 101


def train(model: nn.Module, steps: int, fused: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, fused=fused)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("fused", [False, True], ids=["adamw", "fused adamw"])
def test_a_llama_trains_in_fp8_as_it_does_in_bf16(fused: bool) -> None:
    fp8 = train(convert(llama()), 14, fused)  # a fused optimizer's steps must reach the codes too
    bf16 = train(convert(llama(), Policy(precision="bf16")), 14, fused)
    assert fp8[0] == pytest.approx(4.6, abs=0.2)  # ln 101
    assert fp8[-1] < 0.5 * fp8[0]
    assert max(abs(a - b) for a, b in zip(fp8, bf16, strict=True)) < 0.1
    assert fp8 != bf16


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_lie_near_those_of_the_bf16_twin_and_not_on_them() -> None:
    trained = llama()
    train(trained, 10)
    twin = convert(copy.deepcopy(trained), Policy(precision="bf16"))
    fp8, bf16 = gradients(convert(trained)), gradients(twin)
    assert fp8.keys() == bf16.keys()
    assert {g.dtype for g in fp8.values()} == {torch.float32}
    error = sum(float((fp8[n] - bf16[n]).square().sum()) for n in fp8) ** 0.5
    norm = sum(float(g.square().sum()) for g in bf16.values()) ** 0.5
    assert 0.005 < error / norm < 0.12
    assert all(bool(g.isfinite().all()) for g in fp8.values())


def test_parameters_are_the_same_objects_under_the_same_names() -> None:
    model = llama()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    values = {name: p.detach().clone() for name, p in before.items()}
    assert convert(model) is model
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == keys
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    converted = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert len(converted) == 2 * 7
    assert type(model.lm_head) is nn.Linear  # the head stays in high precision
    saved = model.state_dict()
    llama().load_state_dict(saved)


def test_bf16_parameters_become_float32_masters_in_place() -> None:
    model = llama().bfloat16()
    before = dict(model.named_parameters())
    convert(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        inside = "_proj" in name
        assert parameter.dtype == (torch.float32 if inside else torch.bfloat16)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert bool(loss.isfinite())


def test_selection_and_names_are_those_of_the_module() -> None:
    recorder = Recorder()

    def wide(name: str, linear: nn.Linear) -> bool:
        return "mlp" in name and linear.out_features == 200

    model = convert(llama(), select=wide, recorder=recorder)
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert names == [f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in ("gate_proj", "up_proj")]
    model(input_ids=tokens())
    assert "model.layers.1.mlp.up_proj.input" in recorder.nonfinite
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        convert(llama(), select=lambda name, linear: False)


def test_a_layer_used_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(6, 6)
    model = convert(nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared)))
    assert isinstance(model, nn.Sequential) and isinstance(model[0], Linear)
    assert model[0] is model[2] and model[0] is model[3][0]  # type: ignore[index]
    assert model[0].weight is shared.weight and model[0].bias is shared.bias


def test_what_is_no_plain_linear_layer_is_left_alone_or_refused() -> None:
    class Own(nn.Linear):
        pass

    model = convert(nn.Sequential(Own(3, 3), nn.Linear(3, 3)))
    assert isinstance(model, nn.Sequential) and type(model[0]) is Own and isinstance(model[1], Linear)
    with pytest.raises(ValueError, match="Sequential"):
        convert(nn.Linear(3, 3))
    with pytest.warns(FutureWarning):
        computed = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no parameter"):
        convert(computed)


def test_a_copy_trains_on_its_own_weights() -> None:
    model = convert(nn.Sequential(nn.Linear(40, 30, bias=False)))
    x = torch.randn(5, 40)
    owed = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("0.weight").zero_()
    assert torch.equal(twin(x), torch.zeros(5, 30)) and torch.equal(model(x), owed)


def test_training_mode_and_devices_follow_the_module() -> None:
    model = convert(nn.Sequential(nn.Linear(4, 4)).eval())
    assert isinstance(model, nn.Sequential) and not model[0].training
    assert "fp8" in repr(model)
    assert model.to("meta").get_parameter("0.weight").device.type == "meta"
