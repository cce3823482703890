"""A real gateway before an edge over a fake generator: smg, which speaks OpenAI to its clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from cluster.request import HealthState
from cluster.text import TextCodec
from tests.unit.edge_server import running_edge
from tests.unit.fakes import MODEL, FakeGenerator
from tests.unit.tiny_tokenizers import END, byte_level

GATEWAY = Path(sys.executable).with_name("smg")
# Until the gateway knows worker and tokenizer: a second where nothing else runs.
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05

pytestmark = pytest.mark.skipif(not GATEWAY.exists(), reason="smg is not installed")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def answering(codec: TextCodec) -> FakeGenerator:
    """Says hello and ends; a prompt with "long" in it never ends."""
    said = [*codec.encode("hello 🙂", False), *codec.encode(END, False)]
    endless = codec.encode("long", False)

    def answer(request: Any, _index: int):
        prompt = codec.decode(request.prompt)
        while "long" in prompt:
            yield from endless
        yield from said

    model = dataclasses.replace(
        MODEL, vocabulary=codec.size, context=2048, eos_token_ids=codec.eos_token_ids
    )
    return FakeGenerator(answer, model)


@contextlib.asynccontextmanager
async def gateway(worker: str, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway on loopback that has nowhere else to go."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        GATEWAY,
        "launch",
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--health-check-interval-secs", "1", "--worker-urls", f"grpc://{worker}"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": worker, "HOME": str(home)},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        process.kill()
        await process.wait()


def question(text: str = "?", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


async def answered(client: httpx.AsyncClient, status: int, **body: Any) -> httpx.Response:
    """The first answer of that status; the gateway looks for its worker now and then."""
    async with asyncio.timeout(_START_SECONDS):
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await client.post("/v1/chat/completions", json=question(**body))
                if answer.status_code == status:
                    return answer
            await asyncio.sleep(_POLL_SECONDS)


async def test_openai_clients_reach_headwise_through_a_gateway(tmp_path: Path) -> None:
    codec = TextCodec(byte_level())
    generator = answering(codec)
    async with (
        running_edge(generator, codec) as edge,  # type: ignore[arg-type]
        gateway(edge.edge.address, tmp_path) as client,
    ):
        # It has no tokenizer but the one that headwise hands it.
        whole = (await answered(client, 200)).json()
        (choice,) = whole["choices"]
        assert choice["message"]["content"] == "hello 🙂"
        assert choice["finish_reason"] == "stop"
        assert generator.requests[-1].prompt == tuple(
            codec.render_chat([{"role": "user", "content": "?"}])
        )
        said = len(codec.encode("hello 🙂", False)) + 1
        assert whole["usage"]["completion_tokens"] == said

        body = question(stream=True, stream_options={"include_usage": True}, n=2)
        lines = (await client.post("/v1/chat/completions", json=body)).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        for index in (0, 1):
            deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == index]
            assert "".join(delta.get("content") or "" for delta in deltas) == "hello 🙂"
        assert events[-1]["usage"]["completion_tokens"] == 2 * said

        stopped = (await answered(client, 200, stop=["lo"])).json()["choices"][0]
        assert stopped["message"]["content"] == "hel"
        assert stopped["matched_stop"] == "lo"

        refused = await client.post("/v1/chat/completions", json=question(max_tokens=1 << 20))
        assert refused.status_code == 400
        assert "sampling_params.max_tokens" in refused.text

        body = question("long", stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_lines())
            (running,) = generator.live
        await generator.until(lambda: running in generator.closed)

        generator.set_health(HealthState.NOT_READY, "rank 1 is gone")
        await answered(client, 503)
        generator.set_health(HealthState.READY)
        await answered(client, 200)
