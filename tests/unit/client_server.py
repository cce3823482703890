"""A real gRPC server with scripted answers, and both clients behind one blocking interface."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.message import Message
from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from headwise import AsyncClient, Client, CompletionStream, RetryPolicy
from headwise.v1 import control_pb2_grpc, inference_pb2, inference_pb2_grpc

# Pauses that a test does not notice.
FAST_RETRIES = RetryPolicy(attempts=4, initial_backoff=0.001, max_backoff=0.002)
# How long a test waits for something that happens at once unless it is broken.
PATIENCE = 20.0

Answer = Callable[[Any, grpc.ServicerContext], Iterator[Any]]


@dataclass(frozen=True)
class Call:
    """What the server saw of one call; `seconds` is its deadline, None if it has none."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    seconds: float | None


def says(*messages: Message) -> Answer:
    """Sends the messages and ends well."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        yield from messages

    return answer


def fails(
    code: grpc.StatusCode, text: str, *details: Message, after: tuple[Message, ...] = ()
) -> Answer:
    """Sends `after`, then ends with a status that carries the details."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        yield from after
        status = status_pb2.Status(code=code.value[0], message=text)
        for detail in details:
            packed = PackedAny()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    return answer


class Hangs:
    """Sends the messages, then nothing until the client goes away; `ended` is set when it does."""

    def __init__(self, *messages: Message) -> None:
        self._messages = messages
        self.ended = threading.Event()

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        if not context.add_callback(self.ended.set):
            self.ended.set()
        yield from self._messages
        self.ended.wait(PATIENCE)


def token(text: str, token_id: int, index: int = 0) -> inference_pb2.GenerateResponse:
    """A message with one token."""
    return inference_pb2.GenerateResponse(index=index, text=text, token_ids=[token_id])


def finish(
    index: int = 0, completion_tokens: int = 2, **fields: Any
) -> inference_pb2.GenerateResponse:
    """The last message of a sample."""
    return inference_pb2.GenerateResponse(
        index=index,
        finish=inference_pb2.Finish(
            reason=fields.pop("reason", inference_pb2.FINISH_REASON_LENGTH),
            usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=completion_tokens),
            seed=7,
            **fields,
        ),
    )


class ScriptedServer(inference_pb2_grpc.InferenceServicer, control_pb2_grpc.ControlServicer):
    """Gives the scripted answers one after the other, whatever is called, and records the calls."""

    def __init__(
        self,
        credentials: grpc.ServerCredentials | None = None,
        max_message_bytes: int = 1 << 22,
    ) -> None:
        self.calls: list[Call] = []
        self._script: deque[Answer] = deque()
        options = [("grpc.max_receive_message_length", max_message_bytes)]
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        inference_pb2_grpc.add_InferenceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"

    def script(self, *answers: Answer) -> None:
        """The answers to the next calls; one more call than that fails."""
        self._script = deque(answers)

    def _stream(
        self, method: str, request: Message, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        left = context.time_remaining()
        # A call without a deadline counts down from the end of time.
        seconds = None if left is None or left > 1e9 else left
        metadata = dict(context.invocation_metadata())
        self.calls.append(Call(method, request, metadata, seconds))
        answer = (
            self._script.popleft()
            if self._script
            else fails(grpc.StatusCode.INTERNAL, "nothing is scripted for this call")
        )
        yield from answer(request, context)

    def _unary(self, method: str, request: Message, context: grpc.ServicerContext) -> Any:
        return next(self._stream(method, request, context))

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Generate", request, context)

    def Chat(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        return self._stream("Chat", request, context)

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("Tokenize", request, context)

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("Detokenize", request, context)

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("GetServerInfo", request, context)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("ListModels", request, context)

    def GetModelInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("GetModelInfo", request, context)

    def GetLoad(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("GetLoad", request, context)

    def GetHealth(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("GetHealth", request, context)

    def Abort(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._unary("Abort", request, context)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait(PATIENCE)


class BlockingStream:
    """An AsyncCompletionStream read from ordinary code."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: Any) -> None:
        self._loop = loop
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._loop.run_until_complete(anext(self._stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def result(self) -> Any:
        return self._loop.run_until_complete(self._stream.result())

    def __enter__(self) -> Self:
        self._loop.run_until_complete(self._stream.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._loop.run_until_complete(self._stream.__aexit__(*error))


class BlockingAsyncClient:
    """An AsyncClient used from ordinary code, so that one test serves both clients."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if inspect.iscoroutinefunction(method):
                return self._loop.run_until_complete(method(*arguments, **options))
            return BlockingStream(
                self._loop, self._loop.run_until_complete(begin(arguments, options))
            )

        async def begin(arguments: Any, options: Any) -> Any:
            return method(*arguments, **options)

        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.close()


AnyClient = Client | BlockingAsyncClient
AnyStream = CompletionStream | BlockingStream
CLIENTS = [Client, BlockingAsyncClient]
