"""What `stream` and `stream_chat` return: the deltas of one request, and everything at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from headwise._resumption import Leg, Resumption, StreamRequest
from headwise.errors import RequestCancelledError
from headwise.types import Completion, Delta

Start = Callable[[StreamRequest, float | None], Any]
"""Sends a request, with the seconds it may take, and returns the gRPC call."""


class _Progress:
    """What both kinds of stream know: the calls under way, of which the first is read."""

    def __init__(self, start: Start, resumption: Resumption) -> None:
        self.request_id = resumption.gathering.request_id
        self._start = start
        self._resumption = resumption
        self._error: Exception | None = None
        # Replaced, never changed: another thread may be about to cancel them.
        self._calls: tuple[tuple[Leg, Any], ...] = ()
        self._begin([resumption.first_leg()])

    def text(self, index: int = 0) -> str:
        """What a sample has said so far, also after a failure or `cancel`."""
        return self._resumption.gathering.text(index)

    def token_ids(self, index: int = 0) -> tuple[int, ...]:
        """The tokens that a sample has so far, also after a failure or `cancel`."""
        return self._resumption.gathering.token_ids(index)

    def _begin(self, legs: Iterable[Leg]) -> None:
        timeout = self._resumption.attempts.remaining()
        started = tuple((leg, self._start(leg.request, timeout)) for leg in legs)
        self._calls = started + self._calls

    def _end(self) -> None:
        """Let go of every call."""
        for _, call in self._calls:
            call.cancel()
        self._calls = ()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._end()

    def _outcome(self, cancelled: bool) -> Completion:
        gathering = self._resumption.gathering
        if self._error is not None:
            raise self._error
        if cancelled and not gathering.complete:
            raise RequestCancelledError("cancelled by this client", request_id=self.request_id)
        return gathering.completion()


class CompletionStream(_Progress, Iterator[Delta]):
    """The deltas of one request, in the order in which the server sends them.

    The request is on its way as soon as this object exists, and resumed if its connection breaks.
    Leaving it as a context manager cancels what is unfinished. One thread reads; any thread may
    call `cancel`.
    """

    def __init__(self, start: Start, resumption: Resumption) -> None:
        self._cancelled = threading.Event()
        super().__init__(start, resumption)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """The next delta. Ends after the last one, and after `cancel`; raises HeadwiseError."""
        try:
            return self._next()
        except StopIteration:
            raise
        except Exception as error:
            self._fail(error)
            raise
        except BaseException:  # Ctrl-C: nobody reads on, so nothing more is to be computed
            self._cancelled.set()
            self._end()
            raise

    def _next(self) -> Delta:
        while self._calls:
            leg, call = self._calls[0]
            try:
                return self._resumption.arrived(leg, next(call))
            except StopIteration:
                self._calls = self._calls[1:]
            except grpc.RpcError as fault:
                if self._cancelled.is_set():
                    break
                legs, pause = self._resumption.legs_after(leg, fault)
                if self._cancelled.wait(pause):
                    break
                self._calls = self._calls[1:]
                self._begin(legs)
                if self._cancelled.is_set():
                    # `cancel`, on another thread, may have met the calls before these.
                    break
        self._end()
        raise StopIteration

    def cancel(self) -> None:
        """Stop the work on the server. Iteration ends; does nothing if it has ended already."""
        if self._calls:
            self._cancelled.set()
            for _, call in self._calls:
                call.cancel()

    def result(self) -> Completion:
        """Read what is left and return everything, also if called again.

        Raises HeadwiseError if the request failed, RequestCancelledError if it was cancelled.
        """
        for _ in self:
            pass
        return self._outcome(self._cancelled.is_set())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncCompletionStream(_Progress, AsyncIterator[Delta]):
    """`CompletionStream` for asyncio. One task reads; any task of its loop may call `cancel`.

    Cancelling the task that reads cancels the request.
    """

    def __init__(self, start: Start, resumption: Resumption) -> None:
        self._cancelled = asyncio.Event()
        super().__init__(start, resumption)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Ends after the last one, and after `cancel`; raises HeadwiseError."""
        try:
            return await self._next()
        except StopAsyncIteration:
            raise
        except asyncio.CancelledError:
            # Raised for our own `cancel`, and if the task that reads is being cancelled.
            ours = self._cancelled.is_set()
            self._cancelled.set()
            self._end()
            if not ours or _being_cancelled():
                raise
            raise StopAsyncIteration from None
        except Exception as error:
            self._fail(error)
            raise

    async def _next(self) -> Delta:
        while self._calls:
            leg, call = self._calls[0]
            try:
                message = await call.read()
            except grpc.RpcError as fault:
                legs, pause = self._resumption.legs_after(leg, fault)
                if await self._cancelled_within(pause):
                    break
                self._calls = self._calls[1:]
                self._begin(legs)
            else:
                if message is not grpc.aio.EOF:
                    return self._resumption.arrived(leg, message)
                self._calls = self._calls[1:]
        self._end()
        raise StopAsyncIteration

    async def _cancelled_within(self, pause: float) -> bool:
        try:
            async with asyncio.timeout(pause):
                return await self._cancelled.wait()
        except TimeoutError:
            return False

    def cancel(self) -> None:
        """Stop the work on the server. Iteration ends; does nothing if it has ended already."""
        if self._calls:
            self._cancelled.set()
            for _, call in self._calls:
                call.cancel()

    async def result(self) -> Completion:
        """Read what is left and return everything, also if called again.

        Raises HeadwiseError if the request failed, RequestCancelledError if it was cancelled.
        """
        async for _ in self:
            pass
        return self._outcome(self._cancelled.is_set())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
