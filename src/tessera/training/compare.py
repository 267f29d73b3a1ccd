"""The comparison: one recipe in several arms, and the verdict on what FP8 cost.

    runs/<name>/
      recipe.toml       the recipe all arms come from
      arms/<arm>/       one run each
      evaluation/       the same-weights figures
      compare.json      the verdict with its figures
      report.html

Every arm is a process with one thread of its own; the same-weights criteria start as soon as the BF16 arm is done.
The work is resumable: what a folder has finished is not done again.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tessera.data import Dataset, WittenBellBigram, prepare
from tessera.recipe import Recipe, UserError, load_recipe
from tessera.store import RunFolder, read_events, write_atomic
from tessera.store.json_text import check_schema, dumps, read_object
from tessera.training import same_weights, verdict
from tessera.training.arms import arm_recipe, control_seed, is_control
from tessera.training.jobs import Emit, Job, run_jobs
from tessera.training.same_weights import SameWeights, Yardstick, gradient_error
from tessera.training.trainer import Trainer
from tessera.training.validation import held_out

SCHEMA = 1
# Measured on the BF16 arm's final weights, not trained. Hopper's accumulation is slow on a CPU: on request only.
ABLATIONS = (
    "float32-scales",
    "deepseek-v3-scales",
    "per-row",
    "per-tensor",
    "e5m2-gradients",
    "block-gradients",
    "toward-zero",
)
OUTLIER_ABLATIONS = ("fp8", "per-tensor")  # again, with one channel scaled by 1e5
ACCUMULATION_TOKENS = 256


@dataclass(frozen=True)
class Comparison:
    """What is compared and where. `arms` are trained and contain "fp8" and "bf16"; controls are further BF16 runs."""

    folder: Path
    recipe: Recipe
    arms: tuple[str, ...]
    controls: int
    ablations: tuple[str, ...]
    accumulation: bool

    @property
    def trained(self) -> tuple[str, ...]:
        """All runs, the BF16 arm first: what waits for its weights can start early."""
        others = [arm for arm in self.arms if arm != "bf16"]
        return ("bf16", *others, *(f"control-{i + 1}" for i in range(self.controls)))

    @property
    def data_folder(self) -> Path:
        """Where the tokenizer and the shards of all arms are."""
        return Path(self.recipe.data.cache) if self.recipe.data.cache else self.folder / "data"

    def run_path(self, arm: str) -> Path:
        """The run folder of an arm."""
        return self.folder / "arms" / arm

    def dataset(self, progress: Callable[[str, int, int], None] | None = None) -> Dataset:
        """The data of all arms, prepared once."""
        return prepare(self.recipe.data, self.recipe.model.vocab_size, self.data_folder, progress=progress)


def create(
    folder: Path, recipe: Recipe, arms: Sequence[str], controls: int, ablations: Sequence[str], accumulation: bool
) -> Comparison:
    """Lay out a new comparison; raises UserError for an unknown arm or a folder in use."""
    for arm in (*arms, *ablations):
        arm_recipe(recipe, arm)
    if missing := [arm for arm in ("fp8", "bf16") if arm not in arms]:
        raise UserError(f"--arms {','.join(arms)}: {missing[0]} is missing; the verdict compares fp8 with bf16")
    if len(set(arms)) != len(arms):
        raise UserError(f"--arms {','.join(arms)}: an arm is named twice")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: exists already; go on with --resume {folder}, look at it with `tessera report {folder}`, "
            "or choose another folder with --out"
        )
    comparison = Comparison(folder, recipe, tuple(arms), controls, tuple(ablations), accumulation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another with --out") from None
    write_atomic(folder / "recipe.toml", recipe.to_toml())
    _write_json(folder / "comparison.json", _plan(comparison))
    return comparison


def open_comparison(
    folder: Path, controls: int | None = None, ablations: Sequence[str] | None = None, accumulation: bool = False
) -> Comparison:
    """The comparison in a folder, to go on with; more controls and ablations may be asked for than before."""
    path = folder / "comparison.json"
    if not path.is_file():
        raise UserError(f"{folder}: no comparison to go on with; it has no comparison.json")
    plan = read_object(path)
    check_schema(path, plan.get("schema"), SCHEMA)
    try:
        arms, found_ablations = tuple(plan["arms"]), tuple(plan["ablations"])
        known = Comparison(
            folder, load_recipe(folder / "recipe.toml"), arms, plan["controls"], found_ablations, plan["accumulation"]
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not what a comparison writes: {error}; put a copy back") from None
    grown = replace(
        known,
        controls=max(known.controls, controls or 0),
        ablations=tuple(dict.fromkeys((*known.ablations, *(ablations or ())))),
        accumulation=known.accumulation or accumulation,
    )
    if grown != known:
        _write_json(folder / "comparison.json", _plan(grown))
    return grown


def _plan(c: Comparison) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "arms": list(c.arms),
        "controls": c.controls,
        "ablations": list(c.ablations),
        "accumulation": c.accumulation,
    }


def run(
    comparison: Comparison,
    *,
    workers: int,
    observer: Callable[[str, dict[str, Any]], None],
    sampler: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train what is not trained, measure what is not measured; writes and returns compare.json.

    `observer(job, event)` hears of the progress; `sampler(run folder)` makes the sample of the FP8 arm. Raises
    UserError and Interrupted; both leave a folder that can be gone on with.
    """
    started = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // workers)
    jobs = [
        Job(arm, train_arm, (comparison, arm, threads)) for arm in comparison.trained if not _finished(comparison, arm)
    ]
    figures = _kept_figures(comparison)
    if figures is None:
        after = ("bf16",) if jobs and jobs[0].name == "bf16" else ()
        jobs.insert(2, Job("evaluation", evaluate, (comparison, threads), after))
    results = run_jobs(jobs, workers, observer)
    summary = summarise(comparison, figures or results["evaluation"])
    if sampler is not None:
        summary["sample"] = sampler(comparison.run_path("fp8"))
    summary["seconds"] = time.monotonic() - started
    _write_json(comparison.folder / "compare.json", summary)
    return summary


def train_arm(comparison: Comparison, arm: str, threads: int, emit: Emit) -> str:
    """Train one arm to the end, from its last checkpoint where it has one; returns its final state."""
    torch.set_num_threads(threads)
    path = comparison.run_path(arm)
    recipe = arm_recipe(comparison.recipe, arm).model_copy(update={"name": f"{comparison.recipe.name}-{arm}"})
    options: dict[str, Any] = {"arm": arm, "observer": emit}
    if not is_control(arm):
        options["milestones"] = same_weights.milestones(recipe.training.steps)
    latest = None
    if (path / "run.json").is_file():
        run_folder = RunFolder.open(path)
        latest = run_folder.latest_checkpoint()
    else:
        run_folder = RunFolder.create(path, recipe)
    dataset = comparison.dataset()
    if latest:
        trainer = Trainer.resume(run_folder, dataset, latest[1], **options)
    else:
        trainer = Trainer(recipe, run_folder, dataset, **options)
        seed = control_seed(arm)
        if seed is not None:
            trainer.perturb(seed)
    state = trainer.run()
    if state != "finished":
        raise UserError(
            f"ended at step {trainer.step} of {recipe.training.steps}; go on with "
            f"`tessera compare --resume {comparison.folder}`"
        )
    return state


def evaluate(comparison: Comparison, threads: int, emit: Emit) -> dict[str, Any]:
    """The same-weights figures and the bigram's, from the BF16 arm's checkpoints; kept in evaluation/."""
    torch.set_num_threads(threads)
    recipe, dataset = comparison.recipe, comparison.dataset()
    asked = _asked(comparison)
    rows = asked["ablations"]
    judge = SameWeights(recipe, held_out(dataset, recipe, same_weights.NUM_BATCHES))
    steps = same_weights.milestones(recipe.training.steps)
    batches = len(judge.batches)
    total = (
        len(steps) * batches * 2 + len(rows) * batches + len(OUTLIER_ABLATIONS) * batches * bool(comparison.ablations)
    )
    done = 0

    def progress() -> None:
        nonlocal done
        done += 1
        emit({"kind": "progress", "done": done, "total": total})

    run_folder = RunFolder.open(comparison.run_path("bf16"))
    points = []
    for step in steps:
        judge.load(run_folder.checkpoints_path / f"step-{step}")
        exact = judge.yardstick()
        fp8 = judge.loss_error("fp8", exact, progress=progress)
        bf16 = judge.loss_error("bf16", exact, progress=progress)
        points.append(
            {
                "step": step,
                "loss_error": fp8.free,
                "loss_error_replayed": fp8.replayed,
                "rerouted_tokens": fp8.rerouted,
                "bf16_loss_error": bf16.free,
                "bf16_rerouted_tokens": bf16.rerouted,
            }
        )
    figures = {"asked": asked, "points": points, **_gradients(judge, exact)}
    figures["ablations"] = _ablations(judge, rows, exact, progress)
    if comparison.ablations:
        figures["ablations"] |= _outliers(judge, run_folder, steps[-1], progress)
    if comparison.accumulation:
        judge.load(run_folder.checkpoints_path / f"step-{steps[-1]}")
        figures["ablations"] |= _accumulation(judge)
    figures["bigram_bits_per_byte"] = bigram_bits_per_byte(dataset, recipe)
    _write_json(_figures_path(comparison), figures)
    return figures


def _asked(comparison: Comparison) -> dict[str, Any]:
    arms = [arm for arm in comparison.arms if arm not in ("fp8", "bf16")]
    return {"ablations": list(dict.fromkeys((*arms, *comparison.ablations))), "accumulation": comparison.accumulation}


def _figures_path(comparison: Comparison) -> Path:
    return comparison.folder / "evaluation" / "same_weights.json"


def _kept_figures(comparison: Comparison) -> dict[str, Any] | None:
    """The same-weights figures of an earlier sitting, where they are what is asked for now."""
    path = _figures_path(comparison)
    figures = read_object(path) if path.is_file() else {}
    finite = all(
        figures.get(name) is not None for name in ("same_weights_gradient_error", "same_weights_gradient_bias")
    )
    finite = finite and all(point["loss_error"] is not None for point in figures["points"])
    # NaN is written as null, which the verdict would take for "not measured": such figures are measured again.
    return figures if finite and figures.get("asked") == _asked(comparison) else None


def _finished(comparison: Comparison, arm: str) -> bool:
    path = comparison.run_path(arm)
    return (path / "run.json").is_file() and RunFolder.open(path).state()["state"] == "finished"


def bigram_bits_per_byte(dataset: Dataset, recipe: Recipe) -> float:
    """Held-out bits per byte of a Witten-Bell bigram counted on exactly the sequences that the run consumes."""
    bigram = WittenBellBigram(recipe.model.vocab_size)
    position = 0
    for step in range(recipe.training.steps):
        size = recipe.batch_size_at(step)
        batch = dataset.train.batch(position, size)
        bigram.count(batch.tokens.numpy(), batch.targets.numpy())
        position += size
    batches = held_out(dataset, recipe, recipe.training.validation_batches)
    return bigram.bits_per_byte([(b.tokens.numpy(), b.targets.numpy()) for b in batches], dataset.token_bytes)


def _gradients(judge: SameWeights, exact: Yardstick) -> dict[str, Any]:
    reference = judge.gradient("fp32", exact.routing)
    replayed = gradient_error(judge.gradient("fp8", exact.routing), reference)
    free = gradient_error(judge.gradient("fp8", None), reference)
    bf16 = gradient_error(judge.gradient("bf16", exact.routing), reference)
    return {
        "same_weights_gradient_error": replayed.error,
        "same_weights_gradient_bias": replayed.bias,
        "worst_tensor": {"name": replayed.worst_name, "error": replayed.worst_error},
        "gradient_error_free_routing": free.error,
        "bf16_gradient_error": bf16.error,
    }


def _ablations(
    judge: SameWeights, arms: Sequence[str], exact: Yardstick, progress: Callable[[], None]
) -> dict[str, Any]:
    """Each arm on the final weights: the criteria of the verdict, at one point."""
    if not arms:
        return {}
    reference = judge.gradient("fp32", exact.routing)
    found = {}
    for arm in arms:
        loss = judge.loss_error(arm, exact, progress=progress)
        gradient = gradient_error(judge.gradient(arm, exact.routing), reference)
        found[arm] = _row(loss.free, gradient.error, gradient.bias, "final weights")
    return found


def _outliers(judge: SameWeights, run_folder: RunFolder, step: int, progress: Callable[[], None]) -> dict[str, Any]:
    judge.load(run_folder.checkpoints_path / f"step-{step}", outlier=True)
    exact, found = judge.yardstick(), {}
    for arm in OUTLIER_ABLATIONS:
        loss = judge.loss_error(arm, exact, progress=progress)
        found[f"{arm}, outlier"] = _row(loss.free, None, None, "one channel scaled by 1e5, loss only")
    return found


def _accumulation(judge: SameWeights) -> dict[str, Any]:
    """Unpromoted against promoted accumulation, both on row tiles: one batch of 256 tokens, loss only."""
    first = judge.batches[0]
    rows = slice(0, max(1, ACCUMULATION_TOKENS // first.tokens.shape[1]))
    short = [type(first)(first.tokens[rows], first.targets[rows], first.document_ids[rows])]
    exact = judge.yardstick("hopper-row", short)
    loss = judge.loss_error("hopper-unpromoted", exact, short)
    return {"hopper-unpromoted": _row(loss.free, None, None, "against hopper-row, one short batch, loss only")}


def _row(loss: float, gradient: float | None, bias: float | None, note: str) -> dict[str, Any]:
    missed = verdict.failures(loss, gradient, bias)
    return {
        "loss_error": loss,
        "gradient_error": gradient,
        "gradient_bias": bias,
        "verdict": "failed" if missed else "indistinguishable at this size",
        "note": "; ".join([note, *missed]),
    }


def summarise(comparison: Comparison, figures: dict[str, Any]) -> dict[str, Any]:
    """compare.json, from the runs' events and the same-weights figures."""
    steps = comparison.recipe.training.steps
    losses, ends, validations = {}, {}, {}
    for arm in comparison.trained:
        events = comparison.run_path(arm) / "events.jsonl"
        losses[arm] = {e["step"]: e["lm_loss"] for e in read_events(events, "step") if e["lm_loss"] is not None}
        ends[arm] = [*read_events(events, "end")][-1]
        validations[arm] = [*read_events(events, "validation")][-1:]
    controls = [losses[arm] for arm in comparison.trained if is_control(arm)]
    curve = verdict.curve_error(losses["fp8"], losses["bf16"], controls, steps)
    points = figures["points"]
    loss_error = max(p["loss_error"] for p in points)
    missed = verdict.failures(
        loss_error, figures["same_weights_gradient_error"], figures["same_weights_gradient_bias"], curve
    )
    final = {arm: v[0] for arm, v in validations.items() if v}
    return {
        "schema": SCHEMA,
        "name": comparison.recipe.name,
        "arms": list(comparison.trained),
        "controls": comparison.controls,
        "steps": steps,
        "same_weights_loss_error": loss_error,
        "same_weights_loss_error_replayed": max(p["loss_error_replayed"] for p in points),
        "rerouted_tokens": max(p["rerouted_tokens"] for p in points),
        **{k: v for k, v in figures.items() if k != "asked"},
        "relative_loss_error": curve.figure if curve.resolved else "not resolved",
        "relative_loss_error_figure": curve.figure,
        "relative_loss_error_reason": curve.reason,
        "control_errors": list(curve.controls),
        "verdict": "failed" if missed else "passed",
        "failures": missed,
        "bits_per_byte": {arm: v["bits_per_byte"] for arm, v in final.items()},
        "mtp_acceptance": {arm: v["mtp_acceptance"] for arm, v in final.items()},
        "final_loss": {arm: v["loss"] for arm, v in final.items()},
        "tokens_per_s": {arm: e["tokens_per_s"] for arm, e in ends.items()},
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, dumps(value, indent=1) + "\n")
