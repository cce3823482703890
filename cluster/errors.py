"""Errors of the serving side. The edge maps each class to one gRPC status."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import HeadwiseError


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a request: the field's path as the client wrote it, and value + remedy."""

    field: str
    description: str


class InvalidRequest(HeadwiseError, ValueError):
    """A request that can never be served; every fault is named. -> INVALID_ARGUMENT"""

    def __init__(self, *violations: Violation) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))


class Overloaded(HeadwiseError):
    """The queue is full; try again after `retry_after` seconds. -> RESOURCE_EXHAUSTED"""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoToken(HeadwiseError):
    """No token can be picked for a request; nobody else is touched by it. -> FAILED_PRECONDITION"""


class Unavailable(HeadwiseError):
    """The shard group cannot compute just now; says which rank and why. -> UNAVAILABLE"""


class Abandoned(HeadwiseError):
    """A request whose steps were lost with a rank again and again; it may be what takes them along,
    so nobody should send it on to other ranks. -> INTERNAL"""


class StartupError(HeadwiseError):
    """The cluster could not be started: too few devices, a rank that died while loading."""
