"""The tensor-core model is fast enough to be used; its arithmetic is held to the reference elsewhere."""

import time

import torch

from tessera.numerics import BLOCK, E4M3, VECTOR, Accumulation, gemm, quantise
from tessera.numerics.kernels.hopper import fma
from tessera.numerics.kernels.reference import fma32
from tests.numerics.oracle import fma_cases, same_bits


def test_the_tensor_core_model_reaches_100_million_operations_a_second() -> None:
    x, w = quantise(torch.randn(256, 512), E4M3, VECTOR), quantise(torch.randn(256, 512), E4M3, BLOCK)
    times = []
    for _ in range(3):
        start = time.process_time()
        gemm.fprop(x, w, Accumulation("hopper"), torch.float32)
        times.append(time.process_time() - start)
    assert 2 * 256 * 256 * 512 / min(times) > 100e6


def test_the_vectorised_fma_rounds_once() -> None:
    a, b, c = fma_cases()
    owed = [fma32(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert same_bits(fma(a, b, c), torch.tensor(owed))
