"""What this machine could do: the measured speed of one large matrix product, the denominator of MFU.

Vendors' peaks mean nothing on a CPU whose clock and neighbours vary, so MFU here is the share of the best product
measured at the start of the run, in the dtype and with the threads of the run.
"""

import time

import torch

SIZE = 512  # large enough for full speed, small enough for the second-level cache
REPEATS = 8


def measured_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of a few SIZE x SIZE products on random data."""
    own = torch.Generator(device).manual_seed(0)  # the run's own stream is not to depend on how often it was started
    a = torch.randn(SIZE, SIZE, generator=own, device=device).to(dtype)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best
