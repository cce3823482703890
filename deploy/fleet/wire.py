"""A link's bytes: length-prefixed MessagePack over TCP, and both ends' proof that they belong.

asyncio's streams rather than gRPC's: a frame costs 10 us of CPU on both ends together instead of
94 us, and a link carries one frame for each step of a driver. Links are not encrypted, no more than
those to the ranks: they belong on a cluster's own network.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import msgspec

M = TypeVar("M")

_LENGTH = struct.Struct(">I")
# Before the other end is known: room for a proof, no more.
MOST_STRANGER_BYTES = 1 << 12
MOST_BYTES = 1 << 28
NONCE_BYTES = 32


class LinkBroken(Exception):
    """The other end is gone, or does not speak as it should."""


class Wire(Generic[M]):
    """One end of a link; `M` is what comes in."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[M],
    ) -> None:
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._encoder = msgspec.msgpack.Encoder()
        self.limit = MOST_STRANGER_BYTES
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: msgspec.Struct) -> None:
        """Never waits: `drained` does, for those who may."""
        frame = bytearray(_LENGTH.size)
        self._encoder.encode_into(message, frame, _LENGTH.size)
        _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
        self._writer.write(frame)

    async def drained(self) -> None:
        """Until the other end has taken most of what was sent. Raises `LinkBroken`."""
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise LinkBroken(str(error)) from error

    async def receive(self) -> M:
        """The next message. Raises `LinkBroken`."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > self.limit:
                raise LinkBroken(f"a frame of {length} bytes, and {self.limit} are the most")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError) as error:
            raise LinkBroken(str(error)) from error

    async def messages(self) -> AsyncIterator[M]:
        """Until the link breaks, which is raised."""
        while True:
            yield await self.receive()

    def close(self) -> None:
        self._writer.close()


def prove(key: bytes, role: bytes, nonce: bytes) -> bytes:
    """What only a holder of `key` can answer to `nonce`; `role` keeps one end's answer from being
    the other's."""
    return hmac.digest(key, role + nonce, "sha256")


def is_proof(proof: bytes, key: bytes, role: bytes, nonce: bytes) -> bool:
    return hmac.compare_digest(proof, prove(key, role, nonce))
