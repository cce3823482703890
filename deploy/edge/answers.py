"""The way of every request, whichever API it came in by: submitted, watched, and let go of."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.request import Request
from cluster.text import TextDelta, TextStream
from deploy.edge.intake import Intake
from deploy.edge.models import Served

Operation = Literal["text_completion", "chat"]
"""What a model is asked for, as OpenTelemetry names it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `name` is that of its token or certificate, empty where nobody is asked for one;
    `traceparent` is its W3C trace context, empty for none; `address` is the IP address at the other
    end of the connection, empty where that has none; `operation` is what is asked for."""

    api: Literal["grpc", "vllm", "http"]
    name: str = ""
    traceparent: str = ""
    address: str = ""
    operation: Operation = "text_completion"


class Watch(Protocol):
    """Follows one request: its deltas, then its end, `error` None where all samples finished."""

    def delta(self, delta: TextDelta) -> None: ...
    def end(self, error: BaseException | None) -> None: ...


class Watcher(Protocol):
    """Is told of every request before it is submitted; what it raises refuses the request."""

    def begin(self, model: str, request: Request, caller: Caller) -> Watch: ...


class Limiter(Watcher, Protocol):
    """A watcher that refuses what is beyond a caller's limits."""

    def room(self, caller: Caller) -> int | None:
        """How many more requests the caller may run now; None for as many as it likes."""
        ...


OnCall = Callable[[str, str, str], None]
"""Is told of every call at its end, also of those that ask no model: its API as `Caller` has it,
its method ("other" for one that is not served) and its status, gRPC's name or HTTP's number."""


class Answers:
    """Submits requests to their models' generators, watched by `watchers`, refused by `limiter`."""

    def __init__(self, *watchers: Watcher, limiter: Limiter | None = None) -> None:
        self._limiter = limiter
        # The limiter comes last, so that the others are told of what it refuses.
        self._watchers = watchers if limiter is None else (*watchers, limiter)

    def room(self, caller: Caller) -> int | None:
        """How many more requests the caller may run now; None for as many as it likes."""
        return None if self._limiter is None else self._limiter.room(caller)

    @contextlib.asynccontextmanager
    async def of(
        self, served: Served, intake: Intake, caller: Caller
    ) -> AsyncIterator[AsyncIterator[TextDelta]]:
        """The request's deltas; leaving the block lets go of the request.

        Deltas wait while their reader does; what comes meanwhile is merged. Raises what
        `Generator.submit` does, and what its stream does.
        """
        request = intake.request
        watches: list[Watch] = []
        error: BaseException | None = None
        try:
            for watcher in self._watchers:
                watches.append(watcher.begin(served.name, request, caller))
            stream = served.generator.submit(request)
            try:
                deltas = TextStream(
                    served.texts.codec,
                    request,
                    stream,
                    skip_special_tokens=intake.skip_special_tokens,
                )
                yield _watched(deltas, watches)
            finally:
                stream.close()
        except BaseException as raised:
            error = raised
            raise
        finally:
            for watch in watches:
                watch.end(error)


async def _watched(deltas: TextStream, watches: list[Watch]) -> AsyncIterator[TextDelta]:
    async for delta in deltas:
        for watch in watches:
            watch.delta(delta)
        yield delta
