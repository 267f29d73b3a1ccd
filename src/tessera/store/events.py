"""What happened in a run, one JSON object a line: {"schema": 1, "kind": "step", "run": "tiny", "step": 12, ...}.

The file has one writer, which only appends, and any number of readers, also while it grows. A checkpoint remembers
`EventWriter.offset`; a run that goes on from it cuts the file there, so that every step stands in it once. A crash
can tear the last line: readers skip it and the next writer cuts it off. A torn line with whole ones behind it has
no such explanation, and is an error.
"""

import fcntl
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tessera.recipe import UserError
from tessera.store.files import unreadable, unwritable
from tessera.store.json_text import check_schema, dumps

SCHEMA = 1
_LONGEST_TAIL = 4096  # bytes that hold the event of a checkpoint
_RESERVED = ("schema", "run", "time")  # `kind` and `step` are arguments, so Python refuses them twice


class EventWriter:
    """Appends events to a file; the only writer of it as long as it is open."""

    def __init__(self, path: Path, run: str, offset: int | None = None) -> None:
        """Open or create `path`; with `offset`, cut it to that many bytes first, as a resumed run does.

        Raises UserError if it cannot be written, has another writer, or does not reach to `offset`.
        """
        self.path = path
        self.run = run
        try:
            # Unbuffered: what a failed write leaves behind is then in the file, where it can be cut off.
            self._file = io.FileIO(path, "a+")
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            self._lock()
            self._size = self._whole_lines() if offset is None else self._checked(offset)
            self._file.truncate(self._size)
        except OSError as error:
            self._file.close()
            raise unwritable(path, error) from error
        except BaseException:
            self._file.close()
            raise

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one event; numbers that are not finite become null.

        Raises UserError if it cannot be written; the file then ends with the event before.
        """
        if clash := [name for name in _RESERVED if name in fields]:
            raise ValueError(f"the writer itself sets {', '.join(clash)}")
        head = {"schema": SCHEMA, "kind": kind, "run": self.run, "step": step, "time": round(time.time(), 3)}
        line = dumps(head | fields).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            raise unwritable(self.path, error) from error

    @property
    def offset(self) -> int:
        """Bytes written so far; they are on the disk when this returns. Raises UserError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self._size

    def close(self) -> None:
        """Bring everything to the disk and let go of the file; closing twice does nothing."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise unwritable(self.path, error) from error
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]  # a nearly full disk takes a part of a line
            self._size += len(line)
        except BaseException:  # Ctrl-C too: a part of a line must not stay, nor one that _size does not count
            with suppress(OSError):
                self._file.truncate(self._size)
            raise

    def _lock(self) -> None:
        try:
            # Held until the file is closed or the process ends, however it ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process is writing it; wait for that run to end, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks; the state in run.json still names the writer's process

    def _whole_lines(self) -> int:
        """Bytes up to the end of the last whole line."""
        self._file.seek(0)
        end = length = 0
        line = b""
        for line in io.BufferedReader(io.FileIO(self._file.fileno(), closefd=False)):
            length = len(line)
            end += length
        return end if line.endswith(b"\n") and _parse(line) is not None else end - length

    def _checked(self, offset: int) -> int:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(offset - 1, 0))
        if offset > size or (offset > 0 and self._file.read(1) != b"\n"):
            raise UserError(
                f"{self.path}: has {size} bytes, and none of its lines ends at byte {offset}, where the checkpoint "
                "left it: it was changed since; put the original back, or start a new run from the checkpoint"
            )
        return offset


def read_events(path: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """The events of a file in order, all of them or those of the given kinds.

    A torn last line is skipped. Raises UserError, naming the line, for any other line that is not an event, and
    for a file that cannot be read or was written by a newer tessera.
    """
    try:
        with open(path, "rb") as file:
            torn = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # the last one; do not read on, its rest may arrive at any moment
                    return
                if torn:
                    raise UserError(
                        f"{path}: line {torn} is no whole event, but others follow it: the file was damaged; "
                        "put a copy back, or delete that line"
                    )
                event = _parse(line)
                if event is None:
                    torn = number
                    continue
                check_schema(path, event.get("schema"), SCHEMA)
                if not kinds or event.get("kind") in kinds:
                    yield event
    except OSError as error:
        raise unreadable(path, error) from error


def event_before(path: Path, offset: int) -> dict[str, Any] | None:
    """The event whose line ends at byte `offset`, or None where no line of an event ends there.

    A checkpoint remembers the offset behind its own event, so that a run can tell whether its events still lead to
    it. Raises UserError for a file that cannot be read; one that does not exist holds no event.
    """
    try:
        with open(path, "rb") as file:
            if offset > file.seek(0, os.SEEK_END):
                return None
            file.seek(max(offset - _LONGEST_TAIL, 0))
            tail = file.read(min(offset, _LONGEST_TAIL))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    return _parse(tail[:-1].rpartition(b"\n")[2]) if tail.endswith(b"\n") else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
