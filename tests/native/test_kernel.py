"""Calling kernels: shares of rows, threads that change nothing, instruction sets, scratch memory."""

import os
import signal
import threading
import time
from itertools import pairwise

import pytest
import torch

from tessera import native
from tessera.native import Kernel, kernel
from tessera.native.scratch import LARGEST_KEPT, scratch
from tessera.numerics import BLOCK, COLUMN, E4M3, VECTOR, gemm, quantise
from tessera.numerics.precision import Accumulation

pytestmark = pytest.mark.skipif(bool(native.problem()), reason=native.problem() or "native kernels are there")


@pytest.fixture
def two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 127, 1000, 1001])
@pytest.mark.parametrize("grain", [1, 32, 128])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_shares_cover_all_rows_once_and_begin_at_the_grain(
    rows: int, grain: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shares = kernel._shares(rows, grain, 1 << 20)
    assert shares[0][0] == 0 and shares[-1][1] == rows
    assert all(one[1] == other[0] and one[1] % grain == 0 for one, other in pairwise(shares))
    assert len(shares) <= threads and (rows == 0 or all(start < end for start, end in shares))
    assert len(kernel._shares(rows, grain, 0)) == 1  # little work is not worth a thread


@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_bits_of_one() -> None:
    torch.manual_seed(0)
    x, w, dy = torch.randn(700, 400), torch.randn(600, 400), torch.randn(700, 600).bfloat16()
    offsets = torch.tensor([0, 5, 5, 300, 700])

    def results() -> list[torch.Tensor]:
        rows, columns = quantise(x, E4M3, VECTOR), quantise(x, E4M3, COLUMN, offsets=offsets)
        weight, dy_columns = quantise(w, E4M3, BLOCK, row_segment=150), quantise(dy, E4M3, COLUMN, offsets=offsets)
        plain = Accumulation()
        products = [
            gemm.fprop(rows, quantise(w, E4M3, BLOCK), plain, torch.bfloat16),
            gemm.fprop(rows, weight, plain, torch.bfloat16, offsets),
            gemm.wgrad(dy_columns, columns, plain, offsets),
            gemm.wgrad(dy, x.bfloat16(), plain),
        ]
        return [rows.codes, columns.codes, columns.scales, weight.codes, dy_columns.codes, *products]

    together = results()
    torch.set_num_threads(1)
    for one, other in zip(results(), together, strict=True):
        assert torch.equal(one, other)


def test_a_kernel_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no kernel transmogrify"):
        Kernel("transmogrify", "")(0)


def test_counts_of_all_shares_are_added(two_threads: None) -> None:
    x = torch.full((1000, 100), torch.inf)
    assert quantise(x, E4M3, VECTOR).nonfinite == quantise(x, E4M3, COLUMN).nonfinite == 100_000


def test_scratch_is_kept_grows_and_is_each_threads_own() -> None:
    first = scratch(1000)
    assert scratch(10) is first and scratch(first.numel() + 1) is not first
    other: list[torch.Tensor] = []
    worker = threading.Thread(target=lambda: other.append(scratch(10)))
    worker.start()
    worker.join()
    assert other[0].data_ptr() != scratch(10).data_ptr()
    assert scratch(LARGEST_KEPT + 1) is not scratch(LARGEST_KEPT + 1)  # not kept


def test_a_forked_child_computes_with_threads_of_its_own(two_threads: None) -> None:
    x = torch.randn(2000, 200)
    owed = quantise(x, E4M3, VECTOR).codes
    child = os.fork()
    if child == 0:
        codes = quantise(x, E4M3, VECTOR).codes
        torch.set_num_threads(1)  # torch's own threads did not survive, and it would wait for them
        os._exit(0 if torch.equal(codes, owed) else 1)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert ended[1] == 0
