"""An edge in a thread of its own, which can be restarted, and a proxy that cuts its connections."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from typing import Any, Self, TypeVar

from cluster.config import ServerConfig
from cluster.jobs import sample_seed
from cluster.request import Generator, Request
from cluster.text import TextCodec
from deploy.edge.models import Models, Served
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from tests.unit.edge_server import FACTS
from tests.unit.fakes import FakeCodec, FakeGenerator

_Result = TypeVar("_Result")

# Characters of one to four bytes, bytes that are no text, ends of stop strings, special tokens.
_PIECES = [
    "a",
    "b ",
    "é",
    "€",
    "🙂",
    "EN",
    "END?",
    "🙂🙂",
    b"\xf0\x9f",
    b"\xff\xff\xff\xff\xe2\x82",
]


def seeded_text(request: Request, index: int) -> Iterator[int]:
    """Bytes that are a function of (seed, position) alone, as a real model's tokens are."""
    assert request.sampling.seed is not None
    draw = random.Random(sample_seed(request.sampling.seed, index))
    position = 0
    while True:
        piece = draw.choice(_PIECES)
        for token in piece if isinstance(piece, bytes) else piece.encode():
            if position >= len(request.generated):
                yield token
            else:
                assert request.generated[position] == token, "resumed with other tokens"
            position += 1


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        # A server of grpc.aio that is collected has something left for its loop to do.
        gc.collect()
        self.run(asyncio.sleep(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()


class EdgeThread:
    """An edge at one address for as long as this lives, through any number of `restart`s."""

    def __init__(
        self,
        loop: Loop,
        generator: Generator | None = None,
        codec: TextCodec | FakeCodec | None = FakeCodec(),  # noqa: B008 (it has no state)
    ) -> None:
        self.generator = generator
        self._loop = loop
        self._codec = codec
        self._port = 0
        self.start()

    def start(self) -> None:
        self._loop.run(self._start())

    def stop(self, drain_timeout_s: float = 0) -> None:
        self._loop.run(self._edge.stop(drain_timeout_s))
        self._texts.close()
        del self._edge

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def _start(self) -> None:
        generator = self.generator or FakeGenerator(seeded_text)
        self._texts = Texts(self._codec, generator.model)  # type: ignore[arg-type]
        self._edge = Edge(
            Models(Served(generator, self._texts, FACTS)),
            ServerConfig(grpc_port=self._port, http=False),
        )
        await self._edge.start()
        self._port = int(self._edge.address.rpartition(":")[2])


class CuttingProxy:
    """Passes bytes on to a server. Each new connection takes the next of `cuts`: after how many
    bytes from the server it is cut, None for never, and whether by RST or by FIN."""

    def __init__(self, loop: Loop, upstream: str) -> None:
        self.cuts: deque[tuple[int, bool]] = deque()
        self.connections = 0
        self._loop = loop
        self._host, _, port = upstream.rpartition(":")
        self._upstream_port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = loop.run(self._listen())

    @property
    def address(self) -> str:
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        self._loop.run(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        left, reset = self.cuts.popleft() if self.cuts else (None, False)
        up_reader, up_writer = await asyncio.open_connection(self._host, self._upstream_port)
        up = asyncio.create_task(_pass_on(reader, up_writer, None))
        try:
            # `close` cancels; a task of asyncio's server must not end so.
            with contextlib.suppress(asyncio.CancelledError):
                await _pass_on(up_reader, writer, left)
            if reset and not writer.is_closing():
                # Closed with a linger of 0 seconds, a socket says RST.
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            up.cancel()
            for end in (writer, up_writer):
                end.close()
            self._tasks.discard(task)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None
) -> None:
    """Until the end of either, or until `left` bytes have passed."""
    with contextlib.suppress(ConnectionError):
        while left is None or left > 0:
            data = await reader.read(1 << 16 if left is None else left)
            if not data:
                return
            writer.write(data)
            await writer.drain()
            left = None if left is None else left - len(data)
