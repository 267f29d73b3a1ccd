"""Ctrl-C and SIGTERM as a wish, not a blow: the step is finished and a checkpoint written before the run ends.

A second Ctrl-C is Python's own KeyboardInterrupt, for those who mean it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Wish:
    """`stop` is true once a signal asked the run to end."""

    stop = False


@contextmanager
def finish_on_signal() -> Iterator[Wish]:
    """Within the block the first SIGINT or SIGTERM sets `stop`; handlers are put back at its end."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    kinds = (signal.SIGINT, signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        if wish.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.stop = True

    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield wish
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
