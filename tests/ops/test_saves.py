"""What is kept for backward: codes where a layer is FP8, each consumer's shared input once."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.numerics import RoleKind
from tessera.ops.dispatch import LocalDispatcher
from tessera.ops.expert_mlp import Experts, expert_mlp
from tessera.ops.keep import Keep
from tessera.ops.latent_attention import AttentionShape, Up, latent_attention
from tessera.ops.linear import linear, normed_linear
from tessera.ops.swiglu import swiglu_linear
from tests.ops.float64 import BF16, normal

T, H, I, E, K = 256, 128, 128, 4, 2


@contextmanager
def saves() -> Iterator[dict[tuple[int, torch.dtype], Tensor]]:
    """Tensors kept for backward inside the block, each memory once."""
    kept: dict[tuple[int, torch.dtype], Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr(), tensor.dtype] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def sizes(kept: dict[tuple[int, torch.dtype], Tensor], *without: Tensor) -> dict[torch.dtype, list[int]]:
    """Elements of each kept tensor of at least one row of T, by dtype; `without` these, which live anyway."""
    known = {t.untyped_storage().data_ptr() for t in without}
    result: dict[torch.dtype, list[int]] = {}
    for (pointer, dtype), tensor in kept.items():
        if pointer not in known and tensor.numel() > T:
            result.setdefault(dtype, []).append(tensor.numel())
    return {dtype: sorted(counts) for dtype, counts in result.items()}


KEPT_CODES = Keep(recompute_norms=False)


def test_linears_behind_a_norm_keep_nothing_wide_but_their_input() -> None:
    x, gamma = normal(T, H).to(BF16).requires_grad_(), torch.nn.Parameter(torch.ones(H))
    with saves() as kept:
        normed_linear(x, gamma, 1e-6, Keep(), float64.weight(H, H), float64.weight(2 * H, H))
    assert sizes(kept, x) == {}


def test_linears_behind_a_norm_keep_its_codes_once() -> None:
    x, gamma = normal(T, H).to(BF16).requires_grad_(), torch.nn.Parameter(torch.ones(H))
    with saves() as kept:
        normed_linear(x, gamma, 1e-6, KEPT_CODES, float64.weight(H, H), float64.weight(2 * H, H))
    assert sizes(kept, x) == {torch.uint8: [T * H]}


def test_a_linear_keeps_the_codes_it_was_given() -> None:
    x, w = normal(T, H).to(BF16).requires_grad_(), float64.weight(H, H)
    operand = w.role.input(x.detach())
    with saves() as kept:
        linear(x, operand, operand, w)
        linear(x, operand, operand, float64.weight(2 * H, H))
    assert sizes(kept) == {torch.uint8: [T * H]}
    assert next(iter(kept.values())).data_ptr() == operand.codes.data_ptr()


def test_swiglu_keeps_its_input_in_e4m3_and_not_the_product() -> None:
    gate_up = normal(T, 2 * I).to(BF16).requires_grad_()
    with saves() as kept:
        swiglu_linear(gate_up, float64.role(RoleKind.DENSE_GATE_UP), float64.weight(H, I), Keep())
    # scales: one for each token, gate and up
    assert sizes(kept) == {torch.uint8: [T * 2 * I], torch.float32: [T * 2]}


@pytest.mark.parametrize("regather", [True, False])
def test_experts_keep_the_tokens_codes_once_a_token_or_once_an_expert(regather: bool) -> None:
    x, weights = normal(T, H).to(BF16).requires_grad_(), torch.rand(T, K).requires_grad_()
    up = float64.weight(E, 2 * I, H, kind=RoleKind.EXPERT_GATE_UP, row_segment=I)
    experts = Experts(up, float64.weight(E, H, I, kind=RoleKind.EXPERT_DOWN, row_segment=H))
    operand = up.role.input(x.detach())
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    keep = Keep(regather_tokens=regather)
    with saves() as kept:
        expert_mlp(x, operand, operand, ids, weights, experts, LocalDispatcher(), keep)
    found = sizes(kept, weights)
    assert found.pop(torch.int64) == [T * K]  # experts chosen; slots are sorted again
    scales = [T * K * 2] if regather else [T * K, T * K * 2]  # of one tile: not more than T, left out by `sizes`
    assert found == {torch.uint8: [T * H if regather else T * K * H, T * K * 2 * I], torch.float32: scales}


def test_attention_keeps_its_parts_and_its_output_in_twelve_bits() -> None:
    s = AttentionShape(batch=2, length=T // 2, heads=4, nope=24, rope=8, value=32, softmax_scale=0.2)
    q, kv, k_rope = (normal(T, width).to(BF16).requires_grad_() for width in (128, 224, 8))
    turn = torch.ones(1, s.length, 4, dtype=torch.complex64)
    w = float64.weight(H, 128, kind=RoleKind.ATTENTION_OUTPUT)
    with saves() as kept:
        latent_attention(q, kv, k_rope, Up(q, kv), turn, None, s, w, Keep())
    found = sizes(kept, q, kv, k_rope, turn)
    assert found == {torch.uint8: [T * 128 * 3 // 2], torch.float32: [T * 4]}


@pytest.mark.parametrize("precision, dtype", [("bf16", BF16), ("fp32", torch.float32)])
def test_the_twins_keep_their_own_dtype(precision: str, dtype: torch.dtype) -> None:
    x, gamma = normal(T, H).to(dtype).requires_grad_(), torch.nn.Parameter(torch.ones(H))
    with saves() as kept:
        normed_linear(x, gamma, 1e-6, KEPT_CODES, float64.weight(H, H, precision=precision))
    assert sizes(kept, x) == {dtype: [T * H]}


def test_nothing_is_quantised_for_a_backward_that_will_not_come() -> None:
    x = normal(T, 2 * I).to(BF16)
    down, role = float64.weight(H, I), float64.role(RoleKind.DENSE_GATE_UP, name="up")
    with torch.no_grad():
        swiglu_linear(x, role, down, Keep())
    assert not role.recorder.nonfinite
    swiglu_linear(x.requires_grad_(), role, down, Keep())
    assert list(role.recorder.nonfinite) == ["up.gate_up_cache"]
