"""The time left and the warning about it, on a clock that the test moves."""

import io
import os
import signal
import sys
from typing import Any

import pytest

from tessera.cli import board as module
from tessera.cli.board import STOPPING, Board
from tessera.training.interrupt import finish_on_signal


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(module, "say", found.append)
    monkeypatch.setattr(module, "LINE_EVERY", 0)
    return found


def play(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch, steps: int, first: int = 0, limit: float | None = None
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    board = Board(limit_minutes=limit)
    start: dict[str, Any] = {"kind": "start", "steps": steps, "step": first, "notes": []}
    board.handle("fp8", start)
    for step, taken in enumerate(seconds, start=first):
        now[0] += taken
        board.handle("fp8", {"kind": "step", "step": step, "tokens_per_s": 100.0, "lm_loss": 4.0})


def test_the_time_left_is_that_of_steps_behind_the_warm_up(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    play([10, 10, 10, *[1] * 97], monkeypatch, steps=100)
    assert lines[0].endswith("16:30 left")  # all that is known after one step of ten seconds
    assert lines[10].endswith("1:29 left")
    assert lines[50].endswith("0:49 left")
    assert lines[99].endswith("0:00 left")


def test_a_resumed_run_counts_its_own_steps_only(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    play([1] * 20, monkeypatch, steps=100, first=80)
    assert lines[9].endswith("0:10 left")


def test_a_run_longer_than_its_limit_says_so_once_and_a_shorter_one_never(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play([2] * 300, monkeypatch, steps=300, limit=8)
    assert sum("all steps are made all the same" in line for line in lines) == 1
    lines.clear()
    play([30, *[2] * 299], monkeypatch, steps=300, limit=12)
    assert not any("all steps" in line for line in lines)


def test_a_stop_is_told_once_and_only_of_jobs_that_train(lines: list[str]) -> None:
    board = Board()
    board.handle("same weights", {"kind": "stopping"})
    assert lines == []
    for job in ("bf16", "fp8"):
        board.handle(job, {"kind": "start", "steps": 10, "step": 0, "notes": []})
    for job in ("same weights", "bf16", "fp8"):
        board.handle(job, {"kind": "stopping"})
    assert lines == [STOPPING]


def test_an_unstable_step_is_one_line_with_what_was_done_and_where_more_is(lines: list[str]) -> None:
    board = Board()
    event = {"kind": "unstable", "step": 12, "reason": "a spike, loss 9 above 5", "decision": "skipped"}
    event |= {"rule": 'stability.on_spike = "skip"', "evidence": "evidence/step-12.json"}
    board.handle("fp8", event)
    board.handle("fp8", event | {"evidence": None, "evidence_error": "no room"})
    said = 'fp8: step 12: a spike, loss 9 above 5; skipped (stability.on_spike = "skip"); '
    assert lines == [said + "evidence/step-12.json", said + "no evidence: no room"]


class Terminal(io.StringIO):
    """A terminal where Ctrl-C is pressed while a line about validation is written."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "validation" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_a_stop_in_the_middle_of_a_line_above_the_bars_is_told_in_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with Board() as board, finish_on_signal(lambda: board.handle("fp8", {"kind": "stopping"})) as wish:
        board.handle("fp8", {"kind": "start", "steps": 10, "step": 0, "notes": []})
        board.handle("fp8", {"kind": "step", "step": 0, "tokens_per_s": 100.0, "lm_loss": 4.0})
        board.handle("fp8", {"kind": "validation", "step": 1, "bits_per_byte": 2.0})
        assert wish.stop
    lines = [line.rpartition("\x1b[2K")[2].strip() for line in terminal.getvalue().split("\n")]
    assert STOPPING in lines and "fp8: validation at step 1: 2.000 bits per byte" in lines
