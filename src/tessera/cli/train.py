"""tessera train: one run."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.board import Board
from tessera.cli.options import Json, Out, Overrides, Threads, out_folder, print_json, say
from tessera.recipe import UserError, load_recipe

EXAMPLE = "Example: [bold]tessera train recipes/tiny.toml --set training.steps=100 --out runs/short[/bold]"


def command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe file; left out with --resume.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a run from its latest checkpoint.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Begin a new stage with the weights of a checkpoint or run."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a model: one recipe, one run folder with events, checkpoints and a report.

    Ctrl-C ends after the step, keeps a checkpoint and prints the way to resume.
    """
    if (recipe is None) == (resume is None):
        raise UserError("tessera train takes a RECIPE or --resume DIR, one of the two")
    if resume is not None and (overrides or out or start):
        raise UserError("--resume goes on with a run as it is; --set, --out and --from begin another one")

    import torch

    from tessera.data import prepare
    from tessera.store import RunFolder, find_checkpoint
    from tessera.training.report import write_report
    from tessera.training.trainer import Trainer

    if threads:
        torch.set_num_threads(threads)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device}: " + ("no CUDA device here; use cpu" if device == "cuda" else "cpu or cuda")
        )
    latest = None
    if resume is not None:
        run = RunFolder.open(resume)
        resolved = run.recipe()
        latest = run.latest_checkpoint()
        if run.state()["state"] == "finished":
            raise UserError(
                f"{resume}: finished at step {run.state()['step']}; go on from its weights in a new stage with "
                f"`tessera train RECIPE --from {resume}`"
            )
    else:
        assert recipe is not None
        resolved = load_recipe(recipe, overrides or ())
        source = find_checkpoint(start) if start else None
        run = RunFolder.create(out_folder(out, resolved.name), resolved)
    with Board(quiet=json, limit_minutes=resolved.training.time_limit_minutes) as board:
        data = Path(resolved.data.cache) if resolved.data.cache else _data_folder(run.path)
        options: dict[str, Any] = {
            "device": device,
            "arm": resolved.numerics.precision,
            "observer": lambda event: board.handle(resolved.name, event),
        }
        try:
            dataset = prepare(resolved.data, resolved.model.vocab_size, data, progress=board.stage)
            board.data(dataset.facts)
            if latest:
                trainer = Trainer.resume(run, dataset, latest[1], **options)
            else:
                trainer = Trainer(resolved, run, dataset, **options)
                if resume is None and source:
                    trainer.start_from(source)
        except UserError:
            if resume is None:  # nothing was trained: the same command must work once the cause is gone
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        state = trainer.run()
    report = write_report(run.path)
    if json:
        facts = trainer.validate().facts() if state == "finished" else {}
        print_json({"run": run.path, "state": state, "step": trainer.step, "report": report, "validation": facts})
    elif state == "interrupted":
        say(
            f"stopped after step {trainer.step}; a checkpoint is kept. Go on with:\n  tessera train --resume {run.path}"
        )
    else:
        say(f"finished: {run.path}\nreport:   {report}\nsample:   tessera sample {run.path} --prompt 'def '")
    if state == "interrupted":
        raise typer.Exit(130)


def _data_folder(run: Path) -> Path:
    """The shards of a run; an arm of a comparison shares those beside it."""
    shared = run.parent.parent / "data"
    return shared if run.parent.name == "arms" and shared.is_dir() else run / "data"
