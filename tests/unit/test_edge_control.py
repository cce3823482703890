"""Control, grpc.health.v1 and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.request import HealthState
from headwise.v1 import control_pb2 as pb
from headwise.v1 import inference_pb2
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.fakes import EOS, FakeCodec

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
async def edge() -> AsyncIterator[RunningEdge]:
    async with running_edge() as edge:
        yield edge


async def status(edge: RunningEdge, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(edge.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def test_server_info(edge: RunningEdge) -> None:
    info = await edge.control.GetServerInfo(pb.GetServerInfoRequest())

    assert (info.version, info.libraries["ray"]) == ("1.2.3", "2.60.0")
    assert (info.tensor_parallel, info.device, info.collective) == (2, "cpu", "shared_memory")
    assert (info.max_sequences, info.max_step_tokens) == (32, 512)
    assert (info.kv_blocks, info.block_size) == (64, 16)
    assert info.started_at.ToMicroseconds() == 1_700_000_000_500_000
    second = info.ranks[1]
    assert (second.rank, second.host, second.pid) == (1, "localhost", 102)
    assert (second.heads.start, second.heads.stop) == (5, 9)
    assert (second.kv_heads.start, second.kv_heads.stop) == (1, 3)
    assert (second.channels.start, second.vocabulary.stop) == (64, 258)
    assert (second.weight_bytes, second.kv_bytes) == (4096, 1024)


@pytest.mark.parametrize("codec", [None, FakeCodec(), FakeCodec(has_chat_template=False)])
async def test_model_info(codec: FakeCodec | None) -> None:
    async with running_edge(codec=codec) as edge:
        info = await edge.control.GetModelInfo(pb.GetModelInfoRequest(model="fake"))

    assert (info.name, info.architecture, info.dtype) == ("fake", "FakeForCausalLM", "float32")
    assert (info.vocabulary, info.context, info.layers) == (258, 1 << 20, 2)
    assert (info.heads, info.kv_heads, info.head_dim, info.width) == (9, 3, 8, 72)
    assert (info.parameters, list(info.eos_token_ids)) == (1000, [EOS])
    assert info.has_tokenizer == (codec is not None)
    assert info.has_chat_template == (codec is not None and codec.has_chat_template)


async def test_load(edge: RunningEdge) -> None:
    stopping = inference_pb2.Stopping(max_tokens=4)
    await edge.generate(text="x", stopping=stopping)
    load = await edge.control.GetLoad(pb.GetLoadRequest())

    assert (load.running, load.waiting, load.generated_tokens) == (0, 0, 4)
    assert (load.kv_blocks, load.kv_blocks_used, load.block_size) == (64, 3, 16)
    assert (load.steps, load.preemptions) == (7, 1)
    assert (load.prompt_tokens, load.cached_tokens) == (200, 48)


@pytest.mark.parametrize(
    ("state", "wire"),
    [
        (HealthState.STARTING, pb.HEALTH_STATE_STARTING),
        (HealthState.READY, pb.HEALTH_STATE_READY),
        (HealthState.DEGRADED, pb.HEALTH_STATE_DEGRADED),
        (HealthState.NOT_READY, pb.HEALTH_STATE_NOT_READY),
    ],
)
async def test_health_names_state_and_cause(
    edge: RunningEdge, state: HealthState, wire: int
) -> None:
    edge.generator.set_health(state, "because")
    health = await edge.control.GetHealth(pb.GetHealthRequest())

    assert (health.state, health.cause, health.epoch) == (wire, "because", 1)
    assert health.since.ToMicroseconds() == 1_700_000_000_250_000
    assert [(rank.rank, rank.state, rank.pid) for rank in health.ranks] == [
        (0, wire, 101),
        (1, wire, 102),
    ]


async def test_abort_of_an_unknown_request_finds_nothing(edge: RunningEdge) -> None:
    assert not (await edge.control.Abort(pb.AbortRequest(request_id="gone"))).found


async def test_abort_ends_a_running_request(edge: RunningEdge) -> None:
    edge.generator.pause()
    call = edge.inference.Generate(inference_pb2.GenerateRequest(request_id="r1", text="x"))
    await edge.generator.until(lambda: "r1" in edge.generator.live)

    assert (await edge.control.Abort(pb.AbortRequest(request_id="r1"))).found
    assert (await call.read()).finish.reason == inference_pb2.FINISH_REASON_ABORTED


async def test_abort_without_an_id_is_refused(edge: RunningEdge) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.control.Abort(pb.AbortRequest())

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("state", "inference"),
    [
        (HealthState.STARTING, NOT_SERVING),
        (HealthState.READY, SERVING),
        (HealthState.DEGRADED, SERVING),
        (HealthState.NOT_READY, NOT_SERVING),
    ],
)
async def test_health_service_per_state(
    edge: RunningEdge, state: HealthState, inference: int
) -> None:
    edge.generator.set_health(state)

    assert await status(edge, "headwise.v1.Inference") == inference
    assert await status(edge, "") == inference
    assert await status(edge, "headwise.v1.Control") == SERVING


async def test_an_unknown_service_has_no_health(edge: RunningEdge) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(edge, "nobody")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_changes_and_the_end(edge: RunningEdge) -> None:
    stub = health_pb2_grpc.HealthStub(edge.channel)
    request = health_pb2.HealthCheckRequest(service="headwise.v1.Inference")
    watch = stub.Watch(request)

    assert (await watch.read()).status == SERVING
    edge.generator.set_health(HealthState.NOT_READY, "rank 0 died")
    assert (await watch.read()).status == NOT_SERVING
    edge.generator.set_health(HealthState.READY)
    assert (await watch.read()).status == SERVING
    await edge.edge.stop(60)
    assert (await watch.read()).status == NOT_SERVING
    assert await watch.read() is grpc.aio.EOF


async def test_watch_of_an_unknown_service_says_so(edge: RunningEdge) -> None:
    stub = health_pb2_grpc.HealthStub(edge.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))

    assert (await watch.read()).status == SERVICE_UNKNOWN


async def test_reflection_lists_the_services_and_their_methods(edge: RunningEdge) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="headwise.v1.Inference"),
    ]
    listed, files = [r async for r in stub.ServerReflectionInfo(iter(requests))]

    assert {service.name for service in listed.list_services_response.service} >= {
        "headwise.v1.Inference",
        "headwise.v1.Control",
        "grpc.health.v1.Health",
    }
    described = FileDescriptorProto.FromString(
        files.file_descriptor_response.file_descriptor_proto[0]
    )
    methods = [method.name for method in described.service[0].method]
    assert methods == ["Generate", "Chat", "Tokenize", "Detokenize"]
