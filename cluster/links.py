"""The driver's ends of the control sockets: one per rank, none of which can block it.

What a rank sends comes out of `poll`; what is sent to a rank waits in its outbox while its socket
is full. A rank whose socket ends appears as `RankGone`. No ray: the ranks may be actors or threads.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from shards.channel import Frames, pack, send_descriptor
from shards.contract import FromRank, Hello, ToRank, decode_from_rank

_CHUNK = 1 << 18
_HELLO_TIMEOUT_S = 60.0
_MOST_GREETING = 4096


@dataclass(frozen=True, slots=True)
class RankGone:
    """The control socket of `rank` ended."""

    rank: int


class _Link:
    """One rank's socket: frames in, an outbox out."""

    def __init__(self, sock: socket.socket, hello: Hello, frames: Frames) -> None:
        self.sock = sock
        self.hello = hello
        self.frames = frames
        self.outbox = bytearray()

    def flush(self) -> bool:
        """Send what the socket takes; True if nothing is left."""
        try:
            while self.outbox:
                del self.outbox[: self.sock.send(self.outbox)]
        except BlockingIOError:
            return False
        return True


class _Stranger:
    """A connection that has not said yet which rank it is. It may not take long, nor say much."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.frames = Frames()
        self._heard = 0

    def receive(self) -> list[FromRank] | None:
        """Its first messages; None if none is whole yet, [] if it speaks another language."""
        try:
            part = self.sock.recv(_CHUNK)
            self._heard += len(part)
            messages = [decode_from_rank(body) for body in self.frames.feed(part)]
        except BlockingIOError:
            return None
        except (OSError, msgspec.MsgspecError):
            return []
        return messages or (None if part and self._heard < _MOST_GREETING else [])


class RankLinks:
    """Listens for `world` ranks, then speaks with them.

    `host` None listens in the abstract unix namespace (ranks on this machine), else on a free TCP
    port of that address. `address` and `token` are what a rank needs to connect, or one that takes
    the place of another (`expect`). One thread calls everything but `wake`, which any thread may
    call to end a `poll` early.
    """

    def __init__(self, world: int, host: str | None = None) -> None:
        self.world = world
        self.token = secrets.token_hex(16)
        self._tokens = [self.token] * world
        self._host = host
        self._links: dict[int, _Link] = {}
        self._strangers: list[_Stranger] = []
        self._selector = selectors.DefaultSelector()
        self._ringing = threading.Lock()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self.address = ""
        self._listen()

    def expect(self, rank: int) -> None:
        """Give up the connection of `rank`; another process may connect in its place, by the
        `address` and `token` as they are from now on."""
        link = self._links.pop(rank, None)
        if link is not None:
            self._selector.unregister(link.sock)
            link.sock.close()
        # Its predecessor may be stopped before it said a word, and go on one day.
        self.token = self._tokens[rank] = secrets.token_hex(16)
        if self._listener is None:
            self._listen()

    def hello(self, rank: int) -> Hello | None:
        """What a connected rank said of itself."""
        link = self._links.get(rank)
        return None if link is None else link.hello

    def wake(self) -> None:
        with self._ringing:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def send(
        self, message: ToRank, descriptor: int | None = None, *, rank: int | None = None
    ) -> None:
        """To every connected rank, or to `rank` alone, in order; with an open file behind it where
        given."""
        frame = pack(message)
        for link in self._links.values():
            if rank not in (None, link.hello.rank):
                continue
            link.outbox += frame
            self._flush(link)
            if descriptor is not None:
                self._send_descriptor(link, descriptor)

    def poll(self, timeout_s: float | None) -> list[FromRank | RankGone]:
        """What has arrived; waits at most `timeout_s` (None: until something does, or `wake`)."""
        found: list[FromRank | RankGone] = []
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept(self._listener)
            elif key.data is None:
                os.eventfd_read(self._bell)
            elif isinstance(key.data, _Stranger):
                found.extend(self._greet(key.data))
            else:
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    found.extend(self._receive(key.data))
        for stranger in [s for s in self._strangers if time.monotonic() > s.deadline]:
            self._send_away(stranger)
        return found

    def refuse(self) -> None:
        """Listen no more, and send away who has not said who it is."""
        self._stop_listening()
        for stranger in tuple(self._strangers):
            self._send_away(stranger)

    def close(self) -> None:
        """Close every socket; ranks take it as their end. Idempotent."""
        if self._bell < 0:
            return
        for link in self._links.values():
            link.sock.close()
        for stranger in self._strangers:
            stranger.sock.close()
        self._links.clear()
        self._strangers.clear()
        self._stop_listening()
        self._selector.close()
        with self._ringing:
            os.close(self._bell)
            self._bell = -1

    def _listen(self) -> None:
        if self._host is None:
            name = f"headwise-{os.getpid()}-{secrets.token_hex(8)}"
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"\0{name}")
            listener.listen(self.world)
            self.address = f"unix:{name}"
        else:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = socket.create_server((self._host, 0), family=family, backlog=self.world)
            self.address = f"tcp:{self._host}:{listener.getsockname()[1]}"
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        stranger = _Stranger(sock, time.monotonic() + _HELLO_TIMEOUT_S)
        self._strangers.append(stranger)
        self._selector.register(sock, selectors.EVENT_READ, stranger)

    def _greet(self, stranger: _Stranger) -> list[FromRank]:
        """Make a link of a connection whose first message shows it to be a rank of ours."""
        messages = stranger.receive()
        if messages is None:
            return []
        hello = messages[0] if messages else None
        if (
            not isinstance(hello, Hello)
            or not 0 <= hello.rank < self.world
            or not hmac.compare_digest(hello.token.encode(), self._tokens[hello.rank].encode())
            or hello.rank in self._links
        ):
            self._send_away(stranger)
            return []
        sock = stranger.sock
        self._strangers.remove(stranger)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = self._links[hello.rank] = _Link(sock, hello, stranger.frames)
        self._selector.modify(sock, selectors.EVENT_READ, link)
        if len(self._links) == self.world:
            self._stop_listening()
        return messages

    def _send_away(self, stranger: _Stranger) -> None:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.sock)
        stranger.sock.close()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _receive(self, link: _Link) -> Iterable[FromRank | RankGone]:
        try:
            part = link.sock.recv(_CHUNK)
        except BlockingIOError:
            return ()
        except OSError:
            part = b""
        if not part:
            return (self._drop(link),)
        return [decode_from_rank(body) for body in link.frames.feed(part)]

    def _drop(self, link: _Link) -> RankGone:
        self._selector.unregister(link.sock)
        link.sock.close()
        del self._links[link.hello.rank]
        return RankGone(link.hello.rank)

    def _flush(self, link: _Link) -> None:
        """A socket that fails here also ends for reading, which is where it is noticed."""
        try:
            done = link.flush()
        except OSError:
            link.outbox.clear()
            done = True
        events = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        if self._selector.get_key(link.sock).events != events:
            self._selector.modify(link.sock, events, link)

    def _send_descriptor(self, link: _Link, descriptor: int) -> None:
        link.sock.settimeout(_HELLO_TIMEOUT_S)
        try:
            if link.outbox:
                link.sock.sendall(link.outbox)
                link.outbox.clear()
            send_descriptor(link.sock, descriptor)
        except OSError:
            link.outbox.clear()
        finally:
            link.sock.setblocking(False)
