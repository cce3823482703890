"""What `stream` and `stream_chat` return: the deltas of one request, and everything at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from headwise._responses import Gathering
from headwise._retry import Attempts
from headwise._status import read_error
from headwise.errors import HeadwiseError, RequestCancelledError
from headwise.types import Completion, Delta


class _Progress:
    """What both kinds of stream know of their request, and when they begin it again."""

    def __init__(
        self,
        start: Callable[[float | None], Any],
        gathering: Gathering,
        attempts: Attempts,
    ) -> None:
        """`start` sends the request, with the seconds it may take, and returns the gRPC call."""
        self.request_id = gathering.request_id
        self._start = start
        self._gathering = gathering
        self._attempts = attempts
        self._first_arrived = False
        self._over = False
        self._error: HeadwiseError | None = None
        self._call = start(attempts.remaining())

    def text(self, index: int = 0) -> str:
        """What a sample has said so far, also after a failure or `cancel`."""
        return self._gathering.text(index)

    def token_ids(self, index: int = 0) -> tuple[int, ...]:
        """The tokens that a sample has so far, also after a failure or `cancel`."""
        return self._gathering.token_ids(index)

    def _arrived(self, message: Any) -> Delta:
        self._first_arrived = True
        return self._gathering.add(message)

    def _pause_after(self, fault: grpc.RpcError) -> float:
        """Seconds to wait before another attempt; raises HeadwiseError if there is none.

        What has begun to arrive is not asked for again: the caller has seen it.
        """
        error = read_error(fault, self.request_id)
        pause = None if self._first_arrived else self._attempts.pause(error)
        if pause is None:
            self._over, self._error = True, error
            raise error from fault
        return pause

    def _outcome(self, cancelled: bool) -> Completion:
        if self._error is not None:
            raise self._error
        if cancelled and not self._gathering.complete:
            raise RequestCancelledError("cancelled by this client", request_id=self.request_id)
        return self._gathering.completion()


class CompletionStream(_Progress, Iterator[Delta]):
    """The deltas of one request, in the order in which the server sends them.

    The request is on its way as soon as this object exists. Leaving it as a context manager
    cancels what is unfinished. One thread reads; any thread may call `cancel`.
    """

    def __init__(
        self,
        start: Callable[[float | None], Any],
        gathering: Gathering,
        attempts: Attempts,
    ) -> None:
        self._cancelled = threading.Event()
        super().__init__(start, gathering, attempts)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """The next delta. Ends after the last one, and after `cancel`; raises HeadwiseError."""
        while not self._over:
            try:
                return self._arrived(next(self._call))
            except StopIteration:
                self._over = True
            except grpc.RpcError as fault:
                if self._cancelled.is_set() or self._cancelled.wait(self._pause_after(fault)):
                    self._over = True
                else:
                    self._begin_again()
        raise StopIteration

    def _begin_again(self) -> None:
        self._call = self._start(self._attempts.remaining())
        if self._cancelled.is_set():
            # `cancel`, on another thread, may have met the call before this one.
            self._call.cancel()

    def cancel(self) -> None:
        """Stop the work on the server. Iteration ends; does nothing if it has ended already."""
        if not self._over:
            self._cancelled.set()
            self._call.cancel()

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

    def __init__(
        self,
        start: Callable[[float | None], Any],
        gathering: Gathering,
        attempts: Attempts,
    ) -> None:
        self._cancelled = asyncio.Event()
        super().__init__(start, gathering, attempts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Ends after the last one, and after `cancel`; raises HeadwiseError."""
        while not self._over:
            try:
                message = await self._call.read()
            except grpc.RpcError as fault:
                await self._begin_again(self._pause_after(fault))
            except asyncio.CancelledError:
                # Raised for our own `cancel`, and if the task that reads is being cancelled.
                ours = self._cancelled.is_set()
                self.cancel()
                self._over = True
                if not ours or _being_cancelled():
                    raise
            else:
                if message is not grpc.aio.EOF:
                    return self._arrived(message)
                self._over = True
        raise StopAsyncIteration

    async def _begin_again(self, pause: float) -> None:
        try:
            async with asyncio.timeout(pause):
                await self._cancelled.wait()
            self._over = True
        except TimeoutError:
            self._call = self._start(self._attempts.remaining())

    def cancel(self) -> None:
        """Stop the work on the server. Iteration ends; does nothing if it has ended already."""
        if not self._over:
            self._cancelled.set()
            self._call.cancel()

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
