"""The entry point of `tessera`: which verbs there are, and what happens to an error.

Commands import what they need when they run, so that `--help` starts at once.
"""

import os
import sys

import typer

from tessera.cli import compare, doctor, inspect, report, sample, train
from tessera.recipe import UserError

app = typer.Typer(
    name="tessera",
    help="Train DeepSeek-V3-style mixture-of-experts language models in FP8, with numerics one can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, compare, sample, report, doctor):
    app.command(name=verb.__name__.rsplit(".", 1)[-1], epilog=verb.EXAMPLE)(verb.command)
app.add_typer(inspect.app, name="inspect")


def main() -> None:
    """Run the command line; a mistake of the user ends with exit code 2 and its message, without a traceback."""
    try:
        app()
    except UserError as error:
        print(f"tessera: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
