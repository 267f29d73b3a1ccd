"""The compiled kernels: a shared library with a plain C interface, loaded when it is first needed.

What a kernel computes is stated where it is used (numerics/kernels, ops); this room only finds the library, chooses the
instruction set, and shares rows among threads. The sources are in source/, one idea a file; source/isa.h has the rules.
"""

from tessera.native.kernel import SMALLEST_SHARE, Kernel
from tessera.native.library import available, instruction_sets, keep_freed_memory, problem, require

__all__ = ["SMALLEST_SHARE", "Kernel", "available", "instruction_sets", "keep_freed_memory", "problem", "require"]
