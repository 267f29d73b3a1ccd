"""tessera train: what it shows, how it stops, and that going on gives the run that was never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.store import RunFolder, read_events
from tessera.training.trainer import Trainer
from tests.cli.conftest import Answer, tessera, write_text

COMMAND = [sys.executable, "-c", "from tessera.cli.main import main; main()"]


def start(*words: str | Path) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *map(str, words)], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def press_ctrl_c(process: subprocess.Popen[str], after: str) -> Answer:
    """SIGINT to the whole group, as a terminal sends it, once a line of standard error holds `after`."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if after in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Answer(process.returncode, out, seen + err)


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run / "events.jsonl", "step")}


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "model.safetensors").read_bytes()


def test_a_run_tells_its_losses_and_where_things_are(recipe: Path, tmp_path: Path) -> None:
    answer = tessera("train", recipe, "--out", tmp_path / "run", "--set", "training.steps=2")
    assert answer.code == 0
    step = [*read_events(tmp_path / "run" / "events.jsonl", "step")][-1]
    validation = [*read_events(tmp_path / "run" / "events.jsonl", "validation")][-1]
    assert f"{step['lm_loss']:.4f}" in answer.out
    assert f"{validation['bits_per_byte']:.4f} bits per byte" in answer.out
    assert f"{tmp_path}/run/report.html" in answer.out and (tmp_path / "run" / "report.html").is_file()
    assert "data: 40 documents" in answer.err and "step 2/2" in answer.err


def test_json_is_one_object_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    answer = tessera("train", recipe, "--out", tmp_path / "run", "--set", "training.steps=2", "--json")
    assert answer.code == 0 and answer.err == ""
    facts = answer.json
    assert facts["state"] == "finished" and facts["step"] == 2 and facts["tokens"] == 2 * 4 * 16
    assert facts["run"] == str(tmp_path / "run") and Path(facts["report"]).is_file()
    assert 0 < facts["validation"]["bits_per_byte"] < 8 and facts["loss"] > 0


def test_ctrl_c_keeps_a_checkpoint_and_resuming_gives_the_unbroken_run(recipe: Path, tmp_path: Path) -> None:
    longer = ["--set", "training.steps=12"]
    assert tessera("train", recipe, *longer, "--out", tmp_path / "unbroken").code == 0
    run = tmp_path / "run"
    answer = press_ctrl_c(start("train", recipe, *longer, "--out", run), after="validation at step 2")
    assert answer.code == 130 and answer.out == "" and "Traceback" not in answer.err
    at_once, at_the_end = answer.err.index("stopping after this step"), answer.err.index("stopped after step")
    assert at_once < at_the_end and f"tessera train --resume {run}" in answer.err
    state = RunFolder.open(run).state()
    assert state["state"] == "interrupted" and 2 <= state["step"] < 12
    assert (run / "report.html").is_file()

    answer = tessera("train", "--resume", run)
    assert answer.code == 0 and "finished   12 steps" in answer.out
    assert losses(run) == losses(tmp_path / "unbroken")
    assert weights(run, 12) == weights(tmp_path / "unbroken", 12)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_second_ctrl_c_tells_the_way_on_that_there_is(
    kept: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trainer: Trainer) -> None:
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        original(trainer)

    original = Trainer._step
    monkeypatch.setattr(Trainer, "_step", step)
    run = tmp_path / "run"
    settings = ["--set", f"training.checkpoint_interval={kept}", "--set", "training.steps=4"]
    answer = tessera("train", recipe, *settings, "--out", run)
    assert answer.code == 130 and answer.out == "" and "stopped at once" in answer.err
    assert (f"go on from step 2 with:\n  tessera train --resume {run}" in answer.err) == (kept == 2)
    monkeypatch.undo()
    again = tessera("train", "--resume", run)
    assert again.code == (0 if kept else 2)
    if not kept:
        assert "no checkpoint" in answer.err and "no checkpoint" in again.err and "--out" in again.err


def test_ctrl_c_before_the_first_step_leaves_no_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object, **__: object) -> None:  # while the text is read, which here is over too soon for a signal
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tessera.data.prepare", pressed)
        answer = tessera("train", recipe, "--out", tmp_path / "run")
    assert answer.code == 130 and answer.out == "" and "stopped before the first step" in answer.err
    assert not (tmp_path / "run").exists()
    assert tessera("train", recipe, "--out", tmp_path / "run").code == 0


def test_a_finished_run_is_not_resumed_but_told_how_to_go_on(run: Path) -> None:
    answer = tessera("train", "--resume", run)
    assert answer.code == 2 and f"--from {run}" in answer.err


def test_a_new_stage_takes_weights_and_tokenizer_with_another_length_and_text(
    recipe: Path, run: Path, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text")
    for path in text.iterdir():
        path.write_text(path.read_text().replace("expert", "zebra"))
    sets = ["--set", f"data.source={text}", "--set", "data.sequence_length=24", "--set", "training.steps=2"]
    sets += ["--set", "optimizer.learning_rate=0", "--set", "training.bias_update_speed=0"]
    stage = tmp_path / "stage"
    answer = tessera("train", recipe, "--from", run, *sets, "--out", stage)
    assert answer.code == 0, answer.err
    checkpoint = stage / "checkpoints" / "step-2"
    first = run / "checkpoints" / "step-4"
    assert (checkpoint / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (checkpoint / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert RunFolder.open(stage).recipe().data.sequence_length == 24
    assert {event["tokens"] for event in read_events(stage / "events.jsonl", "step")} == {4 * 24, 8 * 24}


def test_a_new_stage_refuses_a_tokenizer_that_its_weights_do_not_know(recipe: Path, run: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", documents=20)
    settings = ["--set", f"data.source={text}", "--set", "training.steps=1"]
    assert tessera("train", recipe, *settings, "--out", tmp_path / "other").code == 0
    tokenizer = tmp_path / "other" / "checkpoints" / "step-1" / "tokenizer.json"
    out = ["--out", tmp_path / "stage"]
    answer = tessera("train", recipe, "--from", run, "--set", f"data.tokenizer={tokenizer}", *out)
    assert answer.code == 2 and "data.tokenizer" in answer.err and not (tmp_path / "stage").exists()


def test_weights_of_another_shape_are_refused_and_leave_no_folder(recipe: Path, run: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "stage"]
    answer = tessera("train", recipe, "--from", run, "--set", "model.hidden_size=48", *out)
    assert answer.code == 2 and "model.embed_tokens.weight" in answer.err
    assert not (tmp_path / "stage").exists()


def test_a_step_that_is_not_finite_ends_the_run_and_names_where(recipe: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    answer = tessera("train", recipe, "--set", "optimizer.learning_rate=1e30", *out)
    assert answer.code == 2 and "not finite" in answer.err and "model.layers." in answer.err
    assert RunFolder.open(tmp_path / "run").state()["state"] == "failed"
    report = tessera("report", tmp_path / "run", "--json")
    assert report.code == 0 and Path(report.json["report"]).is_file()


def test_an_estimate_beyond_the_time_limit_is_said_and_steps_are_not_cut(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tessera.cli import board

    monkeypatch.setattr(board, "FIRST_ESTIMATE", 0.0)
    sets: list[Any] = ["--set", "training.time_limit_minutes=0.0001", "--set", "training.steps=6"]
    answer = tessera("train", recipe, *sets, "--out", tmp_path / "run")
    assert answer.code == 0 and "6 steps" in answer.out
    assert answer.err.count("training.time_limit_minutes = 0.0001") == 1
