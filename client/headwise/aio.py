"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from headwise import _requests, _responses
from headwise._connection import Options, connection
from headwise._conversation import MessageLike, ToolLike
from headwise._requests import Prompt
from headwise._resumption import Resumption, StreamRequest
from headwise._retry import Readiness
from headwise._status import read_error
from headwise._target import Address
from headwise.errors import HeadwiseError
from headwise.options import (
    DEFAULT_RETRIES,
    NO_RETRIES,
    ChatOptions,
    GenerateOptions,
    RequestOptions,
    RetryPolicy,
    TLSOptions,
)
from headwise.streams import AsyncCompletionStream
from headwise.types import Completion, Health, Load, ModelInfo, ServerInfo, Tokenization
from headwise.v1 import control_pb2
from headwise.v1.control_pb2_grpc import ControlStub
from headwise.v1.inference_pb2_grpc import InferenceStub

_Result = TypeVar("_Result")


class AsyncClient:
    """`headwise.Client` for asyncio: the same arguments, results and errors.

    It may be made anywhere; the loop of its first call is the one it belongs to.
    """

    def __init__(
        self,
        address: Address = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: TLSOptions | None = None,
        timeout: float | None = None,
        retries: RetryPolicy | int = DEFAULT_RETRIES,
    ) -> None:
        self._connection = connection(
            address, token=token, tls=tls, timeout=timeout, retries=retries
        )

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Continue a prompt, text or token ids, and return the whole answer."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Continue a prompt, text or token ids, and return the answer as it is made."""
        request = _requests.generate_request(prompt, options)
        return self._stream(self._inference.Generate, request, options)

    async def chat(
        self, messages: Sequence[MessageLike], **options: Unpack[ChatOptions]
    ) -> Completion:
        """Answer a conversation and return the whole answer."""
        async with self.stream_chat(messages, **options) as stream:
            return await stream.result()

    def stream_chat(
        self, messages: Sequence[MessageLike], **options: Unpack[ChatOptions]
    ) -> AsyncCompletionStream:
        """Answer a conversation and return the answer as it is made."""
        request = _requests.chat_request(messages, options)
        return self._stream(self._inference.Chat, request, options)

    async def tokenize(
        self,
        prompt: str | Sequence[MessageLike],
        *,
        add_special_tokens: bool | None = None,
        tools: Sequence[ToolLike] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Tokenization:
        """Token ids of a text or a conversation, as `generate` and `chat` would make them."""
        request = _requests.tokenize_request(
            prompt,
            add_special_tokens=add_special_tokens,
            tools=tools,
            template_arguments=template_arguments,
            continue_final_message=continue_final_message,
            model=model,
        )
        return await self._call(
            self._inference.Tokenize, request, _responses.read_tokenization, timeout
        )

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = _requests.detokenize_request(token_ids, skip_special_tokens, model)
        return await self._call(self._inference.Detokenize, request, _responses.read_text, timeout)

    async def list_models(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """The names of the models that are served."""
        request = control_pb2.ListModelsRequest()
        return await self._call(self._control.ListModels, request, _responses.read_models, timeout)

    async def model_info(
        self, model: str | None = None, *, timeout: float | None = None
    ) -> ModelInfo:
        """A model; raises NotFoundError for one that is not served.

        Here and below, `model` may be left out where only one is served.
        """
        request = _requests.about(control_pb2.GetModelInfoRequest, model)
        return await self._call(
            self._control.GetModelInfo, request, _responses.read_model_info, timeout
        )

    async def server_info(
        self, model: str | None = None, *, timeout: float | None = None
    ) -> ServerInfo:
        """Versions, devices, limits, and which rank of a model holds what."""
        request = _requests.about(control_pb2.GetServerInfoRequest, model)
        return await self._call(
            self._control.GetServerInfo, request, _responses.read_server_info, timeout
        )

    async def load(self, model: str | None = None, *, timeout: float | None = None) -> Load:
        """How much work there is for a model."""
        request = _requests.about(control_pb2.GetLoadRequest, model)
        return await self._call(self._control.GetLoad, request, _responses.read_load, timeout)

    async def health(self, model: str | None = None, *, timeout: float | None = None) -> Health:
        """The state of every rank of a model and its cause."""
        request = _requests.about(control_pb2.GetHealthRequest, model)
        return await self._call(self._control.GetHealth, request, _responses.read_health, timeout)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request, whoever made it; False if the server does not know it (any more)."""
        request = _requests.abort_request(request_id)
        return await self._call(self._control.Abort, request, _responses.read_found, timeout)

    async def wait_until_ready(
        self, timeout: float | None = 60.0, *, model: str | None = None
    ) -> Health:
        """Ask for the health until a model's server computes, and return it.

        Raises DeadlineExceededError with the last cause if that takes more than `timeout` seconds,
        and at once what waiting will not mend, such as AuthenticationError.
        """
        request = _requests.about(control_pb2.GetHealthRequest, model)
        readiness = Readiness(timeout)
        while True:
            poll_timeout = readiness.poll_timeout()
            try:
                health = await self._call(
                    self._control.GetHealth,
                    request,
                    _responses.read_health,
                    poll_timeout,
                    NO_RETRIES,
                )
                if readiness.accepts(health):
                    return health
            except HeadwiseError as error:
                readiness.failed(error)
            await asyncio.sleep(readiness.pause())

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()
        await self._control_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self,
        method: Any,
        request: Any,
        read: Callable[[Any], _Result],
        timeout: float | None,
        retries: RetryPolicy | None = None,
    ) -> _Result:
        attempts = self._connection.attempts(timeout, retries)
        while True:
            try:
                response = await method(
                    request, timeout=attempts.remaining(), metadata=self._connection.metadata
                )
            except grpc.RpcError as fault:
                error = read_error(fault, None)
                pause = attempts.pause(error)
                if pause is None:
                    raise error from fault
                await asyncio.sleep(pause)
            else:
                return read(response)

    def _stream(
        self,
        method: Any,
        request: StreamRequest,
        options: RequestOptions,
    ) -> AsyncCompletionStream:
        def start(request: StreamRequest, timeout: float | None) -> Any:
            return method(request, timeout=timeout, metadata=self._connection.metadata)

        attempts = self._connection.attempts(options.get("timeout"))
        return AsyncCompletionStream(start, Resumption(request, options, attempts))

    def _open(self, options: Options) -> grpc.aio.Channel:
        target, credentials = self._connection.target, self._connection.credentials
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=options)

    # grpc.aio ties a channel to the loop it is opened on, so that waits for the first call.
    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return self._open(self._connection.options)

    @cached_property
    def _control_channel(self) -> grpc.aio.Channel:
        options = self._connection.control_options
        return self._channel if options is None else self._open(options)

    @cached_property
    def _inference(self) -> Any:
        return InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    @cached_property
    def _control(self) -> Any:
        return ControlStub(self._control_channel)  # type: ignore[no-untyped-call]
