"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster.errors import InvalidRequest, Violation
from cluster.request import Request
from cluster.text import TextDelta
from deploy.edge.http.chat_body import ChatBody
from deploy.edge.http.logprobs import by_id, chat_logprobs, prompt_logprobs
from deploy.edge.http.openapi import answers_with
from deploy.edge.http.replies import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    ToolCall,
    ToolCallDelta,
)
from deploy.edge.http.route import JsonRoute
from deploy.edge.http.service import Call, Service, Tally, finish_reason
from deploy.edge.http.sse import DONE, EventStream, event
from deploy.edge.http.tool_calls import (
    AnswerReader,
    CallPiece,
    MarkedCalls,
    NamedCall,
    PlainText,
    RequiredCalls,
    markers_of,
)
from deploy.edge.intake import Intake, Output, Prompt, take
from deploy.edge.models import Served
from deploy.edge.text import spelled_tokens


class ChatWriter:
    """Turns the deltas of a chat into chunks of its answer."""

    def __init__(self, body: ChatBody, call: Call, served: Served, intake: Intake) -> None:
        self.tally = Tally((intake,))
        self._body = body
        self._call = call
        self._served = served
        self._text = by_id if body.return_tokens_as_token_ids else served.texts.token_text
        new_reader = _reader(body, served)
        self._readers = [new_reader() for _ in range(intake.request.n)]
        self._called: set[int] = set()

    def chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        """A chunk of the answer."""
        return ChatChunk(self._call.id, self._call.created, self._served.name, list(choices))

    def roles(self) -> ChatChunk:
        """The first chunk: every choice is the assistant's."""
        return self.chunk(
            *(
                ChatChunkChoice(index, ChatDelta(role="assistant", content=""))
                for index in range(len(self._readers))
            )
        )

    def write(self, delta: TextDelta) -> ChatChunk | None:
        """What a delta adds; None where it is all held back. Raises as `finish_reason`."""
        self.tally.add(0, delta)
        reason = finish_reason(delta)
        change = ChatDelta()
        for piece in self._readers[delta.index].push(delta.text, last=reason is not None):
            if isinstance(piece, CallPiece):
                self._called.add(delta.index)
                calls = [] if change.tool_calls is UNSET else change.tool_calls
                change.tool_calls = [*calls, _call_delta(piece)]
            else:
                change.content = piece if change.content is UNSET else change.content + piece
        choice = ChatChunkChoice(
            delta.index,
            change,
            finish_reason=reason,
            stop_reason=UNSET if reason is None else delta.matched,
        )
        # As OpenAI has it, a call that the client chose ends with "stop".
        if reason == "stop" and delta.index in self._called and self._body.chosen_tool is None:
            choice.finish_reason = "tool_calls"
        if self._body.logprobs and delta.logprobs:
            choice.logprobs = chat_logprobs(delta.logprobs, self._text)
        chunk = self.chunk(choice)
        if delta.prompt_logprobs is not None:
            chunk.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, self._text)
        elif reason is None and change == ChatDelta() and choice.logprobs is None:
            return None
        return chunk

    def whole(self, chunks: Sequence[ChatChunk]) -> Chat:
        """The answer that chunks amount to."""
        choices: dict[int, list[ChatChunkChoice]] = {}
        for chunk in chunks:
            for choice in chunk.choices:
                choices.setdefault(choice.index, []).append(choice)
        chat = Chat(
            self._call.id,
            self._call.created,
            self._served.name,
            [_whole(choices[index]) for index in sorted(choices)],
            self.tally.reply(),
        )
        scored = (chunk for chunk in chunks if chunk.prompt_logprobs is not UNSET)
        if (first := next(scored, None)) is not None:
            chat.prompt_logprobs = first.prompt_logprobs
        return chat


def chats(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=answers_with(Chat, streams=True))
    async def create_chat_completion(body: ChatBody, request: HttpRequest) -> Response:
        """Answer a conversation."""
        call = Call.of(request, "chatcmpl")
        served = service.models.get(body.model or "")
        intake = await _take(body, call, served)
        writer = ChatWriter(body, call, served, intake)
        if body.stream:
            events = _events(service, body, call, served, intake, writer)
            return EventStream(events, service.exchanges)
        chunks: list[ChatChunk] = []
        async with (
            service.exchanges.answering(request.receive),
            service.deltas(served, (intake,), call.caller) as deltas,
        ):
            async for _, delta in deltas:
                chunk = await _written(writer, served, delta)
                if chunk is not None:
                    chunks.append(chunk)
        return Response(msgspec.json.encode(writer.whole(chunks)), media_type="application/json")

    return router


async def _take(body: ChatBody, call: Call, served: Served) -> Intake:
    """The request of a call. Raises `InvalidRequest`."""
    faults = body.faults()
    codec = served.texts.codec
    calls_if_it_likes = body.offered_tools and body.tool_choice in (None, "auto")
    if calls_if_it_likes and codec is not None and not codec.supports_tools:
        faults.append(
            Violation(
                "tools",
                f"the chat template of {served.name} has no place for tools, so it cannot know of "
                'them: have a call made with tool_choice "required" or by name, or leave them out',
            )
        )
    if faults:
        raise InvalidRequest(*faults)
    constraint_field, constraint = body.constraint() or ("constraint", None)
    length_field, max_tokens = body.max_new_tokens
    request = Request(
        id=call.id,
        prompt=(),
        sampling=body.sampling(body.alternatives, body.prompt_logprobs),
        stopping=body.stopping(max_tokens),
        n=body.samples,
        deadline=call.deadline,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        constraint=constraint,
    )
    try:
        return await take(
            Prompt(body.conversation(), field="messages"),
            request,
            Output(skip_special_tokens=body.skips_special_tokens),
            served,
        )
    except InvalidRequest as error:
        raise body.renamed(
            error, constraint=constraint_field, max_tokens=length_field, logprobs="top_logprobs"
        ) from error


def _reader(body: ChatBody, served: Served) -> Callable[[], AnswerReader]:
    """What finds the calls in an answer."""
    if body.chosen_tool is not None:
        return partial(NamedCall, body.chosen_tool)
    if body.tool_choice == "required":
        return RequiredCalls
    codec = served.texts.codec
    markers = markers_of(codec) if codec is not None and body.offered_tools else None
    return PlainText if markers is None else partial(MarkedCalls, markers)


async def _events(
    service: Service, body: ChatBody, call: Call, served: Served, intake: Intake, writer: ChatWriter
) -> AsyncGenerator[bytes]:
    usage = None if body.includes_usage else UNSET
    begun = False
    async with service.deltas(served, (intake,), call.caller) as deltas:
        async for _, delta in deltas:
            chunk = await _written(writer, served, delta)
            if not begun:
                begun = True
                roles = writer.roles()
                roles.usage = usage
                yield event(roles)
            if chunk is not None:
                chunk.usage = writer.tally.reply() if body.counts_usage else usage
                yield event(chunk)
    if body.includes_usage:
        last = writer.chunk()
        last.usage = writer.tally.reply()
        yield event(last)
    yield DONE


async def _written(writer: ChatWriter, served: Served, delta: TextDelta) -> ChatChunk | None:
    return await served.texts.build(spelled_tokens(delta), partial(writer.write, delta))


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if not piece.id:
        return ToolCallDelta(piece.index, FunctionCall(UNSET, piece.arguments))
    function = FunctionCall(piece.name, piece.arguments)
    return ToolCallDelta(piece.index, function, piece.id, "function")


def _whole(chunks: Sequence[ChatChunkChoice]) -> ChatChoice:
    """One choice out of its chunks."""
    contents = [chunk.delta.content for chunk in chunks if chunk.delta.content is not UNSET]
    calls: dict[int, ToolCall] = {}
    for chunk in chunks:
        for delta in () if chunk.delta.tool_calls is UNSET else chunk.delta.tool_calls:
            if delta.id is not UNSET:
                calls[delta.index] = ToolCall(delta.id, delta.function)
            else:
                calls[delta.index].function.arguments += delta.function.arguments
    message = ChatMessage("".join(contents) if contents or not calls else None)
    if calls:
        message.tool_calls = [calls[index] for index in sorted(calls)]
    scored = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    return ChatChoice(
        chunks[0].index,
        message,
        ChatLogprobs(scored) if scored else None,
        chunks[-1].finish_reason,
        chunks[-1].stop_reason,
    )
