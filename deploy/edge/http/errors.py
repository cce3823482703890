"""Every exception becomes OpenAI's error object here, with the HTTP status of its gRPC one.

`deploy.edge.errors` decides what a client is told; statuses map to HTTP as google.rpc.code has it:
https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from fastapi.exceptions import RequestValidationError
from google.rpc import error_details_pb2
from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import InvalidRequest, Violation
from cluster.validation import BeyondContext
from deploy.edge.errors import UnknownModel, clipped, status_of


class ErrorDetail(msgspec.Struct):
    """`type` is the kind of fault, `param` the field at fault, `code` the one fault, if it has a
    name."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class HttpError:
    """What a client is sent."""

    status: int
    detail: ErrorDetail
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))


# Messages quote what the client sent.
_MOST_MESSAGE_BYTES = 4096
_MOST_PARAM_BYTES = 128

_INVALID = "invalid_request_error"
# HTTP status, type, code; what is not here is internal.
_STATUSES: dict[StatusCode, tuple[int, str, str | None]] = {
    StatusCode.INVALID_ARGUMENT: (400, _INVALID, None),
    StatusCode.FAILED_PRECONDITION: (400, _INVALID, "failed_precondition"),
    StatusCode.OUT_OF_RANGE: (400, _INVALID, None),
    StatusCode.UNAUTHENTICATED: (401, "authentication_error", "invalid_api_key"),
    StatusCode.PERMISSION_DENIED: (403, "permission_error", "permission_denied"),
    StatusCode.NOT_FOUND: (404, _INVALID, "not_found"),
    StatusCode.ALREADY_EXISTS: (409, _INVALID, "already_exists"),
    StatusCode.ABORTED: (409, _INVALID, "aborted"),
    StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    StatusCode.CANCELLED: (499, _INVALID, "cancelled"),
    StatusCode.UNIMPLEMENTED: (501, _INVALID, "unimplemented"),
    StatusCode.UNAVAILABLE: (503, "service_unavailable_error", "service_unavailable"),
    StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
_INTERNAL = (500, "server_error", "internal_error")
# Of what is refused before it is anybody's request.
_KINDS = {
    404: (_INVALID, "not_found"),
    405: (_INVALID, "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: (_INVALID, "request_too_large"),
    415: (_INVALID, "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
_ROUTING = {
    "Not Found": "nothing is served at this path: /docs lists what is",
    "Method Not Allowed": "this path does not take this method: /docs lists what it takes",
}
# What pydantic puts into a path to tell the members of a union apart: `list[str]`, `list[int]`.
_MEMBER = re.compile(r"\W|^[A-Z]|^(str|int|float|bool)$")


def error_of(error: Exception) -> HttpError:
    """What the client is told about an error; logs it where the client is not told."""
    if isinstance(error, RequestValidationError):
        return error_of(_misread(error))
    if isinstance(error, HTTPException):
        kind, code = _KINDS.get(error.status_code, (_INVALID, None))
        message = clipped(_ROUTING.get(error.detail, error.detail), _MOST_MESSAGE_BYTES)
        headers = dict(error.headers or {})
        return HttpError(error.status_code, ErrorDetail(message, kind, code=code), headers)
    status = status_of(error)
    http_status, kind, code = _STATUSES.get(status.code, _INTERNAL)
    param, headers = None, {}
    if isinstance(error, InvalidRequest):
        param = clipped(error.violations[0].field, _MOST_PARAM_BYTES) or None
        # Agents shorten a conversation when they read it.
        if isinstance(error.violations[0], BeyondContext):
            code = "context_length_exceeded"
    if isinstance(error, UnknownModel):
        param, code = "model", "model_not_found"
    for detail in status.details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            # Whole seconds, at least one: what a client may wait for.
            headers["retry-after"] = str(
                max(1, round(detail.retry_delay.ToTimedelta().total_seconds()))
            )
    if http_status == 401:
        headers["www-authenticate"] = "Bearer"
    # A lone surrogate out of a request's JSON has no UTF-8.
    message = status.message.encode(errors="backslashreplace").decode()
    message = clipped(message, _MOST_MESSAGE_BYTES)
    return HttpError(http_status, ErrorDetail(message, kind, param, code), headers)


async def respond(_request: Request, error: Exception) -> Response:
    """An exception handler of the application."""
    told = error_of(error)
    return Response(told.body, told.status, told.headers, "application/json")


class _Silence(Response):
    """Sends nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nobody reads it."""


async def fall_silent(_request: Request, _error: Exception) -> Response:
    """The exception handler for `ClientGone`: nobody is told, and nothing went wrong here."""
    return _Silence()


def _misread(error: RequestValidationError) -> InvalidRequest:
    """pydantic's faults by the field's path as the client wrote it; those of a union's members are
    one fault."""
    descriptions: dict[str, list[str]] = {}
    for fault in error.errors():
        path = _path(fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        descriptions.setdefault(path, []).append(message[:1].lower() + message[1:])
    # Where a part is at fault, that the whole is no string either is no news.
    return InvalidRequest(
        *(
            Violation(path, " or ".join(dict.fromkeys(messages)))
            for path, messages in descriptions.items()
            if not any(other.startswith((f"{path}[", f"{path}.")) for other in descriptions)
        )
    )


def _path(location: tuple[int | str, ...]) -> str:
    parts = location[1:] if location and location[0] in ("body", "header", "path") else location
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _MEMBER.search(part):
            path += f".{part}" if path else part
    return path or "body"
