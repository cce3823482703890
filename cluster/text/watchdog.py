"""A limit on the time of work that cannot be asked to stop."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue


class TookTooLong(BaseException):
    """Raised in the middle of work that ran past its limit. No `Exception`: such work may catch
    those."""


class Watchdog:
    """Ends work that runs longer than `seconds`, whatever thread it runs in.

    One daemon thread for all work, since all have the same limit: the first to begin is the first
    to be late. Python code ends at its next bytecode; a call into C ends first, however long it
    takes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started: SimpleQueue[_Work] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Raises `TookTooLong` in the block, or out of it, once the limit has passed."""
        if not self._alive():
            self._start()
        work = _Work(threading.get_ident(), time.monotonic() + self.seconds)
        self._started.put(work)
        try:
            yield
        finally:
            with self._lock:
                work.ended = True
            if work.interrupted:  # perhaps not raised yet: what follows must not be hit by it
                _raise_in(work.thread, None)

    def _alive(self) -> bool:
        """False before the first work, and in a process forked since."""
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> None:
        with self._lock:
            if not self._alive():
                thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            work = self._started.get()
            time.sleep(max(0.0, work.deadline - time.monotonic()))
            with self._lock:
                if not work.ended:
                    work.interrupted = True
                    _raise_in(work.thread, TookTooLong)


class _Work:
    __slots__ = ("deadline", "ended", "interrupted", "thread")

    def __init__(self, thread: int, deadline: float) -> None:
        self.thread = thread
        self.deadline = deadline
        self.ended = False
        self.interrupted = False


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """None takes back what has not been raised yet."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
