"""Requests that are being answered: their clients may leave, and the server may end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive

from cluster.errors import Overloaded, Unavailable
from shards.errors import HeadwiseError

_LAST_WORDS_SECONDS = 1


class ClientGone(HeadwiseError):
    """The client closed its connection: nobody is left to be told."""


class Exchanges:
    """Knows what is being answered, to let it finish. All methods belong to one event loop."""

    def __init__(self, most: int) -> None:
        """`most` are answered at a time."""
        self._most = most
        self._open: set[asyncio.Timeout] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._draining = False
        self._retiring = False

    @property
    def retiring(self) -> bool:
        """Whether clients had better go elsewhere."""
        return self._retiring or self._draining

    def retire(self) -> None:
        """Answer on, for those that are connected."""
        self._retiring = True

    @contextlib.asynccontextmanager
    async def answering(self, receive: Receive) -> AsyncIterator[None]:
        """Around the answer to a request whose body has been read: interrupted as soon as the
        client is gone (`ClientGone`) or the server can wait no longer (`Unavailable`)."""
        if self._draining:
            raise Unavailable("the server is shutting down: try another one")
        if len(self._open) >= self._most:
            raise Overloaded(f"{self._most} requests are being answered: try again later", 1.0)
        gone = asyncio.Event()
        interruption = asyncio.timeout(None)
        watcher: asyncio.Task[None] | None = None
        try:
            async with interruption:
                self._open.add(interruption)
                self._none_open.clear()
                watcher = asyncio.create_task(_until_gone(receive, gone, interruption))
                yield
        except TimeoutError:
            if not interruption.expired():
                raise
            if gone.is_set():
                raise ClientGone("the client closed its connection") from None
            raise Unavailable("the server is shutting down: send the request again") from None
        finally:
            if watcher is not None:
                watcher.cancel()
            self._open.discard(interruption)
            if not self._open:
                self._none_open.set()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, give running ones `timeout_s`, end the rest."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), timeout_s)
        for interruption in self._open:
            _interrupt(interruption)
        # They only have an error left to send.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), _LAST_WORDS_SECONDS)


async def _until_gone(receive: Receive, gone: asyncio.Event, interruption: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    _interrupt(interruption)


def _interrupt(interruption: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended meanwhile
        interruption.reschedule(asyncio.get_running_loop().time())
