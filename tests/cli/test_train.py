"""tessera train: what it shows, how it stops, and that going on gives the run that was never stopped."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tessera.cli import board
from tessera.store import RunFolder, read_events
from tessera.store.checkpoint_path import TENSORS, read_state_file
from tessera.store.files import unwritable
from tessera.training import checkpoint
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


def weights(run: Path, step: int) -> dict[str, list[Any]]:
    """The file's own bytes differ: the library writes its header's notes in any order."""
    tensors = load_file(run / "checkpoints" / f"step-{step}" / "model" / TENSORS)
    return {name: tensor.tolist() for name, tensor in tensors.items()}


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
    settings = ["--set", f"checkpoint.interval={kept}", "--set", "training.steps=4"]
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
    assert weights(stage, 2) == weights(run, 4)
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
    monkeypatch.setattr(board, "FIRST_ESTIMATE", 0.0)
    sets: list[Any] = ["--set", "training.time_limit_minutes=0.0001", "--set", "training.steps=6"]
    answer = tessera("train", recipe, *sets, "--out", tmp_path / "run")
    assert answer.code == 0 and "6 steps" in answer.out
    assert answer.err.count("training.time_limit_minutes = 0.0001") == 1


LONGER = ["--set", "training.steps=6", "--set", "checkpoint.interval=2"]


@pytest.fixture(scope="module")
def kept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    assert tessera("train", recipe, *LONGER, "--out", folder).code == 0
    return folder


def damaged(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step}" / "optimizer" / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def interrupted(kept: Path, folder: Path) -> Path:
    """A copy of the run as it stood after step 4."""
    shutil.copytree(kept, folder)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    RunFolder.open(folder).set_state("interrupted", 4)
    return folder


def test_a_damaged_checkpoint_is_named_with_the_command_that_goes_on_from_the_one_before(
    kept: Path, tmp_path: Path
) -> None:
    run = interrupted(kept, tmp_path / "run")
    file = damaged(run, 4)
    answer = tessera("train", "--resume", run)
    assert answer.code == 2 and f"{file}: has another SHA-256" in answer.err and "Traceback" not in answer.err
    command = f"tessera train --resume {run}/checkpoints/step-2"
    assert answer.err.rstrip().endswith(f"go on from the checkpoint of step 2 with:\n  {command}")
    again = tessera(*command.split()[1:])
    assert again.code == 0 and "finished   6 steps" in again.out
    assert losses(run) == losses(kept) and weights(run, 6) == weights(kept, 6) and weights(run, 4) == weights(kept, 4)


@pytest.mark.parametrize(
    "form", ["{run}/checkpoints/step-2/", "{run}/checkpoints/step-2", "checkpoints/step-2", "step-2"]
)
def test_a_finished_run_goes_on_from_an_earlier_checkpoint_however_it_is_named(
    form: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    monkeypatch.chdir(run / "checkpoints" if form == "step-2" else run)
    answer = tessera("train", "--resume", form.format(run=run))
    assert answer.code == 0, answer.err
    assert losses(run) == losses(kept) and weights(run, 6) == weights(kept, 6)
    assert [step for step, _ in RunFolder.open(run).checkpoints()] == [2, 4, 6]
    start = [*read_events(run / "events.jsonl", "start")][-1]
    assert start["resumed"] and start["step"] == 2


def test_a_run_that_was_taken_back_and_stopped_goes_on_from_where_its_events_are(kept: Path, tmp_path: Path) -> None:
    """Steps 4 and 6 are still there of its first course; the events know of step 2 only."""
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    RunFolder.open(run).set_state("interrupted", 2)
    offset = read_state_file(run / "checkpoints" / "step-2")["event_offset"]
    os.truncate(run / "events.jsonl", offset)
    answer = tessera("train", "--resume", run)
    assert answer.code == 0, answer.err
    assert [*read_events(run / "events.jsonl", "start")][-1]["step"] == 2
    assert losses(run) == losses(kept) and weights(run, 6) == weights(kept, 6)


def test_a_checkpoint_that_is_not_there_and_the_last_one_of_a_finished_run_are_refused(kept: Path) -> None:
    answer = tessera("train", "--resume", kept / "checkpoints" / "step-3")
    assert answer.code == 2 and "no complete checkpoint; there is step-2, step-4, step-6" in answer.err
    answer = tessera("train", "--resume", kept / "checkpoints" / "step-6")
    assert answer.code == 2 and "finished at step 6" in answer.err


def test_an_error_in_training_ends_with_the_way_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: Any) -> None:
        if "step-4" in folder.parent.name:
            raise unwritable(folder, OSError(errno.ENOSPC, "No space left on device"))
        original(folder, *_)

    original = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    answer = tessera("train", recipe, *LONGER, "--out", tmp_path / "run")
    assert answer.code == 2 and "No space left on device; free some space" in answer.err
    assert f"go on from step 2 with:\n  tessera train --resume {tmp_path}/run" in answer.err


@pytest.mark.parametrize(("on_failed_write", "code"), [("stop", 2), ("go_on", 0)])
@pytest.mark.parametrize("json", [False, True])
def test_a_report_that_the_disk_refuses_costs_no_figure_of_the_run(
    on_failed_write: str, code: int, json: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise unwritable(folder / "report.html", OSError(errno.ENOSPC, "No space left on device"))

    run = tmp_path / "run"
    sets = ["--set", "training.steps=2", "--set", f"checkpoint.on_failed_write={on_failed_write}"]
    with monkeypatch.context() as patch:
        patch.setattr("tessera.training.report.write_report", full)
        answer = tessera("train", recipe, *sets, "--out", run, *(["--json"] if json else []))
    assert answer.code == code
    assert "report.html: cannot be written: No space left on device" in answer.err
    assert f"`tessera report {run}`" in answer.err
    assert answer.json["report"] is None if json else "finished   2 steps" in answer.out
    assert RunFolder.open(run).state()["state"] == "finished"
    assert tessera("report", run).code == 0


def test_a_refused_save_is_told_on_the_screen_where_the_run_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: Any) -> None:
        if "step-2" in folder.parent.name:
            raise unwritable(folder, OSError(errno.ENOSPC, "No space left on device"))
        original(folder, *_)

    original = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    sets = [*LONGER, "--set", "checkpoint.on_failed_write=go_on"]
    answer = tessera("train", recipe, *sets, "--out", tmp_path / "run")
    assert answer.code == 0
    assert answer.err.count("No space left on device; free some space; training goes on without it") == 1
    report = tessera("report", tmp_path / "run")
    assert report.code == 0


def test_a_clock_that_jumps_back_changes_no_loss_no_speed_and_no_estimate(
    recipe: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(board, "LINE_EVERY", 0.0)
    run = tmp_path / "run"
    answer = tessera("train", recipe, *LONGER, "--out", run)
    assert answer.code == 0, answer.err
    times = [event["time"] for event in read_events(run / "events.jsonl")]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    assert losses(run) == losses(kept) and weights(run, 6) == weights(kept, 6)
    steps = [*read_events(run / "events.jsonl", "step")]
    assert all(event["tokens_per_s"] > 0 for event in steps)
    left = re.findall(r"step +\d/6 .* (\S+) left", answer.err)
    assert len(left) == 6 and all(re.fullmatch(r"0:\d\d", one) for one in left)
    (end,) = read_events(run / "events.jsonl", "end")
    assert 0 < end["seconds"] < 600 and "report     " in answer.out
