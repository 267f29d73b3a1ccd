"""Every command that the documentation shows exists, takes the options shown, and the cheap ones run.

Commands are found in fenced blocks without a language (or of a shell), in code spans, and in the examples of --help.
All are parsed by the real command line; RUN and ONLY_PARSED say which of the pages' commands are also run here.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from tessera.cli.main import app
from tessera.recipe import load_recipe
from tests.cli.conftest import tessera, write_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# small.toml at a size that trains in a second; what the page itself sets comes later and wins
SCALED_DOWN = [
    "model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=48",
    "model.moe_intermediate_size=24", "model.num_attention_heads=2", "model.q_lora_rank=24", "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8", "data.sequence_length=16",
    "data.batch_size=4", "data.validation_fraction=0.2", "training.steps=1", "training.micro_batch_size=2",
    "training.validation_batches=2",
]  # fmt: skip

# Run here, in this order and in one folder, as the page has them but for these settings.
RUN: dict[str, list[str]] = {
    "tessera train recipes/small.toml --set data.source=my_texts": SCALED_DOWN,
    "tessera train recipes/small.toml --from runs/small --set data.source=my_texts --out runs/stage2": SCALED_DOWN,
    "tessera inspect memory recipes/tiny.toml --measure": ["data.batch_size=2"],
    "tessera inspect memory recipes/deepseek-v3.toml": [],
}
# Parsed only: they take minutes. tests/cli makes comparisons, and interrupts and resumes, with a small model.
ONLY_PARSED = {
    "make train",
    "make test",
    "make native",
    "make sanitise",
    'make install PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"',
    "tessera compare",
    "tessera compare recipes/tiny.toml --set data.source=my_texts --out runs/mine",
    "tessera train --resume runs/small",
    "tessera train --resume runs/small/checkpoints/step-40",
    "tessera compare --resume runs/tiny --ablations",
    "tessera compare --resume runs/tiny --control 2 --ablations --accumulation",
}
# The table of the README, with what stands for its words; run where the words lead to something cheap.
TABLE = {
    "tessera train RECIPE": None,
    "tessera compare RECIPE": None,
    "tessera sample RUN": "tessera sample runs/stage2 --tokens 4",
    "tessera report DIR": "tessera report runs/stage2",
    "tessera inspect model RECIPE": "tessera inspect model recipes/deepseek-v3.toml",
    "tessera inspect precision RECIPE": "tessera inspect precision recipes/deepseek-v3.toml",
    "tessera inspect memory RECIPE": "tessera inspect memory recipes/deepseek-v3.toml",
    "tessera inspect accumulation": "tessera inspect accumulation --largest-k 512 --size 2",
    "tessera doctor": "tessera doctor",
}


def fenced(page: Path, *languages: str) -> Iterator[str]:
    """The contents of fenced blocks in one of the languages ("" is none)."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield block


def as_command(text: str) -> str | None:
    """A line of a page as the command that it is, without its comment, or None."""
    text = re.sub(r"\s+#.*", "", text.strip().removeprefix("$ ").removeprefix(".venv/bin/"))
    return text if re.match(r"(tessera|make) ", text) else None


def shown() -> list[tuple[str, str]]:
    """(page, command) of every command in a block or a code span of the pages."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in fenced(page, "", "sh", "bash", "console") for line in block.splitlines()]
        for line in (*lines, *re.findall(r"`([^`\n]+)`", text)):
            if command := as_command(line):
                found.append((page.name, command))
    return found


def verbs() -> dict[str, Any]:
    """Every command of the real command line under its words, "inspect model" among them."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))
        if not hasattr(command, "commands"):
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), ())
    return found


def verb_of(command: str) -> str:
    words = shlex.split(command)[1:]
    return next((name for name in verbs() if words[: len(name.split())] == name.split()), "")


def parse(command: str) -> dict[str, Any]:
    """The values that the real command line reads from `tessera ...`; fails for what it would refuse."""
    name = verb_of(command)
    assert name, f"{command}: no such command"
    rest = shlex.split(command)[1 + len(name.split()) :]
    found = verbs()[name].make_context(f"tessera {name}", rest).params
    assert isinstance(found, dict)
    return found


def examples() -> list[tuple[str, str]]:
    """(verb, command) of every example at the end of a --help."""
    return [
        (name, example)
        for name, command in verbs().items()
        for example in re.findall(r"\[bold\](.*?)\[/bold\]", command.epilog or "")
    ]


def test_every_command_of_the_pages_is_classified_as_run_or_only_parsed() -> None:
    assert {command for _, command in shown()} == {*RUN, *ONLY_PARSED, *TABLE}


@pytest.mark.parametrize("where, command", dict.fromkeys([*shown(), *examples()]))
def test_a_command_that_is_shown_exists_and_takes_its_options(where: str, command: str) -> None:
    if command.startswith("make "):
        makefile = (ROOT / "Makefile").read_text()
        target, *variables = shlex.split(command)[1:]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        for variable in variables:
            assert re.search(rf"^{variable.partition('=')[0]} \?=", makefile, re.MULTILINE)
        return
    if command == "tessera compare":  # the page speaks of the verb
        assert "compare" in verbs()
        return
    values = parse(command)
    recipe = values.get("recipe")
    if recipe and recipe.suffix:
        load_recipe(ROOT / recipe, values["overrides"] or ())


def test_the_table_of_the_readme_has_every_command_and_only_options_that_exist() -> None:
    rows = re.findall(r"^\| `(tessera [^`]+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [command for command, _ in rows] == [*TABLE]
    assert {verb_of(command) for command, _ in rows} == {*verbs()}
    for command, text in rows:
        known = {option for parameter in verbs()[verb_of(command)].params for option in parameter.opts}
        for option in re.findall(r"--[\w-]+", text):
            assert option in known, f"{command}: {option}"
        for recipe in re.findall(r"`(recipes/[^`]+)`", text):
            load_recipe(ROOT / recipe)


@pytest.mark.parametrize("name", ["", "inspect", *verbs()])
def test_help_of_every_command_shows_its_options_and_an_example(name: str) -> None:
    answer = tessera(*name.split(), "--help")
    assert answer.code == 0 and answer.err == ""
    assert f"Usage: {' '.join(['tessera', *name.split()])} [OPTIONS]" in answer.out and "Example" in answer.out
    for parameter in verbs()[name].params if name in verbs() else ():
        assert parameter.opts[0].lstrip("-").upper() in answer.out.upper()


def test_the_cheap_commands_run_as_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    write_text(tmp_path / "my_texts")
    monkeypatch.chdir(tmp_path)
    for command, settings in RUN.items():
        verb, recipe, *words = shlex.split(command)[1:]
        answer = tessera(verb, recipe, *(word for key in settings for word in ("--set", key)), *words)
        assert answer.code == 0, f"{command}\n{answer.err}"
    for command in filter(None, TABLE.values()):
        answer = tessera(*shlex.split(command)[1:])
        assert answer.code == 0 and answer.out, f"{command}\n{answer.err}"
    assert (tmp_path / "runs" / "stage2" / "report.html").is_file()


def test_the_python_of_the_readme_runs() -> None:
    (block,) = fenced(ROOT / "README.md", "python")
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    before = [*model.parameters()]
    exec(block, {"model": model})
    assert type(model[0]) is not torch.nn.Linear
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before]
