"""What each kind of error looks like to a client: code, message, details, metadata."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from cluster.request import HealthState
from headwise.v1 import control_pb2
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import RunningEdge, running_edge

ONE = pb.Stopping(max_tokens=1)


@pytest.fixture
async def edge() -> AsyncIterator[RunningEdge]:
    async with running_edge() as edge:
        yield edge


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    answer = call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The one detail of a kind; the rich status agrees with the plain one."""
    status = rpc_status.from_call(_Finished(error))
    assert status is not None
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (packed,) = [entry for entry in status.details if entry.Is(kind.DESCRIPTOR)]
    unpacked = kind()
    packed.Unpack(unpacked)
    return unpacked


class _Finished:
    """An `AioRpcError` as `rpc_status` wants it: a call that answers."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code
        self.details = error.details
        self.trailing_metadata = error.trailing_metadata


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = detail(error, error_details_pb2.BadRequest).field_violations
    return {violation.field: violation.description for violation in found}


async def generate_error(edge: RunningEdge, **fields: Any) -> grpc.aio.AioRpcError:
    return await error_of(edge.inference.Generate(pb.GenerateRequest(**fields)))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": ""}, "prompt"),
        ({}, "prompt"),
        ({"token_ids": pb.TokenIds()}, "prompt"),
        ({"token_ids": pb.TokenIds(ids=[5, 258])}, "prompt"),
        ({"text": "x", "sampling": pb.Sampling(temperature=-0.5)}, "sampling.temperature"),
        ({"text": "x", "sampling": pb.Sampling(temperature=float("nan"))}, "sampling.temperature"),
        ({"text": "x", "sampling": pb.Sampling(top_p=0)}, "sampling.top_p"),
        ({"text": "x", "sampling": pb.Sampling(top_p=float("inf"))}, "sampling.top_p"),
        ({"text": "x", "sampling": pb.Sampling(logit_bias={999: 1.0})}, "sampling.logit_bias"),
        ({"text": "x", "stopping": pb.Stopping(max_tokens=0)}, "stopping.max_tokens"),
        (
            {"text": "x", "stopping": pb.Stopping(conditions=[pb.StopCondition()])},
            "stopping.conditions[0]",
        ),
        ({"text": "x", "n": 0}, "n"),
        ({"text": "x", "output": pb.OutputOptions(logprobs=21)}, "output.logprobs"),
        ({"text": "x", "generated": pb.TokenIds(ids=[1]), "n": 2}, "generated"),
        ({"text": "x", "request_id": "x" * 129}, "request_id"),
        ({"text": "x", "request_id": "a\nb"}, "request_id"),
    ],
)
async def test_bad_requests_name_the_field(
    edge: RunningEdge, fields: dict[str, Any], field: str
) -> None:
    assert field in violations(await generate_error(edge, **fields))
    assert edge.generator.requests == []


async def test_every_fault_is_named_at_once(edge: RunningEdge) -> None:
    error = await generate_error(
        edge,
        sampling=pb.Sampling(temperature=-1, top_p=2),
        stopping=pb.Stopping(max_tokens=0, conditions=[pb.StopCondition()]),
        n=0,
    )

    assert set(violations(error)) == {
        "prompt",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stopping.conditions[0]",
        "n",
    }
    assert "sampling.top_p: 2.0" in (error.details() or "")


async def test_chat_names_its_own_fields(edge: RunningEdge) -> None:
    request = pb.ChatRequest(output=pb.OutputOptions(echo=True, prompt_logprobs=1), n=0)
    error = await error_of(edge.inference.Chat(request))

    assert set(violations(error)) == {"messages", "output.echo", "output.prompt_logprobs", "n"}


async def test_tokenize_and_detokenize_name_their_fields(edge: RunningEdge) -> None:
    nothing = await error_of(edge.inference.Tokenize(pb.TokenizeRequest()))
    unknown = await error_of(edge.inference.Detokenize(pb.DetokenizeRequest(token_ids=[1, 258])))

    assert "input" in violations(nothing)
    assert "token_ids[1]" in violations(unknown)


async def test_text_needs_a_tokenizer() -> None:
    async with running_edge(codec=None) as edge:
        error = await generate_error(
            edge, text="x", stopping=pb.Stopping(conditions=[pb.StopCondition(text="y")])
        )

    assert set(violations(error)) == {"prompt", "stopping.conditions"}


async def test_a_text_that_cannot_fit_is_refused_without_being_tokenized() -> None:
    async with running_edge(max_message_bytes=1 << 23) as edge:
        text = "x" * (edge.generator.model.context * 4 + 1)
        found = violations(await generate_error(edge, text=text, n=0))

    assert "cannot fit" in found["prompt"]
    assert "n" in found


async def test_many_long_faults_fit_into_the_trailers(edge: RunningEdge) -> None:
    edge.generator.refusal = InvalidRequest(
        *(Violation(f"field[{i}]", "ü" * 300) for i in range(200))
    )
    found = violations(await generate_error(edge, text="x", stopping=ONE))

    assert "field[0]" in found
    assert "more faults" in found[""]


@pytest.mark.parametrize("message", [b"\x1a\x02\xff\xfe", b"\xff\xff\xff\xff"])
async def test_what_protobuf_cannot_read_is_an_invalid_argument(
    edge: RunningEdge, message: bytes
) -> None:
    call = edge.channel.unary_stream("/headwise.v1.Inference/Generate")(message)

    assert "UTF-8" in violations(await error_of(call))["request"]


async def test_a_message_over_the_limit_is_refused_by_grpc() -> None:
    async with running_edge(max_message_bytes=1 << 16) as edge:
        error = await generate_error(edge, text="x" * (1 << 17))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_unknown_model_is_not_found(edge: RunningEdge) -> None:
    calls = [
        edge.inference.Generate(pb.GenerateRequest(model="gpt-5", text="x")),
        edge.inference.Chat(pb.ChatRequest(model="gpt-5")),
        edge.inference.Tokenize(pb.TokenizeRequest(model="gpt-5", text="x")),
        edge.inference.Detokenize(pb.DetokenizeRequest(model="gpt-5")),
        edge.control.GetModelInfo(control_pb2.GetModelInfoRequest(model="gpt-5")),
    ]
    errors = [await error_of(call) for call in calls]

    assert {error.code() for error in errors} == {grpc.StatusCode.NOT_FOUND}
    assert all("'gpt-5'" in (e.details() or "") and "'fake'" in e.details() for e in errors)


async def test_the_served_models_name_is_accepted(edge: RunningEdge) -> None:
    assert await edge.generate(model="fake", text="x", stopping=ONE)


async def test_overload_says_when_to_try_again(edge: RunningEdge) -> None:
    edge.generator.refusal = Overloaded("the queue is full", retry_after=2.5)
    error = await generate_error(edge, text="x", stopping=ONE)

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    delay = detail(error, error_details_pb2.RetryInfo).retry_delay
    assert (delay.seconds, delay.nanos) == (2, 500_000_000)


async def test_unavailable_says_why(edge: RunningEdge) -> None:
    edge.generator.set_health(HealthState.NOT_READY, "rank 1 on host b died")
    error = await generate_error(edge, text="x", stopping=ONE)

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "rank 1 on host b died"


async def test_the_unexpected_is_logged_and_not_told(edge: RunningEdge) -> None:
    edge.generator.refusal = KeyError("a secret")
    with capture_logs(processors=[merge_contextvars]) as entries:
        error = await generate_error(edge, request_id="r1", text="x", stopping=ONE)

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    (entry,) = [entry for entry in entries if entry["event"] == "unexpected error"]
    assert entry["error_id"] in (error.details() or "")
    assert entry["request_id"] == "r1"
    assert entry["exc_info"] is edge.generator.refusal


async def test_errors_carry_the_request_id(edge: RunningEdge) -> None:
    edge.generator.refusal = Unavailable("no")
    error = await generate_error(edge, request_id="r1", text="x", stopping=ONE)

    assert dict(error.trailing_metadata())["headwise-request-id"] == "r1"
    assert detail(error, error_details_pb2.RequestInfo).request_id == "r1"


async def test_an_id_that_is_running_is_refused(edge: RunningEdge) -> None:
    edge.generator.pause()
    first = edge.inference.Generate(pb.GenerateRequest(request_id="r1", text="x", stopping=ONE))
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    error = await generate_error(edge, request_id="r1", text="x", stopping=ONE)
    edge.generator.resume()

    assert "request_id" in violations(error)
    assert (await first.read()).text == "a"
