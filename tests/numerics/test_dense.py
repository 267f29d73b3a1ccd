"""Row invariance of unquantised products, and the three GEMMs of the BF16 and FP32 twins."""

import itertools

import pytest
import torch
from torch import Tensor

from tessera import native
from tessera.numerics import dense
from tessera.numerics.dense import matmul_rows
from tests.numerics.oracle import relative_norm

ROWS = [1, 2, 3, 16, 64]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "n"),
    [(128, 8), (128, 4096), (96, 192), (7168, 8), (352, 128), (33, 5), (1000, 1), (64, 11), (16, 7), (1, 3)],
    ids=str,
)
def test_a_row_depends_on_itself_alone_wherever_it_stands(k: int, n: int, dtype: torch.dtype, transposed: bool) -> None:
    a = normal(300, k, dtype=dtype)
    b = normal(n, k, seed=1, dtype=dtype).t() if transposed else normal(k, n, seed=1, dtype=dtype)
    whole = matmul_rows(a, b)
    assert whole.shape == (300, n) and whole.is_contiguous()
    for rows, start in itertools.product([*ROWS, 65, 97, 127, 200], [0, 1, 2, 3, 50]):
        part = matmul_rows(a[start : start + rows], b)
        assert torch.equal(part, whole[start : start + rows]), f"rows {start} to {start + rows}"
    assert matmul_rows(a[:0], b).shape == (0, n)


def test_a_row_of_nan_and_infinity_reaches_no_other_row() -> None:
    a, b = normal(70, 40), normal(40, 9, seed=1)
    owed = matmul_rows(a, b)
    a[3], a[66, 5] = torch.nan, torch.inf
    y = matmul_rows(a, b)
    others = [row for row in range(70) if row not in (3, 66)]
    assert torch.equal(y[others], owed[others]) and bool(y[3].isnan().all())


GROUPS = [3, 0, 200, 1, 64, 129, 127, 0]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_grouped_products_equal_a_loop_over_groups(kind: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    if kind == "wgrad" and out_dtype == torch.bfloat16:
        pytest.skip("weight gradients are float32")
    n, k = 20, 150
    offsets = torch.tensor([0, *itertools.accumulate(GROUPS)])
    a = normal(sum(GROUPS), k if kind == "fprop" else n, dtype=dtype)
    b = normal(sum(GROUPS) if kind == "wgrad" else len(GROUPS) * n, k, seed=1, dtype=dtype)
    y = dense.matmul(kind, a, b, offsets, out_dtype)
    assert y.dtype == out_dtype and y.is_contiguous()
    parts, wide = [], b.double()
    for g, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        w = wide[g * n : (g + 1) * n]
        x = a[start:end].double()
        parts.append(x @ w.T if kind == "fprop" else x @ w if kind == "dgrad" else x.T @ wide[start:end])
    bar = 2e-6 if out_dtype == torch.float32 else 2.0**-9
    assert relative_norm(y, torch.cat(parts)) < bar
    if kind != "wgrad":
        for g, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            alone = dense.matmul(kind, a[start:end], b[g * n : (g + 1) * n], None, out_dtype)
            assert torch.equal(y[start:end], alone), f"group {g} depends on its neighbours"


def test_weight_gradients_of_bf16_operands_are_not_rounded_to_bf16() -> None:
    a, b = normal(500, 30, dtype=torch.bfloat16), normal(500, 40, seed=1, dtype=torch.bfloat16)
    y = dense.matmul("wgrad", a, b, None, torch.float32)
    assert relative_norm(y, a.double().T @ b.double()) < 1e-6
    assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.skipif(bool(native.problem()), reason=native.problem() or "native kernels are there")
def test_the_products_of_a_fixed_weight_are_torch_operators_and_equal_the_plain_ones() -> None:
    weight, x, dy = torch.randn(70, 40), torch.randn(9, 40).bfloat16(), torch.randn(9, 70).bfloat16()
    ops = torch.ops.tessera
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for kind in ("fprop", "dgrad"):
        torch.library.opcheck(ops.bf16_pack.default, (kind, weight), test_utils=checks)
    packed = ops.bf16_pack("fprop", weight)
    torch.library.opcheck(
        ops.bf16_packed_matmul.default, (torch.empty(9, 70), "fprop", x, weight, packed), test_utils=checks
    )
    for grouped in (None, torch.tensor([0, 4, 9])):
        room = torch.full((70 if grouped is None else 140, 40), torch.nan)
        torch.library.opcheck(ops.bf16_wgrad.default, (room.zero_(), dy, x, grouped, True), test_utils=checks)
        made = dense.matmul("wgrad", dy, x, grouped, torch.float32, room.fill_(torch.nan))
        assert made is room and torch.equal(made, dense.matmul("wgrad", dy, x, grouped, torch.float32))
        operands = (x, weight.bfloat16(), grouped, torch.float32, "")
        torch.library.opcheck(ops.bf16_matmul.default, ("fprop", *operands), test_utils=checks)
    fixed = dense.Fixed(weight, torch.bfloat16)
    rounded = weight.bfloat16()
    assert torch.equal(fixed.fprop(x, torch.empty(64, 70)), dense.matmul("fprop", x, rounded, None, torch.float32))
    assert torch.equal(fixed.dgrad(dy, torch.empty_like(x)), dense.matmul("dgrad", dy, rounded, None, torch.bfloat16))
    into, start = torch.randn(70, 40), torch.randn(70, 40)
    dense.add_wgrad(dy, x, into, add=False)
    assert torch.equal(into, dense.matmul("wgrad", dy, x, None, torch.float32))
    owed = into + start
    dense.add_wgrad(dy, x, start, add=True)
    assert torch.equal(start, owed)


@pytest.mark.parametrize("columns", [8192, 8200, 8208])
def test_a_large_result_has_the_bits_of_its_parts(columns: int) -> None:
    """Large float32 results are written past the cache, where their rows lie on lines of it; small ones are not."""
    if not native.available():
        pytest.skip(native.problem())
    a, b = normal(163, 48, dtype=torch.bfloat16), normal(columns, 48, seed=1, dtype=torch.bfloat16)
    whole = dense.matmul("fprop", a, b, None, torch.float32)
    parts = [
        dense.matmul("fprop", a[rows], b, None, torch.float32)
        for rows in (slice(0, 32), slice(32, 101), slice(101, 163))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert relative_norm(whole, a.double() @ b.double().t()) < 1e-6
