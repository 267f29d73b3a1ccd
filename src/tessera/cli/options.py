"""Options that several verbs share, and how a result is shown."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.recipe import UserError

if TYPE_CHECKING:  # rich takes a tenth of a second to import, which --help does not have
    from rich.table import Table

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, such as recipes/tiny.toml.")]
RecipeOrResume = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="A recipe file, such as recipes/tiny.toml; or else --resume.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set training.steps=100; repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write; default: runs/<name>.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads; default: all cores.")]
Json = Annotated[bool, typer.Option("--json", metavar=" ", help="Print one JSON object instead, and nothing else.")]

PIPED_WIDTH = 200  # columns for a table that goes into a file or another program


def require_recipe_or_resume(verb: str, recipe: Path | None, resume: Path | None, begins: Mapping[str, Any]) -> None:
    """Raise UserError unless one of the two is given, and with --resume none of the options that only a beginning has.

    `begins` holds those options, as {"--out": what was given}; a value that is not given is falsy.
    """
    if (recipe is None) == (resume is None):
        raise UserError(f"{verb} takes a RECIPE or --resume DIR, one of the two; see `tessera {verb} --help`")
    given = [option for option, value in begins.items() if value]
    if resume is not None and given:
        raise UserError(f"--resume goes on with what {resume} holds, as it is; leave out {', '.join(given)}")


def examples(*commands: str) -> str:
    """The end of a verb's --help: commands to copy, a line each."""
    heading = "Examples:" if len(commands) > 1 else "Example:"
    return "\n".join([heading, *(f"  [bold]{command}[/bold]" for command in commands)])


def print_json(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite become null."""
    from tessera.store.json_text import dumps

    print(dumps(value, indent=2))


def print_table(table: "Table") -> None:
    """A table on standard output, folded to the width of a terminal and never folded in a pipe."""
    from rich.console import Console

    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def new_table(title: str, headings: Sequence[str], *, numbers: Sequence[str] = ()) -> "Table":
    """An empty table; the columns named in `numbers` are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return table


def say(text: str = "") -> None:
    """A line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def out_folder(out: Path | None, name: str) -> Path:
    """The folder of a run or comparison."""
    return out or Path("runs") / name


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that leaves one digit before the point, such as "3.7 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
