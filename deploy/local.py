"""Runs the application on this machine: its own Ray, its own directory, nothing left behind.

Ray runs in a child process and session. So a Ctrl-C does not reach Ray's processes before they were
asked to end, this process's signal handlers stay its own, and whatever is left is one tree to end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cluster.errors import StartupError
from cluster.ray_environment import LOCAL_RAY
from deploy import start_report
from deploy.args import END, AppArgs, LocalRun
from deploy.signals import StopSignals
from deploy.start_report import Failed, Progress, Ready, StartReport
from deploy.telemetry.logs import LOG_FILE
from shards.errors import HeadwiseError

_POLL_SECONDS = 0.1
# On top of `drain_timeout_s`: what an orderly end may take before processes are killed. With the
# default drain, 2 s, everything is gone in less than 5 s, also on a machine that has much to do.
_END_SECONDS = 1.5
_KILL_SECONDS = 2
_CHILD = "from deploy.app import serve_local; serve_local()"


class LocalError(HeadwiseError):
    """The application ended by itself."""


class LocalApplication:
    """One run of the application, until a signal."""

    def __init__(self, args: AppArgs, stop: StopSignals) -> None:
        self._ready: Ready | None = None
        self._args = args
        self._directory = Path(tempfile.mkdtemp(prefix="headwise-"))
        self._stop = stop
        self._report = StartReport(self._directory / "start")
        self._log = self._directory / "log"
        self._log.touch()
        self._logged = 0
        self._following = False
        self._words = self._directory / "words"
        environment = os.environ | LOCAL_RAY
        environment[start_report.VARIABLE] = str(self._report.path)
        environment[LOG_FILE] = str(self._log)
        with self._words.open("w") as words:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=words,
                env=environment,
                start_new_session=True,
            )
        run = LocalRun(args=args, directory=str(self._directory))
        assert self._child.stdin is not None
        self._child.stdin.write(run.model_dump_json().encode() + b"\n")
        self._child.stdin.flush()

    @property
    def ready(self) -> Ready:
        """Where it listens, and what it serves; known from `start` on."""
        assert self._ready is not None
        return self._ready

    def start(self, on_progress: Callable[[Progress], None]) -> None:
        """Wait until the replica answers. Raises `StartupError`, or `Interrupted` by a signal."""
        while not self._stop.wait(_POLL_SECONDS):
            ended = self._child.poll() is not None
            for event in self._report.new_events():
                if isinstance(event, Progress):
                    on_progress(event)
                elif isinstance(event, Failed):
                    sys.stderr.write(event.trace)
                    raise StartupError(event.message)
                else:
                    self._ready = event
                    return
            if ended:
                sys.stderr.write(self._words.read_text(errors="replace"))
                raise StartupError("Ray could not be started; its words are above")
        self._stop.raise_any()

    def wait(self) -> None:
        """Until a signal comes; meanwhile the replica's log goes to stderr. Raises `LocalError`
        if Ray ends by itself."""
        self._following = True
        while not self._stop.wait(_POLL_SECONDS):
            self._follow_log()
            if self._child.poll() is not None:
                sys.stderr.write(self._words.read_text(errors="replace"))
                raise LocalError("Ray ended unexpectedly; its words are above")

    def close(self) -> None:
        """End everything, in order where something was running, and remove the directory."""
        deadline = time.monotonic() + self._args.server.drain_timeout_s + _END_SECONDS
        assert self._child.stdin is not None
        tree = _Tree(self._child.pid)
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(END)
            self._child.stdin.close()
        if self._ready is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(max(0, deadline - time.monotonic()))
        tree.kill()
        self._child.wait()
        if self._following:
            self._follow_log()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _follow_log(self) -> None:
        with self._log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._logged)
            sys.stderr.write(file.read())
            self._logged = file.tell()
        sys.stderr.flush()


@contextlib.contextmanager
def local_application(
    args: AppArgs, on_progress: Callable[[Progress], None], stop: StopSignals
) -> Iterator[LocalApplication]:
    """The running application. Raises `StartupError`, or `Interrupted` by a signal during the
    start; nothing is left then."""
    stop.raise_any()
    application = LocalApplication(args, stop)
    try:
        application.start(on_progress)
        yield application
    finally:
        application.close()


class _Tree:
    """A process and its descendants; those that lose their parent on the way are remembered."""

    def __init__(self, pid: int) -> None:
        self._known: set[psutil.Process] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known = {psutil.Process(pid)}
        self._look()

    def kill(self) -> None:
        """Until none is left; Ray starts new ones while it has not noticed."""
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            self._look()
            alive = [process for process in self._known if _is_alive(process)]
            if not alive:
                return
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_KILL_SECONDS / 100)

    def _look(self) -> None:
        """One pass over all processes, however many are known: a busy machine takes long enough."""
        children: defaultdict[int, list[psutil.Process]] = defaultdict(list)
        for process in psutil.process_iter(["ppid"]):
            children[process.info["ppid"]].append(process)
        parents = [process for process in self._known if process.is_running()]
        while parents:
            found = children.pop(parents.pop().pid, [])
            self._known.update(found)
            parents.extend(found)


def _is_alive(process: psutil.Process) -> bool:
    # A zombie is dead, and for whoever adopted it to bury.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
