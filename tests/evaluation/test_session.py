"""Calling a program's functions from outside its process: what it returns, raises, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tessera.evaluation import candidate, session, values
from tessera.evaluation.session import Ended, ProgramError, Session
from tessera.evaluation.values import BadValue

Start = Callable[..., Session]


@contextmanager
def started(seconds: float) -> Iterator[Session]:
    to_read, asks = os.pipe()
    answers, to_write = os.pipe()
    command = [sys.executable, "-I", "-S", candidate.__file__, values.__file__, str(to_read), str(to_write)]
    process = subprocess.Popen(
        command,
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read), os.close(to_write)
    try:
        yield Session(asks, answers, time.monotonic() + seconds)
    finally:
        os.close(asks), os.close(answers)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def program() -> Iterator[Session]:
    with started(30.0) as running:
        yield running


def test_functions_are_called_with_copies_and_give_plain_data(program: Session) -> None:
    program.run("def f(x, *, n=1):\n    x.append(n)\n    return {'all': tuple(x)}")
    argument = [1, (2, 3)]
    assert program.function("f")(argument, n={4}) == {"all": (1, (2, 3), {4})}
    assert argument == [1, (2, 3)] and program.ended is None


def test_state_stays_between_calls_and_main_is_the_program(program: Session) -> None:
    program.run(
        "import __main__\nseen = []\ndef f(x):\n    seen.append(x)\n    return len(seen), __name__, __main__.f is f"
    )
    f = program.function("f")
    assert [f(0)[0], f(0)] == [1, (2, "__main__", True)]


@pytest.mark.parametrize(
    ("statement", "kind", "text"),
    [
        ("raise ValueError('no')", ValueError, "no"),
        ("raise KeyError('no')", KeyError, "no"),
        ("1 / 0", ZeroDivisionError, "division"),
        ("raise AssertionError('no')", ProgramError, "AssertionError: no"),
        ("raise type('Mine', (Exception,), {})('no')", ProgramError, "Mine: no"),
        ("b'\\xff'.decode()", ProgramError, "UnicodeDecodeError"),
        ("raise type('SystemExit', (Exception,), {})('no')", ProgramError, "SystemExit: no"),
        ("raise type('print', (Exception,), {})('no')", ProgramError, "print: no"),
        ("return open", None, ""),
        ("def g():\n        while True: yield 1\n    return g()", BadValue, "parts"),
    ],
)  # fmt: skip
def test_what_is_raised_is_an_exception_of_pythons_own_or_the_programs(
    program: Session, statement: str, kind: type[Exception] | None, text: str
) -> None:
    program.run(f"def f():\n    {statement}")
    if kind is None:
        assert isinstance(program.function("f")(), values.Opaque)
        return
    with pytest.raises(kind, match=text) as found:
        program.function("f")()
    assert type(found.value) is kind and program.ended is None
    with pytest.raises(AttributeError, match="missing"):
        program.function("missing")()


def test_a_syntax_error_is_the_programs(program: Session) -> None:
    with pytest.raises(SyntaxError):
        program.run("def f(:")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("import os; os._exit(0)", "exited-early"),
        ("raise SystemExit(0)", "exited-early"),
        ("import sys; sys.exit()", "exited-early"),
        ("raise KeyboardInterrupt", "exited-early"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exited-early"),
        ("import os; os.closerange(3, 100); import time; time.sleep(60)", "exited-early"),
        ("while True: pass", "timeout"),
        ("import os\n    while True: os.write(OUT, b'x')", "timeout"),
        ("import os; os.write(OUT, b'[1]\\n')", "error"),
        ("import os; os.write(OUT, b'\\xff{\\n')", "error"),
        ("import os\n    while True: os.write(OUT, b'x' * 65536)", "output-limit"),
    ],
)  # fmt: skip
def test_the_end_of_a_session_is_remembered_whatever_the_caller_catches(
    statement: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST", 1 << 18)
    with started(30.0) as program:
        program.run("import sys\nOUT = int(sys.argv[3])\ndef f():\n    " + statement)
        if why == "timeout":
            program.deadline = time.monotonic() + 0.1
        for _ in range(2):
            with pytest.raises(Ended, match=why):
                try:
                    program.function("f")()
                except Exception:
                    pytest.fail("an Exception, which a test could expect")
        assert program.ended is not None and program.ended.why == why


def test_a_forged_reply_is_no_more_than_a_value(program: Session) -> None:
    forged = 'import os\nos.write(int(__import__("sys").argv[3]), b\'["value","[\\\\"pickle\\\\",\\\\"x\\\\"]"]\\n\')'
    program.run("pass")
    with pytest.raises(Ended, match="error: not a message"):
        program.run(forged)


def test_arguments_that_cannot_cross_are_the_callers_mistake(program: Session) -> None:
    program.run("def f(x): return x")
    deep: list[object] = []
    deep.append(deep)
    with pytest.raises(BadValue):
        program.function("f")(deep)
    assert program.function("f")(1) == 1
