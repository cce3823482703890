"""Structured output of a real model, asked for over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig, ServerConfig
from cluster.driver import Driver
from deploy.edge.models import Models, Served
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from headwise.v1 import inference_pb2, inference_pb2_grpc
from tests.ranks import ThreadLauncher
from tests.unit.edge_server import FACTS

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "country": {"type": "string"},
        "population": {"type": "integer"},
        "coastal": {"type": "boolean"},
    },
    "required": ["city", "country", "population", "coastal"],
    "additionalProperties": False,
}
QUESTION = "Describe Lisbon as JSON with city, country, population and coastal."


@pytest.fixture(scope="module")
def driver(bundled_model: Path) -> Iterator[Driver]:
    config = ClusterConfig.model_validate(
        {"model": str(bundled_model), "kv_memory": 32 << 20, "max_context": 512}
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(1))
    yield driver
    driver.stop()


@pytest.mark.model
async def test_json_over_generate_and_chat(driver: Driver) -> None:
    texts = Texts(driver.codec, driver.model)
    edge = Edge(Models(Served(driver, texts, FACTS)), ServerConfig(grpc_port=0, http=False))
    await edge.start()
    try:
        async with grpc.aio.insecure_channel(edge.address) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            common: dict[str, Any] = {
                "constraint": inference_pb2.Constraint(json_schema=json.dumps(SCHEMA)),
                "sampling": inference_pb2.Sampling(temperature=0),
                "stopping": inference_pb2.Stopping(max_tokens=200),
            }
            generate = inference_pb2.GenerateRequest(text=QUESTION, **common)
            message = inference_pb2.ChatMessage(role="user", content=QUESTION)
            chat = inference_pb2.ChatRequest(messages=[message], **common)
            for call in (stub.Generate(generate), stub.Chat(chat)):
                deltas = [delta async for delta in call]
                assert deltas[-1].finish.reason == inference_pb2.FINISH_REASON_STOP
                answer = "".join(delta.text for delta in deltas)
                jsonschema.validate(json.loads(answer), SCHEMA)

            generate.constraint.regex = "[a-z"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [_ async for _ in stub.Generate(generate)]
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = rpc_status.from_call(refused.value).details
            bad = error_details_pb2.BadRequest()
            assert any(detail.Unpack(bad) for detail in details)
            [violation] = bad.field_violations
            assert violation.field == "constraint.regex"
            assert "unclosed character class" in violation.description
    finally:
        await edge.stop(0)
        texts.close()
