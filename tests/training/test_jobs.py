"""Processes of a comparison: results, events, errors, deaths, interruption."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tessera.recipe import UserError
from tessera.training.jobs import Emit, Interrupted, Job, run_jobs


def answer(value: int, emit: Emit) -> int:
    emit({"kind": "progress", "done": value})
    return value * 2


def stamp(path: Path, name: str, emit: Emit) -> None:
    with path.open("a") as file:
        file.write(name + "\n")


def mistake(emit: Emit) -> None:
    raise UserError("no such text")


def defect(emit: Emit) -> None:
    raise ZeroDivisionError("a defect")


def die(emit: Emit) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(path: Path, emit: Emit) -> None:
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    emit({"kind": "start"})
    while not ended:
        time.sleep(0.01)
    path.write_text("saved")


def test_results_and_events_arrive_under_their_names() -> None:
    heard: list[tuple[str, Any]] = []
    jobs = [Job("a", answer, (1,)), Job("b", answer, (2,))]
    assert run_jobs(jobs, 2, lambda name, event: heard.append((name, event["done"]))) == {"a": 2, "b": 4}
    assert sorted(heard) == [("a", 1), ("b", 2)]


def test_a_job_waits_for_the_one_it_needs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [Job("late", stamp, (log, "late"), after=("early",)), Job("early", stamp, (log, "early"))]
    run_jobs(jobs, 2, lambda *_: None)
    assert log.read_text().split() == ["early", "late"]


def test_a_users_mistake_comes_back_as_one_with_the_jobs_name() -> None:
    with pytest.raises(UserError, match="bad: no such text"):
        run_jobs([Job("bad", mistake, ())], 1, lambda *_: None)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a defect"):
        run_jobs([Job("bad", defect, ())], 1, lambda *_: None)


def test_a_killed_process_is_reported_with_its_status() -> None:
    with pytest.raises(UserError, match=r"fp8 ended without a word.*-9"):
        run_jobs([Job("fp8", die, ())], 1, lambda *_: None)


def test_an_interruption_lets_the_jobs_save_before_it_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    timers: list[threading.Timer] = []

    def on_start(name: str, event: dict[str, Any]) -> None:
        timers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[-1].start()

    with pytest.raises(Interrupted):
        run_jobs([Job("fp8", linger, (path,))], 1, on_start)
    assert path.read_text() == "saved"


def test_another_jobs_mistake_ends_the_rest_but_lets_them_save(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    jobs = [Job("good", linger, (path,)), Job("bad", mistake, ())]
    with pytest.raises(UserError):
        run_jobs(jobs, 2, lambda *_: None)
    assert not path.exists() or path.read_text() == "saved"
