"""How a start goes, told to the command that waits for it on the same machine.

Serve tells an application's starter nothing until all is up, and then a traceback if it failed. So
`headwise serve` names a file in the environment that its processes inherit; each appends one JSON
object per line. Where the variable is not set, on a cluster, nothing is written.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from cluster.request import ModelInfo, RankInfo
from shards.errors import HeadwiseError

VARIABLE = "HEADWISE_START_REPORT"


class Progress(BaseModel):
    """What is being done, and how much of how much; 0 of 0 where that is not known."""

    event: Literal["progress"] = "progress"
    phase: str
    done: int = 0
    total: int = 0


class Failed(BaseModel):
    """`message` is one sentence for the user; `trace` only where the error was not expected."""

    event: Literal["failed"] = "failed"
    message: str
    trace: str = ""


class Ready(BaseModel):
    """Where a replica listens, and what it serves with which ranks; `kv_tokens` is how many tokens
    its KV cache holds. `http` is a URL, empty where there is no HTTP."""

    event: Literal["ready"] = "ready"
    grpc: str
    http: str = ""
    model: ModelInfo
    ranks: tuple[RankInfo, ...]
    kv_tokens: int


Event = Progress | Failed | Ready
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def failure(error: Exception) -> Failed:
    """What a user is told of an error: its sentence, and a trace where it was not expected."""
    if isinstance(error, HeadwiseError):
        return Failed(message=str(error))
    return Failed(message=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def report(event: Event) -> None:
    """Tell the waiting command, if there is one."""
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")


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
                yield _EVENT.validate_json(line)
