"""Every call is counted by its status, also those that no model hears of."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx2 as httpx
import pytest

from cluster.config import ServerConfig
from deploy.edge import calls
from deploy.edge.models import Models, Served
from deploy.edge.security import Access
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from headwise.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.unit.edge_server import FACTS
from tests.unit.fakes import FakeCodec, FakeGenerator

GENERATE = "/headwise.v1.Inference/Generate"
KNOWN = {"authorization": "Bearer secret"}
COMPLETIONS = "POST /v1/completions"


@dataclass
class Counted:
    """An edge that asks for a token, and what it has told of."""

    edge: Edge
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)


@pytest.fixture
async def counted(tmp_path: Path) -> AsyncIterator[Counted]:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    generator = FakeGenerator()
    texts = Texts(FakeCodec(), generator.model)  # type: ignore[arg-type]
    config = ServerConfig(grpc_port=0, http_port=0, token_file=str(tokens))
    calls: Counter[tuple[str, str, str]] = Counter()
    edge = Edge(
        Models(Served(generator, texts, FACTS)), config, on_call=lambda *call: calls.update([call])
    )
    await edge.start()
    try:
        yield Counted(edge, calls)
    finally:
        await edge.stop(0)
        texts.close()


async def test_grpc_calls_are_counted_by_method_and_code(counted: Counted) -> None:
    known = tuple(KNOWN.items())
    good = inference_pb2.GenerateRequest(text="hello")
    good.stopping.max_tokens = 2
    async with grpc.aio.insecure_channel(counted.edge.address) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        control = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
        assert [message async for message in inference.Generate(good, metadata=known)]
        await control.GetLoad(control_pb2.GetLoadRequest(), metadata=known)
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(aiter(inference.Generate(good)))
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(aiter(inference.Generate(inference_pb2.GenerateRequest(), metadata=known)))
        for name in ("/made.up/One", "/vllm.made.up/Two"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(name)(b"", metadata=known)

    assert counted.calls == {
        ("grpc", GENERATE, "OK"): 1,
        ("grpc", "/headwise.v1.Control/GetLoad", "OK"): 1,
        ("grpc", GENERATE, "UNAUTHENTICATED"): 1,
        ("grpc", GENERATE, "INVALID_ARGUMENT"): 1,
        ("grpc", "other", "UNIMPLEMENTED"): 1,
        ("vllm", "other", "UNIMPLEMENTED"): 1,
    }


async def test_http_calls_are_counted_by_route_and_status(counted: Counted) -> None:
    async with httpx.AsyncClient(base_url=counted.edge.http_address) as client:
        body = {"model": "fake", "prompt": "hello", "max_tokens": 2}
        await client.post("/v1/completions", json=body, headers=KNOWN)
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json={"max_tokens": "many"}, headers=KNOWN)
        await client.get("/v1/models/one", headers=KNOWN)
        await client.get("/v1/models/two", headers=KNOWN)
        await client.get("/ready")
        await client.get("/made/up", headers=KNOWN)
        await client.request("BREW", "/v1/completions", headers=KNOWN)

    assert counted.calls == {
        ("http", COMPLETIONS, "200"): 1,
        ("http", COMPLETIONS, "401"): 1,
        ("http", COMPLETIONS, "400"): 1,
        ("http", "GET /v1/models/{model:path}", "404"): 2,
        ("http", "GET /ready", "200"): 1,
        ("http", "other", "404"): 1,
        ("http", "other", "405"): 1,
    }


class Context:
    """Of a gRPC call without metadata, which says how it ended."""

    def __init__(self, read: Callable[[], Awaitable[bytes]]) -> None:
        self.read = read
        self.status: grpc.StatusCode | None = None
        self.written: list[object] = []

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_arguments: None

    async def write(self, message: object) -> None:
        self.written.append(message)

    async def abort(self, status: grpc.StatusCode, *_: object) -> None:
        self.status = status


async def test_a_newcomer_is_served_while_the_slowest_leaves_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaving, let_go = asyncio.Event(), asyncio.Event()

    async def too_late() -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            leaving.set()
            await let_go.wait()
        raise AssertionError

    async def at_once() -> bytes:
        return b"message"

    async def reply(request: bytes, _context: object) -> bytes:
        return request

    async def served(_details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(reply, bytes)

    around = calls.Calls(Access(ServerConfig()), most=10, answering={})
    details: Any = SimpleNamespace(method="/a/B")
    call = (await around.intercept_service(served, details)).stream_stream
    monkeypatch.setattr(calls, "_MOST_ARRIVING", 1)
    monkeypatch.setattr(calls, "_MESSAGE_SECONDS", 0)
    slowest, newcomer = Context(too_late), Context(at_once)
    task = asyncio.create_task(call(None, slowest))
    await leaving.wait()
    monkeypatch.setattr(calls, "_MESSAGE_SECONDS", 20)
    await call(None, newcomer)
    let_go.set()
    await task

    assert (newcomer.status, newcomer.written) == (None, [b"message"])
    assert slowest.status is grpc.StatusCode.DEADLINE_EXCEEDED
