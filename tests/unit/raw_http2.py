"""HTTP/2 by hand, for what no gRPC client would send. RFC 9113 and, for headers, RFC 7541."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(method: str, stream: int = 1, **others: str) -> bytes:
    """A gRPC call's HEADERS; others replace or extend them, `_` standing for `-`."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    fields |= {name.replace("_", "-"): value for name, value in others.items()}
    return frame(HEADERS, END_HEADERS, stream, _literals(fields))


def message(data: bytes, stream: int = 1) -> bytes:
    """DATA with one gRPC message, the stream's last."""
    return frame(DATA, END_STREAM, stream, b"\0" + struct.pack(">I", len(data)) + data)


class Connection:
    """`seen` is every frame kind that came, `text` all payloads as they came."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader

    async def frames(self) -> AsyncIterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame until the server hangs up."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                yield kind, flags, stream, payload

    async def until(self, kind: int) -> bytes:
        """The payload of the next frame of a kind that ends a stream, or any GOAWAY or RST."""
        async for found, flags, _stream, payload in self.frames():
            if found == kind and (flags & END_STREAM or kind not in (DATA, HEADERS)):
                return payload
        raise ConnectionResetError("the server hung up")


@contextlib.asynccontextmanager
async def connection(address: str, settings: bytes = b"") -> AsyncIterator[Connection]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS, 0, 0, settings))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def _literals(fields: Mapping[str, str]) -> bytes:
    """Without indexing and without Huffman's code."""
    return b"".join(
        b"\0" + b"".join(_string(part.encode()) for part in pair) for pair in fields.items()
    )


def _string(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value
