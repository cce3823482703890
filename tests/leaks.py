"""What a test session left behind: processes it started, and names in /dev/shm.

Other sessions may run on the same machine, so both are told apart by a mark in the environment,
which every descendant inherits, also one whose parent is gone.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import psutil

_MARK = "HEADWISE_TEST_SESSION"
_SHARED_MEMORY = Path("/dev/shm")
# multiprocessing's own helpers of this process; they end with it.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
# For what was told to stop just before.
_GRACE_SECONDS = 10


class LeakCheck:
    """Made before the tests; `leaks()` after them says what is left."""

    def __init__(self) -> None:
        self._session = uuid.uuid4().hex
        os.environ[_MARK] = self._session
        self._names = shared_names()

    def leaks(self) -> list[str]:
        """One line for each process and name; waits a little for processes that are ending."""
        _, alive = psutil.wait_procs(self._started(), timeout=_GRACE_SECONDS)
        lines = [f"process {describe(process)}" for process in alive]
        in_use = self._names_in_use_by_others()
        lines += [f"/dev/shm/{name}" for name in sorted(shared_names() - self._names - in_use)]
        return lines

    def _started(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        try:
            if process.environ().get(_MARK) != self._session:
                return False
            command = " ".join(process.cmdline())
        except psutil.Error:
            return False
        return not any(helper in command for helper in _HELPERS)

    def _names_in_use_by_others(self) -> set[str]:
        names: set[str] = set()
        for process in psutil.process_iter():
            if process.pid == os.getpid() or self._is_ours(process):
                continue
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            except OSError:
                continue
            names |= {
                line.rpartition("/dev/shm/")[2].split(" ")[0]
                for line in maps.splitlines()
                if "/dev/shm/" in line
            }
        return names


def shared_names() -> set[str]:
    """The names in /dev/shm."""
    return {path.name for path in _SHARED_MEMORY.iterdir()} if _SHARED_MEMORY.is_dir() else set()


def describe(process: psutil.Process) -> str:
    """Its id and the beginning of its command line."""
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)
