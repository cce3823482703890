"""Around every gRPC call: who calls, how much at a time, a request id, a log line, errors as
statuses."""

from __future__ import annotations

import asyncio
import contextvars
import time
import urllib.parse
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from deploy.edge import errors
from deploy.edge.answers import Caller, OnCall, Operation
from deploy.edge.security import Access
from deploy.edge.tls import names_in

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Context], Awaitable[None]]

OPEN = "/grpc.health.v1.Health/"
"""Methods that answer anybody, outside of all that is here."""
_REFLECTION = "/grpc.reflection."
_VLLM = "/vllm."

_MOST_ID_BYTES = 128
_RETRY_SECONDS = 1.0
# A request's message has to be here in this time, as each of a stream, and an answer's taken.
_MESSAGE_SECONDS = 30.0
_WRITE_SECONDS = 120.0
# Messages that arrive at the same time, each of up to `max_message_bytes`: one more ends the one
# that has taken longest.
_MOST_ARRIVING = 128

_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


def current_caller() -> Caller:
    """Whose call the current task handles."""
    return _caller.get()


def deadline_of(context: Context) -> float | None:
    """When the call's deadline passes, in `time.monotonic()` seconds; None for never."""
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left


async def write(context: Context, message: Message) -> None:
    """Send a message of a stream. Raises `DeadlineExceeded` where the reader has stopped reading:
    its request would hold its place for as long as it likes."""
    try:
        async with asyncio.timeout(_WRITE_SECONDS):
            await context.write(message)
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"nothing was read for {_WRITE_SECONDS:g} s: read the stream, or cancel it"
        ) from None


class Calls(grpc.aio.ServerInterceptor):
    """Wraps every handler but those of health. Unary handlers and those that stream their answer
    are coroutines (streams use `write`), those that stream both ways are generators.

    Callers are known and counted before their message is read: handlers are given to gRPC as if
    requests were streams, which read when they want to. A request to a model leaves here with an
    id: its own, or a new one. `drain` lets running calls finish and refuses new ones.
    """

    def __init__(
        self,
        access: Access,
        most: int,
        answering: Mapping[str, Operation],
        on_call: OnCall | None = None,
    ) -> None:
        """`most` calls at a time; `answering` are the methods that ask a model for an answer, whose
        requests have a `request_id`."""
        self._access = access
        self._most = most
        self._answering = answering
        self._on_call = on_call
        self._live: dict[asyncio.Task[Any], str] = {}
        self._arriving: OrderedDict[int, asyncio.Timeout] = OrderedDict()
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if method.startswith(OPEN) and handler is not None:
            return handler
        streams = handler is not None and handler.request_streaming
        behavior = self._streaming(handler) if streams else self._reading(handler, method)
        return grpc.stream_stream_rpc_method_handler(
            self._around(behavior, method, "other" if handler is None else method),
            request_deserializer=handler.request_deserializer if streams else None,
            response_serializer=None if handler is None else handler.response_serializer,
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls, give running ones `timeout_s`, end the rest with UNAVAILABLE."""
        self._draining = True
        # Reflection goes on for as long as its client likes, and nobody waits for it.
        working = [task for task, name in self._live.items() if not name.startswith(_REFLECTION)]
        if working:
            await asyncio.wait(working, timeout=timeout_s)
        if self._live:
            for task in self._live:
                task.cancel()
            # They only have a status left to send.
            await asyncio.wait(self._live, timeout=1)

    def _around(
        self, behavior: Behavior, method: str, counted_as: str
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def call(_messages: Any, context: Context) -> None:
            started = time.monotonic()
            outcome = code = "OK"
            task = asyncio.current_task()
            assert task is not None
            request_id = uuid.uuid4().hex
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                try:
                    self._admit(task, method, context)
                    await behavior(context)
                except asyncio.CancelledError:
                    outcome = code = "CANCELLED"
                    if not self._draining or context.cancelled():
                        raise
                    task.uncancel()
                    outcome = code = "UNAVAILABLE"
                    gone = Unavailable("the server is shutting down: send the request again")
                    await errors.abort(context, gone, _request_id())
                except grpc.aio.BaseError:
                    # The reader is gone, or its deadline has passed: nobody is left to be told.
                    outcome = code = "CANCELLED"
                    raise
                except Exception as error:
                    outcome, code = type(error).__name__, errors.code_of(error).name
                    # A reader that does not read does not take its status either.
                    self._live.pop(task, None)
                    await errors.abort(context, error, _request_id())
                finally:
                    self._live.pop(task, None)
                    if self._on_call is not None:
                        self._on_call(_api(method), counted_as, code)
                    log.info(
                        "call",
                        method=method[:_MOST_ID_BYTES],
                        outcome=outcome,
                        seconds=round(time.monotonic() - started, 4),
                    )

        return call

    def _admit(self, task: asyncio.Task[Any], method: str, context: Context) -> None:
        """The call's place among the others, and its caller. Raises what refuses it."""
        caller = self._identified(context, method)
        if self._draining:
            raise Unavailable("the server is shutting down: try another one")
        if len(self._live) >= self._most:
            raise Overloaded(
                f"{self._most} calls are under way, as many as this server takes: try again later",
                _RETRY_SECONDS,
            )
        self._live[task] = method
        _caller.set(caller)
        if caller.name:
            structlog.contextvars.bind_contextvars(caller=caller.name)

    def _identified(self, context: Context, method: str) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        name = self._access.caller(
            _text(metadata.get("authorization")), names_in(context.auth_context() or None)
        )
        return Caller(
            _api(method),
            name,
            _text(metadata.get("traceparent")) or "",
            _address(context.peer() or ""),
            self._answering.get(method, "text_completion"),
        )

    def _reading(self, handler: Any, method: str) -> Behavior:
        """A handler of one message, which is read here."""

        async def behavior(context: Context) -> None:
            if handler is None:
                raise errors.UnknownMethod(
                    f"no method {method[:_MOST_ID_BYTES]!r} here: server reflection lists them"
                )
            request = _parsed(await self._message(context), handler.request_deserializer)
            if method in self._answering:
                _identify(request)
            context.set_trailing_metadata(((errors.REQUEST_ID, _request_id()),))
            if handler.response_streaming:
                await handler.unary_stream(request, context)
            else:
                await write(context, await handler.unary_unary(request, context))

        return behavior

    def _streaming(self, handler: Any) -> Behavior:
        async def behavior(context: Context) -> None:
            async for response in handler.stream_stream(_messages(context), context):
                await write(context, response)

        return behavior

    async def _message(self, context: Context) -> bytes:
        """The request's bytes. Raises `InvalidRequest`, `DeadlineExceeded`."""
        arrival = asyncio.timeout(_MESSAGE_SECONDS)
        if len(self._arriving) >= _MOST_ARRIVING:
            _, slowest = self._arriving.popitem(last=False)
            if not slowest.expired():  # else its task has not run since
                slowest.reschedule(0)
        try:
            async with arrival:
                self._arriving[id(arrival)] = arrival
                data = await context.read()
        except TimeoutError:
            raise errors.DeadlineExceeded(
                "the request's message did not arrive in time: send it at once"
            ) from None
        finally:
            self._arriving.pop(id(arrival), None)
        if not isinstance(data, bytes):
            raise InvalidRequest(Violation("request", "no message came: send one"))
        return data


async def _messages(context: Context) -> AsyncIterator[Any]:
    """Raises `DeadlineExceeded` for a client that keeps its stream open for nothing."""
    while (message := await _next(context)) is not grpc.aio.EOF:
        yield message


async def _next(context: Context) -> Any:
    try:
        async with asyncio.timeout(_MESSAGE_SECONDS):
            return await context.read()
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"no message came for {_MESSAGE_SECONDS:g} s: open another stream when you need one"
        ) from None


def _parsed(data: bytes, deserialize: Callable[[bytes], Any]) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise errors.malformed(error) from error


def _api(method: str) -> Literal["vllm", "grpc"]:
    return "vllm" if method.startswith(_VLLM) else "grpc"


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None


def _address(peer: str) -> str:
    """The IP address of gRPC's `ipv4:1.2.3.4:5678` or `ipv6:%5B::1%5D:5678`; empty for others."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _request_id() -> str:
    return str(structlog.contextvars.get_contextvars()["request_id"])


def _identify(request: Any) -> None:
    """The request's own id becomes the call's; a request without one takes the call's."""
    given = request.request_id
    if not given:
        request.request_id = _request_id()
        return
    # It goes into metadata, where gRPC allows printable ASCII only.
    if len(given) > _MOST_ID_BYTES or not all("!" <= letter <= "~" for letter in given):
        raise InvalidRequest(
            Violation(
                "request_id",
                f"{given[:32]!r} (length {len(given)}): use at most {_MOST_ID_BYTES} printable "
                "ASCII characters without spaces, or leave it empty",
            )
        )
    structlog.contextvars.bind_contextvars(request_id=given)
