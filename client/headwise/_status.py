"""From a gRPC status to an error of this package."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from headwise import errors

_DETAILS = "grpc-status-details-bin"

_CLASSES: dict[grpc.StatusCode, type[errors.HeadwiseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AuthenticationError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
}

# How gRPC itself refuses a message, before the server sees it.
_TOO_LARGE = re.compile(r"larger than max \((?P<size>\d+) vs\. (?P<most>\d+)\)")

# How gRPC and proxies end a call whose connection broke, under any of these statuses.
_BROKEN = re.compile(r"RST_STREAM|GOAWAY|Stream removed|[Ss]ocket closed|[Cc]onnection reset")
_BROKEN_CODES = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}

_Detail = TypeVar("_Detail", bound=Message)


def read_error(fault: grpc.RpcError, request_id: str | None) -> errors.HeadwiseError:
    """The error for what a call of grpc or grpc.aio raised."""
    code = fault.code()
    message = fault.details() or code.name
    details = _details(fault)
    kind = _CLASSES.get(code, errors.HeadwiseError)
    if request_id is None:
        named = _detail(details, error_details_pb2.RequestInfo)
        request_id = None if named is None else named.request_id
    extras: dict[str, Any] = {"code": code, "request_id": request_id}
    info = _detail(details, error_details_pb2.ErrorInfo)
    if info is not None:
        extras |= {"reason": info.reason, "metadata": info.metadata}
    if kind is errors.InvalidRequestError:
        extras["violations"] = _violations(details)
    elif kind is errors.NotFoundError:
        extras["resource"] = _resource(details)
    elif kind is errors.OverloadedError:
        hint = _detail(details, error_details_pb2.RetryInfo)
        sizes = _TOO_LARGE.search(message)
        if hint is None and sizes is not None:
            return _too_large(sizes["size"], sizes["most"], code, request_id)
        if hint is not None:
            extras["retry_after"] = hint.retry_delay.ToTimedelta().total_seconds()
        extras["quotas"] = _quotas(details)
    elif code in _BROKEN_CODES and not details and _BROKEN.search(message):
        kind = errors.UnavailableError
    return kind(message, **extras)


def _violations(details: list[PackedAny]) -> list[errors.Violation]:
    found = _detail(details, error_details_pb2.BadRequest)
    faults = () if found is None else found.field_violations
    return [errors.Violation(fault.field, fault.description) for fault in faults]


def _quotas(details: list[PackedAny]) -> list[errors.Quota]:
    found = _detail(details, error_details_pb2.QuotaFailure)
    faults = () if found is None else found.violations
    return [errors.Quota(fault.subject, fault.description) for fault in faults]


def _resource(details: list[PackedAny]) -> errors.Resource | None:
    found = _detail(details, error_details_pb2.ResourceInfo)
    if found is None:
        return None
    return errors.Resource(found.resource_type, found.resource_name, found.description)


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


def _details(fault: grpc.RpcError) -> list[PackedAny]:
    # Pairs, of types that differ between grpc and grpc.aio.
    metadata: Any = fault.trailing_metadata() or ()
    for key, value in metadata:
        if key == _DETAILS and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []


def _detail(details: list[PackedAny], kind: type[_Detail]) -> _Detail | None:
    for packed in details:
        detail = kind()
        try:
            # False for a detail of another kind.
            if packed.Unpack(detail):
                return detail
        except DecodeError:
            return None
    return None
