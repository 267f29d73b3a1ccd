"""Finding and opening the compiled kernels, and what this machine can run of them."""

import ctypes
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

VERSION = 1  # of the C interface; source/features.cpp has the same number
PATH = Path(__file__).parent / "kernels.so"
# From the best to the one that always runs, with the bit of source/features.cpp that says the machine has it.
SETS = {"amx": 8, "avx512_bf16": 4, "avx512": 2, "avx2": 1, "portable": 0}
# An environment variable: the best set that may be used, to see what another machine does, or "none", as if nothing
# had been built.
LIMIT = "TESSERA_MAX_ISA"


@dataclass(frozen=True)
class Library:
    """`handle`: the opened library or None; `problem`: why there is none; `sets`: usable sets, best first."""

    handle: ctypes.CDLL | None
    problem: str
    sets: tuple[str, ...]


@cache
def library() -> Library:
    """The library, opened once in a process. Raises ValueError where LIMIT names nothing this machine has."""
    limit = os.environ.get(LIMIT, "")
    if limit == "none":
        return Library(None, f"{LIMIT} is none: the native kernels are not used", ())
    found = opened(PATH)
    if not limit or found.handle is None:
        return found
    if limit not in found.sets:
        raise ValueError(f"{LIMIT} is {limit!r}; here it may be {', '.join(found.sets)} or none")
    return replace(found, sets=found.sets[found.sets.index(limit) :])


def opened(path: Path) -> Library:
    if not path.is_file():
        return Library(
            None, "the native kernels were not built (was there a C++ compiler when tessera was installed?)", ()
        )
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, f"{path} cannot be loaded: {error}", ())
    handle.tessera_version.restype = handle.tessera_features.restype = ctypes.c_int64
    if (found := handle.tessera_version()) != VERSION:
        return Library(None, f"{path} has interface {found}, this tessera needs {VERSION}: install it again", ())
    features = handle.tessera_features()
    return Library(handle, "", tuple(name for name, bit in SETS.items() if features & bit == bit))


def available() -> bool:
    return library().handle is not None


def problem() -> str:
    """Why there are no native kernels; empty when there are."""
    return library().problem


def instruction_sets() -> tuple[str, ...]:
    """What this machine can run, best first; empty without the library."""
    return library().sets


def require(isa: str = "") -> None:
    """Raises ValueError, with the reason, where there is no library or the machine cannot run `isa` ("": any)."""
    found = library()
    if found.handle is None:
        raise ValueError(found.problem)
    if isa and isa not in SETS:
        raise ValueError(f"no instruction set {isa!r}; there are {', '.join(SETS)}")
    if isa and isa not in found.sets:
        raise ValueError(f"this machine has no {isa}; it has {', '.join(found.sets)}")


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for processes that train: blocks of every step are the next one's.

    False where there is no library, or no such setting of the allocator (it is glibc's).
    """
    handle = library().handle
    return handle is not None and bool(handle.tessera_keep_freed_memory())
