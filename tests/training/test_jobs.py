"""Processes of a comparison: results, events, errors, deaths, interruption."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.recipe import UserError
from tessera.training.jobs import Emit, Interrupted, Job, run_jobs


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20  # a job that waits for ever would hang the tests
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    wait_until(lambda: bool(ended))
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
        if event["kind"] != "start":
            return
        timers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[-1].start()

    with pytest.raises(Interrupted):
        run_jobs([Job("fp8", linger, (path,))], 1, on_start)
    assert path.read_text() == "saved"


def mistake_after(path: Path, emit: Emit) -> None:
    wait_until(path.exists)
    raise UserError("no such text")


def linger_and_tell(started: Path, saved: Path, emit: Emit) -> None:
    linger(saved, lambda event: started.touch())


def test_another_jobs_mistake_ends_the_rest_but_lets_them_save(tmp_path: Path) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    jobs = [Job("good", linger_and_tell, (started, saved)), Job("bad", mistake_after, (started,))]
    with pytest.raises(UserError, match="bad: no such text"):
        run_jobs(jobs, 2, lambda *_: None)
    assert saved.read_text() == "saved"


def test_on_a_signal_each_running_job_is_told_to_be_stopping_and_no_other_begins(tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []

    def on_event(name: str, event: dict[str, Any]) -> None:
        heard.append((name, event["kind"]))
        if len(heard) == 2:  # both have started
            os.kill(os.getpid(), signal.SIGINT)

    jobs = [Job(name, linger, (tmp_path / name,)) for name in ("fp8", "bf16", "late")]
    with pytest.raises(Interrupted):
        run_jobs(jobs, 2, on_event)
    assert sorted(heard) == [("bf16", "start"), ("bf16", "stopping"), ("fp8", "start"), ("fp8", "stopping")]
    assert {path.name for path in tmp_path.iterdir()} == {"fp8", "bf16"}


def take_long(asked: Path, ended: Path, emit: Emit) -> None:
    signal.signal(signal.SIGTERM, lambda *_: asked.touch())
    emit({"kind": "start"})
    time.sleep(20)
    ended.touch()


@pytest.mark.parametrize("when", ["before they are asked to end", "while they are waited for"])
def test_a_second_ctrl_c_ends_the_jobs_at_once(when: str, tmp_path: Path) -> None:
    asked, ended = tmp_path / "asked", tmp_path / "ended"

    def press_when_asked() -> None:
        wait_until(asked.exists)
        os.kill(os.getpid(), signal.SIGINT)

    second = threading.Thread(target=press_when_asked, daemon=True)

    def on_event(name: str, event: dict[str, Any]) -> None:
        if event["kind"] == "stopping" and when == "before they are asked to end":
            os.kill(os.getpid(), signal.SIGINT)
        elif event["kind"] == "stopping":
            second.start()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("fp8", take_long, (asked, ended))], 1, on_event)
    assert multiprocessing.active_children() == [] and not ended.exists()
    assert asked.exists() == (when == "while they are waited for")


def occupy(log: Path, name: str, workers: int, emit: Emit) -> None:
    with log.open("a") as file:
        file.write(f"+ {name}\n")
    wait_until(lambda: log.read_text().count("+") >= workers)  # the first ones are together for sure
    time.sleep(0.1)
    with log.open("a") as file:
        file.write(f"- {name}\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_as_many_jobs_run_at_once_as_there_are_workers_and_no_more(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_jobs([Job(name, occupy, (log, name, workers)) for name in "abc"], workers, lambda *_: None)
    at_once = [0]
    for line in log.read_text().splitlines():
        at_once.append(at_once[-1] + (1 if line.startswith("+") else -1))
    assert len(at_once) == 7 and max(at_once) == workers


def is_sigint_blocked(emit: Emit) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_of_a_terminal_reaches_no_job_not_even_the_first_of_a_program() -> None:
    """In a program of its own: the first process that `multiprocessing` starts there is not like the later ones."""
    lines = [
        "from tests.training.test_jobs import is_sigint_blocked",
        "from tessera.training.jobs import Job, run_jobs",
        "jobs = [Job(name, is_sigint_blocked, ()) for name in 'abc']",
        "print(sorted(run_jobs(jobs, 2, print).items()))",
    ]
    program = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert program.stdout == "[('a', True), ('b', True), ('c', True)]\n", program.stderr
