"""One request's events, on whichever replica it runs: when one is lost, another goes on.

A token is a function of what came before it, the seed and its position, so what follows is what
the first replica would have sent, as `Request.generated` promises.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.errors import Overloaded, Unavailable
from cluster.request import Request, Timing, TokenEvent, TokenStream


class Busy(Protocol):
    """Who is told how many streams it has."""

    name: str
    streams: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request as submitted to one replica."""

    replica: Busy
    stream: TokenStream


Submit = Callable[[Request, Collection[str]], Attempt]
"""A request and the replicas that had their chance; raises what `Generator.submit` does."""


class RoutedStream:
    """`cluster.request.TokenStream`, to be read by a coroutine.

    A request of which nothing has been delivered yet begins anew elsewhere; one with a single
    sample goes on after what was delivered; any other ends with its replica's error.
    """

    def __init__(self, request: Request, submit: Submit) -> None:
        self._request = request
        self._submit = submit
        self._began = time.monotonic()
        self._tried: set[str] = set()
        self._delivered: list[int] = []
        self._first_token: float | None = None
        self._seed = request.sampling.seed
        self._finished = False
        self._attempt: Attempt | None = None
        self._begin(request)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while self._attempt is not None:
            try:
                async for event in self._attempt.stream:
                    yield self._noted(event)
                self._release()
            except (Overloaded, Unavailable) as error:
                self._release()
                self._go_on(error)

    def __iter__(self) -> Iterator[TokenEvent]:
        raise TypeError("a routed stream belongs to an event loop: read it with `async for`")

    def finish_sample(self, index: int) -> None:
        self._finished = self._finished or self._request.n == 1
        if self._attempt is not None:
            self._attempt.stream.finish_sample(index)

    def close(self) -> None:
        if self._attempt is not None:
            self._attempt.stream.close()
            self._release()

    def _begin(self, request: Request) -> None:
        self._attempt = self._submit(request, self._tried)
        self._attempt.replica.streams += 1
        self._tried.add(self._attempt.replica.name)

    def _release(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.replica.streams -= 1

    def _go_on(self, error: Exception) -> None:
        """On another replica; raises `error` where that cannot be."""
        if self._finished:
            return
        rest = self._rest()
        if rest is None:
            raise error
        try:
            self._begin(rest)
        except (Overloaded, Unavailable):
            raise error from None

    def _rest(self) -> Request | None:
        request = self._request
        if self._first_token is None:
            return request
        if request.n != 1 or request.beams is not None:
            return None
        sampling = replace(request.sampling, seed=self._seed, prompt_logprobs=None)
        generated = (*request.generated, *self._delivered)
        return replace(request, sampling=sampling, generated=generated)

    def _noted(self, event: TokenEvent) -> TokenEvent:
        if self._first_token is None:
            self._first_token = time.monotonic() - self._began
        elif event.queued is not None:
            event = replace(event, queued=None)  # not the first tokens, but those of a new attempt
        self._delivered.extend(event.tokens)
        if event.seed is not None:
            self._seed = event.seed
        if event.finish is not None:
            self._finished = self._request.n == 1
            if len(self._tried) > 1 and event.timing is not None:
                total = time.monotonic() - self._began
                timing = Timing(event.timing.queue, self._first_token, total)
                return replace(event, timing=timing)
        return event
