"""Ctrl-C and SIGTERM as a wish, not a blow: the step is finished and a checkpoint written before the run ends.

A step may take minutes, so that the wish was heard is said at once. A second Ctrl-C is Python's own KeyboardInterrupt,
for those who mean it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Wish:
    """`stop` is true once a signal asked the run to end."""

    stop = False


@contextmanager
def finish_on_signal(announce: Callable[[], None] | None = None) -> Iterator[Wish]:
    """Within the block the first SIGINT or SIGTERM sets `stop`; handlers are put back at its end.

    `announce` is called in a thread of its own then: a handler interrupts whatever runs, and that may hold the very
    lock of the stream that is to be written to. It has returned when the block ends.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    announcer = threading.Thread(target=announce, daemon=True) if announce else None

    def handler(number: int, frame: FrameType | None) -> None:
        if wish.stop:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        wish.stop = True
        if announcer:
            announcer.start()

    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield wish
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
        if announcer and announcer.is_alive():
            announcer.join()
