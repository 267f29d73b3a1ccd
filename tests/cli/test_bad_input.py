"""Every mistake that a first user makes: one clear message, exit code 2, and nothing left in the way."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.store.checkpoint_path import TENSORS
from tests.cli.conftest import Answer, tessera, write_text

# (what is set, what the message must say); {folder} holds the texts that `texts` makes
BAD_DATA = {
    "no such source": (["data.source={folder}/nowhere"], ["nowhere", "does not exist"]),
    "empty folder": (["data.source={folder}/empty"], ["empty", "no text found", "data.extensions"]),
    "empty files": (["data.source={folder}/blank"], ["no text found", "2 documents without a character"]),
    "binary and latin-1": (["data.source={folder}/binary"], ["a.txt (binary)", "b.txt (not UTF-8 at byte 3)"]),
    "dangling link": (["data.source={folder}/unreadable"], ["c.txt", "No such file"]),
    "broken JSONL": (["data.source={folder}/broken.jsonl"], ["broken.jsonl:2", "data.text_field", "body"]),
    "vocabulary too large": (["model.vocab_size=100000"], ["model.vocab_size = 100000", "at most 326"]),
    "vocabulary too small": (["model.vocab_size=100"], ["vocab_size", "272"]),
    "smaller than a batch": (["data.batch_size=400"], ["data.batch_size = 400", "at most 236"]),
    "sequence longer than text": (
        ["data.sequence_length=9000", "model.max_position_embeddings=9000"],
        ["data.sequence_length = 9000", "longer than the training text", "at most"],
    ),
    "unwritable cache": (["data.cache={folder}/file/cache"], ["file/cache", "Not a directory", "data.cache"]),
    "no such tokenizer": (["data.tokenizer={folder}/none.json"], ["none.json"]),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("empty", "blank", "binary", "unreadable"):
        (folder / name).mkdir()
    (folder / "blank" / "a.txt").write_text("")
    (folder / "blank" / "b.txt").write_text("")
    (folder / "binary" / "a.txt").write_bytes(b"\x7fELF\0\0" * 50)
    (folder / "binary" / "b.txt").write_bytes("café au lait".encode("latin-1"))
    (folder / "unreadable" / "c.txt").symlink_to("gone.txt")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"body": "no text"}\n')
    (folder / "file").write_text("a regular file")
    return folder


def assert_refused(answer: Answer, *said: str) -> None:
    assert answer.code == 2, answer.err
    assert answer.out == "" and "Traceback" not in answer.err
    assert re.search(r"^tessera: ", answer.err, re.MULTILINE)
    for words in said:
        assert words in answer.err


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_bad_data_is_named_and_leaves_no_folder(
    name: str, verb: str, texts: Path, recipe: Path, tmp_path: Path
) -> None:
    settings, said = BAD_DATA[name]
    sets = [word for setting in settings for word in ("--set", setting.format(folder=texts))]
    assert_refused(tessera(verb, recipe, *sets, "--out", tmp_path / "out"), *said)
    assert not (tmp_path / "out").exists()


def test_the_same_command_works_once_the_cause_is_gone(recipe: Path, tmp_path: Path) -> None:
    command = ["train", recipe, "--set", f"data.source={tmp_path / 'text'}", "--set", "training.steps=1"]
    command += ["--out", tmp_path / "out"]
    assert_refused(tessera(*command), "does not exist")
    write_text(tmp_path / "text")
    assert tessera(*command).code == 0


def test_files_that_cannot_be_read_among_good_ones_are_skipped_and_told(
    texts: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = write_text(tmp_path / "text")
    (folder / "program.txt").write_bytes(b"\x7fELF\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "link.txt").symlink_to("gone.txt")
    os.mkfifo(folder / "pipe.txt")
    sets = ["--set", f"data.source={folder}", "--set", "training.steps=1"]
    answer = tessera("train", recipe, *sets, "--out", tmp_path / "out")
    assert answer.code == 0
    assert "warning: 4 files were skipped" in answer.err and "latin.txt (not UTF-8 at byte 3)" in answer.err


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_folder_in_use_is_never_written_to(verb: str, recipe: Path, run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert_refused(tessera(verb, recipe, "--out", run), str(run), "--resume", "--out")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(tessera(verb, recipe, "--out", tmp_path), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_an_output_that_cannot_be_written_is_named(verb: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    assert_refused(tessera(verb, recipe, "--out", tmp_path / "file" / "run"), "file/run", "Not a directory")
    assert_refused(tessera(verb, recipe, "--out", tmp_path / "file"), str(tmp_path / "file"), "--out")


RECIPES: dict[str, tuple[str, str, list[str]]] = {
    "newer": ("[model]", "schema = 99\n[model]", ["schema = 99", "upgrade tessera"]),
    "unknown key": ("hidden_size = 32", "hiden_size = 32", ["model.hiden_size", "did you mean model.hidden_size?"]),
    "another section's key": (
        "steps = 4",
        "sequence_length = 8\nsteps = 4",
        ["training.sequence_length", "data.sequence_length"],
    ),
    "wrong type": ("hidden_size = 32", 'hidden_size = "big"', ['model.hidden_size = "big"', "integer >= 1"]),
    "impossible": ("num_experts_per_tok = 2", "num_experts_per_tok = 9", ["model.num_experts_per_tok", "9", "4"]),
    "not TOML": ("[model]", "[model", ["not valid TOML", "line"]),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb", [["train"], ["compare"], ["inspect", "model"], ["inspect", "precision"]], ids=" ".join)
def test_a_bad_recipe_is_answered_with_file_key_value_and_what_is_allowed(
    name: str, verb: list[str], changed: Callable[[str, str], Path]
) -> None:
    old, new, said = RECIPES[name]
    assert_refused(tessera(*verb, changed(old, new)), "changed.toml", *said)


def test_a_recipe_that_is_no_text_and_one_that_is_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "program.toml").write_bytes(b"\x7fELF\xff\0")
    assert_refused(tessera("train", tmp_path / "program.toml"), "program.toml", "UTF-8")
    assert_refused(tessera("train", tmp_path / "none.toml"), "none.toml", "no such recipe")
    assert_refused(tessera("train", tmp_path), str(tmp_path), "directory")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("training.steps", "section.key=value"),
        ("training.stepz=3", "did you mean training.steps?"),
        ("training.steps=many", "integer >= 1"),
        ("nonsense.steps=3", "nonsense"),
    ],
)
def test_a_bad_override_is_named_with_the_nearest_key(setting: str, said: str, recipe: Path) -> None:
    assert_refused(tessera("train", recipe, "--set", setting), f"--set {setting}", said)


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_recipe_or_a_run_to_go_on_with_is_needed_and_not_both(
    verb: str, recipe: Path, run: Path, tmp_path: Path
) -> None:
    said = [f"{verb} takes a RECIPE or --resume DIR", f"tessera {verb} --help"]
    assert_refused(tessera(verb), *said)
    assert_refused(tessera(verb, recipe, "--resume", run), *said)
    assert_refused(tessera(verb, "--resume", run, "--out", tmp_path / "out"), "--resume goes on with", "--out")
    assert not (tmp_path / "out").exists()


def test_arms_without_a_twin_and_unknown_arms_are_refused(recipe: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert_refused(tessera("compare", recipe, "--arms", "fp8", *out), "bf16 is missing")
    assert_refused(tessera("compare", recipe, "--arms", "fp8,bf16,per_tensor", *out), "did you mean per-tensor?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["sample"], ["report"], ["train", "--resume"], ["compare", "--resume"], ["train", "{recipe}", "--from"]],
    ids=" ".join,
)
def test_a_folder_that_is_no_run_is_named_with_what_would_be(words: list[str], recipe: Path, tmp_path: Path) -> None:
    command = [word.format(recipe=recipe) for word in words]
    assert_refused(tessera(*command, tmp_path / "none"), str(tmp_path / "none"))
    assert_refused(tessera(*command, tmp_path), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_used(run: Path, recipe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "checkpoints" / "step-4" / "model" / TENSORS
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert_refused(tessera("sample", broken), f"model/{TENSORS}")
    assert_refused(tessera("train", recipe, "--from", broken, "--out", tmp_path / "out"), f"model/{TENSORS}")
    assert not (tmp_path / "out").exists()
