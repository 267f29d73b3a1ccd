"""Multi-token prediction against a slow float64 model, and what is shared with the trunk."""

import torch

from tessera.model import hugging_face_state
from tessera.ops.chunked_loss import IGNORED, chunked_loss
from tests.model import shapes, slow_model

SECTION = shapes.section(num_nextn_predict_layers=2, **shapes.GROUPS)


def test_two_chained_blocks_equal_an_independent_slow_implementation() -> None:
    model = shapes.with_biases(shapes.model(SECTION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains of 1 would hide a missing one
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    state = slow_model.float64(hugging_face_state(model))
    sequences = shapes.tokens(SECTION, batch=2, length=14)
    trunk = model(sequences[:, :-2])
    first = model.draft(1, trunk.carry, sequences[:, 1:-1])
    second = model.draft(2, first.carry, sequences[:, 2:])
    for row, sequence in enumerate(sequences.tolist()):
        carry = slow_model.trunk(sequence[:-2], state, SECTION)
        assert shapes.relative(trunk.carry[row], carry) <= 1e-5
        logits, carry = slow_model.mtp(carry, sequence[1:-1], state, SECTION, depth=1)
        assert shapes.relative(model.logits(first.hidden)[row], logits) <= 1e-5
        assert shapes.relative(first.carry[row], carry) <= 1e-5
        logits, _ = slow_model.mtp(carry, sequence[2:], state, SECTION, depth=2)
        assert shapes.relative(model.logits(second.hidden)[row], logits) <= 1e-5


def test_embedding_and_head_are_one_parameter_each_and_collect_both_gradients() -> None:
    model = shapes.model(SECTION)
    names = [name for name, p in model.named_parameters() if p.shape == model.lm_head.weight.shape]
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]
    sequences = shapes.tokens(SECTION, batch=2, length=12)

    def gradients(main: float, draft: float) -> list[torch.Tensor]:
        model.zero_grad()
        trunk = model(sequences[:, :-2])
        block = model.draft(1, trunk.carry, sequences[:, 1:-1])
        head = model.lm_head.weight
        loss = main * chunked_loss(trunk.hidden.flatten(0, 1), head, sequences[:, 1:-1].flatten())
        loss = loss + draft * chunked_loss(block.hidden.flatten(0, 1), head, sequences[:, 2:].flatten())
        loss.backward()
        return [model.model.embed_tokens.weight.grad.clone(), head.grad.clone()]

    both = gradients(1.0, 0.3)
    for together, one, other in zip(both, gradients(1.0, 0.0), gradients(0.0, 0.3), strict=True):
        assert other.norm() > 0
        assert shapes.relative(together, one + other) <= 1e-5


def test_targets_beyond_the_sequence_take_no_part() -> None:
    model = shapes.model(SECTION)
    sequences = shapes.tokens(SECTION, batch=2, length=12)
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    shifted = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], dim=1)
    hidden = model.draft(1, model(tokens).carry, targets).hidden
    whole = chunked_loss(hidden.flatten(0, 1), model.lm_head.weight, shifted.flatten())
    cut = chunked_loss(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, targets[:, 1:].flatten())
    assert torch.allclose(whole, cut, rtol=1e-6)


def test_a_depth_the_model_does_not_have_is_refused() -> None:
    model = shapes.model(SECTION)
    tokens = shapes.tokens(SECTION, batch=1, length=4)
    for depth in (0, 3):
        try:
            model.draft(depth, model(tokens).carry, tokens)
        except ValueError as error:
            assert "2 MTP blocks" in str(error)
        else:
            raise AssertionError(f"depth {depth} was accepted")
