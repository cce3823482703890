"""Several servers, many threads, Ctrl-C, and the end of the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster.request import HealthState
from headwise import Client, RetryPolicy
from tests.unit.client_faults import EdgeThread, Loop, seeded_text
from tests.unit.client_server import CLIENTS, PATIENCE, Hangs, ScriptedServer, finish, says, token
from tests.unit.fakes import FakeGenerator


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def edges(loop: Loop) -> Iterator[list[EdgeThread]]:
    edges = [EdgeThread(loop, FakeGenerator(seeded_text)) for _ in range(2)]
    yield edges
    for edge in edges:
        edge.stop()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def served(edge: EdgeThread) -> int:
    assert isinstance(edge.generator, FakeGenerator)
    return len(edge.generator.requests)


@pytest.mark.parametrize("kind", CLIENTS)
def test_calls_go_round_and_leave_out_who_is_away(kind: Any, edges: list[EdgeThread]) -> None:
    first, second = edges
    with kind([edge.address for edge in edges], retries=RetryPolicy(attempts=50)) as client:
        # Both are connected to at the first call, and one of them may be there before the other.
        for _ in range(200):
            client.generate("hello", max_tokens=2)
            if served(first) and served(second):
                break
        assert served(first)
        assert served(second)
        first.stop()
        before = served(second)
        for _ in range(4):
            client.generate("hello", max_tokens=2)
        assert served(second) == before + 4
        first.start()


@pytest.mark.parametrize("kind", CLIENTS)
def test_calls_leave_out_who_computes_nothing(
    kind: Any, loop: Loop, edges: list[EdgeThread]
) -> None:
    sick, well = edges
    assert isinstance(sick.generator, FakeGenerator)
    loop.loop.call_soon_threadsafe(sick.generator.set_health, HealthState.NOT_READY, "rank 0 died")
    # Not one attempt fails: the server says over grpc.health.v1 that it is not to be asked.
    with kind([edge.address for edge in edges], retries=0) as client:
        for _ in range(6):
            client.generate("hello", max_tokens=2, seed=1, timeout=PATIENCE)
        assert (served(sick), served(well)) == (0, 6)
        # But it can be asked what ails it.
        states = {client.health().state.value for _ in range(50)}
        assert states == {"ready", "not_ready"}


def test_many_threads_share_a_client(edges: list[EdgeThread]) -> None:
    with Client(edges[0].address) as client, ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda seed: client.generate("hello", seed=seed, max_tokens=20), range(24))
        )
        alone = [client.generate("hello", seed=seed, max_tokens=20) for seed in range(24)]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]


def test_ctrl_c_cancels_on_the_server(server: ScriptedServer) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    with Client(server.address) as client:
        stream = client.stream("hello")
        next(stream)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert hangs.ended.wait(PATIENCE)
        assert list(stream) == []
        assert stream.text() == "a"


@pytest.mark.parametrize(
    "program",
    [
        """
        from headwise import Client
        stream = Client(ADDRESS).stream("hello")
        print(next(stream).text)
        """,
        """
        import asyncio
        from headwise import AsyncClient

        async def main():
            stream = AsyncClient(ADDRESS).stream("hello")
            print((await anext(stream)).text)

        asyncio.run(main())
        """,
    ],
    ids=["sync", "async"],
)
def test_an_open_stream_does_not_hold_up_the_end(server: ScriptedServer, program: str) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    source = textwrap.dedent(program).replace("ADDRESS", repr(server.address))
    run = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=True
    )
    assert run.stdout == "a\n"
    assert "Traceback" not in run.stderr
    assert hangs.ended.wait(PATIENCE)


def test_a_closed_client_ends_its_streams(server: ScriptedServer) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs, says(finish()))
    with Client(server.address) as client:
        next(client.stream("hello"))
    assert hangs.ended.wait(PATIENCE)
    assert len(server.calls) == 1
