"""Every exception becomes a gRPC status here, and nowhere else.

Statuses carry google.rpc details: ErrorInfo with a reason that programs can rely on and RequestInfo
always; BadRequest with every fault, RetryInfo, QuotaFailure and ResourceInfo where they apply
(docs/security.md has the table). Whatever is not expected becomes INTERNAL with an id that finds
its trace in the log; nothing of it is told.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.errors import Abandoned, InvalidRequest, NoToken, Overloaded, Unavailable, Violation
from shards.errors import HeadwiseError

REQUEST_ID = "headwise-request-id"
"""Trailing metadata of every call to headwise's services."""

DOMAIN = "headwise"
"""Of every ErrorInfo."""

# Statuses travel as HTTP/2 trailers, of which clients take 8 KiB; non-ASCII text and the binary
# details grow in encoding, and the message appears in both.
_MOST_MESSAGE_BYTES = 512
_MOST_VIOLATIONS_BYTES = 2048
_MOST_NAME_BYTES = 128

log = structlog.get_logger(__name__)


class UnknownModel(HeadwiseError):
    """A model that is not served here. -> NOT_FOUND"""

    def __init__(self, message: str, model: str = "") -> None:
        super().__init__(message)
        self.model = model


class UnknownService(HeadwiseError):
    """A service whose health is asked for, and that is not here. -> NOT_FOUND"""


class UnknownMethod(HeadwiseError):
    """A method that no service here has. -> UNIMPLEMENTED"""


class Unauthenticated(HeadwiseError):
    """No bearer token, or one that is not known. -> UNAUTHENTICATED"""


class Forbidden(HeadwiseError):
    """A known caller that may not do this. -> PERMISSION_DENIED"""


class DeadlineExceeded(HeadwiseError):
    """The client's deadline passed, or the server's own for the client. -> DEADLINE_EXCEEDED"""


class Ended(HeadwiseError):
    """An operator ended the request, by its id. -> CANCELLED"""


class LimitExceeded(HeadwiseError):
    """A caller's limit on a metric; after `retry_after` seconds there is room again.
    -> RESOURCE_EXHAUSTED"""

    def __init__(
        self, message: str, *, caller: str, metric: str, limit: int, retry_after: float
    ) -> None:
        super().__init__(message)
        self.caller = caller
        self.metric = metric
        self.limit = limit
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Status:
    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()


# Code and ErrorInfo.reason of every error that is told; the first class that fits decides.
_STATUSES: tuple[tuple[type[Exception], grpc.StatusCode, str], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED"),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    (NoToken, grpc.StatusCode.FAILED_PRECONDITION, "NO_TOKEN"),
    (Abandoned, grpc.StatusCode.INTERNAL, "RANKS_LOST"),
    (UnknownModel, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    (UnknownService, grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE"),
    (UnknownMethod, grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD"),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (Ended, grpc.StatusCode.CANCELLED, "ENDED"),
)


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code alone of what the client is told about an error."""
    codes = (code for kind, code, _ in _STATUSES if isinstance(error, kind))
    return next(codes, grpc.StatusCode.INTERNAL)


def status_of(error: Exception) -> Status:
    """What the client is told about an error; logs it where the client is not told."""
    for kind, code, reason in _STATUSES:
        if isinstance(error, kind):
            info = _error_info(reason, _metadata(error))
            return Status(code, str(error), (info, *_details(error)))
    error_id = uuid.uuid4().hex[:12]
    log.error("unexpected error", error_id=error_id, exc_info=error)
    return Status(
        grpc.StatusCode.INTERNAL,
        f"internal error {error_id}: the server's log has its cause under this id",
        (_error_info("INTERNAL", {"error_id": error_id}),),
    )


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, request_id: str
) -> NoReturn:
    """End the call with the error's status."""
    status = status_of(error)
    message = clipped(status.message, _MOST_MESSAGE_BYTES)
    rich = status_pb2.Status(code=status.code.value[0], message=message)
    request_info = error_details_pb2.RequestInfo(request_id=request_id)
    for detail in (*status.details, request_info):
        packed = AnyMessage()
        packed.Pack(detail)
        rich.details.append(packed)
    trailers = rpc_status.to_status(rich).trailing_metadata or ()
    await context.abort(status.code, message, (*trailers, (REQUEST_ID, request_id)))


def _error_info(reason: str, metadata: Mapping[str, str]) -> Message:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _metadata(error: Exception) -> Mapping[str, str]:
    if isinstance(error, LimitExceeded):
        return {"limit": error.metric, "value": str(error.limit), "caller": error.caller}
    if isinstance(error, UnknownModel):
        return {"model": clipped(error.model, _MOST_NAME_BYTES)}
    return {}


def _details(error: Exception) -> tuple[Message, ...]:
    if isinstance(error, InvalidRequest):
        return (_bad_request(error),)
    if isinstance(error, Overloaded):
        return (_retry_info(error.retry_after),)
    if isinstance(error, LimitExceeded):
        failure = error_details_pb2.QuotaFailure()
        failure.violations.add(
            subject=f"caller:{error.caller}",
            description=clipped(str(error), _MOST_MESSAGE_BYTES),
            quota_metric=error.metric,
            quota_value=error.limit,
        )
        return (_retry_info(error.retry_after), failure)
    if isinstance(error, UnknownModel):
        resource = error_details_pb2.ResourceInfo(
            resource_type="model",
            resource_name=clipped(error.model, _MOST_NAME_BYTES),
            description=clipped(str(error), _MOST_MESSAGE_BYTES),
        )
        return (resource,)
    return ()


def _retry_info(seconds: float) -> Message:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return retry


def _bad_request(error: InvalidRequest) -> Message:
    details = error_details_pb2.BadRequest()
    left = _MOST_VIOLATIONS_BYTES
    for number, violation in enumerate(error.violations):
        field = clipped(violation.field, _MOST_NAME_BYTES)
        description = clipped(violation.description, _MOST_MESSAGE_BYTES)
        left -= len(field.encode()) + len(description.encode())
        if left < 0 and number > 0:
            rest = len(error.violations) - number
            details.field_violations.add(field="", description=f"and {rest} more faults")
            break
        details.field_violations.add(field=field, description=description)
    return details


def malformed(error: Exception) -> InvalidRequest:
    """A message that protobuf could not parse: not UTF-8, or not this message at all."""
    return InvalidRequest(
        Violation(
            "request",
            f"the message could not be read ({error}): text must be UTF-8, and the message as in "
            "proto/headwise/v1",
        )
    )


def clipped(text: str, most_bytes: int) -> str:
    """The beginning of a text, as UTF-8 no longer than that."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= most_bytes:
        return raw.decode()
    return raw[: most_bytes - 3].decode("utf-8", errors="ignore") + "..."
