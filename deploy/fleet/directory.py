"""Who is there: replicas announce themselves again and again, and are told of the others.

All of it is soft state. An entry that is not renewed is dropped, and a directory that begins anew
knows everybody again within a heartbeat; links that stand need no directory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

HEARTBEAT_SECONDS = 1.0
_LAST_SECONDS = 5 * HEARTBEAT_SECONDS


@dataclass(frozen=True, slots=True)
class Entry:
    """A replica that may be linked to.

    `address` is host:port of its `LinkServer`, `key` what both ends of a link have to know.
    `version` is equal for replicas whose answers are; of several versions of a `model`, new
    requests go to the one with the latest `since`, unix time.
    """

    replica: str
    model: str
    version: str
    since: float
    address: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries at a `revision` of the directory; revisions of two directories differ."""

    revision: tuple[float, int]
    entries: tuple[Entry, ...]


class Directory(Protocol):
    """What a replica asks of a directory, wherever that runs."""

    async def meet(self, entry: Entry | None, known: tuple[float, int] | None) -> Listing:
        """Announce `entry`, or keep it; the listing, as soon as it is another than `known`, and
        after a heartbeat in any case."""
        ...

    async def leave(self, replica: str) -> None: ...


class SoftDirectory:
    """A `Directory` for one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._revision = (time.time(), 0)
        self._entries: dict[str, Entry] = {}
        self._expiry: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def meet(self, entry: Entry | None, known: tuple[float, int] | None) -> Listing:
        if entry is not None:
            self._expiry[entry.replica] = self._clock() + _LAST_SECONDS
            if self._entries.get(entry.replica) != entry:
                self._entries[entry.replica] = entry
                self._change()
        self._expire()
        if known == self._revision:
            try:
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                self._expire()
        return Listing(self._revision, tuple(self._entries.values()))

    async def leave(self, replica: str) -> None:
        self._expiry.pop(replica, None)
        if self._entries.pop(replica, None) is not None:
            self._change()

    def _expire(self) -> None:
        now = self._clock()
        late = [name for name in self._entries if self._expiry[name] < now]
        for name in late:
            del self._entries[name], self._expiry[name]
        if late:
            self._change()

    def _change(self) -> None:
        began, number = self._revision
        self._revision = (began, number + 1)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
