"""The native AdamW step and gradient norm, against optimizer.py's own path and plain float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tessera.native import Kernel, instruction_sets
from tessera.recipe import OptimizerSection
from tessera.training import fused_adamw
from tessera.training.fused_adamw import CHUNK, adamw_, gradient_norm
from tessera.training.optimizer import AdamW

SETS = [isa for isa in ("avx512", "avx2", "portable") if isa in instruction_sets()]
every = pytest.mark.parametrize("isa", SETS)
pytestmark = pytest.mark.skipif(not SETS, reason="no native kernels here")
BF16 = torch.bfloat16
SHAPES = [(1,), (7, 9), (16,), (3, 5, 17), (0, 4), (CHUNK // 8, 8), (2, CHUNK + 37), (), (1009,)]


def section(**changes: object) -> OptimizerSection:
    return OptimizerSection.model_validate({"learning_rate": 1e-2, **changes})


class Twin:
    """The same parameters and gradients for the native step and for optimizer.py's path in PyTorch."""

    def __init__(self, s: OptimizerSection, isa: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        self.s, self.isa, self.generator = s, isa, torch.Generator().manual_seed(1)
        self.native = [nn.Parameter(self.normal(shape)) for shape in shapes]
        self.plain = [nn.Parameter(p.detach().clone()) for p in self.native]
        self.slow = AdamW({str(i): p for i, p in enumerate(self.plain)}, s)
        self.slow.fused = False
        self.first = [torch.zeros_like(m) for m in self.slow.first]
        self.second = [torch.zeros_like(m) for m in self.slow.second]
        self.steps = 0

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def step(self, gradient_scale: float, scale: float = 1e-2, *, without: Sequence[int] = ()) -> None:
        self.steps += 1
        gradients: list[Tensor | None] = [self.normal(tuple(p.shape), scale) for p in self.native]
        for i in without:
            gradients[i] = None
        for p, g in zip(self.plain, gradients, strict=True):
            p.grad = g
        self.slow.step(1e-2, gradient_scale)
        s = self.s
        adamw_(
            self.native,
            gradients,
            self.first,
            self.second,
            self.steps,
            1e-2,
            beta1=s.beta1,
            beta2=s.beta2,
            epsilon=s.epsilon,
            weight_decay=s.weight_decay,
            gradient_scale=gradient_scale,
            isa=self.isa,
        )


@every
@pytest.mark.parametrize("moments", ["bf16", "fp32"])
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
def test_moments_have_the_bits_of_the_path_in_pytorch_and_weights_its_values(
    isa: str, moments: str, beta1: float
) -> None:
    twin = Twin(section(moments=moments, beta1=beta1, weight_decay=0.2), isa)
    for step in range(6):
        before = [p.detach().clone() for p in twin.native]
        # One step at a time, each from the same state: what differs then has no time to grow.
        ours = [*twin.native, *twin.first, *twin.second]
        for a, b in zip(ours, [*twin.plain, *twin.slow.first, *twin.slow.second], strict=True):
            b.data.copy_(a.data)
        twin.step(1.0 if step else 0.37, without=[2, 6] if step == 3 else [])
        pairs = [*zip(twin.first, twin.slow.first, strict=True), *zip(twin.second, twin.slow.second, strict=True)]
        if isa == "portable":  # no fused multiply-add: one unit before the rounding, so one after it
            bar = 2.0**-7 if moments == "bf16" else 2.0**-20
            assert all(torch.allclose(a.float(), b.float(), rtol=bar, atol=1e-7) for a, b in pairs)
        else:
            assert all(torch.equal(a, b) for a, b in pairs)
        for p, q, w in zip(twin.native, twin.plain, before, strict=True):
            # One rounding of the sum, and a few units of the update itself.
            bound = 2.0**-23 * w.abs() + 2.0**-21 * (q - w).abs() + 2.0**-21 * 1e-2
            assert ((p - q).abs() <= bound).all()


@every
def test_every_element_is_updated_once_whatever_the_threads(isa: str) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            twin = Twin(section(), isa)
            for _ in range(2):
                twin.step(0.5)
            norm = gradient_norm([p.grad for p in twin.plain], isa=isa)
            results.append([*twin.native, *twin.first, *twin.second, norm])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@every
def test_memory_around_the_tensors_is_not_touched(isa: str) -> None:
    room = [torch.full((CHUNK + 70,), 5.0) for _ in range(2)] + [
        torch.full((CHUNK + 70,), 5.0, dtype=BF16) for _ in range(2)
    ]
    inside = [r[33 : 33 + CHUNK + 5] for r in room]  # begins at no multiple of a vector
    inside[1].fill_(4.0)
    kept = inside[1].clone()
    adamw_(
        [inside[0]],
        [inside[1]],
        [inside[2]],
        [inside[3]],
        1,
        1e-2,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        isa=isa,
    )
    assert all((r[:33] == 5).all() and (r[33 + CHUNK + 5 :] == 5).all() for r in room)
    assert torch.equal(inside[1], kept)  # gradients are only read
    assert all((inside[i] != 5).all() for i in (0, 2, 3))


@every
def test_the_norm_is_that_of_float64(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(shape, generator=generator) * 10.0 ** (i - 4) for i, shape in enumerate(SHAPES)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    norm = gradient_norm([*gradients, None], isa=isa)
    assert norm.dtype == torch.float32 and torch.equal(norm, exact.float())
    assert float(gradient_norm([None], isa=isa)) == float(gradient_norm([], isa=isa)) == 0.0


@every
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25, 1e38])
def test_a_norm_that_float32_can_hold_neither_overflows_nor_vanishes(isa: str, size: float) -> None:
    # The square of each of these is outside of float32.
    assert float(gradient_norm([torch.full((9,), size)], isa=isa)) == pytest.approx(3 * size, rel=1e-6)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 31, CHUNK, 2 * CHUNK + 36])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(isa: str, bad: float, place: int) -> None:
    gradient = torch.ones(2 * CHUNK + 37)
    gradient[place] = bad
    assert not gradient_norm([torch.ones(5), gradient], isa=isa).isfinite()


@every
def test_gradients_of_other_strides_and_dtypes_are_read_right(isa: str) -> None:
    wide = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    for gradient in (wide[:, ::2], wide[:, :3].bfloat16(), wide.t()[:3].t()):
        updated = []
        for g in (gradient, gradient.float().contiguous()):
            p, m, v = torch.ones(40, 3), torch.zeros(40, 3), torch.zeros(40, 3)
            adamw_([p], [g], [m], [v], 1, 0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0, isa=isa)
            updated.append([p, m, v, gradient_norm([g], isa=isa)])
        assert all(torch.equal(a, b) for a, b in zip(*updated, strict=True))


@every
def test_elements_beyond_the_reach_of_32_bits_are_found(isa: str) -> None:
    elements = (1 << 31) + CHUNK
    try:  # addresses; memory only for the pages that are used
        master, moments = torch.empty(elements), [torch.empty(elements, dtype=BF16) for _ in range(2)]
    except RuntimeError:
        pytest.skip("this machine gives no 16 GiB of addresses")
    gradient = torch.zeros(5)
    pointers = (master.data_ptr(), master.data_ptr(), *(m.data_ptr() for m in moments))
    table = torch.tensor([(*pointers, elements, 0), (gradient.data_ptr(), 0, 0, 0, 5, 0)])
    for tensor in (master, *moments):
        tensor[-CHUNK:] = 1.0
    last, sums = elements // CHUNK - 1, torch.zeros(elements // CHUNK + 1, dtype=torch.float64)
    Kernel("sum_of_squares", "pip")._find(isa)(last, last + 1, table.data_ptr(), CHUNK, sums.data_ptr())
    assert sums[last] == CHUNK and sums.sum() == CHUNK
    step = Kernel("adamw_bf16", "pifffffff")._find(isa)
    step(last, last + 1, table.data_ptr(), CHUNK, 1.0, 0.5, 0.5, 0.5, 1.0, -0.25, 0.0)
    assert (master[-CHUNK:] == 0.75).all() and (master[-CHUNK - 9 : -CHUNK] == 0).all()


@pytest.mark.parametrize("change", ["strides", "shape", "dtype", "gradient"])
def test_tensors_that_the_kernel_cannot_take_are_refused(change: str) -> None:
    p, g, m, v = torch.ones(4, 6), torch.ones(4, 6), torch.zeros(4, 6, dtype=BF16), torch.zeros(4, 6, dtype=BF16)
    if change == "strides":
        p = torch.ones(6, 4).t()
    elif change == "shape":
        m = m[:3]
    elif change == "dtype":
        v = v.float()
    else:
        g = torch.ones(24)
    with pytest.raises(ValueError, match="contiguous tensors of one shape"):
        adamw_([p], [g], [m], [v], 1, 0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)


def test_a_parameter_with_strides_takes_the_path_in_pytorch() -> None:
    parameter = nn.Parameter(torch.ones(6, 4).t())
    optimizer = AdamW({"w": parameter}, section())
    parameter.grad = torch.ones(6, 4).t()
    optimizer.step(1e-2, 1.0)
    assert not optimizer.fused and (parameter < 1).all()
    assert AdamW({"w": nn.Parameter(torch.ones(4))}, section()).fused


def test_both_paths_train_alike() -> None:
    """A small regression, 200 steps: the losses of the two paths stay within a thousandth of each other."""
    curves = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(4)
        x, truth = torch.randn(64, 32, generator=generator), torch.randn(32, 16, generator=generator)
        weight = nn.Parameter(torch.zeros(32, 16))
        optimizer = AdamW({"w": weight}, section(weight_decay=0.0))
        optimizer.fused = fused
        losses = []
        for _ in range(200):
            optimizer.zero_gradients()
            loss = (x @ weight - x @ truth).square().mean()
            loss.backward()
            optimizer.step(2e-2, min(1.0, 1.0 / float(optimizer.gradient_norm())))
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.01 * curves[0][0]
    assert all(a == pytest.approx(b, rel=1e-3, abs=1e-3) for a, b in zip(*curves, strict=True))


def test_the_operators_have_fake_kernels_and_true_schemas() -> None:
    tensors = [[torch.ones(4, 3)] for _ in range(4)]
    numbers = (1, 0.1, 0.9, 0.95, 1e-8, 0.1, 1.0, "")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tessera.adamw_.default, (*tensors, *numbers), test_utils=tests)
    torch.library.opcheck(torch.ops.tessera.gradient_norm.default, ([torch.ones(4)], ""), test_utils=tests)


def test_an_empty_model_has_nothing_to_update() -> None:
    assert fused_adamw.usable([], BF16)
    adamw_([], [], [], [], 1, 0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
