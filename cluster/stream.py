"""The events of one request on their way from the driver's thread to one reader.

The reader may be a coroutine or a thread. What it has not read yet waits here, merged per sample
when it comes to read, so a slow reader costs the memory of its own tokens and nobody's time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace

from cluster.request import TokenEvent


class EventStream:
    """`cluster.request.TokenStream`, with the driver's side: `push`, `end`."""

    def __init__(self, finish_sample: Callable[[int], None], close: Callable[[], None]) -> None:
        self._finish_sample = finish_sample
        self._close = close
        self._events: deque[TokenEvent] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: TokenEvent) -> None:
        """Hand an event to the reader; from the driver's thread."""
        self._change(lambda: self._events.append(event))

    def end(self, error: Exception | None = None) -> None:
        """No event follows; the reader is raised `error` after what it has not read yet."""

        def end() -> None:
            self._ended, self._error = True, error

        self._change(end)

    def finish_sample(self, index: int) -> None:
        self._finish_sample(index)

    def close(self) -> None:
        if not self._ended:
            self._close()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while True:
            events, ended = self._take()
            for event in events:
                yield event
            if ended:
                return
            with self._changed:
                if self._events or self._ended:
                    continue
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            events, ended = self._take()
            yield from events
            if ended:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._ended)

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            if self._ended:
                return
            change()
            waiter, self._waiter = self._waiter, None
            self._changed.notify()
        if waiter is not None:
            try:
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)
            except RuntimeError:  # the reader's loop is closed: nobody is left to tell
                self._close()

    def _take(self) -> tuple[Iterable[TokenEvent], bool]:
        """All that waits, merged per sample, and whether it was the last."""
        with self._changed:
            events, ended, error = list(self._events), self._ended, self._error
            self._events.clear()
        if ended and error is not None and not events:
            raise error
        return (events if len(events) < 2 else _merged(events)), ended and error is None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _merged(events: list[TokenEvent]) -> list[TokenEvent]:
    """One event per sample: a reader that fell behind catches up at once."""
    samples: dict[int, list[TokenEvent]] = {}
    for event in events:
        samples.setdefault(event.index, []).append(event)
    return [
        replace(
            parts[-1],
            tokens=tuple(token for part in parts for token in part.tokens),
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
            prompt_logprobs=parts[0].prompt_logprobs,
            queued=parts[0].queued,
        )
        for parts in samples.values()
    ]
