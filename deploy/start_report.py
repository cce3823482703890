"""How a replica's start goes, told to the command that waits for it on the same machine.

Serve tells an application's starter nothing until all is up, and then a traceback if it failed. So
`headwise serve` names a file in the environment that its replicas inherit; a replica appends one
JSON object per line. Where the variable is not set, on a cluster, nothing is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import StartupError
from cluster.request import ModelInfo, RankInfo

VARIABLE = "HEADWISE_START_REPORT"


@dataclass(frozen=True, slots=True)
class Progress:
    """What is being done, and how much of how much."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Failed:
    """`message` is one sentence for the user; `trace` only where the error was not expected."""

    message: str
    trace: str = ""


Event = Progress | Failed


class StartFailed(StartupError):
    """What a replica said when it gave up; `trace` as in `Failed`."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Where a replica listens, and what it serves with which ranks."""

    grpc: str
    model: ModelInfo
    ranks: tuple[RankInfo, ...]


class StartReporter:
    """The replica's end."""

    def __init__(self) -> None:
        path = os.environ.get(VARIABLE)
        self._path = Path(path) if path else None

    def progress(self, phase: str, done: int, total: int) -> None:
        self._write(Progress(phase, done, total))

    def failed(self, message: str, trace: str = "") -> None:
        self._write(Failed(message, trace))

    def _write(self, event: Event) -> None:
        if self._path is None:
            return
        line = json.dumps({"event": type(event).__name__, **asdict(event)})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class StartReport:
    """The waiting command's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        path.touch()

    def new_events(self) -> Iterator[Event]:
        """What was written since the last call; a line still being written waits for the next."""
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read = file.tell()
                fields = json.loads(line)
                kind = fields.pop("event")
                yield Progress(**fields) if kind == "Progress" else Failed(**fields)
