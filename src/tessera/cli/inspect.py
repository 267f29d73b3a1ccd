"""tessera inspect: what a recipe means, without training it: model, precision, memory, accumulation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.inspect_memory import memory
from tessera.cli.options import (
    Json,
    Overrides,
    RecipePath,
    Threads,
    examples,
    human_bytes,
    new_table,
    print_json,
    print_table,
    say,
)
from tessera.recipe import UserError, load_recipe

app = typer.Typer(
    help="Show what a recipe means, without training it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=examples("tessera inspect model recipes/tiny.toml", "tessera inspect precision recipes/tiny.toml"),
)


@app.command(
    epilog=examples(
        "tessera inspect model recipes/deepseek-v3.toml",
        "tessera inspect model recipes/tiny.toml --set model.hidden_size=256 --json",
    )
)
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
    headings = ["part", "parameters", "active for a token"]
    table = new_table(f"{resolved.name}: parameters", headings, numbers=headings[1:])
    for name, c in counts.parts.items():
        table.add_row(name, f"{c.total:,}", f"{c.active:,}")
    table.add_section()
    table.add_row("model", _short(counts.total), _short(counts.active))
    table.add_row("model without the embedding", "", _short(counts.active_without_embedding))
    if counts.mtp_parts:
        table.add_row("multi-token prediction adds", _short(counts.mtp_total), _short(counts.mtp_active))
    print_table(table)
    with_mtp = ", MTP with it" if counts.mtp_parts else ""
    cache = f"{facts['cache_bytes_per_token']:,} bytes a token in BF16"
    if counts.mtp_parts:
        cache += f", and {facts['mtp_cache_bytes_per_token']:,} for MTP"
    print(
        f"FLOPs a token   {flops.forward:.4g} forward, {flops.training:.4g} in training{with_mtp} (context {length:,})"
    )
    print(f"latent cache    {cache}")
    print(f"whole run       {_short(facts['tokens'])} tokens, {facts['training_flops']:.4g} FLOPs")
    for note in facts["notes"]:
        print(f"note: {note}")


@app.command(
    epilog=examples(
        "tessera inspect precision recipes/tiny.toml",
        "tessera inspect precision recipes/tiny.toml --set numerics.precision=bf16",
    )
)
def precision(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """The precision of every parameter, GEMM operand and tensor kept for backward; nothing is allocated."""
    resolved = load_recipe(recipe, overrides or ())

    from tessera import accounting
    from tessera.model.precision_table import OPERANDS, parameter_precisions
    from tessera.numerics import Policy

    policy = Policy(**resolved.numerics.model_dump())
    rows = parameter_precisions(resolved.model, policy, resolved.optimizer.moments)
    saved = accounting.saved_rows(accounting.saved_tensors(resolved.model, resolved.numerics, resolved.memory))
    per_token = sum(row["layers"] * row["bytes_per_token"] for row in saved)
    fixed = sum(row["layers"] * row["bytes"] for row in saved)
    if json:
        print_json(
            {
                "recipe": resolved.name,
                "parameters": rows,
                "cached": saved,
                "cached_bytes_per_token": per_token,
                "cached_bytes": fixed,
            }
        )
        return
    _print_parameters(resolved.name, rows, OPERANDS)
    _print_kept(resolved.name, saved)
    print(f"all layers: {human_bytes(per_token)} a token, and {human_bytes(fixed)} whatever the number of tokens")


def _print_parameters(name: str, rows: list[dict[str, Any]], operands: tuple[str, ...]) -> None:
    """Where a parameter is tiled, the operands of its three GEMMs stand below the table under a letter."""
    letters: dict[tuple[str, ...], str] = {}
    sections: dict[str, list[list[str]]] = {}
    for row in rows:
        computes = row["weight"]
        if " " in computes:
            key = tuple(_words(row[operand]) for operand in (*operands, "accumulation"))
            computes = f"fp8 ({letters.setdefault(key, chr(ord('a') + len(letters)))})"
        part, leaf = _part_and_leaf(row["name"])
        shape = " x ".join(map(str, row["shape"]))
        cells = [leaf, shape, f"{row['master']}, {row['moments']}", computes]
        sections.setdefault(_times(part, row["layers"]), []).append(cells)
    headings = ["parameter", "shape", "master, moments", "computes in"]
    _print_sections(f"{name}: parameters (gradients fp32)", headings, sections)
    for (x, weight, rows_of_dy, columns_of_dy, columns_of_x, sums), letter in letters.items():
        print(f"({letter})  fprop  input {x}, weight {weight}")
        print(f"     dgrad  gradient {rows_of_dy}, the same weight")
        print(f"     wgrad  gradient {columns_of_dy}, input {columns_of_x}")
        print(f"     sums   {sums}\n")


def _print_kept(name: str, rows: list[dict[str, Any]]) -> None:
    sections: dict[str, list[list[str]]] = {}
    for row in rows:
        format = _words(f"{row['format']} {row['tile']} {row['scale']}".rstrip())
        size = f"{human_bytes(row['bytes'])} once" if row["bytes"] else f"{row['bytes_per_token']:,}"
        sections.setdefault(_times(row["part"], row["layers"]), []).append([row["name"], row["op"], format, size])
    _print_sections(f"{name}: kept for backward", ["tensor", "op", "format, tile, scale", "bytes a token"], sections)


def _part_and_leaf(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.gate.weight" -> ("model.layers.3", "mlp.gate.weight"); other names are their own part."""
    words = name.split(".")
    return (".".join(words[:3]), ".".join(words[3:])) if words[1] == "layers" else ("", name)


def _times(part: str, layers: int) -> str:
    return part if layers == 1 else f"{part} ({layers} times)"


def _words(operand: str) -> str:
    """An operand in fewer letters: the scale is "2^k" or "fp32"."""
    return operand.replace("power_of_two", "2^k").replace("float32", "fp32")


def _print_sections(title: str, headings: list[str], sections: dict[str, list[list[str]]]) -> None:
    """Rows under the names of their sections, the last column aligned to the right where it holds numbers."""
    rows = [headings, *(row for part in sections.values() for row in part)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    numbers = all(row[-1][0].isdigit() for row in rows[1:])

    def line(row: list[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[-1] = row[-1].rjust(widths[-1]) if numbers else row[-1]
        return "  " + "  ".join(cells)

    print(f"{title}\n\n{line(headings)}")
    for name, part in sections.items():
        print(name)
        for row in part:
            print(line(row))
    print()


app.command(
    epilog=examples(
        "tessera inspect memory recipes/deepseek-v3.toml",
        "tessera inspect memory recipes/tiny.toml --set memory.recompute_norms=false --measure",
    )
)(memory)


@app.command(epilog=examples("tessera inspect accumulation --largest-k 4096 --plot accumulation.svg"))
def accumulation(
    largest_k: Annotated[
        int,
        typer.Option("--largest-k", metavar="K", min=512, help="Contractions of 512, 1024, ... to this power of two."),
    ] = 16384,
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Products with N x N outputs.")] = 256,
    plot: Annotated[Path | None, typer.Option(metavar="SVG", help="Draw the errors over K into this file.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the data.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """The error of Hopper's FP8 accumulation, without and with promotion to FP32, as the contraction grows."""
    if largest_k & (largest_k - 1):
        raise UserError(f"--largest-k {largest_k}: must be a power of two, such as 4096")

    import torch

    from tessera.cli.board import Board
    from tessera.numerics import accumulation as experiment

    if threads:
        torch.set_num_threads(threads)
    with Board(quiet=json) as board:
        rows = experiment.measure(
            largest_k=largest_k, size=size, seed=seed, progress=lambda done, total: board.stage("products", done, total)
        )
    if plot:
        experiment.plot(rows, plot)
    if json:
        print_json({"size": size, "seed": seed, "rows": rows, "plot": plot})
        return
    names = [name for name in rows[0] if name not in ("data", "k") and not name.endswith("_norm")]
    headings = ["data", "K", *(name.replace("_", " every ") for name in names)]
    table = new_table(f"Largest error of {size} x {size} outputs", headings, numbers=headings[1:])
    previous = rows[0]["data"]
    for row in rows:
        if row["data"] != previous:
            table.add_section()
            previous = row["data"]
        table.add_row(row["data"], f"{row['k']:,}", *(f"{row[name]:.3%}" for name in names))
    print_table(table)
    print("random sign: over the mean magnitude of the outputs; same sign: over each output")
    if plot:
        say(f"plot: {plot}")


def _short(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:,.1f}{name}"
    return f"{count:,.0f}"
