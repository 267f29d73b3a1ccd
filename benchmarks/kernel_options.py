"""Options of the benchmarks of single kernels (gemm.py, attention.py); train_step.py, of processes, has its own."""

import argparse
from pathlib import Path

import torch

from tessera import native


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", default="", metavar="NAME", help="instruction set of tessera's kernels")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON to a file as well")


def apply_options(options: argparse.Namespace) -> None:
    """Set torch's threads; SystemExit for values that make no sense here."""
    if options.rounds < 1 or options.threads < 1:
        raise SystemExit("--rounds and --threads must be at least 1")
    if options.isa and options.isa not in native.instruction_sets():
        raise SystemExit(f"--isa {options.isa}: this machine has {', '.join(native.instruction_sets()) or 'none'}")
    torch.set_num_threads(options.threads)
