"""The cross-entropy of rows of logits against float64, in PyTorch and in every instruction set of this machine."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as exact_loss

import tests.ops.float64 as float64
from tessera.native import Kernel, instruction_sets
from tessera.ops.kernels.cross_entropy import IGNORED, cross_entropy
from tests.ops.float64 import BF16, normal

# AMX and BF16 products have no part in it: those sets run the AVX-512 variant.
KERNELS = ["torch", *(isa for isa in ("avx512", "avx2", "portable") if isa in instruction_sets())]
NATIVE = KERNELS[1:]
every = pytest.mark.parametrize("kernel", KERNELS)
native = pytest.mark.parametrize("kernel", NATIVE)


def case(rows: int, columns: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = normal(rows, columns, seed=rows + columns, scale=scale)
    targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(columns))
    return logits, targets


def in_float64(logits: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss of each row, and `scale` times the gradient of their sum."""
    z = logits.double().requires_grad_()
    loss = exact_loss(z, targets, ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum() * scale, z)
    return loss.detach(), gradient


@every
@pytest.mark.parametrize("columns", [1, 2, 7, 15, 16, 17, 255, 256, 257, 1009, 4096, 8192 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_loss_and_gradient_are_those_of_float64(kernel: str, columns: int, dtype: torch.dtype) -> None:
    logits, targets = case(13, columns)
    targets[3] = IGNORED
    d = torch.full_like(logits, float("nan"), dtype=dtype)
    loss = cross_entropy(logits, targets, 0.37, d, kernel=kernel)
    exact, gradient = in_float64(logits, targets, 0.37)
    # Two units of the exponential, the order of the sum, one rounding of the result.
    assert loss.dtype == torch.float32 and (loss - exact).abs().max() <= 1e-6 * max(1.0, float(exact.max()))
    # An entry of d is p or p - 1, and of p - 1 what cancels is exact.
    bar = 2.0**-8 if dtype == BF16 else 2e-6
    assert ((d - gradient).abs() <= bar * gradient.abs() + 0.37 * 2.0**-23).all()


@every
def test_without_room_for_a_gradient_the_loss_has_the_same_bits(kernel: str) -> None:
    logits, targets = case(9, 1000)
    d = torch.empty_like(logits)
    assert torch.equal(
        cross_entropy(logits, targets, kernel=kernel), cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    )


@every
def test_logits_are_only_read(kernel: str) -> None:
    logits, targets = case(9, 1000)
    before = logits.clone()
    cross_entropy(logits, targets, 1.0, torch.empty_like(logits), kernel=kernel)
    assert torch.equal(logits, before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_row_depends_on_that_row_alone(kernel: str, dtype: torch.dtype) -> None:
    logits, targets = case(70, 515)
    targets[5] = IGNORED
    d = torch.empty_like(logits, dtype=dtype)
    loss = cross_entropy(logits, targets, 0.5, d, kernel=kernel)
    for rows in (slice(0, 1), slice(3, 8), slice(69, 70)):
        part = torch.empty_like(logits[rows], dtype=dtype)
        assert torch.equal(cross_entropy(logits[rows], targets[rows], 0.5, part, kernel=kernel), loss[rows])
        assert torch.equal(part, d[rows])
    for offset in (1, 3, 15):  # elsewhere in memory, where vectors begin at other elements
        moved = torch.empty(logits.numel() + offset)[offset:].view_as(logits).copy_(logits)
        part = torch.empty(logits.numel() + offset, dtype=dtype)[offset:].view_as(logits)
        assert torch.equal(cross_entropy(moved, targets, 0.5, part, kernel=kernel), loss)
        assert torch.equal(part, d)


@native
def test_threads_change_no_bit(kernel: str) -> None:
    logits, targets = case(67, 1009)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            d = torch.empty_like(logits, dtype=BF16)
            results.append((cross_entropy(logits, targets, 1.0, d, kernel=kernel), d))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_ignored_rows_are_zero_whatever_their_logits(kernel: str, dtype: torch.dtype) -> None:
    logits, targets = case(6, 40)
    logits[1], logits[4, 7] = float("nan"), float("inf")
    targets[1] = targets[4] = IGNORED
    d = torch.full_like(logits, 7.0, dtype=dtype)
    loss = cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    assert (loss[[1, 4]] == 0).all() and (d[[1, 4]] == 0).all() and loss.isfinite().all() and d.isfinite().all()


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("nan")])
@pytest.mark.parametrize("place", [0, 16, 299])
def test_a_logit_that_is_not_finite_makes_its_own_row_nan(kernel: str, bad: float, place: int) -> None:
    logits, targets = case(3, 300)
    logits[1, place] = bad
    d = torch.empty_like(logits, dtype=BF16)
    loss = cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    assert loss.isnan().tolist() == [False, True, False]
    assert d[1].isnan().all() and d[[0, 2]].isfinite().all()


@native
def test_a_nan_of_any_payload_stays_nan_in_bf16(kernel: str) -> None:
    logits, targets = case(1, 40)
    logits.view(torch.int32)[0, 5] = 0x7FFFFFFF  # rounding its bits as if they were a number gives -0
    d = torch.empty_like(logits, dtype=BF16)
    assert cross_entropy(logits, targets, 1.0, d, kernel=kernel).isnan().all() and d.isnan().all()


@every
def test_minus_infinity_is_a_token_that_cannot_come(kernel: str) -> None:
    logits, targets = case(4, 50)
    logits[:, ::3] = -float("inf")
    targets[:] = 1
    d = torch.empty_like(logits)
    loss = cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    kept = torch.arange(50) % 3 != 0
    assert (d[:, ~kept] == 0).all()
    assert torch.allclose(loss.double(), in_float64(logits[:, kept], torch.zeros(4, dtype=torch.int64))[0], rtol=1e-6)


@every
@pytest.mark.parametrize("size", [1e-30, 1e4, 3e38])
def test_logits_of_any_size_neither_overflow_nor_lose_the_loss(kernel: str, size: float) -> None:
    logits, targets = case(5, 100, scale=1.0)
    logits = (logits / logits.abs().max() * size).contiguous()
    d = torch.empty_like(logits)
    loss = cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    exact, gradient = in_float64(logits, targets)
    # Differences of 6e38 are infinite in float32, and so is the loss.
    representable = exact < 3.4e38
    assert torch.allclose(loss.double()[representable], exact[representable], rtol=1e-6)
    assert float64.relative(d, gradient) < 1e-6


@native
def test_the_exponential_is_within_two_units_in_the_last_place(kernel: str) -> None:
    x = -torch.linspace(17.4, 87.3, 200_003)  # beside exp(0) these add nothing to the sum
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    d = torch.empty_like(logits)
    cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64), 1.0, d, kernel=kernel)
    exact = x.double().exp()
    unit = 2.0 ** (exact.log2().floor() - 23)
    assert ((d[:, 1].double() - exact).abs() / unit).max() <= 2
    below = torch.tensor([[0.0, -88.0], [0.0, -1e30], [0.0, -float("inf")]])
    cross_entropy(below, torch.zeros(3, dtype=torch.int64), 1.0, d[:3], kernel=kernel)
    assert (d[:3, 1] == 0).all()


@every
@pytest.mark.parametrize("wrong", [-1, -99, -101, 40, 1 << 40])
def test_a_target_outside_the_vocabulary_is_an_error(kernel: str, wrong: int) -> None:
    logits, targets = case(4, 40)
    targets[2] = wrong
    with pytest.raises(ValueError, match=f"target {wrong}: the vocabulary has 40 tokens"):
        cross_entropy(logits, targets, kernel=kernel)


@native
def test_rows_beyond_the_reach_of_32_bits_are_found(kernel: str) -> None:
    rows, columns = 514, 1 << 22
    try:
        logits = torch.empty(rows * columns)  # 8 GiB of addresses; memory for the pages that are used
    except RuntimeError:
        pytest.skip("this machine gives no 8 GiB of addresses")
    last = logits[-columns:]
    last.copy_(normal(1, columns, seed=1)[0])
    targets, loss = torch.full((rows,), 77), torch.zeros(rows)
    run = Kernel("cross_entropy_f32", "pipfpp", counts=True)._find(kernel)
    assert run(rows - 1, rows, logits.data_ptr(), columns, targets.data_ptr(), 1.0, loss.data_ptr(), None) == 0
    assert torch.equal(loss[-1:], cross_entropy(last[None], targets[-1:], kernel=kernel))


@every
def test_no_rows_have_no_losses(kernel: str) -> None:
    logits, targets = case(0, 40)
    assert cross_entropy(logits, targets, 1.0, torch.empty_like(logits), kernel=kernel).shape == (0,)


@every
def test_logits_and_targets_may_have_strides(kernel: str) -> None:
    logits, targets = case(11, 300)
    dense = cross_entropy(logits, targets, kernel=kernel)
    wide = torch.stack([logits, -logits], dim=2)[:, :, 0]
    twice = torch.stack([targets, targets], dim=1)[:, 0]
    assert not wide.is_contiguous() and not twice.is_contiguous()
    assert torch.equal(cross_entropy(wide, twice, kernel=kernel), dense)


@native
def test_what_the_kernel_cannot_write_is_refused(kernel: str) -> None:
    logits, targets = case(4, 40)
    for d in (torch.empty(4, 41), torch.empty(40, 4).t(), torch.empty(4, 40, dtype=torch.float16)):
        with pytest.raises(ValueError, match="d: contiguous BF16 or float32"):
            cross_entropy(logits, targets, 1.0, d, kernel=kernel)
    with pytest.raises(ValueError, match="logits: float32"):
        cross_entropy(logits.to(BF16), targets, kernel=kernel)


def test_the_operator_has_a_fake_kernel_and_a_true_schema() -> None:
    logits, targets = case(5, 40)
    arguments = (logits, targets, 1.0, torch.empty_like(logits), "")
    torch.library.opcheck(torch.ops.tessera.cross_entropy.default, arguments)
