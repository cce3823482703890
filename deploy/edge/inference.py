"""The Inference service: takes a request in, streams its deltas out, and lets go of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.errors import InvalidRequest, Violation
from cluster.request import FinishReason, Generator
from cluster.text import TextDelta, TextStream
from deploy import codec
from deploy.edge.errors import DeadlineExceeded
from deploy.edge.intake import Intake, check_model, take_chat, take_generate
from deploy.edge.text import Texts
from headwise.v1 import inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Raises headwise's own errors; `deploy.edge.calls` turns them into statuses."""

    def __init__(self, generator: Generator, texts: Texts) -> None:
        self._generator = generator
        self._texts = texts

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        intake = await take_generate(
            request, self._generator.model, self._texts, _deadline(context)
        )
        await self._stream(intake, context, lambda message: message)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> None:
        intake = await take_chat(request, self._generator.model, self._texts, _deadline(context))
        await self._stream(intake, context, codec.chat_response)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        model = self._generator.model
        check_model(request.model, model)
        kind = request.WhichOneof("input")
        if kind == "text":
            special = request.add_special_tokens
            ids = await self._texts.encode(
                request.text,
                add_special_tokens=special if request.HasField("add_special_tokens") else True,
                field="text",
            )
        elif kind == "conversation":
            ids = await self._texts.render(
                request.conversation.messages, field="conversation.messages"
            )
        else:
            raise InvalidRequest(Violation("input", "not set: set text or conversation"))
        return inference_pb2.TokenizeResponse(token_ids=ids, context=model.context)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        check_model(request.model, self._generator.model)
        skip = request.skip_special_tokens
        text = await self._texts.decode(
            request.token_ids,
            skip_special_tokens=skip if request.HasField("skip_special_tokens") else True,
            field="token_ids",
        )
        return inference_pb2.DetokenizeResponse(text=text)

    async def _stream(
        self,
        intake: Intake,
        context: Context,
        as_response: Callable[[inference_pb2.GenerateResponse], Message],
    ) -> None:
        # Waits while the reader does; what comes meanwhile is merged in the stream.
        stream = self._generator.submit(intake.request)
        try:
            begun: set[int] = set()
            deltas = TextStream(
                self._texts.codec,
                intake.request,
                stream,
                skip_special_tokens=intake.skip_special_tokens,
            )
            async for delta in deltas:
                message = await self._texts.build(
                    _spelled_tokens(delta),
                    partial(self._response, delta, intake, first=delta.index not in begun),
                )
                begun.add(delta.index)
                if delta.finish is FinishReason.DEADLINE:
                    raise DeadlineExceeded("the call's deadline passed before the last token")
                await context.write(as_response(message))
        finally:
            stream.close()

    def _response(
        self, delta: TextDelta, intake: Intake, *, first: bool
    ) -> inference_pb2.GenerateResponse:
        text = self._texts.token_text if intake.with_text else _no_text
        message = inference_pb2.GenerateResponse(
            index=delta.index,
            text=(intake.echo_text if first else "") + (delta.text if intake.with_text else ""),
            token_ids=(*(intake.echo_ids if first else ()), *delta.tokens),
            logprobs=[codec.token_logprob(entry, text) for entry in delta.logprobs],
        )
        if first:
            message.request_id = intake.request.id
        if delta.prompt_logprobs is not None:
            message.prompt_logprobs.extend(
                codec.prompt_logprobs(delta.prompt_logprobs, intake.request.prompt, text)
            )
        if delta.finish is not None and delta.finish is not FinishReason.DEADLINE:
            message.finish.CopyFrom(
                codec.finish(
                    delta.finish,
                    delta.matched,
                    delta.usage,
                    delta.timing,
                    delta.seed,
                    delta.score,
                )
            )
        return message


def _deadline(context: Context) -> float | None:
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left


def _spelled_tokens(delta: TextDelta) -> int:
    """How many tokens its log probabilities name, each with its text."""
    entries = (*delta.logprobs, *(delta.prompt_logprobs or ()))
    return sum(1 + (0 if entry is None else len(entry.top_tokens)) for entry in entries)


def _no_text(_token: int) -> str:
    return ""
