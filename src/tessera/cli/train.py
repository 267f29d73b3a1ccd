"""tessera train: one run."""

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
    "tessera train recipes/small.toml --from runs/small --out runs/small-2",
)

NO_CHECKPOINT = "there is no checkpoint to go on from; remove the folder, or choose another --out, and begin again"
TOKENIZER = "tokenizer.json"  # of a checkpoint; and of a run, where it came with the weights


def command(
    recipe: RecipeOrResume = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a run from its latest checkpoint.")
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
        source, run = None, _unfinished(resume)
    else:
        assert recipe is not None
        source, run = _new_run(load_recipe(recipe, overrides or ()), out, start)
    resolved = run.recipe()
    seen: dict[str, dict[str, Any]] = {}
    with Board(quiet=json, limit_minutes=resolved.training.time_limit_minutes) as board:

        def observe(event: dict[str, Any]) -> None:
            seen[event["kind"]] = event
            board.handle(resolved.name, event)

        try:
            trainer = _trainer(run, resolved, source, device, threads, board, observe)
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
    _finish(run, trainer, state, seen, json)
    if state == "interrupted":
        raise typer.Exit(130)


def _unfinished(path: Path) -> "RunFolder":
    from tessera.store import RunFolder

    run = RunFolder.open(path)
    comparison = path.resolve().parent.parent
    if (comparison / "comparison.json").is_file():  # an arm has a perturbation and milestones that train knows not of
        raise UserError(f"{path}: an arm of a comparison; go on with `tessera compare --resume {comparison}`")
    state = run.state()
    if state["state"] == "finished":
        raise UserError(
            f"{path}: finished at step {state['step']}; go on from its weights in a new stage with "
            f"`tessera train RECIPE --from {path}`"
        )
    if not run.latest_checkpoint():  # beginning anew here would lose the weights of --from
        raise UserError(f"{path}: {NO_CHECKPOINT}")
    return run


def _way_on(run: "RunFolder") -> str:
    latest = run.latest_checkpoint()
    return f"go on from step {latest[0]} with:\n  tessera train --resume {run.path}" if latest else NO_CHECKPOINT


def _new_run(recipe: Recipe, out: Path | None, start: Path | None) -> tuple[Path | None, "RunFolder"]:
    """The checkpoint to start from, if any, and the new run's folder."""
    from tessera.store import RunFolder, find_checkpoint

    folder = out_folder(out, recipe.name)
    if start is None:
        return None, RunFolder.create(folder, recipe)
    source = find_checkpoint(start)
    if recipe.data.tokenizer is None:  # these weights mean the tokens that they were trained on
        data = recipe.data.model_copy(update={"tokenizer": str(folder.resolve() / TOKENIZER)})
        recipe = recipe.model_copy(update={"data": data})
    elif not _same_tokenizer(Path(recipe.data.tokenizer), source / TOKENIZER):
        raise UserError(
            f"data.tokenizer = {recipe.data.tokenizer}: not the tokenizer of {source}, whose weights would read other "
            "words; leave data.tokenizer out to take the checkpoint's own"
        )
    return source, RunFolder.create(folder, recipe)


def _same_tokenizer(one: Path, other: Path) -> bool:
    from tessera.data import Tokenizer

    return Tokenizer.load(one).to_json() == Tokenizer.load(other).to_json()


def _trainer(
    run: "RunFolder",
    recipe: Recipe,
    source: Path | None,
    device: str,
    threads: int | None,
    board: Board,
    observer: "Observer",
) -> "Trainer":
    """The run at the step where it goes on; prepares its data."""
    import torch

    from tessera.data import Tokenizer, prepare
    from tessera.training.trainer import Trainer

    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use cpu")
    if source and recipe.data.tokenizer == str(run.path.resolve() / TOKENIZER):
        Tokenizer.load(source / TOKENIZER).save(Path(recipe.data.tokenizer))
    data = Path(recipe.data.cache) if recipe.data.cache else _data_folder(run.path)
    dataset = prepare(recipe.data, recipe.model.vocab_size, data, progress=board.stage)
    board.data(dataset.facts)
    options: dict[str, Any] = {"device": device, "arm": recipe.numerics.precision, "observer": observer}
    if latest := run.latest_checkpoint():
        return Trainer.resume(run, dataset, latest[1], **options)
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
    from tessera.training.report import write_report

    report = write_report(run.path)
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
    print(f"report     {report}\nsample     tessera sample {run.path} --prompt 'def '")
