"""The PyTorch form of the tensor-core model is fast enough to be used; its bits are held to the reference elsewhere."""

import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

from tessera.numerics.kernels import reference
from tessera.numerics.kernels import torch as kernel
from tessera.numerics.kernels.hopper import fma
from tessera.numerics.kernels.reference import fma32
from tests.numerics.oracle import fma_cases, problem_of, same_bits


def test_the_pytorch_form_is_a_hundred_times_as_fast_as_the_reference() -> None:
    times: dict[str, float] = {}
    for rows, name, run in ((4, "reference", reference.matmul), (64, "vectorised", partial(kernel.matmul, isa=None))):
        problem = problem_of("fprop", [rows], rows, 256, torch.randn, kernel=kernel)
        form = SimpleNamespace(matmul=run)
        start = time.process_time()
        replace(problem, accumulation="hopper").run(form)
        times[name] = (time.process_time() - start) / rows**2  # a product of 256 numbers
    assert times["reference"] > 100 * times["vectorised"], times


def test_the_vectorised_fma_rounds_once() -> None:
    a, b, c = fma_cases()
    owed = [fma32(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert same_bits(fma(a, b, c), torch.tensor(owed))
