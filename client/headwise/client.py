"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

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
from headwise.streams import CompletionStream
from headwise.types import Completion, Health, Load, ModelInfo, ServerInfo, Tokenization
from headwise.v1 import control_pb2
from headwise.v1.control_pb2_grpc import ControlStub
from headwise.v1.inference_pb2_grpc import InferenceStub

_Result = TypeVar("_Result")


class Client:
    """A connection to a headwise server, or to several that serve the same. Threads may share it.

    `address` is host:port, a target of gRPC's (`unix:`, `dns:`), or a list of host:port. Calls go
    round all the servers of a list or of a name; those that are away or compute nothing are left
    out.

    `token` is sent as a bearer token: use it with `tls`, or on this machine only. `timeout` is the
    default of every call in seconds, retries included, None for no limit. `retries` is a number of
    further attempts, or a policy. Raises TypeError or ValueError for an argument that cannot be
    right; the server is first spoken to by the first call.

    Every call raises `HeadwiseError` (see `headwise.errors`), and TypeError for an argument of the
    wrong type.
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
        self._channel = self._open(self._connection.options)
        # Opened, not connected: that waits for a first call.
        self._control_channel = (
            self._channel
            if self._connection.control_options is None
            else self._open(self._connection.control_options)
        )
        self._inference: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._control: Any = ControlStub(self._control_channel)  # type: ignore[no-untyped-call]

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Continue a prompt, text or token ids, and return the whole answer."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> CompletionStream:
        """Continue a prompt, text or token ids, and return the answer as it is made."""
        request = _requests.generate_request(prompt, options)
        return self._stream(self._inference.Generate, request, options)

    def chat(self, messages: Sequence[MessageLike], **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation and return the whole answer."""
        with self.stream_chat(messages, **options) as stream:
            return stream.result()

    def stream_chat(
        self, messages: Sequence[MessageLike], **options: Unpack[ChatOptions]
    ) -> CompletionStream:
        """Answer a conversation and return the answer as it is made."""
        request = _requests.chat_request(messages, options)
        return self._stream(self._inference.Chat, request, options)

    def tokenize(
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
        return self._call(self._inference.Tokenize, request, _responses.read_tokenization, timeout)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = _requests.detokenize_request(token_ids, skip_special_tokens, model)
        return self._call(self._inference.Detokenize, request, _responses.read_text, timeout)

    def list_models(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """The names of the models that are served."""
        request = control_pb2.ListModelsRequest()
        return self._call(self._control.ListModels, request, _responses.read_models, timeout)

    def model_info(self, model: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """A model; raises NotFoundError for one that is not served.

        Here and below, `model` may be left out where only one is served.
        """
        request = _requests.about(control_pb2.GetModelInfoRequest, model)
        return self._call(self._control.GetModelInfo, request, _responses.read_model_info, timeout)

    def server_info(self, model: str | None = None, *, timeout: float | None = None) -> ServerInfo:
        """Versions, devices, limits, and which rank of a model holds what."""
        request = _requests.about(control_pb2.GetServerInfoRequest, model)
        return self._call(
            self._control.GetServerInfo, request, _responses.read_server_info, timeout
        )

    def load(self, model: str | None = None, *, timeout: float | None = None) -> Load:
        """How much work there is for a model."""
        request = _requests.about(control_pb2.GetLoadRequest, model)
        return self._call(self._control.GetLoad, request, _responses.read_load, timeout)

    def health(self, model: str | None = None, *, timeout: float | None = None) -> Health:
        """The state of every rank of a model and its cause."""
        request = _requests.about(control_pb2.GetHealthRequest, model)
        return self._call(self._control.GetHealth, request, _responses.read_health, timeout)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request, whoever made it; False if the server does not know it (any more)."""
        request = _requests.abort_request(request_id)
        return self._call(self._control.Abort, request, _responses.read_found, timeout)

    def wait_until_ready(self, timeout: float | None = 60.0, *, model: str | None = None) -> Health:
        """Ask for the health until a model's server computes, and return it.

        Raises DeadlineExceededError with the last cause if that takes more than `timeout` seconds,
        and at once what waiting will not mend, such as AuthenticationError.
        """
        request = _requests.about(control_pb2.GetHealthRequest, model)
        readiness = Readiness(timeout)
        while True:
            poll_timeout = readiness.poll_timeout()
            try:
                health = self._call(
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
            time.sleep(readiness.pause())

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()
        self._control_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, options: Options) -> grpc.Channel:
        target, credentials = self._connection.target, self._connection.credentials
        if credentials is None:
            return grpc.insecure_channel(target, options=options)
        return grpc.secure_channel(target, credentials, options=options)

    def _call(
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
                response = method(
                    request, timeout=attempts.remaining(), metadata=self._connection.metadata
                )
            except grpc.RpcError as fault:
                error = read_error(fault, None)
                pause = attempts.pause(error)
                if pause is None:
                    raise error from fault
                time.sleep(pause)
            else:
                return read(response)

    def _stream(
        self,
        method: Any,
        request: StreamRequest,
        options: RequestOptions,
    ) -> CompletionStream:
        def start(request: StreamRequest, timeout: float | None) -> Any:
            return method(request, timeout=timeout, metadata=self._connection.metadata)

        attempts = self._connection.attempts(options.get("timeout"))
        return CompletionStream(start, Resumption(request, options, attempts))
