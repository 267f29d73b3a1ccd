"""The compiled norms against float64, and each row against itself in other company, places and shares."""

import pytest
import torch
from torch import Tensor

import tests.ops.float64 as float64
from tessera.ops.keep import Keep
from tessera.ops.kernels import norm
from tessera.ops.rms_norm import add_rms_norm, normalise, normalise_backward, scaled
from tests.ops.float64 import BF16, normal
from tests.ops.kernels.sets import KERNELS, apart, each_set, misaligned, threads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16])
SIZES = [(0, 40), (1, 1), (2, 15), (3, 16), (63, 17), (64, 31), (65, 129), (130, 640)]
EPSILON = 0.01
# One rounding to BF16; in float32 sums of up to 640 products and six further roundings.
BARS = {torch.float32: 5e-7, BF16: 2.0**-8}


def a_case(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, gamma, dy."""
    return 3 * normal(rows, columns).to(dtype), 1 + normal(columns, seed=1), normal(rows, columns, seed=2).to(dtype)


def exact_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt() * gamma


@each_set
@DTYPES
@pytest.mark.parametrize("rows, columns", SIZES)
def test_values_are_those_of_float64(rows: int, columns: int, dtype: torch.dtype, isa: str) -> None:
    x, gamma, _ = a_case(rows, columns, dtype)
    y, inverse_rms = norm.rms_norm(x, gamma, EPSILON, isa)
    exact = exact_norm(x.double(), gamma.double())
    torch.testing.assert_close(y.double(), exact, rtol=BARS[dtype], atol=1e-30)
    owed = (x.double().square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()
    torch.testing.assert_close(inverse_rms.double(), owed, rtol=3e-7, atol=0.0)
    assert y.dtype == dtype and inverse_rms.shape == (rows, 1)


@each_set
@DTYPES
@pytest.mark.parametrize("rows, columns", SIZES)
def test_gradients_are_those_of_float64(rows: int, columns: int, dtype: torch.dtype, isa: str) -> None:
    x, gamma, dy = a_case(rows, columns, dtype)
    passing = normal(rows, columns, seed=3).to(dtype)
    leaves = [x.double().requires_grad_(), gamma.double().requires_grad_()]
    exact_norm(*leaves).backward(dy.double())
    _, inverse_rms = norm.rms_norm(x, gamma, EPSILON, isa)
    for given in (dy, dy.float()):
        dx, dgamma = norm.rms_norm_backward(given, x, gamma, inverse_rms, None, isa)
        added, _ = norm.rms_norm_backward(given, x, gamma, inverse_rms, passing, isa)
        assert dx.dtype == added.dtype == dtype and dgamma.dtype == torch.float32
        assert float64.relative(dx, leaves[0].grad) < BARS[dtype]
        assert float64.relative(added, leaves[0].grad + passing.double()) < BARS[dtype]
        assert float64.relative(dgamma, leaves[1].grad) < 2e-6


@each_set
@DTYPES
def test_the_gradient_that_passes_by_is_added_before_the_rounding(dtype: torch.dtype, isa: str) -> None:
    x, gamma, dy = a_case(70, 96, dtype)
    passing = normal(70, 96, seed=3).to(dtype)
    wide, inverse_rms = x.float(), norm.rms_norm(x, gamma, EPSILON, isa)[1]
    whole, _ = norm.rms_norm_backward(dy.float(), wide, gamma, inverse_rms, None, isa)
    added, _ = norm.rms_norm_backward(dy, x, gamma, inverse_rms, passing, isa)
    assert torch.equal(added, (whole + passing.float()).to(dtype))


@each_set
@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 48, 250])
def test_a_sum_is_rounded_once_and_its_norm_is_that_of_the_rounded_sum(
    columns: int, dtype: torch.dtype, isa: str
) -> None:
    x, gamma, delta = a_case(67, columns, dtype)
    total, y, inverse_rms = norm.add_rms_norm(x, delta, gamma, EPSILON, isa)
    assert torch.equal(total, x + delta)
    owed = norm.rms_norm(total, gamma, EPSILON, isa)
    assert torch.equal(y, owed[0]) and torch.equal(inverse_rms, owed[1])


@each_set
@DTYPES
@pytest.mark.parametrize("columns", [5, 48, 129])
def test_a_row_has_the_same_bits_in_any_company_place_and_share(columns: int, dtype: torch.dtype, isa: str) -> None:
    x, gamma, dy = a_case(1000, columns, dtype)
    y, inverse_rms = norm.rms_norm(x, gamma, EPSILON, isa)
    dx, dgamma = norm.rms_norm_backward(dy, x, gamma, inverse_rms, None, isa)
    assert torch.equal(norm.rms_norm_again(x, gamma, inverse_rms, isa), y)
    for rows in (slice(0, 1), slice(5, 8), slice(63, 200)):
        part = norm.rms_norm(x[rows], gamma, EPSILON, isa)
        assert torch.equal(part[0], y[rows]) and torch.equal(part[1], inverse_rms[rows])
        alone, _ = norm.rms_norm_backward(dy[rows], x[rows], gamma, inverse_rms[rows], None, isa)
        assert torch.equal(alone, dx[rows])
    for place in (misaligned(x), apart(x), x.t().contiguous().t()):
        assert torch.equal(norm.rms_norm(place, gamma, EPSILON, isa)[0], y)
        assert torch.equal(norm.rms_norm_again(place, gamma, inverse_rms, isa), y)
        moved = norm.rms_norm_backward(apart(dy), place, misaligned(gamma), inverse_rms, None, isa)
        assert torch.equal(moved[0], dx) and torch.equal(moved[1], dgamma)
    with threads(3):
        assert torch.equal(norm.rms_norm(x, gamma, EPSILON, isa)[0], y)
        shared = norm.rms_norm_backward(dy, x, gamma, inverse_rms, None, isa)
        assert torch.equal(shared[0], dx) and torch.equal(shared[1], dgamma)


@each_set
def test_rows_beyond_2_to_the_31_elements_are_reached(isa: str) -> None:
    stride = 2**30 + 8
    x = torch.empty(2 * stride + 40, dtype=BF16).as_strided((3, 40), (stride, 1))  # the gaps are never touched
    x.copy_(normal(3, 40))
    gamma = 1 + normal(40, seed=1)
    assert torch.equal(norm.rms_norm(x, gamma, EPSILON, isa)[0], norm.rms_norm(x.clone(), gamma, EPSILON, isa)[0])


@each_set
@DTYPES
def test_what_is_not_finite_spoils_its_own_row_alone(dtype: torch.dtype, isa: str) -> None:
    x, gamma, dy = a_case(6, 33, dtype)
    x[1, 32], x[3, 0], x[4] = torch.nan, torch.inf, 0.0
    found, owed = (normalise(x, gamma, EPSILON, kernel)[0] for kernel in (isa, "torch"))
    assert torch.equal(found.isnan(), owed.isnan()) and not found[[0, 2, 4, 5]].isnan().any()
    assert torch.equal(found[4], torch.zeros(33, dtype=dtype))
    _, inverse_rms = norm.rms_norm(x, gamma, EPSILON, isa)
    dx = normalise_backward(dy, x, gamma, inverse_rms, kernel=isa)[0]
    assert dx[1].isnan().all() and dx[3].isnan().any() and dx[[0, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@DTYPES
def test_a_residual_sum_and_its_norm_share_one_gradient(dtype: torch.dtype, kernel: str) -> None:
    x, gamma, delta = (t.requires_grad_() for t in a_case(50, 40, dtype))
    total, y, _ = add_rms_norm(x, delta, gamma, EPSILON, Keep(), kernel)
    exact = [t.detach().double().requires_grad_() for t in (x, delta, gamma)]
    # The rounded sum, with the gradient of the exact one.
    owed_total = exact[0] + exact[1] + (total.detach().double() - (exact[0] + exact[1]).detach())
    owed_y = exact_norm(owed_total, exact[2])
    readers = normal(50, 40, seed=5).to(dtype), normal(50, 40, seed=6).to(dtype)
    torch.autograd.backward([total, y], list(readers))
    torch.autograd.backward([owed_total, owed_y], [r.double() for r in readers])
    assert torch.equal(total, x + delta) and float64.relative(y, owed_y) < BARS[dtype]
    assert torch.equal(x.grad, delta.grad)
    for found, leaf in zip((x, delta, gamma), exact, strict=True):
        assert float64.relative(found.grad, leaf.grad) < BARS[dtype]


@each_set
@DTYPES
def test_both_paths_agree_to_a_rounding(dtype: torch.dtype, isa: str) -> None:
    x, gamma, dy = a_case(130, 129, dtype)
    results = []
    for kernel in (isa, "torch"):
        y, inverse_rms = normalise(x, gamma, EPSILON, kernel)
        results.append(
            [y, scaled(x, gamma, inverse_rms, kernel), *normalise_backward(dy, x, gamma, inverse_rms, x, kernel)]
        )
    for found, owed in zip(*results, strict=True):
        assert found.dtype == owed.dtype and float64.relative(found, owed) < BARS[dtype]


@each_set
def test_shapes_that_do_not_fit_are_refused(isa: str) -> None:
    x, gamma, dy = a_case(4, 6, torch.float32)
    inverse_rms = torch.ones(4, 1)
    wrong = [
        lambda: norm.rms_norm(x, gamma[:5], EPSILON, isa=isa),
        lambda: norm.add_rms_norm(x, dy[:3], gamma, EPSILON, isa=isa),
        lambda: norm.rms_norm_again(x, gamma, inverse_rms[:3], isa=isa),
        lambda: norm.rms_norm_backward(dy[:3], x, gamma, inverse_rms, None, isa=isa),
        lambda: norm.rms_norm_backward(dy, x, gamma, inverse_rms, dy[:, :5], isa=isa),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            call()
