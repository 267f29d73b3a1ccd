"""Calls timed beside a peer in one process: each sample of a call lies between two of its peer.

A processor whose matrix units or memory are shared with a neighbour changes its speed within a second, so times of a
long run say little; the ratio to what ran right before and after says what is to be known. A call is its own peer
where it is the baseline: the spread of that ratio is the noise of the run.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SHORTEST = 4e-3  # seconds of a sample: short calls are repeated in it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


@dataclass(eq=False)
class Timed:
    """One call, its peer (None: itself), and its samples.

    `scale`: by how much the time of the call is multiplied, where only a part of the work is done in it.
    """

    call: Callable[[], Any]
    peer: "Timed | None" = None
    scale: float = 1.0
    repeats: int = 1
    own: list[tuple[float, float]] = field(default_factory=list)
    peers: list[tuple[float, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """median_ms (CPU), median_wall_ms, ratio and wall_ratio to the peer, each with its quartiles."""
        found: dict[str, Any] = {}
        for clock, prefix in enumerate(("", "wall_")):
            low, middle, high = quartiles([1e3 * sample[clock] for sample in self.own])
            found |= {f"median_{prefix}ms": middle, f"{prefix}quartiles": [low, high]}
            pairs = zip(self.own, self.peers, strict=True)
            low, middle, high = quartiles([own[clock] / other[clock] for own, other in pairs])
            found |= {f"{prefix}ratio": middle, f"{prefix}ratio_quartiles": [low, high]}
        return found


class Clock:
    """CPU seconds, of this thread where there is one thread, else of the process; and wall seconds."""

    def __init__(self, threads: int) -> None:
        self._cpu = time.thread_time if threads == 1 else time.process_time

    def __call__(self, timed: Timed) -> tuple[float, float]:
        """One sample: (CPU, wall) seconds a call."""
        wall, cpu = time.perf_counter(), self._cpu()
        for _ in range(timed.repeats):
            timed.call()
        cpu, wall = self._cpu() - cpu, time.perf_counter() - wall
        return timed.scale * cpu / timed.repeats, timed.scale * wall / timed.repeats


def measure(calls: Sequence[Timed], rounds: int, clock: Clock) -> None:
    """Fill the samples: all calls in turn in each round, each between two samples of its peer (their mean counts)."""
    for timed in calls:
        timed.call()  # libraries build their kernels, buffers are allocated
        timed.repeats = max(1, math.ceil(SHORTEST * timed.scale / clock(timed)[1]))
    for _ in range(rounds):
        for timed in calls:
            peer = timed.peer or timed
            if peer.repeats > 1:
                clock(
                    peer
                )  # what ran last was another call: caches and matrix units are to be as the next ones find them
            before, own, after = clock(peer), clock(timed), clock(peer)
            timed.own.append(own)
            timed.peers.append(((before[0] + after[0]) / 2, (before[1] + after[1]) / 2))


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def keep_memory() -> bool:
    """Let the allocator keep freed memory, so that no call is timed with page faults of its results; glibc's alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
