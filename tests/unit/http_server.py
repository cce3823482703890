"""The HTTP API over a fake generator on a port of its own, and a client that speaks to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from cluster.config import ServerConfig
from deploy.edge.answers import Answers, Limiter, Watcher
from deploy.edge.http.api import HttpApi
from deploy.edge.http.operations import Exposition
from deploy.edge.models import Models, Served
from deploy.edge.security import Access
from deploy.edge.text import Texts
from tests.unit.edge_server import FACTS
from tests.unit.fakes import FakeCodec, FakeGenerator


@dataclass
class RunningApi:
    api: HttpApi
    generator: FakeGenerator
    http: httpx.AsyncClient

    async def post(self, path: str, /, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of a completion that must succeed."""
        return ok(await self.post("/v1/completions", **body))

    async def chat(self, *messages: str, **body: Any) -> dict[str, Any]:
        """The answer to messages of a user, which must succeed."""
        return ok(await self.post("/v1/chat/completions", messages=says(*messages), **body))

    async def events(self, path: str, /, **body: Any) -> list[Any]:
        """The data of every event of a stream; [DONE] as it is."""
        async with self.http.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            return [event async for event in read_events(response)]


def says(*contents: Any) -> list[dict[str, Any]]:
    """Messages of a user."""
    return [{"role": "user", "content": content} for content in contents]


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


async def read_events(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


@contextlib.asynccontextmanager
async def running_api(
    generator: FakeGenerator | None = None,
    codec: FakeCodec | None = None,
    *,
    tokenizer: bool = True,
    watchers: tuple[Watcher, ...] = (),
    limiter: Limiter | None = None,
    exposition: Exposition | None = None,
    verify: Any = True,
    **config: Any,
) -> AsyncIterator[RunningApi]:
    """`tokenizer` False serves a model without one."""
    generator = generator or FakeGenerator()
    texts = Texts((codec or FakeCodec()) if tokenizer else None, generator.model)  # type: ignore[arg-type]
    server = ServerConfig(**{"http_port": 0, **config})
    api = HttpApi(
        Models(Served(generator, texts, FACTS)),
        Answers(*watchers, limiter=limiter),
        server,
        Access(server),
        exposition=exposition,
    )
    await api.start()
    async with httpx.AsyncClient(base_url=api.url, verify=verify, timeout=20) as http:
        try:
            yield RunningApi(api, generator, http)
        finally:
            await api.drain(0)
            await api.stop()
            texts.close()
