"""What each switch of [memory] saves and costs, what it does to the gradient, and the peak memory of a process.

    python benchmarks/memory.py recipes/tiny.toml --json results.json

Systems: tessera with every switch on, with one off, with all off; the same number of layers in plain PyTorch (BF16)
and of transformers' (BF16), where it is installed. Bytes are counted with autograd's hooks. Times are CPU time of one
forward and backward pass on one thread: the median ratio of pairs, each system in turn with "all on" beside it. Peak
memory is that of a process of its own: the highest resident size during passes less the size before them, on
--peak-sequences sequences; once with an allocator that gives freed memory back at once (glibc's MALLOC_MMAP_THRESHOLD_
at 1 MiB), once as a process is by default, where the heap keeps a varying part of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from tessera.data import Batch
from tessera.model import Transformer
from tessera.model.plain_layer import PlainLayer
from tessera.numerics import Policy
from tessera.ops.keep import Keep
from tessera.recipe import load_recipe
from tessera.training import saved_bytes
from tessera.training.loss import Share, training_loss

SWITCHES = [field.name for field in fields(Keep)]
LOSSY = ("e5m6_attention_output", "fp8_swiglu_inputs")
LAYERS = 4  # of the stacks whose peak memory is compared


def keeps() -> dict[str, Keep]:
    """The systems of tessera by name."""
    off = {f"without {name}": Keep(**{name: False}) for name in SWITCHES}
    return {"all on": Keep()} | off | {"all off": Keep(**dict.fromkeys(SWITCHES, False))}


class Step:
    """One forward and backward pass of a recipe's whole model, losses included."""

    def __init__(self, recipe, keep: Keep, sequences: int, checkpoint: Path | None) -> None:
        self.model = Transformer(recipe.model, Policy(**recipe.numerics.model_dump()), keep=keep, seed=1)
        if checkpoint:
            from tessera.model.weights import read_weights

            read_weights(checkpoint, self.model)
        length = recipe.data.sequence_length
        text = saved_bytes.random_tokens(recipe.model, sequences, length + 1)
        self.batch = Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.zeros(sequences, length))
        self.share = Share(sequences * length, sequences, 0.3, 1e-4)

    def run(self) -> float:
        """CPU seconds; gradients are left in the parameters."""
        self.model.zero_grad(set_to_none=True)
        start = time.process_time()
        training_loss(self.model, self.batch, None, self.share).total.backward()
        return time.process_time() - start

    def saved(self) -> int:
        counter = saved_bytes.SavedBytes(self.model)
        with counter.counting():
            training_loss(self.model, self.batch, None, self.share)
        return sum(counter.bytes.values())

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def switches(recipe, rounds: int, sequences: int, checkpoint: Path | None) -> list[dict]:
    """One row a system: bytes a token, seconds, and how far its gradient is from that with every switch on."""
    steps = {name: Step(recipe, keep, sequences, checkpoint) for name, keep in keeps().items()}
    base = steps["all on"]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            both = base.run, step.run
            pair = (both[0](), both[1]()) if number % 2 else (both[1](), both[0]())[::-1]
            seconds[name].append(pair)
        print(f"round {number} of {rounds}", file=sys.stderr)
    reference, tokens = steps["all on"].gradient(), sequences * recipe.data.sequence_length
    rows = []
    for name, step in steps.items():
        step.run()
        away = float((step.gradient() - reference).norm() / reference.norm())
        pairs = seconds[name][1:]
        ratio = statistics.median(own / on for on, own in pairs)
        middle = statistics.median(own for _, own in pairs)
        found = {"bytes_per_token": step.saved() / tokens, "cpu_s": middle, "cpu_ratio": ratio, "gradient_away": away}
        rows.append({"system": name} | found)
    return rows


def peak(system: str, recipe, sequences: int) -> int:
    """Bytes by which the resident size of this process rises in two passes over a stack of layers."""
    section = recipe.model.model_copy(
        update={"num_hidden_layers": LAYERS, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    )
    length = recipe.data.sequence_length
    x = torch.randn(sequences, length, section.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    if system in keeps():
        policy = Policy(**recipe.numerics.model_dump())
        model = Transformer(section, policy, keep=keeps()[system], seed=1)

        def run_layer(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            place = model.place(torch.zeros(x.shape[:2], dtype=torch.int64), None, None)
            return layer(x.flatten(0, 1), place)[0].view(x.shape)

        stack = [partial(run_layer, layer) for layer in model.model.layers]
    elif system == "plain":
        stack = [PlainLayer(section) for _ in range(LAYERS)]
    else:
        stack = []
        for _ in range(LAYERS):
            layer = saved_bytes.transformers_layer(section, length)
            if layer is None:
                return 0
            stack.append(layer[1])

    def run(x: torch.Tensor) -> None:
        x = x.requires_grad_()
        for layer in stack:
            x = layer(x)
        x.float().square().mean().backward()

    run(x[:1].clone())  # libraries, weight codes and gradients are there now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    for _ in range(2):
        run(x.clone())
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--peak-sequences", type=int, default=32)
    parser.add_argument("--checkpoint", type=Path, help="trained weights for the effect on the gradient")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.set)
    if options.peak:
        print(peak(options.peak, recipe, options.peak_sequences))
        return
    rows = switches(recipe, options.rounds, options.sequences, options.checkpoint)
    print(f"{'system':36} {'bytes a token':>13} {'CPU s':>7} {'against on':>10} {'gradient away':>13}")
    for row in rows:
        ratio = row["cpu_ratio"] - 1
        print(
            f"{row['system']:36} {row['bytes_per_token']:13,.0f} {row['cpu_s']:7.3f} {ratio:+10.1%} "
            f"{row['gradient_away']:13.3%}"
        )
    layer = saved_bytes.measure_layer(recipe)
    print(f"\none layer with experts: {asdict(layer)}, ratio {layer.ratio:.3f}")
    peaks: dict[str, dict[str, int]] = {}
    tokens = options.peak_sequences * recipe.data.sequence_length
    print(f"\npeak memory of a process, {LAYERS} layers with experts, {tokens:,} tokens")
    print(f"{'system':16} {'freed at once':>14} {'by default':>14}")
    for system in ("all on", "all off", "plain", "transformers"):
        peaks[system] = {}
        for how, settings in (("freed at once", {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}), ("by default", {})):
            command = [sys.executable, *sys.argv, "--peak", system]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | settings)
            peaks[system][how] = int(done.stdout)
        print(f"{system:16} " + " ".join(f"{size / 1e6:11,.1f} MB" for size in peaks[system].values()))
    if options.json:
        facts = {"recipe": recipe.name, "torch": torch.__version__, "rows": rows, "layer": asdict(layer)}
        options.json.write_text(json.dumps(facts | {"peak_tokens": tokens, "peak_bytes": peaks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
