"""What needs no tensors starts at once, and every verb's help shows what to type."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tessera.cli.main import app
from tests.cli.conftest import tessera

PROGRAM = """
import contextlib, io, json, sys, time
from tessera.cli.main import main
sys.argv = ["tessera", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print(json.dumps([time.process_time(), sorted(sys.modules)]))
"""
RECIPES = Path(__file__).parents[2] / "recipes"
VERBS = ["train", "compare", "sample", "report", "doctor", "inspect"]
PATHS = [*([verb] for verb in VERBS), *(["inspect", what] for what in ("model", "precision", "accumulation"))]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["inspect", "model", str(RECIPES / "tiny.toml")]])
def test_what_needs_no_tensors_imports_no_torch_and_starts_at_once(words: list[str]) -> None:
    command = [sys.executable, "-c", PROGRAM, *words]
    seconds, modules = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "tokenizers", "safetensors", "numpy"} & set(modules)
    assert seconds < 1.5  # of CPU, with the interpreter; measured: 0.3


@pytest.mark.parametrize("path", [[], *PATHS], ids=" ".join)
def test_every_help_ends_with_an_example_whose_options_exist(path: list[str]) -> None:
    answer = tessera(*path, "--help")
    assert answer.code == 0 and answer.err == ""
    _, heading, examples = answer.out.partition("Example")
    assert heading
    lines = [line.strip() for line in examples.splitlines() if line.strip().startswith("tessera ")]
    assert lines
    for line in lines:
        verb = re.findall(r"^tessera ((?:inspect )?[a-z]+)", line)[0].split()
        if path:
            assert verb[: len(path)] == path
        assert set(re.findall(r"--[a-z-]+", line)) <= options_of(verb)


def options_of(verb: list[str]) -> set[str]:
    command = typer.main.get_command(app)
    for word in verb:
        command = command.commands[word]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def test_nothing_at_all_shows_the_verbs_and_is_an_error() -> None:
    answer = tessera()
    assert answer.code == 2
    assert all(verb in answer.out + answer.err for verb in VERBS)


def test_the_version_is_the_packages() -> None:
    assert re.fullmatch(r"tessera \d+\.\d+\.\d+\n", tessera("--version").out)


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "trian"),
        (["train", "--stepz"], "--stepz"),
        (["sample"], "RUN"),
        (["report"], "DIR"),
        (["inspect", "model"], "RECIPE"),
        (["train"], "a RECIPE or --resume DIR"),
        (["compare"], "a RECIPE or --resume DIR"),
        (["train", "a.toml", "--resume", "b"], "one of the two"),
        (["train", "--resume", "b", "--set", "training.steps=3"], "--set"),
        (["compare", "--resume", "b", "--arms", "fp8,bf16"], "--arms"),
        (["train", "a.toml", "--threads", "0"], "--threads"),
        (["train", "a.toml", "--threads", "many"], "--threads"),
        (["train", "a.toml", "--device", "tpu"], "must be cpu or cuda"),
        (["sample", "run", "--top-p", "2"], "--top-p"),
        (["sample", "run", "--prompt", "\udcff"], "not UTF-8"),
        (["inspect", "accumulation", "--largest-k", "1000"], "power of two"),
    ],
)
def test_a_wrong_command_line_is_answered_in_words_with_exit_code_2(words: list[str], said: str) -> None:
    answer = tessera(*words)
    assert answer.code == 2 and answer.out == ""
    assert said in re.sub(r"[│\s]+", " ", answer.err)
