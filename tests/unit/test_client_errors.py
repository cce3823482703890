"""What each status becomes, and which failures are tried again."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import (  # type: ignore[import-untyped]
    BadRequest,
    ErrorInfo,
    QuotaFailure,
    ResourceInfo,
    RetryInfo,
)

from headwise import (
    AuthenticationError,
    DeadlineExceededError,
    HeadwiseError,
    HealthState,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    Violation,
)
from headwise.v1 import control_pb2
from tests.unit.client_server import (
    CLIENTS,
    FAST_RETRIES,
    AnyClient,
    Hangs,
    ScriptedServer,
    fails,
    finish,
    says,
    token,
)

UNAVAILABLE = fails(grpc.StatusCode.UNAVAILABLE, "rank 1 died")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[AnyClient]:
    with request.param(server.address, retries=FAST_RETRIES) as client:
        yield client


@pytest.fixture(params=CLIENTS)
def client_of(request: pytest.FixtureRequest) -> Any:
    return request.param


def overloaded(nanos: int = 0, seconds: int = 0) -> Any:
    hint = RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos))
    return fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", hint)


def health(state: control_pb2.HealthState, cause: str = "") -> Any:
    return says(control_pb2.GetHealthResponse(state=state, cause=cause))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.INVALID_ARGUMENT, ValueError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimeoutError),
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, AuthenticationError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.CANCELLED, RequestCancelledError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.INTERNAL, HeadwiseError),
    ],
)
def test_statuses(
    server: ScriptedServer, client: AnyClient, code: grpc.StatusCode, kind: type[HeadwiseError]
) -> None:
    server.script(fails(code, "because"), fails(code, "because"))
    with pytest.raises(kind, match="because") as streamed:
        client.generate("hello", request_id="mine")
    with pytest.raises(kind, match="because") as unary:
        client.load()
    assert (streamed.value.code, streamed.value.request_id) == (code, "mine")
    assert (unary.value.code, unary.value.request_id) == (code, None)
    assert len(server.calls) == 2


def test_violations_are_decoded(server: ScriptedServer, client: AnyClient) -> None:
    faults = BadRequest(
        field_violations=[
            BadRequest.FieldViolation(field="sampling.top_p", description="2 is not in (0, 1]"),
            BadRequest.FieldViolation(field="n", description="0 is less than 1"),
        ]
    )
    server.script(fails(grpc.StatusCode.INVALID_ARGUMENT, "2 faults", faults))
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("hello", top_p=2.0, n=0)
    expected = (("sampling.top_p", "2 is not in (0, 1]"), ("n", "0 is less than 1"))
    assert caught.value.violations == expected
    assert caught.value.violations[0].field == "sampling.top_p"


def test_what_else_the_server_says_is_decoded(server: ScriptedServer, client: AnyClient) -> None:
    info = ErrorInfo(reason="QUOTA", domain="headwise", metadata={"limit": "5"})
    quota = QuotaFailure.Violation(subject="token:ann", description="5 requests a minute")
    resource = ResourceInfo(resource_type="model", resource_name="m", description="not here")
    server.script(
        fails(
            grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", info, QuotaFailure(violations=[quota])
        ),
        fails(grpc.StatusCode.NOT_FOUND, "no such model", resource),
    )
    with pytest.raises(OverloadedError) as overloaded:
        client.generate("hello")
    assert (overloaded.value.reason, overloaded.value.metadata) == ("QUOTA", {"limit": "5"})
    assert overloaded.value.quotas == (("token:ann", "5 requests a minute"),)
    with pytest.raises(NotFoundError) as missing:
        client.generate("hello")
    assert missing.value.resource == ("model", "m", "not here")
    assert missing.value.reason == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.CANCELLED, "RST_STREAM"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
    ],
)
def test_a_connection_that_breaks_is_unavailable_whatever_its_status(
    server: ScriptedServer, client: AnyClient, code: grpc.StatusCode, message: str
) -> None:
    def breaks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(code, message)
        yield

    server.script(breaks, says(token("a", 1), finish()))
    assert client.generate("hello").text == "a"


def test_details_that_cannot_be_read_leave_the_status(client: AnyClient, server: Any) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "because")
        yield

    server.script(answer)
    with pytest.raises(InvalidRequestError, match="because") as caught:
        client.generate("hello")
    assert caught.value.violations == ()


def test_errors_can_be_sent_between_processes() -> None:
    error = InvalidRequestError(
        "because", violations=[Violation("n", "0")], code=grpc.StatusCode.INVALID_ARGUMENT
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.violations) == (str(error), error.code, error.violations)


def test_unavailable_is_tried_again(server: ScriptedServer, client: AnyClient) -> None:
    server.script(UNAVAILABLE, UNAVAILABLE, says(token("a", 1), finish()))
    assert client.generate("hello").text == "a"
    first, second, third = (call.request for call in server.calls)
    assert first == second == third


def test_unavailable_unary_is_tried_again(server: ScriptedServer, client: AnyClient) -> None:
    server.script(UNAVAILABLE, says(control_pb2.GetLoadResponse(running=2)))
    assert client.load().running == 2
    assert len(server.calls) == 2


def test_attempts_are_bounded(server: ScriptedServer, client: AnyClient) -> None:
    server.script(*[UNAVAILABLE] * 10)
    with pytest.raises(UnavailableError, match="rank 1 died"):
        client.generate("hello")
    assert len(server.calls) == FAST_RETRIES.attempts


@pytest.mark.parametrize("kind", CLIENTS)
def test_retries_can_be_counted_and_switched_off(server: ScriptedServer, kind: type[Any]) -> None:
    server.script(*[UNAVAILABLE] * 10)
    for retries in (0, 1):
        with kind(server.address, retries=retries) as client, pytest.raises(UnavailableError):
            client.load()
    assert len(server.calls) == 1 + 2


def test_without_resume_nothing_is_tried_again_after_the_first_message(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(
        fails(grpc.StatusCode.UNAVAILABLE, "rank 1 died", after=(token("a", 1),)),
        says(token("a", 1), finish()),
    )
    stream = client.stream("hello", resume=False)
    assert next(stream).text == "a"
    with pytest.raises(UnavailableError):
        next(stream)
    with pytest.raises(UnavailableError):
        stream.result()
    assert list(stream) == []
    assert (stream.text(), stream.token_ids()) == ("a", (1,))
    assert len(server.calls) == 1


def test_a_message_too_large_is_an_invalid_request(client_of: Any) -> None:
    """As gRPC refuses it, before the server sees any of it."""
    with (
        ScriptedServer(max_message_bytes=1 << 12) as server,
        client_of(server.address) as client,
        pytest.raises(InvalidRequestError, match=r"shorter prompt.*max_message_bytes") as caught,
    ):
        client.generate("x" * (1 << 13))

    (violation,) = caught.value.violations
    assert violation.field == "request"
    assert "more than the 4096" in violation.description
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.calls == []


def test_overloaded_with_a_hint_is_tried_again(server: ScriptedServer, client: AnyClient) -> None:
    server.script(overloaded(nanos=1_000_000), says(token("a", 1), finish()))
    assert client.generate("hello").text == "a"
    assert len(server.calls) == 2


def test_a_long_hint_is_left_to_the_caller(server: ScriptedServer, client: AnyClient) -> None:
    server.script(overloaded(seconds=120, nanos=500_000_000))
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        client.generate("hello")
    assert caught.value.retry_after == 120.5
    assert len(server.calls) == 1


def test_overloaded_without_a_hint_is_not_tried_again(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory for it"))
    with pytest.raises(OverloadedError) as caught:
        client.generate("hello")
    assert caught.value.retry_after is None
    assert len(server.calls) == 1


def test_no_attempt_begins_after_the_deadline(server: ScriptedServer, client: AnyClient) -> None:
    server.script(overloaded(seconds=20))
    with pytest.raises(OverloadedError):
        client.generate("hello", timeout=10)
    assert len(server.calls) == 1


def test_later_attempts_share_the_deadline(server: ScriptedServer, client: AnyClient) -> None:
    server.script(overloaded(nanos=400_000_000), says(finish()))
    # gRPC sends a timeout again as it was if the new one is within 3%: this one is 10% shorter.
    client.generate("hello", timeout=4)
    second = server.calls[1].seconds
    assert second is not None
    assert second < 3.7


def test_the_deadline_ends_a_stream(server: ScriptedServer, client: AnyClient) -> None:
    hangs = Hangs(token("a", 1))
    server.script(hangs)
    with pytest.raises(DeadlineExceededError):
        client.generate("hello", timeout=0.5)
    assert hangs.ended.wait(20)


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_server_that_is_not_there_is_unavailable(kind: type[Any]) -> None:
    with ScriptedServer() as server:
        address = server.address
    with kind(address, retries=FAST_RETRIES) as client, pytest.raises(UnavailableError):
        client.generate("hello")


def test_waiting_for_a_server_that_loads(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        UNAVAILABLE,
        health(control_pb2.HEALTH_STATE_STARTING),
        health(control_pb2.HEALTH_STATE_READY),
    )
    assert client.wait_until_ready(30).state is HealthState.READY
    assert len(server.calls) == 3


def test_waiting_ends_with_the_cause(server: ScriptedServer, client: AnyClient) -> None:
    server.script(*[health(control_pb2.HEALTH_STATE_NOT_READY, "rank 0 died")] * 20)
    with pytest.raises(DeadlineExceededError, match=r"after 0\.2 s: not_ready: rank 0 died"):
        client.wait_until_ready(0.2)


def test_waiting_does_not_mend_a_wrong_token(server: ScriptedServer, client: AnyClient) -> None:
    server.script(fails(grpc.StatusCode.UNAUTHENTICATED, "no token"))
    with pytest.raises(AuthenticationError):
        client.wait_until_ready(30)
    assert len(server.calls) == 1
