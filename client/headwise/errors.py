"""What the client raises. Every error of a call is a `HeadwiseError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grpc


class HeadwiseError(Exception):
    """A call failed.

    `code` is the gRPC status, None where the fault was found before anything was sent.
    `request_id` names the request in the server's logs, where the call has one.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class Violation(NamedTuple):
    """One fault of a request: which field, and what is wrong with it."""

    field: str
    description: str


class InvalidRequestError(HeadwiseError, ValueError):
    """The request can never be served. `violations` names every fault that was found.

    A fault that the server found is named by its path in the API (`sampling.top_p`), one that
    could not even be sent by the argument (`top_k`).
    """

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.violations = tuple(violations)


class OverloadedError(HeadwiseError):
    """The server's queue is full; `retry_after` is its hint in seconds, if it gave one."""

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.retry_after = retry_after


class UnavailableError(HeadwiseError):
    """The server cannot be reached, or its shards cannot compute just now."""


class DeadlineExceededError(HeadwiseError, TimeoutError):
    """The timeout passed before the call ended; the server has stopped the work."""


class AuthenticationError(HeadwiseError):
    """The token is missing or wrong, or does not allow this call."""


class NotFoundError(HeadwiseError):
    """No such model is served here."""


class RequestCancelledError(HeadwiseError):
    """The call was cancelled, by this client or by the server."""
