"""The entry point of `tessera`: which verbs there are, and what happens to an error.

Exit codes: 0 done, 1 the answer is no (a verdict that failed, an installation that is not sound), 2 a mistake in the
input, 130 stopped by Ctrl-C. Commands import what they need when they run, so that `--help` starts at once.
"""

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from tessera.cli import compare, doctor, inspect, report, sample, train
from tessera.cli.options import examples
from tessera.recipe import UserError

app = typer.Typer(
    name="tessera",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "tessera compare recipes/tiny.toml",
        "tessera sample runs/tiny --prompt 'def read('",
        "tessera inspect model recipes/deepseek-v3.toml",
    ),
)
for verb in (train, compare, sample, report, doctor):
    app.command(name=verb.__name__.rsplit(".", 1)[-1], epilog=verb.EXAMPLE)(verb.command)
app.add_typer(inspect.app, name="inspect")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tessera {version('tessera')}")
        raise typer.Exit


@app.callback()
def tessera(
    version: Annotated[
        bool,
        typer.Option("--version", metavar=" ", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """Train DeepSeek-V3-style mixture-of-experts language models in FP8, with numerics one can trust."""


def main() -> None:
    """Run the command line; a mistake of the user ends with exit code 2 and its message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a text may hold what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="tessera")
    except UserError as error:
        print(f"tessera: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
