"""What an edge and another replica's driver say to each other over a link.

MessagePack of [tag, fields...]; `cluster.request`'s dataclasses travel by their field names.
"""

from __future__ import annotations

import time
from dataclasses import replace

import msgspec

from cluster.errors import Abandoned, InvalidRequest, NoToken, Overloaded, Unavailable, Violation
from cluster.request import Health, Load, ModelInfo, RankInfo, Request, TokenEvent
from deploy.edge.models import ServerFacts


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    """The first word on a link, the driver's: prove that you know the link's key."""

    nonce: bytes


class Response(msgspec.Struct, frozen=True, array_like=True, tag="response"):
    """`proof` of the challenge, and a challenge in return."""

    proof: bytes
    nonce: bytes


class Introduction(msgspec.Struct, frozen=True, array_like=True, tag="introduction"):
    """The driver's proof, and what does not change about it.

    `tokenizer` is `TextCodec.pack`'s, None for a model without one.
    """

    proof: bytes
    model: ModelInfo
    ranks: tuple[RankInfo, ...]
    facts: ServerFacts
    tokenizer: bytes | None


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """How the driver is doing; told when it changes, and as a sign of life."""

    load: Load
    health: Health
    retiring: bool = False


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """An error as it crosses a link: the name of its class, and what it says."""

    kind: str
    message: str
    retry_after: float = 0.0
    violations: tuple[Violation, ...] = ()


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """No event of a stream follows; without a fault, all its samples are finished."""

    stream: int
    fault: Fault | None = None


class Events(msgspec.Struct, frozen=True, array_like=True, tag="events"):
    """What has come for an edge since the last such frame, for each stream in order."""

    events: tuple[tuple[int, TokenEvent], ...]
    ended: tuple[Ended, ...] = ()


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A request, as stream number `stream` of this link. Hosts do not share a monotonic clock: its
    deadline travels as `seconds_left`."""

    stream: int
    request: Request
    seconds_left: float | None = None

    @classmethod
    def of(cls, stream: int, request: Request) -> Submit:
        if request.deadline is None:
            return cls(stream, request)
        left = request.deadline - time.monotonic()
        return cls(stream, replace(request, deadline=None), left)

    def received(self) -> Request:
        """The request with its deadline on this host's clock."""
        if self.seconds_left is None:
            return self.request
        return replace(self.request, deadline=time.monotonic() + self.seconds_left)


class Routed(msgspec.Struct, frozen=True, array_like=True, tag="routed"):
    """This edge sends requests to the driver from here on."""


class FinishSample(msgspec.Struct, frozen=True, array_like=True, tag="finish"):
    stream: int
    index: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """Nobody reads a stream any more."""

    stream: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End a request, whoever submitted it; `number` is the question's."""

    number: int
    request_id: str


class Aborted(msgspec.Struct, frozen=True, array_like=True, tag="aborted"):
    """Whether there was such a request."""

    number: int
    found: bool


FromDriver = Challenge | Introduction | Status | Events | Aborted
FromEdge = Response | Routed | Submit | FinishSample | Close | Abort

_FAULTS = {error.__name__: error for error in (Unavailable, NoToken, Abandoned)}


def fault_of(error: Exception) -> Fault:
    """What the other end is told of an error."""
    message = str(error)
    if isinstance(error, InvalidRequest):
        return Fault("InvalidRequest", message, violations=error.violations)
    if isinstance(error, Overloaded):
        return Fault("Overloaded", message, error.retry_after)
    if type(error).__name__ in _FAULTS:
        return Fault(type(error).__name__, message)
    return Fault("", f"{type(error).__name__}: {message}")


def error_of(fault: Fault) -> Exception:
    """The error that `fault_of` was given; one of a class unknown here is a RuntimeError."""
    if fault.kind == "InvalidRequest":
        return InvalidRequest(*fault.violations)
    if fault.kind == "Overloaded":
        return Overloaded(fault.message, fault.retry_after)
    return _FAULTS.get(fault.kind, RuntimeError)(fault.message)
