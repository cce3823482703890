"""A listening socket goes, and no connection is lost where another process listens on its port."""

from __future__ import annotations

import asyncio
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from deploy.edge import listener

CLIENTS = 32  # the kernel deals them to both listeners
SUCCESSOR = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])), reuse_port=True)
print("listening", flush=True)
kept = []
while True:
    kept.append(listening.accept()[0])
    kept[-1].sendall(b"hello")
"""


@pytest.fixture
def retiring() -> Iterator[socket.socket]:
    """It accepts nobody, as a busy process does for a while."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as listening:
        yield listening


@pytest.fixture
def port(retiring: socket.socket) -> Iterator[int]:
    """Another process listens there as well, and greets whom it accepts."""
    port: int = retiring.getsockname()[1]
    command = [sys.executable, "-c", SUCCESSOR, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as successor:
        assert successor.stdout is not None
        successor.stdout.readline()
        yield port
        successor.kill()


def test_who_comes_meanwhile_meets_the_other_listener(port: int, retiring: socket.socket) -> None:
    listener.turn_away(port)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(CLIENTS)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        # Those that the kernel has dealt to the other one are through; the rest is unanswered.
        retiring.setblocking(False)
        with pytest.raises(BlockingIOError):
            retiring.accept()
        listener.stop_listening(port)
        for client in clients:
            assert select.select([client], [], [], 10)[0]
            assert client.recv(5) == b"hello"


def test_who_is_connected_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as alone:
        own: int = alone.getsockname()[1]
        with socket.create_connection(("127.0.0.1", own)) as client, alone.accept()[0] as server:
            listener.turn_away(own)
            listener.stop_listening(own)
            assert listener.connections(own) == 1
            client.sendall(b"ping")
            assert server.recv(4) == b"ping"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", own))


async def test_connections_are_counted_off_the_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        count = listener.ConnectionCount(listening.getsockname()[1])
        with socket.create_connection(listening.getsockname()), listening.accept()[0]:
            assert count.latest == 0  # and the count begins
            async with asyncio.timeout(10):
                while not count.latest:  # noqa: ASYNC110 (no event tells)
                    await asyncio.sleep(0.001)
            assert count.latest == 1
