"""The command line in this process, on a model and a text of a few pages that train in seconds."""

import json
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tessera.cli.main import main

RECIPE = """
[model]
vocab_size = 320
hidden_size = 32
num_hidden_layers = 2
intermediate_size = 48
moe_intermediate_size = 24
n_routed_experts = 4
num_experts_per_tok = 2
num_attention_heads = 2
q_lora_rank = 24
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
max_position_embeddings = 64

[data]
source = "{text}"
sequence_length = 16
batch_size = 4
validation_fraction = 0.2

[optimizer]
learning_rate = 3e-3

[training]
steps = 4
validation_interval = 2
validation_batches = 2
health_interval = 4
load_interval = 2

[checkpoint]
interval = 0
"""


@dataclass(frozen=True)
class Answer:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def tessera(*words: str | int | Path) -> Answer:
    """Run `tessera words...` as a shell would, but in this process; a traceback is raised."""
    out, err, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["tessera", *map(str, words)]
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        assert end.code is None or isinstance(end.code, int)
        code = end.code or 0
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def write_text(folder: Path, documents: int = 40) -> Path:
    """A folder of small files of words, some of them not ASCII."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["tile", "scale", "expert", "token", "route", "sum", "FP8", "def", "return", "self", "né", "=", "(", ")"]
    for number in range(documents):
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(12)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file of 4 steps, and its text beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "small.toml"
    path.write_text(RECIPE.replace("{text}", str(write_text(folder / "text"))))
    return path


@pytest.fixture(scope="session")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    answer = tessera("train", recipe, "--out", folder)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def changed(recipe: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """changed("steps = 4", "steps = 5"): the recipe file with other words in it."""

    def write(old: str, new: str) -> Path:
        text = recipe.read_text()
        assert old in text
        path = tmp_path / "changed.toml"
        path.write_text(text.replace(old, new))
        return path

    return write
