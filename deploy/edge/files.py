"""Files that are replaced while the server runs: secrets, certificates, limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from cluster.errors import StartupError

T = TypeVar("T")

CHECK_SECONDS = 1.0
# They are read on the event loop: what is larger has been mistaken for one of them.
_MOST_BYTES = 1 << 20

log = structlog.get_logger(__name__)

# One per file: device, inode, modification time and size of what the path leads to. Kubernetes
# swaps a symbolic link, editors rename, others write in place: each changes at least one of them.
_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """What `read` makes of some files, made anew when they have changed.

    `read` raises `StartupError` where the files are at fault: the constructor lets it pass, later
    on it is logged and the last good value stays. Safe to use from any thread.
    """

    def __init__(
        self,
        paths: Sequence[str],
        read: Callable[[], T],
        *,
        check_every_s: float = CHECK_SECONDS,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._check_every_s = check_every_s
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._value = read()
        self._checked_at = time.monotonic()

    @property
    def current(self) -> T:
        """The files are looked at once in `check_every_s` at most."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked_at >= self._check_every_s:
                self._checked_at = now
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        before = self._look()
        if before == self._stamp:
            return
        try:
            value = self._read()
        # Also what `read` did not foresee: a call in between is no place to end for it.
        except Exception as error:
            if self._look() == before:
                self._stamp = before
                # Others may quote what is in the files.
                expected = isinstance(error, StartupError)
                cause = str(error) if expected else type(error).__name__
                log.error("kept the old version of changed files", cause=cause)
            return
        # Files that changed meanwhile may not belong together: the next check reads them again.
        if self._look() == before:
            self._stamp, self._value = before, value
            log.info("read changed files again", files=self._paths)

    def _look(self) -> _Stamp:
        return tuple(map(_stamp, self._paths))


def read_file(field: str, path: str) -> bytes:
    """At most 1 MiB. Raises `StartupError` naming the option that gave the path."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise StartupError(f"{field} {path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise StartupError(f"{field} {path} holds more than {_MOST_BYTES >> 20} MiB: name another")
    return content


def _stamp(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
