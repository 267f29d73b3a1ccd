"""What figures depend on besides the code: processor, matrix units, versions, settings of allocator and libraries."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PREFIXES = ("MALLOC_", "ONEDNN_", "DNNL_", "ATEN_", "GLIBC_TUNABLES", "LD_PRELOAD", "TORCHINDUCTOR_", "TESSERA_")


def machine(packages: Sequence[str]) -> dict[str, str]:
    """cpu, units, versions (of `packages` and Python) and environment, a line of text each."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t: ", 1) for line in facts.splitlines() if "\t: " in line)
    lines = {key.strip(): value for key, value in lines.items()}
    numbers = [lines[key] for key in ("cpu family", "model", "stepping") if key in lines]
    cpu = f"{lines.get('model name', platform.processor())} ({'/'.join(numbers)}), {os.cpu_count()} cores"
    flags = lines.get("flags", "").split()
    units = [flag for flag in UNITS if flag in flags]
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(PREFIXES)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    versions += f", Python {platform.python_version()}"
    return {"cpu": cpu, "units": " ".join(units), "versions": versions, "environment": " ".join(settings) or "default"}
