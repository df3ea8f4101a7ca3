"""Interrupts: SIGINT and SIGTERM end a stage between two pieces of work, never inside one.

    with stop_on_signals() as stop:
        for piece in pieces:
            do(piece)
            if stop.requested:
                save()
            stop.check("3 of 9 pieces are on disk")

`check` raises `Stopped`, which the command line prints as one line, with exit code 130 (SIGINT) or 143 (SIGTERM, what
schedulers send). A second SIGINT raises KeyboardInterrupt wherever the program is: nothing may be saved then.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tcsae.shared.base.errors import Stopped

STOPPING = (signal.SIGINT, signal.SIGTERM)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process with exit code 130 and a line, from now on and wherever it is.

    A KeyboardInterrupt that comes before a command begins, or after it, is a traceback, or click's "Aborted!" with 1.
    Where interrupts are ignored (nohup) they stay so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    with contextlib.suppress(OSError):
        os.write(2, b"\nInterrupted. The same command goes on from what is on disk.\n")
    raise SystemExit(128 + number)


class StopRequest:
    """The first signal that came, if any. One that no signal handler feeds, `StopRequest()`, never stops."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came: time to save what is not on disk yet, before `check`."""
        return self.number is not None

    def check(self, state: str) -> None:
        """Call between two pieces of work, when all so far is on disk. Raises Stopped if a signal came.

        `state` says what is on disk, in a few words; the message goes on "The same command goes on from there".
        """
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Stopped(f"Stopped by {name}: {state}. The same command goes on from there.", 128 + self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        # Not through the console: a handler may run while its lock is held. A closed stderr is no reason to fail.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after the piece of work at hand. Interrupt once more to stop at once.\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest that SIGINT and SIGTERM set inside the block; afterwards they are handled as before.

    Python handles signals in the main thread alone: elsewhere the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
