"""The kernels' exponential and logarithm against float64, on a dense sample of float32."""

import pytest
import torch
from torch import Tensor

from tessera import native
from tessera.native import Kernel

SETS = native.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=native.problem())
every_set = pytest.mark.parametrize("isa", SETS)
EXPONENTIAL, LOGARITHM = Kernel("exponential", "pp"), Kernel("logarithm", "pp")
LOWEST, HIGHEST = -87.33654, 88.72283  # e^x is a normal float32 in between


def values(kernel: Kernel, x: Tensor, isa: str) -> Tensor:
    y = torch.full_like(x, 7.0)
    kernel(len(x), x, y, isa=isa)
    return y


def patterns(first: float, last: float, step: int) -> Tensor:
    """Every step-th float32 of one sign from `first` to `last` by its bits."""
    low, high = (int(torch.tensor(x).view(torch.int32)) for x in (first, last))
    return torch.arange(low, high + 1, step, dtype=torch.int32).view(torch.float32)


def worst(found: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place."""
    unit = torch.exp2(exact.abs().log2().floor() - 23)
    return float(((found.double() - exact) / unit).abs().max())


@every_set
def test_the_exponential_is_within_two_units_in_the_last_place(isa: str) -> None:
    for x in (patterns(0.0, HIGHEST, 997), -patterns(0.0, -LOWEST, 997), torch.linspace(LOWEST, HIGHEST, 1_000_001)):
        assert worst(values(EXPONENTIAL, x, isa), x.double().exp()) <= 2


@every_set
def test_the_exponential_at_its_ends(isa: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([-inf, -3e38, -1e4, -104.0, -87.34, 88.73, 89.0, 1e4, inf, nan, -nan, 0.0, -0.0, 1e-45])
    owed = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, inf, inf, inf, inf, nan, nan, 1.0, 1.0, 1.0])
    assert torch.equal(
        values(EXPONENTIAL, x, isa).nan_to_num(nan=-1.0, posinf=inf), owed.nan_to_num(nan=-1.0, posinf=inf)
    )
    payloads = torch.arange(0x7F800001, 0x7F800001 + 1000, dtype=torch.int32).view(torch.float32)
    assert values(EXPONENTIAL, payloads, isa).isnan().all()


@every_set
def test_a_lane_does_not_know_its_place(isa: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 20
    whole = values(EXPONENTIAL, x, isa)
    for begin, count in ((1, 999), (3, 1), (5, 15), (16, 33), (0, 0)):
        assert torch.equal(values(EXPONENTIAL, x[begin : begin + count].clone(), isa), whole[begin : begin + count])


@every_set
def test_the_logarithm_is_within_two_units_in_the_last_place(isa: str) -> None:
    x = torch.cat([patterns(1.2e-38, 3.4e38, 1999), patterns(0.999, 1.001, 1)])
    exact = x.double().log()
    found = values(LOGARITHM, x, isa)
    assert worst(found[exact != 0], exact[exact != 0]) <= 2 and (found[exact == 0] == 0).all()
