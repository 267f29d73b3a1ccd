"""Believable runs without training: the files of a run or of a comparison, made of noise with a seed.

Written from the event schema alone, as plain JSON lines, so that the report is held to the schema and not to the
code that happens to write it. Losses fall from ln(vocabulary) as a power of the step; arms of one comparison share
the noise of their batches and part by a random walk, as twins do whose roundings differ.
"""

import json
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """schema = 1
name = "tiny"

[model]
vocab_size = 4096
hidden_size = 128
num_hidden_layers = 4
n_routed_experts = 8
num_experts_per_tok = 2

[numerics]
precision = "fp8"
scales = "power_of_two"

[training]
steps = 500
"""
START_TIME = 1_750_000_000.0
OPERANDS = ("input", "weight", "gradient_rows", "gradient_columns", "input_columns")
LINEARS = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
BIGRAM_BITS = 2.214


@dataclass(frozen=True)
class Shape:
    """How large the example is."""

    steps: int = 500
    layers: int = 4
    experts: int = 8
    load_interval: int = 10
    health_interval: int = 50
    validation_interval: int = 50


def comparison(path: Path, shape: Shape = Shape(), **changes: Any) -> Path:
    """A finished comparison of fp8 and bf16 with two controls and ablations; `changes` replace keys of compare.json."""
    arms = ["fp8", "bf16", "control-1", "control-2"]
    for index, name in enumerate(arms):
        run(path / "arms" / name, shape, name="bf16" if name.startswith("control") else name, chaos=index)
    (path / "recipe.toml").write_text(RECIPE)
    figures = compare_json(arms, shape)
    for name in ("fp8", "bf16"):
        last = [line for line in events(shape, name, arms.index(name)) if line["kind"] == "validation"][-1:]
        for line in last:
            figures["bits_per_byte"][name], figures["final_loss"][name] = line["bits_per_byte"], line["loss"]
    (path / "compare.json").write_text(json.dumps(figures | changes))
    return path


def compare_json(arms: list[str], shape: Shape) -> dict[str, Any]:
    quarter = shape.steps // 4
    return {
        "schema": 1,
        "name": "tiny",
        "arms": arms,
        "controls": 2,
        "steps": shape.steps,
        "same_weights_loss_error": 0.000121,
        "same_weights_loss_error_replayed": 0.000064,
        "rerouted_tokens": 0.0131,
        "same_weights_gradient_error": 0.0283,
        "same_weights_gradient_bias": -0.0012,
        "worst_tensor": {"name": "model.layers.2.self_attn.kv_b_proj.weight", "error": 0.071},
        "points": [
            {
                "step": quarter * k,
                "loss_error": e,
                "loss_error_replayed": e * 0.55,
                "rerouted_tokens": 0.011 + 0.001 * k,
                "bf16_loss_error": e * 0.2,
            }
            for k, e in enumerate((0.000084, 0.000121, 0.000097, 0.000103), start=1)
        ],
        "relative_loss_error": 0.00092,
        "relative_loss_error_figure": 0.00092,
        "relative_loss_error_reason": None,
        "control_errors": [0.00071, 0.00088],
        "verdict": "passed",
        "failures": [],
        "diverged": {},
        "notes": [],
        "ablations": {
            "toward-zero": {
                "loss_error": 0.00412,
                "gradient_error": 0.131,
                "gradient_bias": -0.0874,
                "verdict": "failed, as it must",
                "note": "the lean of the gradient gives it away",
            },
            "per-tensor, outlier": {
                "loss_error": 0.0231,
                "gradient_error": 0.617,
                "gradient_bias": -0.042,
                "verdict": "failed, as it must",
                "note": "the outlier flushes the rest of its tensor to zero",
            },
            "e5m2-gradients": {
                "loss_error": 0.000121,
                "gradient_error": 0.0571,
                "gradient_bias": -0.0015,
                "verdict": "indistinguishable at this size",
                "note": "twice the noise, within the bar at this size",
            },
            "hopper-unpromoted": {
                "loss_error": 0.00071,
                "gradient_error": None,
                "gradient_bias": None,
                "verdict": "failed",
                "note": "loss only, 256 tokens",
            },
        },
        "bits_per_byte": {},
        "bigram_bits_per_byte": BIGRAM_BITS,
        "final_loss": {},
        "tokens_per_s": {"fp8": 2410.0, "bf16": 2655.0},
        "mtp_acceptance": {"fp8": [0.41], "bf16": [0.412]},
        "sample": {"prompt": "def read_header(self, file):\n", "text": SAMPLE},
        "seconds": 433.0,
    }


SAMPLE = '''    """Return the next line of the file.

    The argument is a string object, or None if the file is not set.
    """
    if self._name is None:
        raise ValueError("the name of the file must be a string")
    for line in self.readline():
        if not line.startswith(b"<head>"):
            self.set_data(line, self.header)
    return self.file
'''


def run(path: Path, shape: Shape = Shape(), *, name: str = "fp8", chaos: int = 0, state: str = "finished") -> Path:
    """One run folder; `chaos` seeds the walk by which it parts from its twins."""
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(RECIPE)
    (path / "run.json").write_text(
        json.dumps({"schema": 1, "state": state, "pid": 1, "step": shape.steps, "time": START_TIME})
    )
    write_events(path, events(shape, name, chaos))
    return path


def write_events(path: Path, lines: list[dict[str, Any]]) -> None:
    (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def event(kind: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"schema": 1, "kind": kind, "run": "tiny", "step": step, "time": START_TIME + 0.86 * step} | fields


def events(shape: Shape, name: str = "fp8", chaos: int = 0) -> list[dict[str, Any]]:
    """All events of a run of `shape.steps` steps, in the order a trainer writes them; steps count from 0."""
    batches, own = np.random.default_rng(7), np.random.default_rng(100 + chaos)
    speed = 2410 if name == "fp8" else 2655
    walk = np.cumsum(own.normal(0, 1, shape.steps)) if chaos != 1 else np.zeros(shape.steps)
    walk *= 0.0011 / max(1.0, float(np.abs(walk[shape.steps // 2 :]).max(initial=1.0)))
    noise = batches.normal(0, 0.035, shape.steps)
    lines = [
        event(
            "start",
            0,
            arm=name,
            precision=name,
            parameters=2_361_344,
            active_parameters=1_574_912,
            tokens_per_step=2048,
            steps=shape.steps,
            notes=["moe_intermediate_size 64 is less than a tile of 128: its scales cover fewer elements"],
            resumed=False,
            threads=1,
            device="cpu",
        ),
        event("baseline", 0, name="witten-bell bigram", bits_per_byte=BIGRAM_BITS),
    ]
    for i in range(shape.steps):
        step, done = i + 1, (i + 1) / shape.steps
        loss = 2.05 + (log(4096) - 2.05) * (1 + step / 14) ** -0.52
        loss *= 1 + noise[i] * min(1, step / 20) * 0.6 + walk[i] + own.normal(0, 0.0006)
        rate = 0.003 * min(1, step / 40) * (0.1 + 0.45 * (1 + np.cos(np.pi * done)))
        lines.append(
            event(
                "step",
                i,
                loss=loss * 1.35,
                lm_loss=loss,
                mtp_loss=loss * 1.11 + 0.2,
                balance_loss=1.0 + 0.6 * (1 + step / 30) ** -1,
                gradient_norm=0.32 + 3.0 * (1 + step / 8) ** -1.1 + abs(own.normal(0, 0.05)),
                learning_rate=rate,
                tokens=2048 * step,
                tokens_per_s=speed * (1 + own.normal(0, 0.03)) * (0.7 if step < 4 else 1),
                mfu=0.31 * speed / 2655 * (1 + own.normal(0, 0.03)),
                batch_size=8,
                bias_update_speed=0.001 if done < 0.97 else 0.0,
                mtp_loss_weight=0.3,
            )
        )
        if i % shape.load_interval == 0 or step == shape.steps:
            lines.append(_load(shape, i, batches))
        if name == "fp8" and (i % shape.health_interval == 0 or step == shape.steps):
            lines.append(_health(shape, i, own))
        if step % shape.validation_interval == 0:
            lines.append(
                event(
                    "validation",
                    step,
                    loss=loss * 1.012,
                    bits_per_byte=0.583 * loss * 1.012,
                    mtp_loss=[loss * 1.13],
                    mtp_acceptance=[0.46 * (1 - (1 + step / 120) ** -1)],
                    tokens=65_536,
                    bytes=231_004,
                )
            )
    lines.append(event("sample", shape.steps, prompt="import ", text="import os\n", temperature=0.8))
    lines.append(event("end", shape.steps, reason="finished", seconds=0.86 * shape.steps, tokens_per_s=float(speed)))
    return lines


def _load(shape: Shape, step: int, noise: np.random.Generator) -> dict[str, Any]:
    names = [f"model.layers.{layer}" for layer in range(1, shape.layers + 1)]
    counts, low, high = [], [], []
    for layer in range(1, shape.layers + 1):
        taste = np.random.default_rng(layer).normal(0, 1.3, shape.experts)
        calm = 0.06 + np.exp(-step / (0.14 * shape.steps * (1 + 0.25 * layer)))
        share = np.exp(calm * taste + noise.normal(0, 0.09, shape.experts))
        counts.append([int(count) for count in noise.multinomial(4096, share / share.sum())])
        low.append(-0.001 * step * 0.10 * layer * (1 - 0.4 * step / shape.steps))
        high.append(0.001 * step * 0.12 * layer * (1 - 0.4 * step / shape.steps))
    return event("load", step, layers=names, counts=counts, bias_min=low, bias_max=high)


def _health(shape: Shape, step: int, noise: np.random.Generator) -> dict[str, Any]:
    tensors = {}
    for layer in range(shape.layers):
        mlp = (
            ["mlp.gate_up_proj", "mlp.down_proj"]
            if layer == 0
            else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_experts.down_proj"]
        )
        for linear in [*LINEARS, *mlp]:
            for operand in OPERANDS:
                odd = layer == 2 and linear.endswith("kv_b_proj") and operand.startswith("gradient")
                exponent = {
                    "input": -6,
                    "weight": -11,
                    "gradient_rows": -21,
                    "gradient_columns": -21,
                    "input_columns": -6,
                }[operand]
                spread = int(noise.integers(2, 6))
                tensors[f"model.layers.{layer}.{linear}.{operand}"] = {
                    "relative_rms": 0.0262
                    * (1 + noise.normal(0, 0.012))
                    * (1 + (0.9 * step / shape.steps if odd else 0)),
                    "saturated": float(abs(noise.normal(0.0004, 0.0001))),
                    "flushed": float(abs(noise.normal(0.0011, 0.0003))) * (1 + (30 * step / shape.steps if odd else 0)),
                    "rounded_twice": float(abs(noise.normal(0.012, 0.002))) if operand == "input_columns" else None,
                    "nonfinite": 0,
                    "scale_min": 2.0 ** (exponent - spread),
                    "scale_max": 2.0**exponent,
                    "elements": 2048 * 128,
                }
    return event("health", step, tensors=tensors)
