"""SIGINT and SIGTERM as an event, for what has to be ended in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from shards.errors import HeadwiseError

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(HeadwiseError):
    """A signal came before there was anything to end; `exit_code` is what a shell expects then."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} during the start: everything is stopped")
        self.exit_code = 128 + number


class StopSignals:
    """Whether one of them has come."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._number: int | None = None

    def wait(self, timeout_s: float) -> bool:
        """True as soon as there is one, False after `timeout_s` seconds without."""
        return self._event.wait(timeout_s)

    def raise_any(self) -> None:
        """Raise `Interrupted` if there was one."""
        if self._number is not None:
            raise Interrupted(self._number)

    def take(self, number: int, _frame: FrameType | None) -> None:
        self._number = number
        self._event.set()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """They interrupt nothing in its body, which is to look for them; for the main thread."""
    stop = StopSignals()
    handlers = [(number, signal.signal(number, stop.take)) for number in _NUMBERS]
    try:
        yield stop
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
