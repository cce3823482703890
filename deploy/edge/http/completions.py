"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from pydantic import BeforeValidator, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cluster import validation
from cluster.errors import InvalidRequest, Violation
from cluster.request import Request
from cluster.text import TextDelta
from deploy.edge.http.constraints import asked_constraint
from deploy.edge.http.fields import Entries, GenerationBody, Text, TokenId
from deploy.edge.http.logprobs import by_id, completion_logprobs, prompt_logprobs
from deploy.edge.http.openapi import answers_with
from deploy.edge.http.replies import Completion, CompletionChoice, CompletionLogprobs
from deploy.edge.http.route import JsonRoute
from deploy.edge.http.service import Call, Service, Tally, finish_reason
from deploy.edge.http.sse import DONE, EventStream, event
from deploy.edge.intake import Intake, Output, Prompt, take
from deploy.edge.models import Served
from deploy.edge.text import spelled_tokens
from shards.contract import Logprobs

_DEFAULT_MAX_TOKENS = 16
_MOST_PROMPTS = 2048

Ids = Annotated[Entries[TokenId], Field(min_length=1)]


def _few_prompts(value: object) -> object:
    """Before any of them is judged as each of the things that a prompt may be."""
    if isinstance(value, list) and len(value) > _MOST_PROMPTS and not isinstance(value[0], int):
        raise ValueError(f"{len(value)} prompts are more than {_MOST_PROMPTS}: send fewer at once")
    return value


class CompletionBody(GenerationBody):
    """One answer for every prompt and sample."""

    prompt: Annotated[
        Text
        | Annotated[Entries[Text], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Ids
        | Annotated[Entries[Ids], Field(min_length=1, max_length=_MOST_PROMPTS)],
        BeforeValidator(_few_prompts),
    ]
    max_tokens: (
        Annotated[int, Field(ge=0, le=2**31 - 1, description="0, with `echo`, scores the prompt.")]
        | None
    ) = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=validation.MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64, description="Only as many as `n`.")] | None = None
    suffix: Literal[""] | None = None


class CompletionWriter:
    """Turns the deltas of a call's requests into chunks of its answer."""

    def __init__(
        self, body: CompletionBody, call: Call, served: Served, intakes: Sequence[Intake]
    ) -> None:
        self.tally = Tally(intakes)
        self._body = body
        self._call = call
        self._served = served
        self._intakes = intakes
        # The tokens of `max_tokens` 0 are generated for the sake of the prompt, and not sent.
        self._scores_only = body.max_tokens == 0
        self._text = by_id if body.return_tokens_as_token_ids else served.texts.token_text
        # Characters of each choice's tokens so far; a choice that is not in it has not begun.
        self._offsets: dict[int, int] = {}
        # By prompt; they come with the first of its samples.
        self._scores: dict[int, Sequence[Logprobs | None]] = {}

    def completion(self, *choices: CompletionChoice) -> Completion:
        """An answer, or a chunk of one."""
        return Completion(self._call.id, self._call.created, self._served.name, list(choices))

    def chunk(self, position: int, delta: TextDelta) -> CompletionChoice:
        """What a delta of the prompt at that position adds. Raises as `finish_reason`."""
        self.tally.add(position, delta)
        intake = self._intakes[position]
        choice = CompletionChoice(
            position * intake.request.n + delta.index,
            "" if self._scores_only else delta.text,
            finish_reason=(reason := finish_reason(delta)),
            stop_reason=UNSET if reason is None else delta.matched,
        )
        first = choice.index not in self._offsets
        if first:
            self._offsets[choice.index] = 0
            choice.text = intake.echo_text + choice.text
        if delta.prompt_logprobs is not None:
            self._scores[position] = delta.prompt_logprobs
            if self._body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, self._text)
        if self._body.logprobs is not None:
            choice.logprobs = self._logprobs(choice.index, position, delta, echo=first)
        return choice

    def _logprobs(
        self, index: int, position: int, delta: TextDelta, *, echo: bool
    ) -> CompletionLogprobs:
        tokens: Sequence[int] = () if self._scores_only else delta.tokens
        entries: Sequence[Logprobs | None] = () if self._scores_only else delta.logprobs
        if echo and self._body.echo:
            tokens = (*self._intakes[position].echo_ids, *tokens)
            entries = (*self._scores.get(position, ()), *entries)
        logprobs = completion_logprobs(tokens, entries, self._text, self._offsets[index])
        self._offsets[index] += sum(map(len, logprobs.tokens))
        return logprobs


def completions(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", responses=answers_with(Completion, streams=True))
    async def create_completion(body: CompletionBody, request: HttpRequest) -> Response:
        """Continue prompts."""
        call = Call.of(request, "cmpl")
        served = service.models.get(body.model or "")
        intakes = await _take(body, call, served)
        writer = CompletionWriter(body, call, served, intakes)
        if body.stream:
            events = _events(service, body, call, served, intakes, writer)
            return EventStream(events, service.exchanges)
        choices: dict[int, list[CompletionChoice]] = {}
        async with (
            service.exchanges.answering(request.receive),
            service.deltas(served, intakes, call.caller) as deltas,
        ):
            async for position, delta in deltas:
                chunk = await _built(writer, served, position, delta)
                choices.setdefault(chunk.index, []).append(chunk)
        completion = writer.completion(*(_whole(choices[index]) for index in sorted(choices)))
        completion.usage = writer.tally.reply()
        return Response(msgspec.json.encode(completion), media_type="application/json")

    return router


async def _take(body: CompletionBody, call: Call, served: Served) -> list[Intake]:
    """The requests of a call, one for each prompt. Raises `InvalidRequest`."""
    field, constraint = asked_constraint(body) or ("constraint", None)
    faults: list[Violation] = []
    if body.best_of is not None and body.best_of != body.samples:
        faults.append(
            Violation("best_of", f"{body.best_of} of which n={body.samples} are kept: choose n")
        )
    if body.max_tokens == 0 and not body.echo:
        faults.append(
            Violation("max_tokens", "0 without echo asks for nothing: give at least 1, or set echo")
        )
    if faults:
        raise InvalidRequest(*faults)
    scored = (body.prompt_logprobs, body.logprobs if body.echo else None)
    request = Request(
        id=call.id,
        prompt=(),
        sampling=body.sampling(
            body.logprobs, max((count for count in scored if count is not None), default=None)
        ),
        stopping=body.stopping(
            _DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
        ),
        n=body.samples,
        deadline=call.deadline,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        constraint=constraint,
    )
    output = Output(skip_special_tokens=body.skips_special_tokens, echo=bool(body.echo))
    contents = _contents(body.prompt)
    intakes = []
    for position, content in enumerate(contents):
        alone = len(contents) == 1
        prompt = Prompt(
            content,
            "prompt" if alone else f"prompt[{position}]",
            add_special_tokens=body.add_special_tokens is not False,
        )
        own = request if alone else replace(request, id=f"{call.id}-{position}")
        try:
            intakes.append(await take(prompt, own, output, served))
        except InvalidRequest as error:
            raise body.renamed(error, constraint=field) from error
        # Each may have taken the loop some milliseconds; there may be thousands of them.
        await asyncio.sleep(0)
    return intakes


def _contents(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [one if isinstance(one, str) else tuple(one) for one in prompt]


async def _events(
    service: Service,
    body: CompletionBody,
    call: Call,
    served: Served,
    intakes: Sequence[Intake],
    writer: CompletionWriter,
) -> AsyncGenerator[bytes]:
    usage = None if body.includes_usage else UNSET
    async with service.deltas(served, intakes, call.caller) as deltas:
        async for position, delta in deltas:
            chunk = writer.completion(await _built(writer, served, position, delta))
            chunk.usage = writer.tally.reply() if body.counts_usage else usage
            yield event(chunk)
    if body.includes_usage:
        last = writer.completion()
        last.usage = writer.tally.reply()
        yield event(last)
    yield DONE


async def _built(
    writer: CompletionWriter, served: Served, position: int, delta: TextDelta
) -> CompletionChoice:
    return await served.texts.build(spelled_tokens(delta), partial(writer.chunk, position, delta))


def _whole(chunks: list[CompletionChoice]) -> CompletionChoice:
    """One choice out of its chunks."""
    whole = chunks[0]
    whole.text = "".join(chunk.text for chunk in chunks)
    whole.finish_reason, whole.stop_reason = chunks[-1].finish_reason, chunks[-1].stop_reason
    if whole.logprobs is not None:
        for chunk in chunks[1:]:
            if chunk.logprobs is not None:
                for name in chunk.logprobs.__struct_fields__:
                    getattr(whole.logprobs, name).extend(getattr(chunk.logprobs, name))
    return whole
