"""Processes that take turns: the parent says "step" to one of them at a time, the others wait without using CPU.

Each system that is measured has a process, and with it an allocator, a thread pool and a peak memory, of its own;
taking turns, all of them meet the same disturbances by other work on the machine. A message is one line of JSON each
way, over pipes; whatever a library prints in a child goes to stderr.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
MIB = 2**20


class Child:
    """The parent's end of one process."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question. SystemExit where the process has ended instead; its traceback is on stderr."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name}: ended with {self._process.wait()}; --systems can leave it out")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's end: answer questions until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


def resident_mib() -> float:
    """Resident size of this process, MiB; where the system does not tell (no /proc), the largest it has had."""
    return _status("VmRSS") if STATUS.exists() else peak_mib()


def peak_mib() -> float:
    """Largest resident size since `restart_peak`, MiB."""
    if STATUS.exists():
        return _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / MIB if sys.platform == "darwin" else largest / 1024


def restart_peak() -> bool:
    """Let the peak begin anew at the present size; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(name))
