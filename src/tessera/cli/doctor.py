"""tessera doctor: what this machine offers, and whether the numbers come out right on it."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from tessera.cli.options import Json, examples, print_json

EXAMPLE = examples("tessera doctor")
EXTRAS = {"parquet": "pyarrow", "tensorboard": "tensorboard"}  # extra: the package it brings


def command(json: Json = False) -> None:
    """Check the installation: versions, devices, kernels, extras, and the FP8 arithmetic on this machine.

    Exit code 1 where something that tessera needs is wrong.
    """
    facts = examine()
    if json:
        print_json(facts)
    else:
        _print(facts)
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that doctor knows, as one JSON-able dict; `problems` lists what is wrong."""
    import torch

    from tessera import native

    problems = []
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        problems.append(f"Python {platform.python_version()}: tessera is tested on 3.11 and 3.12")
    if not (equal := kernels_agree()):
        problems.append("the FP8 kernels give codes on this machine that the reference kernel does not")
    return {
        "tessera": version("tessera"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": "native" if native.available() else "torch",
        "instruction_sets": list(native.instruction_sets()),
        "without_native_kernels": native.problem() or None,
        "kernels_equal_reference": equal,
        "extras": {extra: _version(package) for extra, package in EXTRAS.items()},
        "problems": problems,
    }


def kernels_agree() -> bool:
    """Codes and scales of all kernels are the reference's, on a matrix with outliers, zeros and ragged tiles."""
    import torch

    from tessera import native
    from tessera.numerics import operators

    backends = ["reference", "torch", *(f"cpu:{isa}" for isa in native.instruction_sets())]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator) * torch.logspace(-6, 5, 300)
    x[1] = 0
    for tile in ((1, 128), (128, 1), (128, 128)):
        for mode in ("power_of_two", "float32"):
            owed, *others = (
                operators.quantise(x, *tile, 0, 0, None, "e4m3", mode, "nearest", backend) for backend in backends
            )
            for made in others:
                if not all(torch.equal(a, b) for a, b in zip(made, owed, strict=True)):
                    return False
    return True


def _kernels(facts: dict[str, Any]) -> str:
    if not facts["without_native_kernels"]:
        best, *others = facts["instruction_sets"]
        return f"native, {best}" + (f" (also {', '.join(others)})" if others else "")
    return (
        f"PyTorch only: {facts['without_native_kernels']}\n{'':<18}a training step takes several times as long; "
        "install a C++ compiler (g++ or clang), then tessera again"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(facts: dict[str, Any]) -> None:
    cpu = f"{facts['cores']} cores ({facts['cpu_capability']}), {facts['memory_gib']} GiB of memory"
    rows = {
        "tessera": f"{facts['tessera']}, Python {facts['python']}, torch {facts['torch']}",
        "machine": f"{facts['platform']}, {cpu}",
        "devices": f"cpu, cuda: {facts['cuda']}" if facts["cuda"] else "cpu (no CUDA device)",
        "kernels": _kernels(facts),
        "numbers": f"FP8 codes equal the reference: {'yes' if facts['kernels_equal_reference'] else 'NO'}",
    }
    for extra, found in facts["extras"].items():
        missing = f"not installed; pip install 'tessera[{extra}]'"
        rows[f"extra {extra}"] = f"{EXTRAS[extra]} {found}" if found else missing
    for name, text in rows.items():
        print(f"{name:<18}{text}")
    for problem in facts["problems"]:
        print(f"{'problem':<18}{problem}")
    if not facts["problems"]:
        print("all is well")
