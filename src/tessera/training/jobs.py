"""Run functions in processes of their own, a few at a time, and hear from them while they work.

For the arms of a comparison: they share nothing but files, and one thread each beats two threads on one arm. A job
may wait for others. A UserError in a job is raised here again; a job that dies is reported with its exit status. On
Ctrl-C or SIGTERM the jobs are asked to end (training finishes its step and keeps a checkpoint) and waited for; on a
second Ctrl-C they are killed.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from tessera.recipe import UserError
from tessera.training.interrupt import finish_on_signal

Emit = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """The user ended the work; what was done is kept, and the message says how to go on."""


@dataclass(frozen=True)
class Job:
    """`target(*arguments, emit)` returns what the parent gets; importable and picklable, since it is spawned."""

    name: str
    target: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], workers: int, observer: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Run all jobs, at most `workers` at once, in order where nothing waits; returns results by name.

    `observer(name, event)` hears what a job emits, and {"kind": "stopping"} of each running job on a signal. Raises
    the first job's UserError (the others are ended), a RuntimeError with the job's traceback for a defect, Interrupted
    on a signal; KeyboardInterrupt on a second Ctrl-C, which ends the jobs at once, without a checkpoint.
    """
    context = multiprocessing.get_context("spawn")
    # The first process of a program starts the tracker as well, and that unblocks SIGINT (Python 3.11 to 3.13): the
    # first job would inherit it unblocked, and die of a Ctrl-C that comes before it can answer.
    resource_tracker.ensure_running()
    waiting, running, results = list(jobs), dict[str, tuple[SpawnProcess, Connection]](), dict[str, Any]()
    with finish_on_signal() as wish, _ended_with(running):
        while waiting or running:
            if wish.stop:
                for name in running:
                    observer(name, {"kind": "stopping"})
                raise Interrupted
            ready = [job for job in waiting if all(name in results for name in job.after)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, job.target, job.arguments), name=job.name)
                # Ctrl-C reaches every process of a terminal; the jobs are to hear of it from us alone, once they
                # are able to answer, so SIGINT stays blocked in them.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                process.start()
                running[job.name] = (process, mine)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                theirs.close()
            for name in _readable(running):
                process, connection = running[name]
                message = _receive(connection)
                if message is None:
                    process.join()
                    raise UserError(
                        f"the process of {name} ended without a word (exit status {process.exitcode}); if it was "
                        "killed for memory, run fewer workers; what is done is kept"
                    )
                kind, value = message
                if kind == "event":
                    observer(name, value)
                    continue
                process.join()
                del running[name]
                if kind == "user error":
                    raise UserError(f"{name}: {value}")
                if kind == "defect":
                    raise RuntimeError(f"{name} failed:\n{value}")
                results[name] = value
    return results


@contextmanager
def _ended_with(running: dict[str, tuple[SpawnProcess, Connection]]) -> Iterator[None]:
    """On an error in the block the processes of `running` are told to end and waited for: they may save.

    A KeyboardInterrupt, in the block or in that wait, ends them at once.
    """
    try:
        try:
            yield
        except Exception:
            for process, _ in running.values():
                process.terminate()
            for process, connection in running.values():
                connection.close()  # a job that waits to be heard goes on
                process.join()
            raise
    except BaseException:  # a KeyboardInterrupt; after any other error they have ended
        for process, _ in running.values():
            process.kill()
        for process, _ in running.values():
            process.join()
        raise


def _readable(running: dict[str, tuple[SpawnProcess, Connection]]) -> list[str]:
    ready = wait([connection for _, connection in running.values()], timeout=0.2)
    return [name for name, (_, connection) in running.items() if connection in ready]


def _receive(connection: Connection) -> tuple[str, Any] | None:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _child(connection: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def emit(event: dict[str, Any]) -> None:
        with suppress(OSError):  # the parent has closed its end: it is ending us, and a checkpoint comes first
            connection.send(("event", event))

    try:
        answer = ("done", target(*arguments, emit))
    except UserError as error:
        answer = ("user error", str(error))
    except Exception:
        answer = ("defect", traceback.format_exc())
    with suppress(OSError):
        connection.send(answer)
