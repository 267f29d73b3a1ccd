"""Signals: a wish first, then a blow."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tessera.training.interrupt import finish_on_signal


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_is_announced_at_once_and_once(kind: signal.Signals) -> None:
    heard: list[float] = []
    said = threading.Event()

    def announce() -> None:
        heard.append(time.monotonic())
        said.set()

    before = signal.getsignal(kind)
    with finish_on_signal(announce) as wish:
        assert not wish.stop
        os.kill(os.getpid(), kind)
        assert wish.stop
        assert said.wait(5)  # while the step, which is this block, goes on
        os.kill(os.getpid(), signal.SIGTERM)  # a second one asks for nothing new
        time.sleep(0.05)
    assert len(heard) == 1
    assert signal.getsignal(kind) is before


class PressedInTheMiddle(io.RawIOBase):
    """A stream that is interrupted by Ctrl-C while it writes its first bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        if not self.written:
            os.kill(os.getpid(), signal.SIGINT)
        self.written.append(bytes(content))
        return len(content)


def line_writer(stream: io.BufferedWriter, line: bytes) -> Callable[[], None]:
    def write() -> None:
        stream.write(line)
        stream.flush()

    return write


def test_an_announcement_waits_for_the_line_that_it_interrupts_and_is_whole_at_the_end() -> None:
    raw = PressedInTheMiddle()
    stream = io.BufferedWriter(raw)
    with finish_on_signal(line_writer(stream, b"stopping\n")) as wish:
        line_writer(stream, b"step 1\n")()  # a second write from the handler itself is a RuntimeError of the stream
        assert wish.stop
    assert b"".join(raw.written) == b"step 1\nstopping\n"


def test_a_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), finish_on_signal() as wish:
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.stop
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("went on after a second Ctrl-C")


def test_a_thread_that_is_not_the_main_one_takes_no_signals() -> None:
    found: list[object] = []

    def work() -> None:
        with finish_on_signal() as wish:
            found.append((wish.stop, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
