"""Every exception becomes a gRPC status here, and nowhere else.

Statuses carry google.rpc details: BadRequest with every fault, RetryInfo, RequestInfo. Whatever is
not expected becomes INTERNAL with an id that finds its trace in the log; nothing of it is told.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.errors import InvalidRequest, NoToken, Overloaded, Unavailable, Violation
from shards.errors import HeadwiseError

REQUEST_ID = "headwise-request-id"
"""Trailing metadata of every call to headwise's services."""

# Statuses travel as HTTP/2 trailers, of which clients take 8 KiB; non-ASCII text and the binary
# details grow in encoding, and the message appears in both.
_MOST_MESSAGE_BYTES = 512
_MOST_VIOLATIONS_BYTES = 2048

log = structlog.get_logger(__name__)


class UnknownModel(HeadwiseError):
    """A model that is not served here. -> NOT_FOUND"""


class Unauthenticated(HeadwiseError):
    """No bearer token, or one that is not known. -> UNAUTHENTICATED"""


class DeadlineExceeded(HeadwiseError):
    """The client's deadline passed. -> DEADLINE_EXCEEDED"""


@dataclass(frozen=True, slots=True)
class Status:
    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()


def status_of(error: Exception) -> Status:
    """What the client is told about an error; logs it where the client is not told."""
    if isinstance(error, InvalidRequest):
        return _bad_request(error)
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), (retry,))
    if isinstance(error, Unavailable):
        return Status(grpc.StatusCode.UNAVAILABLE, str(error))
    if isinstance(error, NoToken):
        return Status(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    if isinstance(error, UnknownModel):
        return Status(grpc.StatusCode.NOT_FOUND, str(error))
    if isinstance(error, Unauthenticated):
        return Status(grpc.StatusCode.UNAUTHENTICATED, str(error))
    if isinstance(error, DeadlineExceeded):
        return Status(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    error_id = uuid.uuid4().hex[:12]
    log.error("unexpected error", error_id=error_id, exc_info=error)
    return Status(
        grpc.StatusCode.INTERNAL,
        f"internal error {error_id}: the server's log has its cause under this id",
    )


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, request_id: str
) -> NoReturn:
    """End the call with the error's status."""
    status = status_of(error)
    message = _clipped(status.message, _MOST_MESSAGE_BYTES)
    rich = status_pb2.Status(code=status.code.value[0], message=message)
    request_info = error_details_pb2.RequestInfo(request_id=request_id)
    for detail in (*status.details, request_info):
        packed = AnyMessage()
        packed.Pack(detail)
        rich.details.append(packed)
    trailers = rpc_status.to_status(rich).trailing_metadata or ()
    await context.abort(status.code, message, (*trailers, (REQUEST_ID, request_id)))


def _bad_request(error: InvalidRequest) -> Status:
    details = error_details_pb2.BadRequest()
    left = _MOST_VIOLATIONS_BYTES
    for number, violation in enumerate(error.violations):
        field = _clipped(violation.field, 128)
        description = _clipped(violation.description, _MOST_MESSAGE_BYTES)
        left -= len(field.encode()) + len(description.encode())
        if left < 0 and number > 0:
            rest = len(error.violations) - number
            details.field_violations.add(field="", description=f"and {rest} more faults")
            break
        details.field_violations.add(field=field, description=description)
    return Status(grpc.StatusCode.INVALID_ARGUMENT, str(error), (details,))


def malformed(error: Exception) -> InvalidRequest:
    """A message that protobuf could not parse: not UTF-8, or not this message at all."""
    return InvalidRequest(
        Violation(
            "request",
            f"the message could not be read ({error}): text must be UTF-8, and the message as in "
            "proto/headwise/v1",
        )
    )


def _clipped(text: str, most_bytes: int) -> str:
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= most_bytes:
        return raw.decode()
    return raw[: most_bytes - 3].decode("utf-8", errors="ignore") + "..."
