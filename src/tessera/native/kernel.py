"""Calling a kernel: the variant for the machine's instruction set, and its rows shared among torch's threads.

Every entry point takes a range of rows first and touches nothing of other rows, so results do not depend on how many
threads there are. Threads are Python's own: ctypes lets go of the interpreter while a kernel runs.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tessera.native.library import library, require

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
SMALLEST_SHARE = 1 << 14  # elements below which another thread costs more than it gives


class Kernel:
    """One entry point: `name`, and the C types of what follows the range of rows, a letter each (TYPES).

    p a tensor (or None), i int64, f float, d double. Returns the sum over the shares of what the shares return
    (int64), for counts; most return nothing and are declared with `counts` false.
    """

    def __init__(self, name: str, signature: str, *, counts: bool = False) -> None:
        self.name, self.signature, self.counts = name, signature, counts
        self._functions: dict[str, Callable[..., int | None]] = {}  # by instruction set asked for

    def __call__(self, rows: int, *arguments: Any, work: int = 1, grain: int = 1, isa: str = "") -> int:
        """Run on rows [0, rows), in shares that begin at multiples of `grain`; `work`: elements a row has.

        `isa` names an instruction set; "" is the best there is a variant for. Raises ValueError for a set that this
        machine has not, or has no variant of this kernel for.
        """
        function = self._functions.get(isa) or self._functions.setdefault(isa, self._find(isa))
        # The tensors in `arguments` stay alive until all shares are done: the caller's frame holds them.
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        if torch.get_num_threads() == 1 or len(shares := _shares(rows, grain, work)) == 1:
            return function(0, rows, *values) or 0
        first, *others = shares
        waiting = [_pool(len(others)).submit(function, *share, *values) for share in others]
        total = function(*first, *values) or 0
        return total + sum(one.result() or 0 for one in waiting)

    def _find(self, isa: str) -> Callable[..., int | None]:
        require(isa)
        opened = library()
        # A kernel has variants only where they differ: the best set's is that of the next lower set that has one.
        for candidate in opened.sets[opened.sets.index(isa) if isa else 0 :]:
            function = getattr(opened.handle, f"tessera_{candidate}_{self.name}", None)
            if function is not None:
                function.argtypes = [ctypes.c_int64, ctypes.c_int64, *(TYPES[letter] for letter in self.signature)]
                function.restype = ctypes.c_int64 if self.counts else None
                return function
        raise ValueError(f"the native library has no kernel {self.name}")


def _shares(rows: int, grain: int, work: int) -> list[tuple[int, int]]:
    """Ranges of rows, a thread each, none of them empty."""
    grains = -(-rows // grain)
    count = max(1, min(torch.get_num_threads(), grains, rows * work // SMALLEST_SHARE))
    bounds = [min(grains * i // count * grain, rows) for i in range(count + 1)]
    return list(pairwise(bounds))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="tessera-kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
