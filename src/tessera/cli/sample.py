"""tessera sample: let a trained model continue a text."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import Json, Threads, examples, print_json, say
from tessera.recipe import UserError

EXAMPLE = examples(
    "tessera sample runs/tiny --prompt 'def read(' --tokens 80 --temperature 0.5",
    "tessera sample runs/tiny/arms/bf16/checkpoints/step-125 --temperature 0 --json",
)
INCOMPLETE = "\ufffd"  # what the decoder gives for bytes that are no character, or none yet
# A terminal obeys control characters; a young model writes all of them.
VISIBLE = {code: INCOMPLETE for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def command(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a comparison (its FP8 arm) or a checkpoint.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue; may be empty.")] = "def ",
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to add, at most.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="0 takes the most probable token each time; 1 draws as the model says."),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, max=1, help="Draw from the most probable tokens that together have this probability."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same text.")] = 0,
    ema: Annotated[
        bool, typer.Option("--ema", metavar=" ", help="Take the moving average of the weights (training.ema_decay).")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text with a trained model, in the precision it was trained in."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        raise UserError(f"--prompt {prompt!a}: is not UTF-8") from None
    for option, value in (("--temperature", temperature), ("--top-p", top_p)):
        if not math.isfinite(value):
            raise UserError(f"{option} {value}: must be a finite number")

    import torch

    if threads:
        torch.set_num_threads(threads)
    sample = make_sample(model, prompt, tokens, temperature, top_p, seed, ema, None if json else _show)
    if json:
        print_json(sample)
    else:
        print()


def make_sample(
    path: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ema: bool = False,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The sample as a dict {prompt, text, temperature, precision, checkpoint, ema}.

    `ema` takes the averaged weights; `show` gets the text as it comes. Raises UserError where there is no checkpoint,
    or none with averages.
    """
    from tessera.data import Tokenizer
    from tessera.inference.sample import continue_tokens
    from tessera.model import Transformer
    from tessera.model.weights import read_weights, require_bytes_of
    from tessera.numerics import Policy
    from tessera.recipe import load_recipe
    from tessera.store import find_checkpoint, verify_checkpoint
    from tessera.store.checkpoint_path import EMA, WEIGHTS

    checkpoint = find_checkpoint(path)
    if ema and not (checkpoint / EMA).is_dir():
        raise UserError(
            f"{checkpoint}: holds no average of the weights; leave out --ema, or train with training.ema_decay"
        )
    part = EMA if ema else WEIGHTS
    verify_checkpoint(checkpoint, (part,))
    recipe = load_recipe(checkpoint / "recipe.toml")
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    require_bytes_of(checkpoint, recipe.model, part)
    model = Transformer(recipe.model, Policy(**recipe.numerics.model_dump()))
    read_weights(checkpoint, model, part)
    precision = recipe.numerics.precision
    if show:
        say(f"{checkpoint} ({precision}{', moving average' if ema else ''})")
        show(prompt)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    added: list[int] = []
    text = shown = ""
    for token in continue_tokens(model, ids, max_new_tokens=tokens, stop=tokenizer.end_of_text, **options):
        added.append(token)
        text = tokenizer.decode(added)
        if show and not text.endswith(INCOMPLETE):  # a character may take several tokens
            show(text[len(shown) :])
            shown = text
    if show:
        show(text[len(shown) :])
    facts = {"temperature": temperature, "precision": precision, "checkpoint": checkpoint, "ema": ema}
    return {"prompt": prompt, "text": text, **facts}


def _show(text: str) -> None:
    sys.stdout.write(text.translate(VISIBLE))
    sys.stdout.flush()
