"""What the client raises. Every error of a call is a `HeadwiseError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grpc


class Violation(NamedTuple):
    """One fault of a request: which field, and what is wrong with it."""

    field: str
    description: str


class Quota(NamedTuple):
    """A limit that was reached: whose, and what it allows."""

    subject: str
    description: str


class Resource(NamedTuple):
    """What was asked for and is not there, such as a model."""

    type: str
    name: str
    description: str


class HeadwiseError(Exception):
    """A call failed.

    `code` is the gRPC status, None where the fault was found before anything was sent.
    `request_id` names the call in the server's logs, where it is known. `reason` is the
    server's word for the cause, such as "OVERLOADED", for programs to go by, and `metadata` what
    goes with it; both are empty where the server says none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
        self.reason = reason
        self.metadata = dict(metadata or {})


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
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            message, code=code, request_id=request_id, reason=reason, metadata=metadata
        )
        self.violations = tuple(violations)


class OverloadedError(HeadwiseError):
    """The server's queue is full, or the caller's quota is used up.

    `retry_after` is the server's hint in seconds, if it gave one; `quotas` are the limits that were
    reached, empty where it is the queue's.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        quotas: Sequence[Quota] = (),
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            message, code=code, request_id=request_id, reason=reason, metadata=metadata
        )
        self.retry_after = retry_after
        self.quotas = tuple(quotas)


class UnavailableError(HeadwiseError):
    """The server cannot be reached, or its shards cannot compute just now."""


class DeadlineExceededError(HeadwiseError, TimeoutError):
    """The timeout passed before the call ended; the server has stopped the work."""


class AuthenticationError(HeadwiseError):
    """The token is missing or wrong, or does not allow this call."""


class NotFoundError(HeadwiseError):
    """No such model is served here; `resource` names it, where the server does."""

    def __init__(
        self,
        message: str,
        *,
        resource: Resource | None = None,
        code: grpc.StatusCode | None = None,
        request_id: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            message, code=code, request_id=request_id, reason=reason, metadata=metadata
        )
        self.resource = resource


class RequestCancelledError(HeadwiseError):
    """The call was cancelled, by this client or by the server."""
