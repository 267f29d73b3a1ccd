"""The PyTorch form of the tensor-core model is fast enough to be used; its bits are held to the reference elsewhere."""

import time
from dataclasses import replace

import torch

from tessera.numerics.kernels import torch as kernel
from tessera.numerics.kernels.hopper import fma
from tessera.numerics.kernels.reference import fma32
from tests.numerics.oracle import fma_cases, problem_of, same_bits


def test_the_tensor_core_model_reaches_100_million_operations_a_second() -> None:
    problem = replace(problem_of("fprop", [256], 256, 512, torch.randn, kernel=kernel), accumulation="hopper")
    times = []
    for _ in range(3):
        start = time.process_time()
        problem.run(kernel, isa=None)
        times.append(time.process_time() - start)
    assert 2 * 256 * 256 * 512 / min(times) > 100e6


def test_the_vectorised_fma_rounds_once() -> None:
    a, b, c = fma_cases()
    owed = [fma32(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert same_bits(fma(a, b, c), torch.tensor(owed))
