"""Callers that mean harm, or are broken: they are told so, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.internal import encoder
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import ServerConfig
from cluster.request import HealthState
from deploy.edge import calls, health, transport
from headwise.v1 import inference_pb2 as pb
from tests.unit import raw_http2
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.fakes import FakeGenerator

ONE = pb.Stopping(max_tokens=1)
GENERATE = "/headwise.v1.Inference/Generate"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.fixture
async def edge() -> AsyncIterator[RunningEdge]:
    async with running_edge() as edge:
        yield edge


async def answers(edge: RunningEdge) -> bool:
    """Whether a stranger to all this, on a connection of its own, is served."""
    async with grpc.aio.insecure_channel(edge.edge.address) as channel:
        call = channel.unary_stream(GENERATE)(
            pb.GenerateRequest(text="x", stopping=ONE).SerializeToString(), timeout=20
        )
        return [part async for part in call] != []


async def reason(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status and the ErrorInfo.reason that a call ends with."""
    code = await call.code()
    for key, value in await call.trailing_metadata():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.domain == "headwise"
            return code, info.reason
    return code, ""


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
        raw_http2.PREFACE + b"\xff" * 64,
        raw_http2.PREFACE + raw_http2.frame(raw_http2.SETTINGS, 0, 0, b"odd"),
        raw_http2.PREFACE
        + raw_http2.frame(raw_http2.SETTINGS, 0, 0)
        + raw_http2.frame(raw_http2.HEADERS, raw_http2.END_HEADERS, 1, b"\xbe\xff\xff\xff\x7f"),
    ],
)
async def test_garbage_on_the_port_is_hung_up_on(edge: RunningEdge, data: bytes) -> None:
    host, _, port = edge.edge.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            await reader.read()
    writer.close()
    assert await answers(edge)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content_type": "application/json"}, b"415"),
        ({":method": "GET"}, b""),
        ({"grpc_timeout": "soon"}, b"grpc-status"),
        ({"grpc_timeout": "0n"}, b""),
        ({"grpc_timeout": "99999999H"}, b"grpc-status"),
        ({"grpc_encoding": "made-up"}, b"grpc-status"),
    ],
)
async def test_odd_headers_end_their_call_alone(
    edge: RunningEdge, fields: dict[str, str], expected: bytes
) -> None:
    request = pb.GenerateRequest(text="x", stopping=ONE).SerializeToString()
    async with asyncio.timeout(20), raw_http2.connection(edge.edge.address) as peer:
        peer.writer.write(raw_http2.headers(GENERATE, **fields) + raw_http2.message(request))
        async for kind, flags, _stream, payload in peer.frames():
            if kind == raw_http2.RST_STREAM:
                break
            if kind == raw_http2.HEADERS and flags & raw_http2.END_STREAM:
                assert payload
                break
        else:
            pytest.fail("the connection ended")
    assert await answers(edge)
    assert edge.generator.live == {}


async def test_pings_without_end_are_answered_with_goaway(edge: RunningEdge) -> None:
    async with asyncio.timeout(20), raw_http2.connection(edge.edge.address) as peer:
        peer.writer.write(raw_http2.frame(raw_http2.PING, 0, 0, b"12345678") * 10)
        assert b"too_many_pings" in await peer.until(raw_http2.GOAWAY)
    assert await answers(edge)


async def test_a_method_that_is_not_there(edge: RunningEdge) -> None:
    for method in ("/headwise.v1.Inference/Guess", "/nobody/knows", "/grpc.health.v1.Health/X"):
        call = edge.channel.unary_unary(method)(b"x")
        assert await reason(call) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")


async def test_a_message_that_never_comes_is_not_waited_for(
    edge: RunningEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_MESSAGE_SECONDS", 0.05)
    call = edge.channel.stream_stream(GENERATE)()
    assert await reason(call) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_no_message_at_all(edge: RunningEdge) -> None:
    call = edge.channel.stream_stream(GENERATE)()
    await call.done_writing()
    assert await reason(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_the_slowest_message_makes_way(
    edge: RunningEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_MOST_ARRIVING", 4)
    slow = [edge.channel.stream_stream(GENERATE)() for _ in range(4)]
    late = edge.channel.stream_stream(GENERATE)()
    ended, _ = await asyncio.wait(
        [asyncio.create_task(reason(call)) for call in (*slow, late)],
        return_when=asyncio.FIRST_COMPLETED,
    )
    assert {task.result()[0] for task in ended} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert await answers(edge)
    for call in (*slow, late):
        call.cancel()


async def test_more_calls_than_there_is_room_for_are_told_when_to_come_back() -> None:
    async with running_edge(max_concurrent_calls=3) as edge:
        edge.generator.pause()
        running = [
            edge.inference.Generate(pb.GenerateRequest(request_id=name, text="x", stopping=ONE))
            for name in "abc"
        ]
        await edge.generator.until(lambda: len(edge.generator.live) == 3)
        for refused in (
            edge.inference.Generate(pb.GenerateRequest(text="x")),
            edge.inference.Tokenize(pb.TokenizeRequest(text="x")),
        ):
            assert await reason(refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        checked = await health_pb2_grpc.HealthStub(edge.channel).Check(
            health_pb2.HealthCheckRequest()
        )
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        edge.generator.resume()
        for call in running:
            assert (await call.read()).text == "a"


async def test_connections_are_bounded() -> None:
    async with running_edge(max_connections=8) as edge, contextlib.AsyncExitStack() as stack:
        assert await answers(edge)
        peers = [
            await stack.enter_async_context(raw_http2.connection(edge.edge.address))
            for _ in range(16)
        ]
        refused = 0
        for peer in peers:
            with contextlib.suppress(ConnectionError):
                try:
                    async with asyncio.timeout(10):
                        await peer.until(raw_http2.SETTINGS)
                except ConnectionResetError:
                    refused += 1
        assert refused >= 8


async def test_hundreds_of_half_open_connections_harm_no_stream(edge: RunningEdge) -> None:
    host, _, port = edge.edge.address.rpartition(":")
    edge.generator.pause()
    call = edge.inference.Generate(
        pb.GenerateRequest(text="x", stopping=pb.Stopping(max_tokens=50))
    )
    await edge.generator.until(lambda: bool(edge.generator.live))
    opened = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(300)))
    for number, (_, writer) in enumerate(opened):
        # Silent, in the middle of the preface, or in the middle of a frame.
        writer.write((b"", raw_http2.PREFACE[:9], raw_http2.PREFACE + b"\0\0")[number % 3])
    edge.generator.resume()
    assert "".join([part.text async for part in call]).startswith("abcdefghij")
    assert await answers(edge)
    for _, writer in opened:
        writer.close()


async def test_who_stops_reading_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_WRITE_SECONDS", 0.2)
    # No window at all: nothing of the answer can be sent.
    no_window = struct.pack(">HI", 4, 0)
    async with running_edge() as edge:
        request = pb.GenerateRequest(request_id="stuck", text="x", stopping=pb.Stopping())
        async with raw_http2.connection(edge.edge.address, no_window) as peer:
            peer.writer.write(
                raw_http2.headers(GENERATE) + raw_http2.message(request.SerializeToString())
            )
            await edge.generator.until(lambda: "stuck" in edge.generator.closed)
            assert await answers(edge)


async def test_a_bomb_is_not_unpacked(edge: RunningEdge) -> None:
    call = edge.channel.unary_stream(GENERATE)(bytes(64 << 20), compression=grpc.Compression.Gzip)
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await answers(edge)


def nested(depth: int) -> bytes:
    """A ChatRequest whose template arguments are so deep; protobuf itself would not write it."""

    def field(number: int, content: bytes) -> bytes:
        size, rest = b"", len(content)
        while rest > 127:
            size, rest = size + bytes([rest & 127 | 128]), rest >> 7
        return bytes([*encoder.TagBytes(number, 2), *size, rest]) + content

    struct_ = b""
    for _ in range(depth):
        # Struct.fields: an entry with a key and a Value, whose struct_value is the next Struct.
        struct_ = field(1, field(1, b"x") + field(2, field(5, struct_)))
    request = pb.ChatRequest(messages=[MESSAGE], stopping=ONE)
    return request.SerializeToString() + field(13, struct_)


def wide(entries: int) -> struct_pb2.Struct:
    return struct_pb2.Struct(
        fields={str(i): struct_pb2.Value(bool_value=True) for i in range(entries)}
    )


MESSAGE = pb.ChatMessage(role="user", content="x")
DEEP_JSON = '{"a":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ChatRequest(template_arguments=wide(100_000)), "template_arguments"),
        (
            pb.ChatRequest(
                template_arguments=struct_pb2.Struct(
                    fields={"x": struct_pb2.Value(number_value=float("nan"))}
                )
            ),
            "template_arguments",
        ),
        (pb.ChatRequest(tools=[pb.Tool(name="t", parameters=DEEP_JSON)]), "tools[0].parameters"),
        (
            pb.ChatRequest(tools=[pb.Tool(name="t", parameters='{"a":' * 70 + "1" + "}" * 70)]),
            "tools[0].parameters",
        ),
        (pb.ChatRequest(tools=[pb.Tool()] * 1000), "tools"),
        (pb.ChatRequest(messages=[MESSAGE] * 100_000), "messages"),
        (
            pb.ChatRequest(stopping=pb.Stopping(conditions=[pb.StopCondition()] * 100_000)),
            "stopping.conditions",
        ),
        (
            pb.ChatRequest(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(100_000), 1.0))),
            "sampling.logit_bias",
        ),
    ],
)
async def test_messages_that_hold_too_much(
    edge: RunningEdge, request_: pb.ChatRequest, field: str
) -> None:
    if not request_.messages:
        request_.messages.append(MESSAGE)
    call = edge.inference.Chat(request_)
    assert await reason(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert field in await call.details()


async def test_a_struct_as_deep_as_protobuf_allows(edge: RunningEdge) -> None:
    chat = edge.channel.unary_stream("/headwise.v1.Inference/Chat")
    assert await chat(nested(20)).read()
    refused = chat(nested(1000))
    assert await reason(refused) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_unknown_fields_do_no_harm(edge: RunningEdge) -> None:
    request = pb.GenerateRequest(text="x", stopping=ONE).SerializeToString()
    unknown = b"\xfa\x7f\x03abc" + b"\xf8\x7f\x01"
    call = edge.channel.unary_stream(GENERATE)(request + unknown)
    assert [part async for part in call]


async def test_watches_of_health_are_bounded_on_each_connection(
    edge: RunningEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_MOST_WATCHES", 2)
    stub = health_pb2_grpc.HealthStub(edge.channel)
    watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watching:
        assert (await watch.read()).status
    refused = stub.Watch(health_pb2.HealthCheckRequest())
    assert await reason(refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")

    apart = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(edge.edge.address, options=apart) as channel:
        other = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await other.read()).status == health_pb2.HealthCheckResponse.SERVING
        # Those that are there are told all the same.
        edge.generator.set_health(HealthState.NOT_READY, "lost")
        for watch in (*watching, other):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    for watch in watching:
        watch.cancel()


async def test_reflection_is_not_kept_open_for_nothing(
    edge: RunningEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_MESSAGE_SECONDS", 0.05)
    call = edge.channel.stream_stream(REFLECTION)()
    assert await reason(call) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("timeout", [0, -1, 1e-9, 3e9])
async def test_deadlines_of_any_size(timeout: float) -> None:
    generator = FakeGenerator()
    generator.pause()
    async with running_edge(generator) as edge:
        call = edge.inference.Generate(pb.GenerateRequest(text="x", stopping=ONE), timeout=timeout)
        if timeout > 1:
            await generator.until(lambda: bool(generator.live))
            generator.resume()
            assert (await call.read()).text == "a"
        else:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert generator.live == {}


async def test_a_deadline_that_passes_lets_go_of_the_request(edge: RunningEdge) -> None:
    edge.generator.pause()
    request = pb.GenerateRequest(request_id="late", text="x", stopping=ONE)
    call = edge.inference.Generate(request, timeout=0.2)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await edge.generator.until(lambda: "late" in edge.generator.closed)


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(1024, 1 << 20, 5120), (1024, 2048, 2048), (1 << 16, 1 << 16, None)],
)
def test_open_files_are_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: asked.append(limits))
    transport.raise_file_limit(ServerConfig(max_connections=4096))
    assert asked == ([] if expected is None else [(expected, hard)])
