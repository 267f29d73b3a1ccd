"""The speed and the memory of one whole training step: tessera in four precisions, transformers in six modes.

    python benchmarks/train_step.py [CONFIG.toml] [--threads 1] [--threads 2] [--rounds N] [--systems NAMES] [--json]

A step is forward, backward, clipping of the gradient, AdamW and the dropping of gradients, on a batch that lies ready.
Every system runs in a process of its own and makes one step in each round, in turn, so that all meet the same
disturbances; times are the process's CPU time and wall time, as medians and quartiles over rounds, and a ratio of two
systems is the median over rounds of the ratios within a round. The configuration is a recipe without what
transformers does not have (MTP, balance loss, moving biases); --set changes it, --systems takes names and patterns
("tessera-*,transformers-fp32"). The allocator is the environment's (MALLOC_MMAP_THRESHOLD_ and its like), the same for
all.

Peak memory is the resident size of the process, all of it: baseline_mib of it was there when torch was imported,
resident_mib between two steps after warm-up (weights, moments, libraries; what compilation left behind as well), after
freed heap was given back; peak_mib is the largest during the timed steps, or in the process's whole life where
peak_of_timed_steps is false. Processes that torch.compile starts to compile are not in it.

Exit code 1: the sides are not equal (parameters, the loss of the first step), or a loss did not fall.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lockstep
from machine import machine
from step_figures import Row, compare, inequalities, show, summarise

from tessera.recipe import Recipe, UserError, load_recipe

HERE = Path(__file__).parent
WARM_UP = 3  # steps before the first timed one; compilation happens in the first of them
PROFILED = 15  # operators shown


@dataclass(frozen=True)
class System:
    """One way to make a step: whose model, in which precision, and whether through torch.compile."""

    name: str
    system: str
    precision: str
    compiled: bool


def _systems() -> list[System]:
    found = [System(f"tessera-{one}", "tessera", one, False) for one in ("fp8", "fp8-lean", "bf16", "fp32")]
    for compiled in (False, True):
        for one in ("fp32", "bf16-autocast", "bf16"):
            name = f"transformers-{one}" + "-compiled" * compiled
            found.append(System(name, "transformers", one, compiled))
    return found


SYSTEMS = {system.name: system for system in _systems()}


# The child: one system. Torch is imported here only, so that the parent stays small and still.


class Served:
    """One system in this process, and the answers to the parent's questions."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe) -> None:
        import torch

        self.baseline = lockstep.resident_mib()
        torch.set_num_threads(options.threads[0])
        if options.profile:
            import torch._inductor.config

            torch._inductor.config.cpp.enable_kernel_profile = True
        self.described, self.threads = SYSTEMS[options.child], options.threads[0]
        self.recipe, self.steps = recipe, 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`ask` is one of warm_up, step, finish, profile."""
        return getattr(self, question["ask"])()

    def warm_up(self) -> dict[str, Any]:
        """Build the system and make its first steps."""
        import step_systems

        described = asdict(self.described)
        self.system = step_systems.build(self.recipe, *list(described.values())[1:])
        self.tokens = step_systems.tokens
        first = [self.step() for _ in range(WARM_UP)]
        _give_back_freed()
        self.graphs = _graphs()
        return described | {
            "threads": self.threads,
            "parameters": sum(p.numel() for p in self.system.model.parameters()),
            "adamw": self.system.adamw,
            "warm_up_s": sum(one["wall"] for one in first),
            "first_loss": first[0]["loss"],
            "baseline_mib": self.baseline,
            "resident_mib": lockstep.resident_mib(),
            "peak_of_timed_steps": lockstep.restart_peak(),
        }

    def step(self) -> dict[str, Any]:
        """The next step's CPU and wall seconds, its loss and its tokens."""
        batch = self.tokens(self.recipe, self.steps)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.system.step(self.steps, batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.steps += 1
        return {"wall": wall, "cpu": cpu, "loss": loss, "tokens": batch.targets.numel()}

    def finish(self) -> dict[str, Any]:
        """What is known after the last timed step."""
        return {"peak_mib": lockstep.peak_mib(), "recompiled": _graphs() - self.graphs}

    def profile(self) -> dict[str, Any]:
        """One more step under torch's profiler: operators by their own time (wall, as it has it) in ms, and calls."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.step()
        found = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
        total = sum(one.self_cpu_time_total for one in found)
        top = [[one.key, one.self_cpu_time_total / 1e3, one.count] for one in found[:PROFILED]]
        return {"profile": top, "profiled_ms": total / 1e3}


def _graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    counters = sys.modules.get("torch._dynamo.utils")
    return counters.counters["stats"]["unique_graphs"] if counters else 0


def _give_back_freed() -> None:
    import ctypes
    import gc

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


# The parent: turns, figures, tables


def measure(options: argparse.Namespace, names: list[str], threads: int) -> list[Row]:
    """One row a system; `rounds` of each row are its steps."""
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    changes = [word for change in options.set for word in ("--set", change)]
    rows, children = [], []
    for name in names:
        command = [sys.executable, __file__, str(options.config), *changes, "--threads", str(threads)]
        command += ["--child", name, *(["--profile"] if options.profile else [])]
        children.append(lockstep.Child(name, command, environment))
        rows.append(children[-1].ask(ask="warm_up") | {"name": name, "rounds": []})
        _tell(f"{name}, {threads} threads: ready, {WARM_UP} steps in {rows[-1]['warm_up_s']:.1f} s")
    turns = list(zip(children, rows, strict=True))
    for number in range(options.rounds):
        for child, row in turns:  # the order of every round: back and forth, two would find their caches warm
            row["rounds"].append(child.ask(ask="step"))
        _tell(f"round {number + 1} of {options.rounds}")
    for child, row in turns:
        row |= child.ask(ask="finish")
    for child, row in turns:
        row |= child.ask(ask="profile") if options.profile else {}
        child.close()
    return rows


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(patterns: str) -> list[str]:
    """Names of the systems that match, in their own order; SystemExit for a pattern that none matches."""
    words = [word.strip() for word in patterns.split(",")]
    for word in words:
        if not any(fnmatchcase(name, word) for name in SYSTEMS):
            raise SystemExit(f"--systems {word}: no such system; there are {', '.join(SYSTEMS)}")
    return [name for name in SYSTEMS if any(fnmatchcase(name, word) for word in words)]


def comparable_recipe(options: argparse.Namespace) -> Recipe:
    """The configuration; SystemExit for a wrong one, and for parts of the loss that transformers does not have."""
    try:
        recipe = load_recipe(options.config, options.set)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if recipe.model.num_nextn_predict_layers or recipe.training.balance_loss_weight:
        raise SystemExit(
            f"{options.config}: transformers has neither MTP nor the balance loss; "
            "--set model.num_nextn_predict_layers=0 --set training.balance_loss_weight=0.0"
        )
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, nargs="?", default=HERE / "train_step.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, action="append", help="may be given more than once; 1 if left out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--systems", default="*", metavar="NAMES", help="names or patterns, with commas between")
    parser.add_argument("--profile", action="store_true", help="one more step of each system under torch's profiler")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON to a file as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = options.threads or [1]
    recipe = comparable_recipe(options)
    if options.child:
        lockstep.serve(Served(options, recipe).answer)
        return
    if options.rounds < 1 or min(options.threads) < 1:
        raise SystemExit("--rounds and --threads must be at least 1")
    names, facts, rows, wrong = chosen(options.systems), machine(("torch", "transformers")), [], []
    for threads in options.threads:
        measured = measure(options, names, threads)
        compare(measured)
        wrong += inequalities(measured)
        rows += [summarise(row) for row in measured]
    text = json.dumps({"rows": [row | {"machine": facts} for row in rows]}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        show(rows, facts)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
