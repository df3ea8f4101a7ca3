"""SIGINT and SIGTERM end a harvest after the piece of work at hand; a SIGINT after that ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tcsae.shared.base.errors import Stopped


class StopRequest:
    """Whether a signal has asked for the end."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self, state: str) -> None:
        """Call between two pieces of work, when all so far is on disk. Raises Stopped if a signal came."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Stopped(f"Stopped by {name}: {state}. The same command goes on from there.", 128 + self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        # Not through the console: a handler may run while its lock is held.
        os.write(2, b"\nStopping after the piece of work at hand. Interrupt once more to stop at once.\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Signals are noted while inside, and handled as before afterwards. Elsewhere than in the main thread, never."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
