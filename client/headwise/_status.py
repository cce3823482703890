"""From a gRPC status to an error of this package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from headwise import errors

_DETAILS = "grpc-status-details-bin"

_CLASSES: dict[grpc.StatusCode, type[errors.HeadwiseError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AuthenticationError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
}

# How gRPC itself refuses a message, before the server sees it.
_TOO_LARGE = re.compile(r"larger than max \((?P<size>\d+) vs\. (?P<most>\d+)\)")

_Detail = TypeVar("_Detail", bound=Message)


def read_error(fault: grpc.RpcError, request_id: str | None) -> errors.HeadwiseError:
    """The error for what a call of grpc or grpc.aio raised."""
    code = fault.code()
    message = fault.details() or code.name
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violations = [
            errors.Violation(violation.field, violation.description)
            for detail in _details(fault, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        ]
        return errors.InvalidRequestError(
            message, violations=violations, code=code, request_id=request_id
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        hint = next(_details(fault, error_details_pb2.RetryInfo), None)
        sizes = _TOO_LARGE.search(message)
        if hint is None and sizes is not None:
            return _too_large(sizes["size"], sizes["most"], code, request_id)
        return errors.OverloadedError(
            message,
            retry_after=None if hint is None else hint.retry_delay.ToTimedelta().total_seconds(),
            code=code,
            request_id=request_id,
        )
    return _CLASSES.get(code, errors.HeadwiseError)(message, code=code, request_id=request_id)


def _too_large(
    size: str, most: str, code: grpc.StatusCode, request_id: str | None
) -> errors.InvalidRequestError:
    violation = errors.Violation(
        "request",
        f"its {size} bytes are more than the {most} that the server takes: send a shorter prompt "
        "or conversation, or start the server with a larger max_message_bytes",
    )
    return errors.InvalidRequestError(
        f"{violation.field}: {violation.description}",
        violations=[violation],
        code=code,
        request_id=request_id,
    )


def _details(fault: grpc.RpcError, kind: type[_Detail]) -> Iterator[_Detail]:
    # Pairs, of types that differ between grpc and grpc.aio.
    metadata: Any = fault.trailing_metadata() or ()
    for key, value in metadata:
        if key != _DETAILS or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            continue
        for packed in status.details:
            detail = kind()
            if packed.Is(kind.DESCRIPTOR) and packed.Unpack(detail):
                yield detail
