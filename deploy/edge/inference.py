"""The Inference service: takes a request in, streams its deltas out, and lets go of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.errors import InvalidRequest, Violation
from cluster.request import FinishReason
from cluster.text import TextDelta
from deploy import codec
from deploy.edge.answers import Answers
from deploy.edge.calls import current_caller, deadline_of, write
from deploy.edge.errors import DeadlineExceeded
from deploy.edge.extent import check_conversation
from deploy.edge.intake import Intake
from deploy.edge.messages import take_chat, take_generate
from deploy.edge.models import Models, Served
from deploy.edge.text import Texts, spelled_tokens
from headwise.v1 import inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Raises headwise's own errors; `deploy.edge.calls` turns them into statuses."""

    def __init__(self, models: Models, answers: Answers) -> None:
        self._models = models
        self._answers = answers

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        served = self._models.get(request.model)
        intake = await take_generate(request, served, deadline_of(context))
        await self._stream(served, intake, context, lambda message: message)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> None:
        served = self._models.get(request.model)
        intake = await take_chat(request, served, deadline_of(context))
        await self._stream(served, intake, context, codec.chat_response)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        served = self._models.get(request.model)
        kind = request.WhichOneof("input")
        if kind == "text":
            special = request.add_special_tokens
            ids = await served.texts.encode(
                request.text,
                add_special_tokens=special if request.HasField("add_special_tokens") else True,
                field="text",
            )
        elif kind == "conversation":
            try:
                check_conversation(request.conversation)
                ids = await served.texts.render(codec.conversation(request.conversation))
            except InvalidRequest as error:
                raise InvalidRequest(
                    *(
                        replace(fault, field=f"conversation.{fault.field}")
                        for fault in error.violations
                    )
                ) from error
        else:
            raise InvalidRequest(Violation("input", "not set: set text or conversation"))
        context_length = served.generator.model.context
        return inference_pb2.TokenizeResponse(token_ids=ids, context=context_length)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        served = self._models.get(request.model)
        skip = request.skip_special_tokens
        text = await served.texts.decode(
            request.token_ids,
            skip_special_tokens=skip if request.HasField("skip_special_tokens") else True,
            field="token_ids",
        )
        return inference_pb2.DetokenizeResponse(text=text)

    async def _stream(
        self,
        served: Served,
        intake: Intake,
        context: Context,
        as_response: Callable[[inference_pb2.GenerateResponse], Message],
    ) -> None:
        begun: set[int] = set()
        async with self._answers.of(served, intake, current_caller()) as deltas:
            async for delta in deltas:
                message = await served.texts.build(
                    spelled_tokens(delta),
                    partial(_response, delta, intake, served.texts, first=delta.index not in begun),
                )
                begun.add(delta.index)
                if delta.finish is FinishReason.DEADLINE:
                    raise DeadlineExceeded("the call's deadline passed before the last token")
                await write(context, as_response(message))


def _response(
    delta: TextDelta, intake: Intake, texts: Texts, *, first: bool
) -> inference_pb2.GenerateResponse:
    text = texts.token_text if intake.with_text else _no_text
    message = inference_pb2.GenerateResponse(
        index=delta.index,
        text=(intake.echo_text if first else "") + (delta.text if intake.with_text else ""),
        token_ids=(*(intake.echo_ids if first else ()), *delta.tokens),
        logprobs=[codec.token_logprob(entry, text) for entry in delta.logprobs],
    )
    if first:
        message.request_id = intake.request.id
        message.echoed_tokens = len(intake.echo_ids)
    if delta.prompt_logprobs is not None:
        message.prompt_logprobs.extend(
            codec.prompt_logprobs(delta.prompt_logprobs, intake.request.prompt, text)
        )
    if delta.finish is not None and delta.finish is not FinishReason.DEADLINE:
        message.finish.CopyFrom(
            codec.finish(
                delta.finish, delta.matched, delta.usage, delta.timing, delta.seed, delta.score
            )
        )
    return message


def _no_text(_token: int) -> str:
    return ""
