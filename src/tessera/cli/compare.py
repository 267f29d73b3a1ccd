"""tessera compare: the same recipe in FP8 and BF16, and the verdict."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.board import Board
from tessera.cli.options import Json, Out, Overrides, out_folder, print_json, say
from tessera.recipe import UserError, load_recipe

EXAMPLE = (
    "Example: [bold]tessera compare recipes/tiny.toml[/bold], and later, in the same folder, the noise floor and the "
    "ablations: [bold]tessera compare --resume runs/tiny --control 2 --ablations[/bold]"
)
SAMPLE: dict[str, Any] = {"prompt": "def ", "tokens": 96, "temperature": 0.7, "top_p": 0.95, "seed": 0}


def command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe file; left out with --resume.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a comparison, or ask more of a finished one.")
    ] = None,
    arms: Annotated[str, typer.Option(help="Arms to train, with commas; fp8 and bf16 among them.")] = "fp8,bf16",
    control: Annotated[
        int, typer.Option(min=0, metavar="N", help="Control runs: the BF16 twin, perturbed by 2^-20.")
    ] = 0,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Other tiles, formats and roundings on the same weights; no training.")
    ] = False,
    accumulation: Annotated[
        bool,
        typer.Option("--accumulation", help="Hopper's accumulation without promotion, on the same weights (slow)."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at once, each with its share of the cores; default: one a core."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a recipe in FP8 beside its BF16 twin on the same data, and say what FP8 cost.

    Exit code 0: the verdict is passed; 1: it failed; 2: a mistake in the input.
    """
    if (recipe is None) == (resume is None):
        raise UserError("tessera compare takes a RECIPE or --resume DIR, one of the two")
    if resume is not None and (overrides or out):
        raise UserError("--resume goes on with a comparison as it is; --set and --out begin another one")

    from tessera.training import compare
    from tessera.training.jobs import Interrupted
    from tessera.training.report import write_report

    wanted = compare.ABLATIONS if ablations else ()
    if resume is not None:
        comparison = compare.open_comparison(resume, control, wanted, accumulation)
    else:
        assert recipe is not None
        resolved = load_recipe(recipe, overrides or ())
        names = [name.strip() for name in arms.split(",") if name.strip()]
        comparison = compare.create(out_folder(out, resolved.name), resolved, names, control, wanted, accumulation)
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(comparison.trained))
    rounds = -(-len(comparison.trained) // workers)
    limit = comparison.recipe.training.time_limit_minutes
    with Board(quiet=json, limit_minutes=limit, sharing=rounds) as board:
        try:
            dataset = comparison.dataset(board.stage)
        except UserError:
            if resume is None:
                shutil.rmtree(comparison.folder, ignore_errors=True)
            raise
        board.data(dataset.facts)
        try:
            summary = compare.run(comparison, workers=workers, observer=board.handle, sampler=_sample)
        except Interrupted:
            say(f"stopped; checkpoints are kept. Go on with:\n  tessera compare --resume {comparison.folder}")
            raise typer.Exit(130) from None
    report = write_report(comparison.folder)
    if json:
        print_json(summary | {"report": report})
    else:
        _print(summary, report)
    if summary["verdict"] != "passed":
        raise typer.Exit(1)


def _sample(run: Path) -> dict[str, Any]:
    from tessera.cli.sample import make_sample

    sample = make_sample(run, **SAMPLE)
    return {"prompt": sample["prompt"], "text": sample["text"]}


def _print(summary: dict[str, Any], report: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{summary['name']}: {summary['steps']} steps", title_justify="left")
    for heading in ("arm", "held-out loss", "bits per byte", "MTP acceptance", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in summary["arms"]:
        accepted = summary["mtp_acceptance"].get(arm) or []
        table.add_row(
            arm,
            _figure(summary["final_loss"].get(arm), ".4f"),
            _figure(summary["bits_per_byte"].get(arm), ".4f"),
            ", ".join(f"{a:.1%}" for a in accepted) or "-",
            _figure(summary["tokens_per_s"].get(arm), ",.0f"),
        )
    table.add_row("Witten-Bell bigram", "", _figure(summary["bigram_bits_per_byte"], ".4f"), "", "")
    console.print(table)
    bias = summary["same_weights_gradient_bias"]
    console.print(f"FP8 verdict: [bold]{summary['verdict']}[/bold]")
    console.print(f"  same-weights loss error      {summary['same_weights_loss_error']:.4%}  (bar 0.05 %)")
    console.print(
        f"  same-weights gradient error  {summary['same_weights_gradient_error']:.2%}  (bar 10 %), bias {bias:+.3%} (bar 1 %)"
    )
    curve = summary["relative_loss_error_figure"]
    reason = summary["relative_loss_error_reason"]
    console.print(
        f"  relative loss error (curves) {_figure(curve, '.3%')}  (bar 0.25 %)"
        + (f", not resolved: {reason}" if reason else "")
    )
    for failure in summary["failures"]:
        console.print(f"  missed: {failure}")
    for name, row in summary.get("ablations", {}).items():
        console.print(f"  {name:<22} loss error {row['loss_error']:.4%}  {row['verdict']}")
    if sample := summary.get("sample"):
        console.print(f"\nSample:\n{sample['prompt']}{sample['text']}", markup=False)
    console.print(f"\nReport: {report}")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
