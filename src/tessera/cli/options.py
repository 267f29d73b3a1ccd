"""Options that several verbs share, and how a result is shown."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, such as recipes/tiny.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set training.steps=100; may be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write; default: runs/<name>.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else there.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite become null."""
    from tessera.store.json_text import dumps

    print(dumps(value, indent=2))


def say(text: str = "") -> None:
    """A line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def out_folder(out: Path | None, name: str) -> Path:
    """The folder of a run or comparison."""
    return out or Path("runs") / name
