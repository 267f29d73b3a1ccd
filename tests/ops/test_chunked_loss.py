"""The head and its loss against float64."""

import pytest
import torch

import tests.ops.float64 as float64
from tessera.ops import chunked_loss as module
from tessera.ops.chunked_loss import IGNORED, chunked_loss, head_logits
from tessera.ops.gradient_room import leave_room
from tests.ops.float64 import BF16, normal


def case(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    hidden = normal(tokens, 40, seed=1).to(dtype).requires_grad_()
    head = torch.nn.Parameter(normal(300, 40, seed=2, scale=0.3))
    targets = torch.randint(300, (tokens,), generator=torch.Generator().manual_seed(3))
    targets[::5] = IGNORED
    return hidden, head, targets


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_loss_and_gradients_are_those_of_float64(tokens: int, dtype: torch.dtype) -> None:
    hidden, head, targets = case(tokens, dtype)
    targets[-1] = 7
    (0.25 * chunked_loss(hidden, head, targets)).backward()
    h = hidden.detach().double().requires_grad_()
    w = head.detach().to(dtype).double().requires_grad_()  # the operand is rounded, the gradient passes
    loss = 0.25 * torch.nn.functional.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum")
    loss.backward()
    assert chunked_loss(hidden, head, targets).dtype == torch.float32
    assert 0.25 * float(chunked_loss(hidden, head, targets).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    bar = 2e-6 if dtype == torch.float32 else 4e-3
    assert float64.relative(hidden.grad, h.grad) < bar and float64.relative(head.grad, w.grad) < bar
    assert head.grad.dtype == torch.float32 and hidden.grad.dtype == dtype


@pytest.mark.parametrize("tokens", [1, 63, 256, 259, 600])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_kept_logits_give_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    results = []
    for chunked in (True, False):
        hidden, head, targets = case(tokens, dtype)
        loss = chunked_loss(hidden, head, targets, chunked=chunked)
        (0.3 * loss).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_gradient_known_beforehand_is_multiplied_in_and_costs_no_rounding(dtype: torch.dtype, chunked: bool) -> None:
    hidden, head, targets = case(300, dtype)
    factor = 1 / 181
    chunked_loss(hidden, head, targets, chunked=chunked, grad_output=factor).mul(factor).backward()
    h, w = hidden.detach().double().requires_grad_(), head.detach().to(dtype).double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum") * factor
    exact.backward()
    bar = 2e-6 if dtype == torch.float32 else 4e-3
    assert float64.relative(hidden.grad, h.grad) < bar and float64.relative(head.grad, w.grad) < bar


@pytest.mark.parametrize("known", [0.0, 1e-3, 0.5, -4.0])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_gradient_that_was_announced_wrongly_gives_the_same_gradients(known: float, chunked: bool) -> None:
    hidden, head, targets = case(300)
    results = []
    for announced in (0.3, known):
        hidden.grad = head.grad = None
        chunked_loss(hidden, head, targets, chunked=chunked, grad_output=announced).mul(0.3).backward()
        results.append((hidden.grad, head.grad))
    assert all(float64.relative(a, b.double()) < 1e-6 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("chunked", [True, False])
def test_backward_twice_adds_the_same_gradient_twice(chunked: bool) -> None:
    hidden, head, targets = case(300)
    loss = chunked_loss(hidden, head, targets, chunked=chunked)
    loss.backward(retain_graph=True)
    once = head.grad.clone()
    loss.backward()
    assert torch.equal(head.grad, once + once)


def test_the_head_is_given_its_gradient_and_no_copy_of_it() -> None:
    hidden, head, targets = case(300)
    places = []
    for _ in range(3):
        leave_room(head)
        between = torch.empty_like(head)  # takes what the allocator would give again
        chunked_loss(hidden, head, targets, grad_output=0.3).mul(0.3).backward()
        places.append(head.grad.data_ptr())
        assert between.data_ptr() != head.grad.data_ptr()
    assert len(set(places)) == 1


def test_the_room_of_the_last_gradient_leaves_nothing_in_the_next() -> None:
    hidden, head, targets = case(300)
    chunked_loss(hidden, head, targets).backward()
    fresh = head.grad.clone()
    head.grad.fill_(float("nan"))
    leave_room(head)
    chunked_loss(hidden, head, targets).backward()
    assert torch.equal(head.grad, fresh)
    leave_room(head)
    chunked_loss(hidden[:0], head, targets[:0]).backward()
    assert (head.grad == 0).all()


def test_ignored_positions_have_no_gradient_and_none_left_is_zero() -> None:
    hidden, head, targets = case(300)
    chunked_loss(hidden, head, targets).backward()
    assert (hidden.grad[::5] == 0).all() and (hidden.grad[1::5] != 0).any(dim=1).all()
    hidden.grad = head.grad = None
    loss = chunked_loss(hidden, head, torch.full_like(targets, IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0.0 and (head.grad == 0).all() and (hidden.grad == 0).all()


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, head, targets = case(20)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss = chunked_loss(hidden, head, targets)
    exact = torch.nn.functional.cross_entropy(
        hidden.double() @ head.double().T, targets, ignore_index=IGNORED, reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_the_chunk_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = case(500)
    one = chunked_loss(hidden, head, targets).detach()
    monkeypatch.setattr(module, "CHUNK_TOKENS", 100)
    assert torch.allclose(one, chunked_loss(hidden, head, targets).detach(), rtol=1e-7)


def test_without_gradients_only_the_loss_is_made() -> None:
    hidden, head, targets = case(300)
    with torch.no_grad():
        quiet = chunked_loss(hidden, head, targets)
    assert torch.equal(quiet, chunked_loss(hidden, head, targets).detach()) and not quiet.requires_grad


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_a_row_of_logits_depends_on_that_row_alone(rows: int) -> None:
    hidden, head = normal(64, 640).to(BF16), normal(500, 640)
    whole = head_logits(hidden, head)
    assert whole.dtype == torch.float32
    assert torch.equal(head_logits(hidden[:rows], head), whole[:rows])
    exact = hidden.double() @ head.to(BF16).double().T
    assert float64.relative(whole, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_tokens_loss_depends_on_that_token_alone(dtype: torch.dtype) -> None:
    hidden, head, targets = case(515, dtype)  # the last chunk has three tokens
    targets[targets == IGNORED] = 5
    with torch.no_grad():
        for token in (0, 100, 255, 256, 511, 512, 514):
            only = torch.full_like(targets, IGNORED)
            only[token] = targets[token]
            alone = chunked_loss(hidden[token : token + 1], head, targets[token : token + 1])
            assert torch.equal(chunked_loss(hidden, head, only), alone), token
    chunked_loss(hidden, head, targets).backward()
    for rows in (slice(0, 1), slice(100, 103), slice(512, 515)):
        part = hidden[rows].detach().requires_grad_()
        chunked_loss(part, head, targets[rows]).backward()
        assert torch.equal(part.grad, hidden.grad[rows]), rows


def test_tokens_are_added_in_float64() -> None:
    hidden = torch.zeros(20_000, 8)
    hidden[0, 0] = 3e4  # one loss beside which the others vanish in float32
    head = torch.nn.Parameter(torch.zeros(64, 8))
    head.data[1, 0] = 1.0
    targets = torch.zeros(20_000, dtype=torch.int64)
    exact = 3e4 + 19_999 * torch.tensor(64.0).double().log().item()
    assert float(chunked_loss(hidden, head, targets).detach()) == pytest.approx(exact, rel=1e-7)
