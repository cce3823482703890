"""What every endpoint needs: who asks for what, and the deltas of its prompts as one stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from cluster.errors import InvalidRequest, Violation
from cluster.request import FinishReason
from cluster.text import TextDelta
from deploy.edge.answers import Answers, Caller
from deploy.edge.errors import DeadlineExceeded, Ended
from deploy.edge.http.exchanges import Exchanges
from deploy.edge.http.replies import PromptTokensDetails, Usage
from deploy.edge.intake import Intake
from deploy.edge.models import Models, Served

TIMEOUT = "x-request-timeout-ms"
"""Request header: milliseconds after which the answer is of no use any more."""

CALLER = "headwise.caller"
"""Key of a request's scope: the `Caller`, put there by the boundary."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request for an answer. `created` is unix time, `deadline` `time.monotonic()`."""

    id: str
    created: int
    caller: Caller
    deadline: float | None

    @classmethod
    def of(cls, request: Request, prefix: str) -> Call:
        """Ids begin with `prefix`, as OpenAI's do. Raises `InvalidRequest` for a bad timeout."""
        return cls(
            f"{prefix}-{uuid.uuid4().hex}",
            int(time.time()),
            request.scope[CALLER],
            _deadline(request.headers.get(TIMEOUT)),
        )


@dataclass(frozen=True)
class Service:
    """The models, the way in to them, and the requests that are being answered."""

    models: Models
    answers: Answers
    exchanges: Exchanges

    @contextlib.asynccontextmanager
    async def deltas(
        self, served: Served, intakes: Sequence[Intake], caller: Caller
    ) -> AsyncIterator[AsyncIterator[tuple[int, TextDelta]]]:
        """The deltas of several requests, each with its request's position.

        As many run at a time as the model has places for and the caller's limit allows; the first
        error ends them all. Leaving the block lets go of them.
        """
        if len(intakes) == 1:
            async with self.answers.of(served, intakes[0], caller) as deltas:
                yield _numbered(deltas)
            return
        # One at a time is under way to the reader: a slow one is waited for.
        merged: asyncio.Queue[tuple[int, TextDelta] | Exception | None] = asyncio.Queue(1)
        most = served.facts.max_sequences // intakes[0].request.n
        room = self.answers.room(caller)
        places = asyncio.Semaphore(max(1, most if room is None else min(most, room)))

        async def answer(position: int, intake: Intake) -> None:
            try:
                async with places, self.answers.of(served, intake, caller) as deltas:
                    async for delta in deltas:
                        await merged.put((position, delta))
                await merged.put(None)
            except Exception as error:
                await merged.put(error)

        tasks = [asyncio.create_task(answer(*numbered)) for numbered in enumerate(intakes)]
        try:
            yield _merged(merged, len(tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Tally:
    """Counts what the prompts and choices of one call come to."""

    def __init__(self, intakes: Sequence[Intake]) -> None:
        self._prompt = sum(len(intake.request.prompt) for intake in intakes)
        self._completion: dict[tuple[int, int], int] = {}
        self._cached: dict[int, int] = {}

    def add(self, position: int, delta: TextDelta) -> None:
        """Count a delta of the request at that position."""
        choice = position, delta.index
        if delta.usage is None:
            self._completion[choice] = self._completion.get(choice, 0) + len(delta.tokens)
            return
        # With a stop token that is no part of the answer.
        self._completion[choice] = delta.usage.completion_tokens
        self._cached[position] = max(self._cached.get(position, 0), delta.usage.cached_tokens)

    def reply(self) -> Usage:
        """What there is so far."""
        completion = sum(self._completion.values())
        cached = sum(self._cached.values())
        return Usage(
            self._prompt, completion, self._prompt + completion, PromptTokensDetails(cached)
        )


def finish_reason(delta: TextDelta) -> Literal["stop", "length"] | None:
    """How a sample ended, None where it goes on. Raises `DeadlineExceeded`, `Ended`."""
    if delta.finish is FinishReason.DEADLINE:
        raise DeadlineExceeded(f"{TIMEOUT} passed before the last token")
    if delta.finish is FinishReason.ABORTED:
        raise Ended("an operator ended the request")
    if delta.finish is None:
        return None
    return "length" if delta.finish is FinishReason.LENGTH else "stop"


async def _numbered(deltas: AsyncIterator[TextDelta]) -> AsyncIterator[tuple[int, TextDelta]]:
    async for delta in deltas:
        yield 0, delta


async def _merged(
    queue: asyncio.Queue[tuple[int, TextDelta] | Exception | None], streams: int
) -> AsyncIterator[tuple[int, TextDelta]]:
    while streams:
        item = await queue.get()
        if item is None:
            streams -= 1
        elif isinstance(item, Exception):
            raise item
        else:
            yield item


def _deadline(header: str | None) -> float | None:
    if header is None:
        return None
    if not header.isascii() or not header.isdigit() or not 0 < len(header) <= 10:
        raise InvalidRequest(
            Violation(TIMEOUT, f"{header[:32]!r} is not a whole number of milliseconds: give one")
        )
    return time.monotonic() + int(header) / 1000
