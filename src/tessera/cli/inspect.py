"""tessera inspect: what a recipe means, without training it: model, precision, accumulation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import Json, Overrides, RecipePath, Threads, print_json, say
from tessera.recipe import UserError, load_recipe

app = typer.Typer(help="What a recipe means, without training it.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(epilog="Example: [bold]tessera inspect model recipes/deepseek-v3.toml[/bold]")
def model(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """Parameters by part, FLOPs and cache bytes a token; nothing is allocated."""
    from tessera import accounting

    resolved = load_recipe(recipe, overrides or ())
    section, length = resolved.model, resolved.data.sequence_length
    counts, flops = accounting.parameters(section), accounting.flops_per_token(section, length)
    facts: dict[str, Any] = {
        "recipe": resolved.name,
        "parts": {name: {"total": c.total, "active": c.active} for name, c in counts.parts.items()},
        "mtp_parts": {name: {"total": c.total, "active": c.active} for name, c in counts.mtp_parts.items()},
        "total": counts.total,
        "active": counts.active,
        "active_without_embedding": counts.active_without_embedding,
        "mtp_total": counts.mtp_total,
        "mtp_active": counts.mtp_active,
        "flops_per_token": {
            "context": length,
            "forward": flops.forward,
            "mtp_forward": flops.mtp_forward,
            "training": flops.training,
        },
        "cache_bytes_per_token": accounting.cache_bytes_per_token(section),
        "mtp_cache_bytes_per_token": accounting.mtp_cache_bytes_per_token(section),
        "tokens": resolved.total_tokens(),
        "training_flops": flops.training * resolved.total_tokens(),
        "notes": resolved.notes(),
    }
    if json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{resolved.name}: parameters", title_justify="left")
    for heading in ("part", "total", "active for a token"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, c in counts.parts.items():
        table.add_row(name, f"{c.total:,}", f"{c.active:,}")
    table.add_section()
    table.add_row("model", _short(counts.total), _short(counts.active))
    table.add_row("without the embedding", "", _short(counts.active_without_embedding))
    if counts.mtp_parts:
        table.add_row("multi-token prediction adds", _short(counts.mtp_total), _short(counts.mtp_active))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"FLOPs a token at {length} tokens: forward {flops.forward:.4g}, training {flops.training:.4g} (with MTP)"
    )
    console.print(
        f"cache bytes a token (BF16): {facts['cache_bytes_per_token']:,}; MTP's apart: "
        f"{facts['mtp_cache_bytes_per_token']:,}"
    )
    console.print(f"tokens of the run: {_short(resolved.total_tokens())}; training FLOPs {facts['training_flops']:.4g}")
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False)


@app.command(epilog="Example: [bold]tessera inspect precision recipes/tiny.toml[/bold]")
def precision(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """The precision of every parameter, GEMM operand and tensor kept for backward."""
    from tessera.model.precision_table import precision_table
    from tessera.numerics import Policy

    resolved = load_recipe(recipe, overrides or ())
    rows = precision_table(resolved.model, Policy(**resolved.numerics.model_dump()), resolved.optimizer.moments)
    if json:
        print_json({"recipe": resolved.name, "parameters": rows.parameters, "cached": rows.cached})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, found in (("parameters", rows.parameters), ("kept for backward", rows.cached)):
        table = Table(title=f"{resolved.name}: {title}", title_justify="left")
        for heading in found[0]:
            table.add_column(heading.replace("_", " "), overflow="fold")
        for row in found:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table)


@app.command(epilog="Example: [bold]tessera inspect accumulation --largest-k 4096 --plot accumulation.svg[/bold]")
def accumulation(
    largest_k: Annotated[
        int, typer.Option("--largest-k", min=512, help="Contractions from 512 to this, doubling.")
    ] = 16384,
    size: Annotated[int, typer.Option(min=1, help="Outputs are size x size.")] = 256,
    plot: Annotated[Path | None, typer.Option(metavar="SVG", help="Draw the curves into this file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """The error of Hopper's FP8 accumulation, without and with promotion to FP32, as the contraction grows."""
    import torch

    from tessera.cli.board import Board
    from tessera.numerics import accumulation as experiment

    if threads:
        torch.set_num_threads(threads)
    if largest_k & (largest_k - 1):
        raise UserError(f"--largest-k {largest_k}: must be a power of two, such as 4096")
    with Board(quiet=json) as board:
        rows = experiment.measure(
            largest_k=largest_k, size=size, seed=seed, progress=lambda done, total: board.stage("products", done, total)
        )
    if plot:
        experiment.plot(rows, plot)
        say(f"plot: {plot}")
    if json:
        print_json({"size": size, "seed": seed, "rows": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"errors of {size} x {size} outputs", title_justify="left")
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3%}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(highlight=False).print(table)


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:,.1f}{name}"
    return f"{count:,.0f}"
