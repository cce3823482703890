"""Another replica's driver, as this replica's edge sees it over a link."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from dataclasses import replace

import msgspec

from cluster.errors import Unavailable
from cluster.request import Health, HealthState, Load, ModelInfo, RankInfo, Request
from cluster.stream import EventStream
from deploy.edge.models import ServerFacts
from deploy.fleet.directory import Entry
from deploy.fleet.link_server import SILENCE_SECONDS
from deploy.fleet.messages import (
    Abort,
    Aborted,
    Challenge,
    Close,
    Events,
    FinishSample,
    FromDriver,
    FromEdge,
    Introduction,
    Response,
    Routed,
    Status,
    Submit,
    error_of,
)
from deploy.fleet.wire import MOST_BYTES, NONCE_BYTES, LinkBroken, Wire, is_proof, prove

_CONNECT_SECONDS = 5.0


class RemoteGenerator:
    """`cluster.request.Generator` over a link. All methods belong to one event loop.

    What the driver refuses, `submit`'s stream raises when it is read. Once the link is `broken`,
    every stream has ended with `Unavailable`.
    """

    def __init__(
        self, replica: str, wire: Wire[FromDriver], known: Introduction, status: Status
    ) -> None:
        self.replica = replica
        self.broken = False
        self._wire = wire
        self._known = known
        self._status = status
        self._numbers = itertools.count()
        self._streams: dict[int, EventStream] = {}
        self._aborts: dict[int, asyncio.Future[bool]] = {}

    @classmethod
    async def connect(cls, entry: Entry) -> RemoteGenerator:
        """Raises `LinkBroken`."""
        host, _, port = entry.address.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(host, int(port))
                wire = Wire[FromDriver](reader, writer, msgspec.msgpack.Decoder(FromDriver))
                try:
                    return await cls._introduced(entry, wire)
                except BaseException:
                    wire.close()
                    raise
        except OSError as error:  # a TimeoutError is one
            raise LinkBroken(f"{entry.address} cannot be reached: {error}") from error

    @classmethod
    async def _introduced(cls, entry: Entry, wire: Wire[FromDriver]) -> RemoteGenerator:
        challenge = await wire.receive()
        if not isinstance(challenge, Challenge):
            raise LinkBroken("the other end does not challenge")
        nonce = secrets.token_bytes(NONCE_BYTES)
        wire.send(Response(prove(entry.key, b"edge", challenge.nonce), nonce))
        wire.limit = MOST_BYTES
        known, status = await wire.receive(), await wire.receive()
        if not isinstance(known, Introduction) or not isinstance(status, Status):
            raise LinkBroken("the other end does not introduce itself")
        if not is_proof(known.proof, entry.key, b"driver", nonce):
            raise LinkBroken("the other end does not know the key")
        return cls(entry.replica, wire, known, status)

    @property
    def model(self) -> ModelInfo:
        return self._known.model

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        return self._known.ranks

    @property
    def facts(self) -> ServerFacts:
        return self._known.facts

    @property
    def tokenizer(self) -> bytes | None:
        """`TextCodec.pack`'s."""
        return self._known.tokenizer

    @property
    def retiring(self) -> bool:
        return self._status.retiring or self.broken

    def note_routed(self) -> None:
        """Tell the driver that requests may come now."""
        self._send(Routed())

    async def run(self) -> None:
        """Take what comes, until the link breaks or is cancelled."""
        cause = "its link was closed"
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    self._take(await self._wire.receive())
        except (LinkBroken, TimeoutError) as error:
            cause = str(error) or f"it was silent for {SILENCE_SECONDS:g} s"
        finally:
            self._break(f"replica {self.replica} is gone: {cause}")

    def submit(self, request: Request) -> EventStream:
        if self.broken:
            raise Unavailable(self._status.health.cause)
        number = next(self._numbers)
        stream = EventStream(
            finish_sample=lambda index: self._send(FinishSample(number, index)),
            close=lambda: self._close(number),
        )
        self._streams[number] = stream
        self._send(Submit.of(number, request))
        return stream

    async def abort(self, request_id: str) -> bool:
        if self.broken:
            return False
        number = next(self._numbers)
        answer = self._aborts[number] = asyncio.get_running_loop().create_future()
        self._send(Abort(number, request_id))
        try:
            return await answer
        finally:
            del self._aborts[number]

    def load(self) -> Load:
        return self._status.load

    def health(self) -> Health:
        return self._status.health

    def _take(self, message: FromDriver) -> None:
        match message:
            case Events(events=events, ended=ended):
                for number, event in events:
                    if (stream := self._streams.get(number)) is not None:
                        stream.push(event)
                for end in ended:
                    if (stream := self._forget(end.stream)) is not None:
                        stream.end(None if end.fault is None else error_of(end.fault))
            case Aborted(number=number, found=found):
                if (answer := self._aborts.get(number)) is not None and not answer.done():
                    answer.set_result(found)
            case Status():
                self._status = message
            case _:
                raise LinkBroken(f"a {type(message).__name__} where none is due")

    def _send(self, message: FromEdge) -> None:
        if not self.broken:
            self._wire.send(message)

    def _close(self, number: int) -> None:
        if self._forget(number) is not None:
            self._send(Close(number))

    def _forget(self, number: int) -> EventStream | None:
        return self._streams.pop(number, None)

    def _break(self, cause: str) -> None:
        self.broken = True
        self._wire.close()
        health = replace(self._status.health, state=HealthState.NOT_READY, cause=cause)
        self._status = Status(self._status.load, health, retiring=True)
        for number in tuple(self._streams):
            if (stream := self._forget(number)) is not None:
                stream.end(Unavailable(cause))
        for answer in self._aborts.values():
            if not answer.done():
                answer.set_result(False)
