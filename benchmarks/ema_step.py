"""What the moving average adds to a training step of a recipe: two trainers in turn, one process each.

    python benchmarks/ema_step.py recipes/tiny.toml --steps 30

Wall time is what a person waits; CPU time includes the worker's. One thread a trainer; what is added is the median over
pairs of steps that ran one after the other, and only as sure as its quartiles are narrow.
"""

import argparse
import json
import statistics
import subprocess
import sys

CHILD = """
import sys, tempfile, time
from pathlib import Path
import torch
from tessera.data import prepare
from tessera.recipe import load_recipe
from tessera.store import RunFolder
from tessera.training.trainer import Trainer

torch.set_num_threads(1)
recipe = load_recipe(Path(sys.argv[1]), [*sys.argv[3:], "training.health_interval=0", "training.load_interval=0"])
dataset = prepare(recipe.data, recipe.model.vocab_size, Path(sys.argv[2]))
trainer = Trainer(recipe, RunFolder.create(Path(tempfile.mkdtemp()) / "run", recipe), dataset)
trainer._emit = lambda *_, **__: None
trainer._peak = 1.0
print("ready", flush=True)
for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    trainer._step()
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""
SIDES = {"without": [], "with": ["training.ema_decay=0.999"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--data", default="runs/benchmark-data", help="folder of the tokenizer and shards")
    options = parser.parse_args()
    children = {}
    for side, settings in SIDES.items():
        command = [sys.executable, "-c", CHILD, options.recipe, options.data, *settings]
        children[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert children[side].stdout.readline() == "ready\n"
    times = {side: [] for side in SIDES}
    for step in range(options.steps + 3):
        order = list(SIDES) if step % 2 else list(SIDES)[::-1]
        for side in order:
            children[side].stdin.write("step\n")
            children[side].stdin.flush()
            times[side].append([float(x) for x in children[side].stdout.readline().split()])
    for child in children.values():
        child.stdin.close()
        child.wait()
    print(f"{'':<10}{'without':>10}{'with':>10}{'added':>9}  a quarter of the steps added less, a quarter more than")
    facts = {}
    for column, name in enumerate(("wall s", "CPU s")):
        without, with_ = ([step[column] for step in times[side][3:]] for side in SIDES)
        low, middle, high = statistics.quantiles([b / a - 1 for a, b in zip(without, with_, strict=True)], n=4)
        medians = statistics.median(without), statistics.median(with_)
        print(f"{name:<10}{medians[0]:>10.4f}{medians[1]:>10.4f}{middle:>9.2%}  {low:+.2%}, {high:+.2%}")
        facts[name] = {"medians": medians, "added": middle, "quartiles": [low, high]}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
