"""The listening sockets of this process: who is connected, and no one anew.

gRPC has no call that ends listening alone. Its `stop` does more: a call that arrives before the
client has heard of it is cancelled. So a server that is to be replaced without a lost call stops
listening first, answers on until its connections have made way (`max_connection_age_s`), and only
then stops.

To close a listening socket loses connections, too: the kernel resets those that nobody has accepted
yet, though another process listens on the same port. So nothing new is let in for a moment before.

Sockets are found by asking the kernel for all of this process'. With thousands of connections that
takes a good part of a second: it is not for an event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import psutil

SETTLE_SECONDS = 0.5
"""From `turn_away` to `stop_listening`: handshakes that have begun end, and what waits is accepted.
Less than the second after which a client's kernel asks again."""

_FRESH_SECONDS = 1.0

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; the socket module does not have it
# Classic BPF over a TCP header: (code, jump if true, jump if false, operand).
_DROP_NEW = (
    (0x30, 0, 0, 13),  # load the byte of the flags
    (0x54, 0, 0, 0x12),  # SYN and ACK of them
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # take it
)


def turn_away(port: int) -> None:
    """Leave new connections unanswered, so that their clients' kernels ask again: once
    `stop_listening` is called, they meet whoever else listens on the port."""
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in _DROP_NEW))
    filtering = struct.pack("HP", len(_DROP_NEW), ctypes.addressof(program))
    for listening in _listening(port):
        # Where the kernel lets nobody filter, a few clients have to try again.
        with contextlib.suppress(OSError):
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filtering)


def stop_listening(port: int) -> None:
    """New connections go to whoever else listens on the port, or are refused."""
    for listening in _listening(port):
        listening.shutdown(socket.SHUT_RD)


def connections(port: int) -> int:
    """How many clients are connected."""
    return sum(1 for _ in _sockets(port, psutil.CONN_ESTABLISHED))


class ConnectionCount:
    """Counts the clients connected to a port, in a thread of its own. All methods belong to one
    event loop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._latest = 0
        self._counted_at = -math.inf
        self._counting: asyncio.Task[int] | None = None

    @property
    def latest(self) -> int:
        """As of the last count. Where that is more than a second old, the next one begins."""
        counting = self._counting is not None and not self._counting.done()
        if not counting and time.monotonic() - self._counted_at > _FRESH_SECONDS:
            self._counting = asyncio.create_task(self.count())
        return self._latest

    async def count(self) -> int:
        """As of now."""
        self._latest = await asyncio.to_thread(connections, self._port)
        self._counted_at = time.monotonic()
        return self._latest


def _listening(port: int) -> Iterator[socket.socket]:
    """Duplicates of the sockets, which do to them what is done to these."""
    for found in _sockets(port, psutil.CONN_LISTEN):
        with socket.socket(fileno=os.dup(found.fd)) as duplicate:
            yield duplicate


def _sockets(port: int, state: str) -> Iterator[Any]:
    for found in psutil.Process().net_connections("tcp"):
        if found.status == state and found.laddr.port == port:
            yield found
