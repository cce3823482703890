"""Ending a stream early stops the work on the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest

from headwise import AsyncClient, AsyncCompletionStream, Client, RequestCancelledError, RetryPolicy
from tests.unit.client_server import (
    CLIENTS,
    FAST_RETRIES,
    PATIENCE,
    AnyClient,
    Hangs,
    ScriptedServer,
    fails,
    finish,
    says,
    token,
)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[AnyClient]:
    with request.param(server.address, retries=FAST_RETRIES) as client:
        yield client


def test_cancel_reaches_the_server(server: ScriptedServer, client: AnyClient) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    stream = client.stream("hello", request_id="mine")
    assert next(stream).text == "a"
    stream.cancel()
    assert hangs.ended.wait(PATIENCE)
    assert list(stream) == []
    assert stream.text() == "a"
    with pytest.raises(RequestCancelledError) as caught:
        stream.result()
    assert caught.value.request_id == "mine"


def test_leaving_the_stream_cancels_it(server: ScriptedServer, client: AnyClient) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    with client.stream("hello") as stream:
        next(stream)
    assert hangs.ended.wait(PATIENCE)


def test_an_error_of_the_caller_cancels_the_stream(
    server: ScriptedServer, client: AnyClient
) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    with pytest.raises(ZeroDivisionError), client.stream("hello") as stream:
        _ = 1 // (len(next(stream).token_ids) - 1)
    assert hangs.ended.wait(PATIENCE)


def test_a_whole_answer_outlives_a_cancel(server: ScriptedServer, client: AnyClient) -> None:
    server.script(Hangs(token("a", 1), finish()))
    with client.stream("hello") as stream:
        while next(stream).finish is None:
            pass
    assert stream.result().text == "a"


def test_cancel_after_the_end_does_nothing(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(token("a", 1), finish()))
    stream = client.stream("hello")
    whole = stream.result()
    stream.cancel()
    assert stream.result() == whole


def test_the_client_can_be_used_after_a_cancel(server: ScriptedServer, client: AnyClient) -> None:
    server.script(Hangs(token("a", 1)), says(token("b", 2), finish()))
    with client.stream("hello") as stream:
        next(stream)
    assert client.generate("hello").text == "b"


def test_cancel_from_another_thread_wakes_the_reader(server: ScriptedServer) -> None:
    server.script(Hangs(token("a", 1)))
    with Client(server.address) as client:
        stream = client.stream("hello")
        next(stream)
        threading.Thread(target=stream.cancel).start()
        assert list(stream) == []


def test_cancel_between_attempts_is_heard(server: ScriptedServer) -> None:
    server.script(fails(grpc.StatusCode.UNAVAILABLE, "rank 1 died"))
    patient = RetryPolicy(initial_backoff=60, max_backoff=60)
    with Client(server.address, retries=patient) as client:
        stream = client.stream("hello")
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.extend(delta.text for delta in stream))
        reader.start()
        stream.cancel()
        reader.join(PATIENCE)
        assert not reader.is_alive()
        assert texts == []


async def test_cancelling_the_task_cancels_the_request(server: ScriptedServer) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    async with AsyncClient(server.address) as client:
        stream = client.stream("hello")
        await anext(stream)
        task = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(hangs.ended.wait, PATIENCE)
        with pytest.raises(RequestCancelledError):
            await stream.result()


async def test_a_timeout_of_asyncio_cancels_the_request(server: ScriptedServer) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    async with AsyncClient(server.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("hello")
        assert await asyncio.to_thread(hangs.ended.wait, PATIENCE)


async def test_cancel_from_another_task_wakes_the_reader(server: ScriptedServer) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    async with AsyncClient(server.address) as client:
        stream = client.stream("hello")
        await anext(stream)
        rest = asyncio.create_task(_texts(stream))
        await asyncio.sleep(0)
        stream.cancel()
        assert await rest == []
        assert await asyncio.to_thread(hangs.ended.wait, PATIENCE)


async def test_streams_share_one_client(server: ScriptedServer) -> None:
    count = 6
    server.script(*[says(*[token(str(i), i) for i in range(20)], finish())] * count)
    async with AsyncClient(server.address) as client:
        answers = await asyncio.gather(*(client.generate("hello") for _ in range(count)))
    assert {answer.token_ids for answer in answers} == {tuple(range(20))}


async def _texts(stream: AsyncCompletionStream) -> list[str]:
    return [delta.text async for delta in stream]
