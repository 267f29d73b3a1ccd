"""tessera sample: let a trained model continue a text."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import Json, Threads, print_json

EXAMPLE = "Example: [bold]tessera sample runs/tiny --prompt 'def read(' --tokens 80 --temperature 0.5[/bold]"


def command(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a comparison (its FP8 arm) or a checkpoint.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token each time.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the smallest set of this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text with a trained model, in the precision it was trained in."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    show = None if json else lambda text: (sys.stdout.write(text), sys.stdout.flush())
    sample = make_sample(model, prompt, tokens, temperature, top_p, seed, show)
    if json:
        print_json(sample)
    else:
        print()


def make_sample(
    path: Path, prompt: str, tokens: int, temperature: float, top_p: float, seed: int, show: Any = None
) -> dict[str, Any]:
    """The sample as a dict {prompt, text, temperature, checkpoint}; `show` gets the text piece by piece."""
    from tessera.data import Tokenizer
    from tessera.inference.sample import continue_tokens
    from tessera.model import Transformer
    from tessera.model.weights import read_weights
    from tessera.numerics import Policy
    from tessera.recipe import load_recipe
    from tessera.store import find_checkpoint, verify_manifest

    checkpoint = find_checkpoint(path)
    verify_manifest(checkpoint)
    recipe = load_recipe(checkpoint / "recipe.toml")
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    model = Transformer(recipe.model, Policy(**recipe.numerics.model_dump()))
    read_weights(checkpoint, model)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    added: list[int] = []
    shown = ""
    if show:
        show(prompt)
    for token in continue_tokens(
        model,
        ids,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tokenizer.end_of_text,
    ):
        added.append(token)
        text = tokenizer.decode(added)
        if show and not text.endswith("\ufffd"):  # a character may take several tokens
            show(text[len(shown) :])
            shown = text
    return {"prompt": prompt, "text": tokenizer.decode(added), "temperature": temperature, "checkpoint": checkpoint}
