"""Framed messages between the driver and a rank, over one unix or TCP socket.

A frame is a 4-byte little-endian length and a MessagePack body (`shards/contract.py`). A unix
socket can carry one file descriptor ahead of a frame. No torch, no ray.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

from shards.contract import encode

if TYPE_CHECKING:
    import msgspec

_LENGTH = struct.Struct("<I")
_MARK = b"\x00fd\x00"  # travels with a descriptor, which needs at least one byte of data
_CHUNK = 1 << 18


class ChannelClosed(ConnectionError):
    """The other side is gone."""


def connect(address: str, timeout_s: float) -> socket.socket:
    """Connect to `unix:NAME` (Linux's abstract namespace: no file is left behind) or
    `tcp:HOST:PORT`."""
    scheme, _, place = address.partition(":")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        sock.connect(f"\0{place}")
    else:
        host, _, port = place.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
    return sock


def pack(message: msgspec.Struct) -> bytes:
    """A message as a frame."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def send_descriptor(sock: socket.socket, descriptor: int) -> None:
    """Hand an open file to the other side, which takes it with `Channel.receive_descriptor`."""
    socket.send_fds(sock, [_MARK], [descriptor])


class Frames:
    """Cuts a byte stream that arrives in pieces into the bodies of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, part: bytes) -> list[bytes]:
        buffer = self._buffer
        buffer += part
        bodies, at = [], 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if len(buffer) - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            bodies.append(bytes(buffer[at : at + length]))
            at += length
        del buffer[:at]
        return bodies


class Channel:
    """A rank's side: whole frames in both directions, waiting for each."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: msgspec.Struct) -> None:
        try:
            self.sock.sendall(pack(message))
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive_descriptor(self) -> int:
        """Must be the next thing on the wire; the caller owns the descriptor."""
        mark, descriptors, _, _ = socket.recv_fds(self.sock, len(_MARK), 1)
        if mark != _MARK or len(descriptors) != 1:
            raise ChannelClosed("expected a file descriptor on the control socket")
        return descriptors[0]

    def receive(self) -> bytes:
        """The next frame's body; waits for it. Reads no byte beyond it, since a descriptor that
        is read past would be lost."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        body = bytearray()
        while len(body) < count:
            try:
                part = self.sock.recv(min(count - len(body), _CHUNK))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other side closed the control socket")
            body += part
        return bytes(body)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
