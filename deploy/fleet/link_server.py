"""A driver's end of its links: other replicas' edges submit to it, and get all their events back.

Events that come together leave together, one frame for each edge. A stream is read only while its
link takes what was sent, so an edge that does not read costs the memory of merged events, in
`EventStream`, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import msgspec
import structlog

from cluster.errors import Unavailable
from cluster.request import Generator, TokenEvent, TokenStream
from cluster.text import TextCodec
from deploy.edge.models import ServerFacts
from deploy.fleet.messages import (
    Abort,
    Aborted,
    Challenge,
    Close,
    Ended,
    Events,
    Fault,
    FinishSample,
    FromEdge,
    Introduction,
    Response,
    Routed,
    Status,
    Submit,
    fault_of,
)
from deploy.fleet.wire import MOST_BYTES, NONCE_BYTES, LinkBroken, Wire, is_proof, prove

STATUS_SECONDS = 0.2
# An unchanged status is told again, so that the other end knows a dead link from a quiet one.
SILENCE_SECONDS = 5.0
_SIGNS_OF_LIFE = 5
_HANDSHAKE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class LinkServer:
    """Offers `generator` to whoever knows `key`. All methods belong to one event loop."""

    def __init__(
        self, generator: Generator, codec: TextCodec | None, facts: ServerFacts, key: bytes
    ) -> None:
        self._generator = generator
        self._facts = facts
        self._key = key
        self._tokenizer = None if codec is None else codec.pack()
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._routed = asyncio.Condition()
        self._retiring = False
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listen on any free port of `host`; host:port."""
        self._server = await asyncio.start_server(self._accept, host, 0)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def routed_by(self, edges: int) -> None:
        """Until that many edges send their requests here as well."""
        async with self._routed:
            await self._routed.wait_for(lambda: sum(link.routed for link in self._links) >= edges)

    async def note_routed(self) -> None:
        """One edge more sends its requests here."""
        async with self._routed:
            self._routed.notify_all()

    def retire(self) -> None:
        """Refuse what is submitted from here on, and say so; streams go on."""
        self._retiring = True
        for link in self._links:
            link.tell_status()

    async def drained(self, timeout_s: float) -> None:
        """Until every stream has ended, at most `timeout_s`; new ones are not waited for."""
        pumps = [pump for link in self._links for pump in link.pumps]
        if pumps:
            await asyncio.wait(pumps, timeout=timeout_s)

    async def close(self) -> None:
        """End every link; what still runs ends with it."""
        if self._server is not None:
            self._server.close()
        for task in self._links.values():
            task.cancel()
        await asyncio.gather(*self._links.values(), return_exceptions=True)

    def admit(self, request: Submit) -> TokenStream:
        """As `Generator.submit`; `Unavailable` while retiring."""
        if self._retiring:
            raise Unavailable("the replica is retiring: another one answers")
        return self._generator.submit(request.received())

    async def abort(self, request_id: str) -> bool:
        return await self._generator.abort(request_id)

    def status(self) -> Status:
        return Status(self._generator.load(), self._generator.health(), self._retiring)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer, msgspec.msgpack.Decoder(FromEdge))
        link = _Link(self, wire)
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                await self._greet(wire)
            self._links[link] = task
            await link.run()
        except (LinkBroken, TimeoutError) as error:
            log.info("link ended", cause=str(error) or type(error).__name__)
        except asyncio.CancelledError:
            pass  # the server's own end: asyncio would log it as an error
        finally:
            self._links.pop(link, None)
            link.close()

    async def _greet(self, wire: Wire[FromEdge]) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        wire.send(Challenge(nonce))
        answer = await wire.receive()
        if not isinstance(answer, Response) or not is_proof(
            answer.proof, self._key, b"edge", nonce
        ):
            raise LinkBroken("the other end does not know the key")
        wire.limit = MOST_BYTES
        wire.send(
            Introduction(
                prove(self._key, b"driver", answer.nonce),
                self._generator.model,
                self._generator.ranks,
                self._facts,
                self._tokenizer,
            )
        )
        wire.send(self.status())


class _Link:
    """One edge, and its streams."""

    def __init__(self, server: LinkServer, wire: Wire[FromEdge]) -> None:
        self.routed = False
        self.pumps: set[asyncio.Task[None]] = set()
        self._server = server
        self._wire = wire
        self._streams: dict[int, TokenStream] = {}
        self._events: list[tuple[int, TokenEvent]] = []
        self._ended: list[Ended] = []
        self._flush_due = False
        self._told: Status | None = None

    async def run(self) -> None:
        """Until the link breaks, which is raised."""
        statuses = asyncio.create_task(self._tell_statuses())
        try:
            async for message in self._wire.messages():
                if isinstance(message, Routed):
                    self.routed = True
                    await self._server.note_routed()
                elif isinstance(message, Abort):
                    found = await self._server.abort(message.request_id)
                    self._wire.send(Aborted(message.number, found))
                else:
                    self._take(message)
        finally:
            statuses.cancel()

    def close(self) -> None:
        """Nobody reads these streams any more."""
        for pump in self.pumps:
            pump.cancel()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._wire.close()

    def tell_status(self) -> None:
        self._told = self._server.status()
        self._wire.send(self._told)

    def _take(self, message: FromEdge) -> None:
        match message:
            case Submit(stream=number):
                self._begin(number, message)
            case FinishSample(stream=number, index=index) if number in self._streams:
                self._streams[number].finish_sample(index)
            case Close(stream=number) if number in self._streams:
                self._streams.pop(number).close()
            case _:
                pass  # of a stream that has meanwhile ended

    def _begin(self, number: int, submit: Submit) -> None:
        try:
            stream = self._server.admit(submit)
        except Exception as error:
            self._end(number, fault_of(error))
            return
        self._streams[number] = stream
        pump = asyncio.create_task(self._pump(number, stream))
        self.pumps.add(pump)
        pump.add_done_callback(self.pumps.discard)

    async def _pump(self, number: int, stream: TokenStream) -> None:
        fault = None
        try:
            async for event in stream:
                self._events.append((number, event))
                self._flush_soon()
                await self._wire.drained()
        except LinkBroken:
            return
        except Exception as error:
            fault = fault_of(error)
        if self._streams.pop(number, None) is not None:
            self._end(number, fault)

    def _end(self, number: int, fault: Fault | None) -> None:
        self._ended.append(Ended(number, fault))
        self._flush_soon()

    def _flush_soon(self) -> None:
        """After the tasks that are ready now: the rest of this step's events."""
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._wire.send(Events(tuple(self._events), tuple(self._ended)))
        self._events.clear()
        self._ended.clear()

    async def _tell_statuses(self) -> None:
        quiet = 0
        with contextlib.suppress(LinkBroken):
            while True:
                await asyncio.sleep(STATUS_SECONDS)
                quiet += 1
                if quiet == _SIGNS_OF_LIFE or self._server.status() != self._told:
                    self.tell_status()
                    quiet = 0
                    await self._wire.drained()
