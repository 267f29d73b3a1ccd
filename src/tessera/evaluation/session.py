"""The judge's side of a session with a program: its functions, as functions of the judge's own process.

What comes back is plain data (values.py). The session remembers the first thing that ended it, whatever the code that
calls did with the exception: a program that exits, floods, talks nonsense or takes too long cannot be forgiven by a
test that catches everything.
"""

import builtins
import json
import os
import select
import time
from collections.abc import Callable
from typing import Any

from tessera.evaluation.values import LONGEST, BadValue, dump, load

PIECE = 1 << 16


class Ended(BaseException):
    """The session is over; `why` is exited-early, timeout, output-limit or error. Not an Exception, so that tests which
    expect one do not take it for theirs.
    """

    def __init__(self, why: str, text: str) -> None:
        super().__init__(f"{why}: {text}")
        self.why, self.text = why, text


class ProgramError(Exception):
    """An exception of the program that is none of Python's own."""


class Session:
    """Talks to candidate.py through two file descriptors until `deadline` (time.monotonic())."""

    def __init__(self, requests: int, replies: int, deadline: float) -> None:
        self.requests, self.replies, self.deadline = requests, replies, deadline
        self.ended: Ended | None = None
        self._pending = b""
        os.set_blocking(requests, False)
        os.set_blocking(replies, False)

    def run(self, source: str) -> None:
        """Run the program's text. Raises what it raises (see `function`), Ended where the session is over."""
        self._ask("run", source)

    def function(self, name: str) -> Callable[..., Any]:
        """The program's function of that name: arguments and result are copied, as plain data.

        It raises the exception of the same name where that is one of Python's own (never AssertionError, which is the
        tests' word, nor what is no Exception), else ProgramError; BadValue for arguments or results that cannot cross.
        """

        def call(*arguments: Any, **keywords: Any) -> Any:
            return self._ask("call", name, dump((list(arguments), keywords)))

        call.__name__ = call.__qualname__ = name
        return call

    def _ask(self, *request: str) -> Any:
        if self.ended:
            raise self.ended
        self._write(json.dumps(request).encode() + b"\n")
        line = self._line()
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._end("error", f"a reply that is none: {error}") from None
        return self._meaning(reply)

    def _meaning(self, reply: Any) -> Any:
        match reply:
            case ["done"]:
                return None
            case ["value", str(line)]:
                try:
                    return load(line)
                except BadValue as error:
                    raise self._end("error", str(error)) from None
            case ["unsendable", str(why)]:
                raise BadValue(why)
            case ["raised", str(name), str(text)]:
                raise _exception(name, text)
        raise self._end("error", "a reply that is none")

    def _line(self) -> bytes:
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > LONGEST * 2:  # JSON inside JSON: quotes are escaped
                raise self._end("output-limit", f"a reply of more than {LONGEST * 2:,} bytes")
            self._wait(self.replies, select.POLLIN)
            piece = os.read(self.replies, PIECE)
            if not piece:
                raise self._end("exited-early", "the program ended before it answered")
            self._pending += piece
        line, self._pending = self._pending[:end], self._pending[end + 1 :]
        return line

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._wait(self.requests, select.POLLOUT)
            try:
                view = view[os.write(self.requests, view) :]
            except BrokenPipeError:
                raise self._end("exited-early", "the program ended before it was asked") from None

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = self.deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise self._end("timeout", "the program did not answer in time")

    def _end(self, why: str, text: str) -> Ended:
        self.ended = self.ended or Ended(why, text)
        return self.ended


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return ProgramError(f"{name}: {text}")
