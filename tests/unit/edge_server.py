"""An edge over a fake generator on a port of its own, and stubs that speak to it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.config import ServerConfig
from deploy.edge.models import Models, Served, ServerFacts
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from headwise.v1 import control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.unit.fakes import FakeCodec, FakeGenerator

FACTS = ServerFacts(
    version="1.2.3",
    libraries={"ray": "2.60.0"},
    device="cpu",
    collective="shared_memory",
    max_sequences=32,
    max_step_tokens=512,
    started_at=1_700_000_000.5,
)


@dataclass
class RunningEdge:
    edge: Edge
    generator: FakeGenerator
    channel: grpc.aio.Channel
    inference: Any
    control: Any

    async def generate(self, **fields: Any) -> list[inference_pb2.GenerateResponse]:
        """Every message of one call."""
        call = self.inference.Generate(inference_pb2.GenerateRequest(**fields))
        return [message async for message in call]


@contextlib.asynccontextmanager
async def running_edge(
    generator: FakeGenerator | None = None,
    codec: FakeCodec | None = FakeCodec(),  # noqa: B008 (it has no state)
    credentials: grpc.ChannelCredentials | None = None,
    **config: Any,
) -> AsyncIterator[RunningEdge]:
    generator = generator or FakeGenerator()
    texts = Texts(codec, generator.model)  # type: ignore[arg-type]
    served = Served(generator, texts, FACTS)
    edge = Edge(Models(served), ServerConfig(**{"grpc_port": 0, "http": False, **config}))
    await edge.start()
    if credentials is None:
        channel = grpc.aio.insecure_channel(edge.address)
    else:
        options = [("grpc.ssl_target_name_override", "localhost")]
        channel = grpc.aio.secure_channel(edge.address, credentials, options=options)
    try:
        yield RunningEdge(
            edge,
            generator,
            channel,
            inference_pb2_grpc.InferenceStub(channel),
            control_pb2_grpc.ControlStub(channel),
        )
    finally:
        await channel.close()
        await edge.stop(0)
        texts.close()
