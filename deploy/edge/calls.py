"""Around every call to headwise's own services: a request id, a log line, errors as statuses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from cluster.errors import InvalidRequest, Unavailable, Violation
from deploy.edge import errors
from headwise.v1.inference_pb2 import ChatRequest, GenerateRequest

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Awaitable[Any]]

_MOST_ID_BYTES = 128


class Calls(grpc.aio.ServerInterceptor):
    """Wraps the handlers of `/headwise.*`, which are coroutines (streams use `context.write`).

    A Generate or Chat request leaves here with an id: its own, or a new one. `drain` lets running
    calls finish and refuses new ones.
    """

    def __init__(self) -> None:
        self._live: set[asyncio.Task[Any]] = set()
        self._draining = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/headwise."):
            return handler
        serializers = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._around(handler.unary_stream, method), **serializers
            )
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._around(handler.unary_unary, method), **serializers
            )
        return handler

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls, give running ones `timeout_s`, end the rest with UNAVAILABLE."""
        self._draining = True
        if self._live:
            await asyncio.wait(self._live, timeout=timeout_s)
        if self._live:
            for task in self._live:
                task.cancel()
            # They only have a status left to send.
            await asyncio.wait(self._live, timeout=1)

    def _around(self, behavior: Behavior, method: str) -> Behavior:
        async def call(request: Any, context: Context) -> Any:
            request_id, fault = _identify(request)
            context.set_trailing_metadata(((errors.REQUEST_ID, request_id),))
            started = time.monotonic()
            outcome = "OK"
            task = asyncio.current_task()
            assert task is not None
            self._live.add(task)
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                try:
                    if fault is not None:
                        raise fault
                    if self._draining:
                        raise Unavailable("the server is shutting down: try another one")
                    return await behavior(request, context)
                except asyncio.CancelledError:
                    outcome = "CANCELLED"
                    if not self._draining or context.cancelled():
                        raise
                    task.uncancel()
                    outcome = "UNAVAILABLE"
                    gone = Unavailable("the server is shutting down: send the request again")
                    await errors.abort(context, gone, request_id)
                except grpc.aio.BaseError:
                    # The reader is gone, or its deadline has passed: nobody is left to be told.
                    outcome = "CANCELLED"
                    raise
                except Exception as error:
                    outcome = type(error).__name__
                    await errors.abort(context, error, request_id)
                finally:
                    self._live.discard(task)
                    log.info(
                        "call",
                        method=method,
                        outcome=outcome,
                        seconds=round(time.monotonic() - started, 4),
                    )

        return call


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """grpc answers UNKNOWN where parsing raises; hand the fault to the call instead."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return errors.malformed(error)

    return parse


def _identify(request: Any) -> tuple[str, InvalidRequest | None]:
    """The call's id, set on the request where it had none, and what is wrong with the request."""
    new_id = uuid.uuid4().hex
    if isinstance(request, InvalidRequest):
        return new_id, request
    if not isinstance(request, (GenerateRequest, ChatRequest)):
        return new_id, None
    given = request.request_id
    if not given:
        request.request_id = new_id
        return new_id, None
    # It goes into metadata, where gRPC allows printable ASCII only.
    if len(given) > _MOST_ID_BYTES or not all("!" <= letter <= "~" for letter in given):
        return new_id, InvalidRequest(
            Violation(
                "request_id",
                f"{given[:32]!r} (length {len(given)}): use at most {_MOST_ID_BYTES} printable "
                "ASCII characters without spaces, or leave it empty",
            )
        )
    return given, None
