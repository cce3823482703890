"""Runs the application on this machine: its own Ray, its own directory, nothing left behind.

The main thread waits for signals; a second one starts Ray, and lives until the end because Ray's
processes die with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from deploy import start_report
from deploy.args import AppArgs
from deploy.start_report import Event, Progress, ReplicaInfo, StartReport

# Read by Ray when it is imported or started. Loopback only; no token file in the user's home; no
# call home; ranks at normal priority, or a step waits for whatever else runs.
_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "GRPC_VERBOSITY": "NONE",
}
# `drain_timeout_s` on top: what an orderly end may take before processes are killed.
_END_SECONDS = 1.5


class Local:
    """One run of the application; for the main thread."""

    def __init__(self, args: AppArgs, on_event: Callable[[Event], None]) -> None:
        self._args = args
        self._on_event = on_event
        self._directory = Path(tempfile.mkdtemp(prefix="headwise-"))
        self._before = _descendants()
        self._stop = threading.Event()
        self._started = threading.Event()
        self._info: ReplicaInfo | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def start(self) -> ReplicaInfo | None:
        """The replica's addresses and ranks, or None if a signal came first. Raises
        `StartupError`."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        return self._info

    def wait(self) -> None:
        """Until `stop` is called or a signal comes."""
        self._stop.wait()

    def stop(self) -> None:
        """Ends the wait; safe in a signal handler."""
        self._stop.set()
        self._started.set()

    def close(self) -> None:
        """End everything, in order where there is time for it, and remove the directory."""
        self.stop()
        if self._info is not None:
            self._thread.join(self._args.server.drain_timeout_s + _END_SECONDS)
        _end(_descendants() - self._before)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self) -> None:
        try:
            os.environ.update(_RAY_ENVIRONMENT)
            report = StartReport(self._directory / "start")
            os.environ[start_report.VARIABLE] = str(report.path)
            self._on_event(Progress("importing Ray", 0, 0))
            from deploy.app import LocalApplication

            application = LocalApplication(self._args, self._directory)
            self._info = application.start(report, self._on_event, self._stop)
            self._started.set()
            self._stop.wait()
            if self._info is not None:
                application.stop()
        except BaseException as error:
            self._error = error
            self._started.set()
            # Ray's processes would end with this thread, in no order; `close` ends them.
            self._stop.wait()


@contextlib.contextmanager
def local_application(
    args: AppArgs, on_event: Callable[[Event], None]
) -> Iterator[tuple[Local, ReplicaInfo | None]]:
    """Start, with SIGINT and SIGTERM ending the run in order; None if one came during the start."""
    local = Local(args, on_event)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        local.stop()

    handlers: dict[int, Any] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield local, local.start()
    finally:
        local.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=2)
