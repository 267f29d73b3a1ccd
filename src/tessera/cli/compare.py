"""tessera compare: the same recipe in FP8 and BF16, and the verdict."""

import os
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
    examples,
    new_table,
    out_folder,
    print_json,
    print_table,
    require_recipe_or_resume,
    say,
)
from tessera.recipe import load_recipe

if TYPE_CHECKING:
    from tessera.training.compare import Comparison

EXAMPLE = examples(
    "tessera compare recipes/tiny.toml",
    "tessera compare --resume runs/tiny --control 2 --ablations",
)
SAMPLE: dict[str, Any] = {"prompt": "def ", "tokens": 96, "temperature": 0.7, "top_p": 0.95, "seed": 0}


def command(
    recipe: RecipeOrResume = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a comparison, or ask more of a finished one.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Arms to train, fp8 and bf16 among them; default: fp8,bf16. Every ablation is an arm too.",
        ),
    ] = None,
    control: Annotated[
        int, typer.Option(metavar="N", min=0, help="Control runs: the BF16 twin, perturbed by 2^-20.")
    ] = 0,
    ablations: Annotated[
        bool,
        typer.Option(
            "--ablations", metavar=" ", help="Other tiles, formats and roundings on the same weights; no training."
        ),
    ] = False,
    accumulation: Annotated[
        bool,
        typer.Option(
            "--accumulation", metavar=" ", help="Hopper's accumulation without promotion, on the same weights (slow)."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes at once, sharing the cores; default: one a core."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a recipe in FP8 beside its BF16 twin on the same data, and say what FP8 cost.

    Ctrl-C keeps a checkpoint of each arm and prints the way to resume.

    Exit code 0: the verdict is passed; 1: it failed; 2: a mistake in the input; 130: stopped.
    """
    require_recipe_or_resume("compare", recipe, resume, {"--set": overrides, "--out": out, "--arms": arms})
    resolved = None if recipe is None else load_recipe(recipe, overrides or ())

    from tessera.training import compare
    from tessera.training.evaluation import ABLATIONS
    from tessera.training.report import write_report

    wanted = ABLATIONS if ablations else ()
    if resolved is not None:
        names = [name.strip() for name in (arms or "fp8,bf16").split(",") if name.strip()]
        comparison = compare.create(out_folder(out, resolved.name), resolved, names, control, wanted, accumulation)
    else:
        assert resume is not None
        comparison = compare.open_comparison(resume, control, wanted, accumulation)
    summary = _run(comparison, workers, json, is_new=resume is None)
    report = write_report(comparison.folder)
    if json:
        print_json(summary | {"report": report})
    else:
        _print(summary, report)
    if summary["verdict"] != "passed":
        raise typer.Exit(1)


def _run(comparison: "Comparison", workers: int | None, json: bool, *, is_new: bool) -> dict[str, Any]:
    """Prepare the data, train and measure; a new comparison that fails before that leaves no folder."""
    from tessera.training import compare
    from tessera.training.jobs import Interrupted

    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(comparison.trained))
    rounds = -(-len(comparison.trained) // workers)
    limit = comparison.recipe.training.time_limit_minutes
    with Board(quiet=json, limit_minutes=limit, sharing=rounds) as board:
        try:
            dataset = comparison.dataset(board.stage)
        except BaseException as error:
            if is_new:  # nothing was trained: the same command must work once the cause is gone
                shutil.rmtree(comparison.folder, ignore_errors=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            say("stopped before the first step; the same command begins again")
            raise typer.Exit(130) from None
        board.data(dataset.facts)
        board.say(f"{comparison.folder}: {', '.join(comparison.trained)}, {workers} at once; then the verdict")
        try:
            return compare.run(comparison, workers=workers, observer=board.handle, sampler=_sample)
        except (Interrupted, KeyboardInterrupt) as end:
            kept = "checkpoints are kept" if isinstance(end, Interrupted) else "at once, without new checkpoints"
            say(f"stopped; {kept}. Go on with:\n  tessera compare --resume {comparison.folder}")
            raise typer.Exit(130) from None


def _sample(run: Path) -> dict[str, Any]:
    from tessera.cli.sample import make_sample

    sample = make_sample(run, **SAMPLE)
    return {"prompt": sample["prompt"], "text": sample["text"]}


def _print(summary: dict[str, Any], report: Path) -> None:
    from tessera.cli.sample import VISIBLE

    headings = ["arm", "held-out loss", "bits per byte", "MTP accepted", "tokens/s"]
    table = new_table(f"{summary['name']}: {summary['steps']} steps", headings, numbers=headings[1:])
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
    print_table(table)
    for arm, reason in summary["diverged"].items():
        print(f"{arm} diverged: {reason}")
    print(f"FP8 verdict: {summary['verdict']}")
    for row in _verdict_rows(summary):
        print("  {:<29}{:>10}   {}".format(*row))
    for failure in summary["failures"]:
        print(f"  missed: {failure}")
    for note in summary["notes"]:
        print(f"  note: {note}")
    if rows := summary.get("ablations"):
        headings = ["ablation", "loss error", "gradient error", "bias", "verdict", "note"]
        table = new_table("On the same weights", headings, numbers=headings[1:4])
        for name, row in rows.items():
            figures = [_figure(row[key], form) for key, form in zip(ERRORS, (".4%", ".2%", "+.3%"), strict=True)]
            table.add_row(name, *figures, row["verdict"], row["note"].partition(";")[0])
        print()
        print_table(table)
    if sample := summary.get("sample"):
        print(f"\nSample:\n{sample['prompt']}{sample['text']}".translate(VISIBLE))
    print(f"\nReport: {report}   (whole comparison: {clock(summary['seconds'])})")


ERRORS = ("loss_error", "gradient_error", "gradient_bias")


def _verdict_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(criterion, figure, bar) of each criterion of the verdict."""
    from tessera.training.verdict import BIAS_BAR, CURVE_BAR, GRADIENT_BAR, LOSS_BAR

    reason = summary["relative_loss_error_reason"]
    curve = f"not resolved: {reason}" if reason else f"bar {CURVE_BAR:.2%}"
    return [
        ("same-weights loss error", f"{summary['same_weights_loss_error']:.4%}", f"bar {LOSS_BAR:.2%}"),
        ("same-weights gradient error", f"{summary['same_weights_gradient_error']:.2%}", f"bar {GRADIENT_BAR:.0%}"),
        ("same-weights gradient bias", f"{summary['same_weights_gradient_bias']:+.3%}", f"bar {BIAS_BAR:.0%}"),
        ("relative loss error of curves", _figure(summary["relative_loss_error_figure"], ".3%"), curve),
    ]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
