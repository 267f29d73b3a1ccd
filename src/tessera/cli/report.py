"""tessera report: the page of a run or comparison."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import Json, examples, print_json

EXAMPLE = examples("tessera report runs/tiny")


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder or a comparison folder.")],
    json: Json = False,
) -> None:
    """Write report.html: one page that works offline, from what the run has recorded so far."""
    from tessera.training.report import write_report

    path = write_report(folder)
    if json:
        print_json({"report": path})
    else:
        print(path)
