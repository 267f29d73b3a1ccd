"""The comparison: one recipe in several arms, and the verdict on what FP8 cost.

    runs/<name>/
      recipe.toml       the recipe all arms come from
      arms/<arm>/       one run each
      comparison.json   what is asked, and the digest of the text that all arms are trained on
      evaluation/       the same-weights figures
      compare.json      the verdict with its figures
      report.html

Every arm is a process with one thread of its own; the same-weights criteria start as soon as the BF16 arm is done.
The work is resumable: what a folder has finished is not done again.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tessera.data import Dataset, prepare
from tessera.recipe import Recipe, UserError, load_recipe
from tessera.store import RunFolder, read_events, write_atomic, write_json
from tessera.store.json_text import check_schema, read_object
from tessera.training import same_weights, verdict
from tessera.training.arms import arm_recipe, control_seed, is_control, require_backward
from tessera.training.checkpoint import latest_to_resume
from tessera.training.evaluation import ACCUMULATION, Evaluation, arm_of, missing, read_figures, uncaught
from tessera.training.jobs import Emit, Job, run_jobs
from tessera.training.stability import REFUSED, Stopped
from tessera.training.trainer import Trainer

SCHEMA = 1
SHOWN = 5  # steps of a long list


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

    @property
    def figures_path(self) -> Path:
        """Where the same-weights figures are kept."""
        return self.folder / "evaluation" / "same_weights.json"

    @property
    def rows(self) -> tuple[str, ...]:
        """What is measured on the same weights beside the verdict's own criteria."""
        arms = [arm for arm in self.arms if arm not in ("fp8", "bf16")]
        return tuple(dict.fromkeys((*arms, *self.ablations, *((ACCUMULATION,) if self.accumulation else ()))))

    def dataset(self, progress: Callable[[str, int, int], None] | None = None) -> Dataset:
        """The data of all arms, prepared once.

        Raises UserError where the text is not the one that the comparison began with: what is trained or measured
        later would not compare.
        """
        dataset = prepare(self.recipe.data, self.recipe.model.vocab_size, self.data_folder, progress=progress)
        path, digest = self.folder / "comparison.json", dataset.facts["digest"]
        plan = read_object(path)
        if plan.get("data") is None:
            write_json(path, plan | {"data": digest})
        elif plan["data"] != digest:
            raise UserError(
                f"{self.folder}: began with other text than data.source holds now (a newer Python brings another "
                "standard library); put the text back, or begin a new comparison with --out"
            )
        return dataset


def create(
    folder: Path, recipe: Recipe, arms: Sequence[str], controls: int, ablations: Sequence[str], accumulation: bool
) -> Comparison:
    """Lay out a new comparison; raises UserError for arms that cannot be trained or measured, or a folder in use."""
    for arm in arms:
        if is_control(arm):
            raise UserError(f"--arms: {arm}: control runs are made by --control N")
        require_backward(arm_recipe(recipe, arm).numerics)
    _check_rows(recipe, ablations, accumulation)
    if missing := [arm for arm in ("fp8", "bf16") if arm not in arms]:
        raise UserError(f"--arms {','.join(arms)}: {missing[0]} is missing; the verdict compares fp8 with bf16")
    if len(set(arms)) != len(arms):
        raise UserError(f"--arms {','.join(arms)}: an arm is named twice")
    if recipe.training.log_interval != 1:
        raise UserError(
            f"training.log_interval = {recipe.training.log_interval}: a comparison needs the loss of every step; set "
            "it to 1 (--set training.log_interval=1)"
        )
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
    write_json(folder / "comparison.json", _plan(comparison))
    return comparison


def _check_rows(recipe: Recipe, ablations: Sequence[str], accumulation: bool) -> None:
    rows = [*ablations, *(("hopper-row", ACCUMULATION) if accumulation else ())]
    for row in rows:
        arm_recipe(recipe, arm_of(row))


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
    _check_rows(grown.recipe, grown.ablations, grown.accumulation)
    if grown != known:
        write_json(path, plan | _plan(grown))
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
        Job(arm, train_arm, (comparison, arm, threads))
        for arm in comparison.trained
        if _state(comparison, arm) == "open"
    ]
    figures = read_figures(comparison.figures_path)
    if not figures or missing(figures, comparison.rows):
        after = ("bf16",) if jobs and jobs[0].name == "bf16" else ()
        jobs.insert(2, Job("evaluation", evaluate, (comparison, threads), after))
    results = run_jobs(jobs, workers, observer)
    summary = summarise(comparison, results.get("evaluation", figures))
    if sampler is not None:
        summary["sample"] = sampler(comparison.run_path("fp8"))
    summary["seconds"] = time.monotonic() - started
    write_json(comparison.folder / "compare.json", summary)
    return summary


def train_arm(comparison: Comparison, arm: str, threads: int, emit: Emit) -> str:
    """Train one arm to the end, from its last checkpoint where it has one; returns "finished" or "diverged".

    The BF16 arm is what all others are held against: where it is stopped by [stability], Stopped is raised.
    """
    torch.set_num_threads(threads)
    path = comparison.run_path(arm)
    recipe = arm_recipe(comparison.recipe, arm).model_copy(update={"name": f"{comparison.recipe.name}-{arm}"})
    options: dict[str, Any] = {"arm": arm, "observer": emit}
    if not is_control(arm):
        options["milestones"] = same_weights.milestones(recipe.training.steps)
    latest = None
    if (path / "run.json").is_file():
        run_folder = RunFolder.open(path)
        latest = latest_to_resume(run_folder)
    else:
        shutil.rmtree(path, ignore_errors=True)  # of a start that was killed before it was a run
        run_folder = RunFolder.create(path, recipe)
    dataset = comparison.dataset()
    if latest:
        trainer = Trainer.resume(run_folder, dataset, latest, **options)
    else:
        trainer = Trainer(recipe, run_folder, dataset, **options)
        if is_control(arm):
            trainer.perturb(control_seed(arm))
    try:
        state = trainer.run()
    except Stopped:
        if arm == "bf16":
            raise
        return "diverged"
    if state != "finished":
        raise UserError(
            f"ended at step {trainer.step} of {recipe.training.steps}; go on with "
            f"`tessera compare --resume {comparison.folder}`"
        )
    return state


def evaluate(comparison: Comparison, threads: int, emit: Emit) -> dict[str, Any]:
    """The same-weights figures and the bigram's, from the BF16 arm's checkpoints; kept in evaluation/."""
    torch.set_num_threads(threads)
    bf16 = RunFolder.open(comparison.run_path("bf16"))
    return Evaluation(comparison.figures_path, comparison.recipe, comparison.dataset(), bf16, emit).run(comparison.rows)


def _state(comparison: Comparison, arm: str) -> str:
    """ "finished", "diverged" (going on would diverge again), or "open"."""
    path = comparison.run_path(arm)
    facts = RunFolder.open(path).state() if (path / "run.json").is_file() else {"state": "absent"}
    if facts["state"] == "finished":
        return "finished"
    stopped = facts.get("stopped")
    return "diverged" if stopped and arm != "bf16" else "open"


def summarise(comparison: Comparison, figures: dict[str, Any]) -> dict[str, Any]:
    """compare.json, from the runs' events and the same-weights figures."""
    steps = comparison.recipe.training.steps
    losses, ends, validations, refused = {}, {}, {}, {}
    diverged = [arm for arm in comparison.trained if _state(comparison, arm) == "diverged"]
    for arm in comparison.trained:
        events = comparison.run_path(arm) / "events.jsonl"
        losses[arm] = {e["step"]: e["lm_loss"] for e in read_events(events, "step") if e["lm_loss"] is not None}
        ends[arm] = [*read_events(events, "end")][-1]
        refused[arm] = [e["step"] for e in read_events(events, "unstable") if e["decision"] in REFUSED]
        validations[arm] = [] if arm in diverged else [*read_events(events, "validation")][-1:]
    controls = [losses[arm] for arm in comparison.trained if is_control(arm) and arm not in diverged]
    curve = verdict.curve_error(losses["fp8"], losses["bf16"], controls, steps)
    points = figures["points"]
    loss_error = max(p["loss_error"] for p in points)
    missed = verdict.failures(
        loss_error, figures["same_weights_gradient_error"], figures["same_weights_gradient_bias"], curve
    )
    if "fp8" in diverged:
        missed.append(f"the fp8 arm diverged: {ends['fp8']['reason']}")
    missed += uncaught(figures)
    final = {arm: v[0] for arm, v in validations.items() if v}
    return {
        "schema": SCHEMA,
        "name": comparison.recipe.name,
        "arms": list(comparison.trained),
        "diverged": {arm: ends[arm]["reason"] for arm in diverged},
        "refused_steps": {arm: len(found) for arm, found in refused.items() if found},
        "controls": comparison.controls,
        "steps": steps,
        "same_weights_loss_error": loss_error,
        "same_weights_loss_error_replayed": max(p["loss_error_replayed"] for p in points),
        "rerouted_tokens": max(p["rerouted_tokens"] for p in points),
        **figures,
        "ablations": {row: figures["ablations"][row] for row in comparison.rows},
        "relative_loss_error": curve.figure if curve.resolved else "not resolved",
        "relative_loss_error_figure": curve.figure,
        "relative_loss_error_reason": curve.reason,
        "control_errors": list(curve.controls),
        "verdict": "failed" if missed else "passed",
        "failures": missed,
        "notes": [*_refusals(refused), *_notes(figures)],
        "bits_per_byte": {arm: v["bits_per_byte"] for arm, v in final.items()},
        "mtp_acceptance": {arm: v["mtp_acceptance"] for arm, v in final.items()},
        "final_loss": {arm: v["loss"] for arm, v in final.items()},
        "tokens_per_s": {arm: e["tokens_per_s"] for arm, e in ends.items()},
    }


def _refusals(refused: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """A sentence for each arm that did not make every update: its curve and its weights are of fewer than the others'.

    `refused`: arm -> the steps whose update it left out.
    """
    for arm, steps in refused.items():
        if steps:
            shown = ", ".join(map(str, steps[:SHOWN])) + (", ..." if len(steps) > SHOWN else "")
            yield f"{arm} left out the update of {len(steps)} of its steps ({shown}), as [stability] says"


def _notes(figures: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know of them."""
    found = figures["held_out_batches"]
    if found >= same_weights.NUM_BATCHES:
        return []
    return [
        f"the held-out text makes {found} batches, fewer than the {same_weights.NUM_BATCHES} of the definition: the "
        "same-weights figures are less certain; more text, or a larger data.validation_fraction, gives more"
    ]
