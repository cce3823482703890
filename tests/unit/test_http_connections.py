"""Clients that leave, read slowly, send slowly; who may call; the server's end."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
import uvicorn
from structlog.testing import capture_logs

from cluster.config import ServerConfig
from cluster.errors import StartupError
from cluster.request import Request
from deploy.edge.answers import Caller
from deploy.edge.http import boundary, protocol
from deploy.edge.http.server import bind
from tests.unit.http_server import RunningApi, ok, read_events, running_api, says
from tests.unit.pems import Authority

COMPLETIONS = "/v1/completions"


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    async with running_api() as running:
        yield running


async def connect(api: RunningApi) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(api.api.url)
    return await asyncio.open_connection(where.hostname, where.port)


def request_of(**body: Any) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(content), content)
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(api: RunningApi, stream: bool) -> None:
    api.generator.pause()
    _, writer = await connect(api)
    with capture_logs() as logs:
        writer.write(request_of(prompt=["x", "y"], stream=stream))
        await api.generator.until(lambda: len(api.generator.live) == 2)
        writer.close()
        await api.generator.until(lambda: not api.generator.live)
        # What the server is still at ends with it, the log line included.
        await api.api.drain(0)
        await api.api.stop()
    assert [(entry["event"], entry.get("outcome")) for entry in logs] == [("call", "DISCONNECTED")]


async def test_a_client_that_leaves_in_the_middle_of_a_stream(api: RunningApi) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 1_000_000}
    async with api.http.stream("POST", COMPLETIONS, json=body) as response:
        await anext(read_events(response))
    await api.generator.until(lambda: not api.generator.live)
    assert api.generator.events < 1_000_000


async def test_a_slow_reader_is_waited_for(api: RunningApi) -> None:
    reader, writer = await connect(api)
    writer.write(request_of(prompt="x", stream=True, max_tokens=1_000_000))
    await reader.readuntil(b"data:")
    produced = -1
    # Until the buffers between the two are full: then nothing more is produced.
    while produced != api.generator.events:
        produced = api.generator.events
        await asyncio.sleep(0.2)
    assert produced < 200_000
    # Meanwhile others are answered.
    await api.complete(prompt="x", max_tokens=1)
    writer.close()
    await api.generator.until(lambda: not api.generator.live)


async def test_headers_that_do_not_come(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_HEADERS_SECONDS", 0.1)
    reader, writer = await connect(api)
    writer.write(b"GET /version HTTP/1.1\r\nhost:")
    assert await reader.read() == b""
    # A connection that has been of use has as long again.
    reader, writer = await connect(api)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.write(b"GET")
    assert (await reader.read()).endswith(b'"}')


async def test_a_body_that_does_not_come(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "_BODY_SECONDS", 0.1)
    reader, writer = await connect(api)
    writer.write(request_of(prompt="x" * 1000)[:-500])
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_too_many_bodies_at_a_time(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "_MOST_BODIES", 0)
    response = await api.post(COMPLETIONS, prompt="x")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


async def test_what_is_no_http(api: RunningApi) -> None:
    reader, writer = await connect(api)
    writer.write(b"hello\r\n\r\n")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_request"


async def test_headers_that_are_too_large(api: RunningApi) -> None:
    reader, writer = await connect(api)
    writer.write(b"GET /version HTTP/1.1\r\nx-large: " + b"x" * 100_000)
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()


async def test_connections_beyond_the_bound_are_closed() -> None:
    async with running_api(max_connections=2) as api:
        first, second = await connect(api), await connect(api)
        for reader, writer in (first, second):
            writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader, _ = await connect(api)
        assert await reader.read() == b""


async def test_requests_beyond_the_bound_are_refused() -> None:
    async with running_api(max_concurrent_calls=1) as api:
        api.generator.pause()
        running = asyncio.create_task(api.post(COMPLETIONS, prompt="x", max_tokens=1))
        await api.generator.until(lambda: bool(api.generator.live))
        response = await api.post(COMPLETIONS, prompt="x")
        assert response.status_code == 429
        api.generator.resume()
        ok(await running)


async def test_running_requests_may_finish(api: RunningApi) -> None:
    api.generator.pause()
    running = asyncio.create_task(api.post(COMPLETIONS, prompt="x", max_tokens=2))
    await api.generator.until(lambda: bool(api.generator.live))
    drain = asyncio.create_task(api.api.drain(20))
    await asyncio.sleep(0)
    refused = await api.post(COMPLETIONS, prompt="x")
    assert refused.status_code == 503
    assert "try another one" in refused.json()["error"]["message"]
    assert (await api.http.get("/ready")).status_code == 503
    assert (await api.http.get("/health")).status_code == 200
    api.generator.resume()
    assert ok(await running)["choices"][0]["text"] == "ab"
    await drain


async def test_those_that_do_not_are_told() -> None:
    async with running_api() as api:
        body = {"messages": says("x"), "stream": True}
        async with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
            events = read_events(response)
            await anext(events)
            api.generator.pause()
            whole = asyncio.create_task(api.post(COMPLETIONS, prompt="x"))
            await api.generator.until(lambda: len(api.generator.live) == 2)
            await api.api.drain(0)
            last = [event async for event in events][-1]
        assert "shutting down" in last["error"]["message"]
        assert (await whole).status_code == 503
        assert not api.generator.live


async def test_a_server_that_retires_sends_its_clients_away(api: RunningApi) -> None:
    reader, writer = await connect(api)
    writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"}")
    api.generator.pause()
    running = asyncio.create_task(api.post(COMPLETIONS, prompt="x", max_tokens=1))
    await api.generator.until(lambda: bool(api.generator.live))
    api.api.retire()
    # The idle one ends at once, the other one with its answer.
    assert await asyncio.wait_for(reader.read(), 20) == b""
    api.generator.resume()
    response = await running
    ok(response)
    assert response.headers["connection"] == "close"
    with pytest.raises(httpx.ConnectError):
        await api.http.get("/version")


@dataclass
class Callers:
    """Remembers who asked."""

    seen: list[Caller] = field(default_factory=list)

    def begin(self, _model: str, _request: Request, caller: Caller) -> Any:
        self.seen.append(caller)
        return self

    def delta(self, _delta: Any) -> None: ...
    def end(self, _error: BaseException | None) -> None: ...


async def test_tokens_and_trace_contexts(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("alice:secret\n")
    callers = Callers()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running_api(token_file=str(file), watchers=(callers,)) as api:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = await api.http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await api.http.get("/v1/models")).status_code == 401
        for path in ("/health", "/ready", "/version"):
            assert (await api.http.get(path)).status_code == 200
        headers = {"authorization": "Bearer secret", "traceparent": trace}
        ok(await api.http.post(COMPLETIONS, json={"prompt": "x"}, headers=headers))
    assert callers.seen == [Caller("http", "alice", trace, "127.0.0.1")]


async def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("client")
    certificates = {
        "tls_certificate": str(server.certificate),
        "tls_key": str(server.key),
        "tls_client_ca": str(authority.certificate),
    }
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    async with running_api(verify=trusted, **certificates) as api:
        assert api.api.url.startswith("https://")
        with pytest.raises(httpx.HTTPError):
            await api.http.get("/version")
    trusted.load_cert_chain(str(client.certificate), str(client.key))
    callers = Callers()
    async with running_api(verify=trusted, watchers=(callers,), **certificates) as api:
        await api.complete(prompt="x", max_tokens=1)
    assert callers.seen[0].name == "client"


async def test_a_server_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(uvicorn.Server, "startup", fail)
    with pytest.raises(StartupError, match="HTTP server ended"):
        async with asyncio.timeout(20), running_api():
            pass


async def test_an_address_that_is_taken(api: RunningApi) -> None:
    port = urlsplit(api.api.url).port
    with pytest.raises(StartupError, match=f"{port} cannot be listened on.*another http_port"):
        bind(ServerConfig(http_port=port))
