"""tessera train: one run."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.cli.board import Board, clock
from tessera.cli.options import (
    Json,
    Out,
    Overrides,
    RecipeOrResume,
    Threads,
    examples,
    out_folder,
    print_json,
    require_recipe_or_resume,
    say,
)
from tessera.recipe import Recipe, UserError, load_recipe

if TYPE_CHECKING:
    from tessera.store import RunFolder
    from tessera.training.trainer import Observer, Trainer

EXAMPLE = examples(
    "tessera train recipes/tiny.toml --set training.steps=100 --out runs/short",
    "tessera train --resume runs/short",
    "tessera train --resume runs/short/checkpoints/step-40",
    "tessera train recipes/small.toml --from runs/small --out runs/small-2",
)

NO_CHECKPOINT = "there is no checkpoint to go on from; remove the folder, or choose another --out, and begin again"
STEP = re.compile(r"step-([0-9]+)")
TOKENIZER = "tokenizer.json"  # of a checkpoint; and of a run, where it came with the weights


def command(
    recipe: RecipeOrResume = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with a run from its latest checkpoint, or from the one named."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Begin a new stage with the weights and the tokenizer of a checkpoint or run.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to compute: cpu or cuda.")] = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a model: one recipe, one run folder with events, checkpoints and a report.

    Ctrl-C ends after the step, keeps a checkpoint and prints the way to resume; a second one ends at once.

    Exit code 0: finished; 2: a mistake in the input, or a step at which [stability] stops; 130: stopped.
    """
    require_recipe_or_resume("train", recipe, resume, {"--set": overrides, "--out": out, "--from": start})
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu or cuda")
    if resume is not None:
        run, source = _unfinished(resume)
    else:
        assert recipe is not None
        run, source = _new_run(load_recipe(recipe, overrides or ()), out, start)
    resolved = run.recipe()
    seen: dict[str, dict[str, Any]] = {}
    with Board(quiet=json, limit_minutes=resolved.training.time_limit_minutes) as board:

        def observe(event: dict[str, Any]) -> None:
            seen[event["kind"]] = event
            board.handle(resolved.name, event)

        try:
            trainer = _trainer(run, resolved, source, resume is not None, device, threads, board, observe)
        except BaseException as error:
            if resume is None:  # nothing was trained: the same command must work once the cause is gone
                shutil.rmtree(run.path, ignore_errors=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            say("stopped before the first step; the same command begins again")
            raise typer.Exit(130) from None
        try:
            state = trainer.run(lambda: board.handle(resolved.name, {"kind": "stopping"}))
        except KeyboardInterrupt:  # a second Ctrl-C
            say(f"stopped at once, without a new checkpoint; {_way_on(run)}")
            raise typer.Exit(130) from None
        except UserError as error:
            from tessera.training.stability import Stopped

            if isinstance(error, Stopped):  # going on would end there again
                raise
            raise UserError(f"{error}\n{_way_on(run)}") from error
    _finish(run, trainer, state, seen, json)
    if state == "interrupted":
        raise typer.Exit(130)


def _unfinished(path: Path) -> tuple["RunFolder", Path | None]:
    """The run to go on with, and the checkpoint, never None: the one that `path` names, or the latest."""
    from tessera.store import RunFolder
    from tessera.training.checkpoint import latest_to_resume

    place = path.absolute()
    step = STEP.fullmatch(place.name) if place.parent.name == "checkpoints" else None
    if step:
        path = path.parent.parent if len(path.parts) > 2 else place.parent.parent
    run = RunFolder.open(path)
    comparison = path.resolve().parent.parent
    if (comparison / "comparison.json").is_file():  # an arm has a perturbation and milestones that train knows not of
        raise UserError(f"{path}: an arm of a comparison; go on with `tessera compare --resume {comparison}`")
    state = run.state()
    if step:
        found = dict(run.checkpoints())
        if int(step[1]) not in found:
            there = ", ".join(f"step-{number}" for number in found) or "none"
            raise UserError(f"{place}: no complete checkpoint; there is {there}")
    if state["state"] == "finished" and (step is None or int(step[1]) >= state["step"]):
        raise UserError(
            f"{path}: finished at step {state['step']}; go on from its weights in a new stage with "
            f"`tessera train RECIPE --from {path}`"
        )
    checkpoint = found[int(step[1])] if step else latest_to_resume(run)
    if checkpoint is None:  # beginning anew here would lose the weights of --from
        raise UserError(f"{path}: {NO_CHECKPOINT}")
    return run, checkpoint


def _way_on(run: "RunFolder") -> str:
    from tessera.training.checkpoint import latest_to_resume

    latest = latest_to_resume(run)
    steps = {path: step for step, path in run.checkpoints()}
    return f"go on from step {steps[latest]} with:\n  tessera train --resume {run.path}" if latest else NO_CHECKPOINT


def _new_run(recipe: Recipe, out: Path | None, start: Path | None) -> tuple["RunFolder", Path | None]:
    """The new run's folder, and the checkpoint to start from, if any."""
    from tessera.store import RunFolder, find_checkpoint
    from tessera.store.files import regular_size

    folder = out_folder(out, recipe.name)
    if start is None:
        return RunFolder.create(folder, recipe), None
    source = find_checkpoint(start)
    regular_size(source / TOKENIZER)  # read before all is verified; a link would lead out of the folder
    if recipe.data.tokenizer is None:  # these weights mean the tokens that they were trained on
        data = recipe.data.model_copy(update={"tokenizer": str(folder.resolve() / TOKENIZER)})
        recipe = recipe.model_copy(update={"data": data})
    elif not _same_tokenizer(Path(recipe.data.tokenizer), source / TOKENIZER):
        raise UserError(
            f"data.tokenizer = {recipe.data.tokenizer}: not the tokenizer of {source}, whose weights would read other "
            "words; leave data.tokenizer out to take the checkpoint's own"
        )
    return RunFolder.create(folder, recipe), source


def _same_tokenizer(one: Path, other: Path) -> bool:
    from tessera.data import Tokenizer

    return Tokenizer.load(one).to_json() == Tokenizer.load(other).to_json()


def _trainer(
    run: "RunFolder",
    recipe: Recipe,
    source: Path | None,
    resume: bool,
    device: str,
    threads: int | None,
    board: Board,
    observer: "Observer",
) -> "Trainer":
    """The run at the step where it goes on; prepares its data. `source`: the checkpoint to resume or to start from."""
    import torch

    from tessera.data import Tokenizer, prepare
    from tessera.training.trainer import Trainer

    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use cpu")
    if source and not resume and recipe.data.tokenizer == str(run.path.resolve() / TOKENIZER):
        Tokenizer.load(source / TOKENIZER).save(Path(recipe.data.tokenizer))
    data = Path(recipe.data.cache) if recipe.data.cache else _data_folder(run.path)
    dataset = prepare(recipe.data, recipe.model.vocab_size, data, progress=board.stage)
    board.data(dataset.facts)
    options: dict[str, Any] = {"device": device, "arm": recipe.numerics.precision, "observer": observer}
    if source and resume:
        return Trainer.resume(run, dataset, source, **options)
    trainer = Trainer(recipe, run, dataset, **options)
    if source:
        trainer.start_from(source)
    return trainer


def _data_folder(run: Path) -> Path:
    """The shards of a run; an arm of a comparison shares those beside it."""
    shared = run.parent.parent / "data"
    return shared if run.parent.name == "arms" and shared.is_dir() else run / "data"


def _finish(run: "RunFolder", trainer: "Trainer", state: str, seen: dict[str, dict[str, Any]], json: bool) -> None:
    """Write the report, and tell how the run stands; `seen` is the last event of each kind."""
    from tessera.store.files import Unwritable
    from tessera.training.report import write_report

    report, refusal = None, None
    try:
        report = write_report(run.path)
    except Unwritable as error:  # what was trained is told first
        refusal = f"{error}; the run itself is kept: make its page later with `tessera report {run.path}`"
    _tell(run, trainer, state, seen, json, report)
    if refusal and trainer.recipe.checkpoint.on_failed_write == "stop":
        raise UserError(refusal)
    if refusal:
        say(refusal)


def _tell(
    run: "RunFolder",
    trainer: "Trainer",
    state: str,
    seen: dict[str, dict[str, Any]],
    json: bool,
    report: Path | None,
) -> None:
    end, step, validation = seen["end"], seen.get("step", {}), seen.get("validation")
    if json:
        facts = {"run": run.path, "state": state, "step": trainer.step, "tokens": trainer.tokens}
        facts |= {"loss": step.get("lm_loss"), "seconds": end["seconds"], "tokens_per_s": end["tokens_per_s"]}
        print_json(facts | {"validation": validation, "report": report})
        return
    if state == "interrupted":
        say(
            f"stopped after step {trainer.step}; a checkpoint is kept. Go on with:\n  tessera train --resume {run.path}"
        )
        return
    speed = f"{end['tokens_per_s']:,.0f} tokens/s"
    print(f"finished   {trainer.step:,} steps, {trainer.tokens:,} tokens in {clock(end['seconds'])} ({speed})")
    if step:
        print(f"loss       {step['lm_loss']:.4f} in the last step")
    if validation:
        accepted = ", ".join(f"{share:.1%}" for share in validation["mtp_acceptance"])
        drafts = f", {accepted} of the MTP drafts accepted" if accepted else ""
        print(
            f"held out   {validation['loss']:.4f} nats a token, {validation['bits_per_byte']:.4f} bits per byte{drafts}"
        )
    if report:
        print(f"report     {report}")
    print(f"sample     tessera sample {run.path} --prompt 'def '")
