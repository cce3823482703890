"""A generator and a codec without a model, behind the production interfaces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import InvalidRequest, Unavailable, Violation
from cluster.request import (
    FinishReason,
    Health,
    HealthState,
    Load,
    ModelInfo,
    RankCounters,
    RankHealth,
    RankInfo,
    Request,
    Timing,
    TokenEvent,
    Usage,
)
from shards.contract import Logprobs, PhaseSeconds

BOS, EOS = 256, 257
VOCABULARY = 258
ALPHABET = b"abcdefghijklmnopqrstuvwxyz"

MODEL = ModelInfo(
    name="fake",
    architecture="FakeForCausalLM",
    vocabulary=VOCABULARY,
    context=1 << 20,
    layers=2,
    heads=9,
    kv_heads=3,
    head_dim=8,
    width=72,
    parameters=1000,
    dtype="float32",
    eos_token_ids=(EOS,),
)
RANKS = (
    RankInfo(0, "localhost", 101, (0, 5), (0, 2), (0, 64), (0, 129), 4096, 1024),
    RankInfo(1, "localhost", 102, (5, 9), (1, 3), (64, 128), (129, 258), 4096, 1024),
)

Answer = Callable[[Request, int], Iterator[int]]


class FakeCodec:
    """Bytes are tokens; a begin token goes before text, and templates are `role: content`."""

    eos_token_ids = (EOS,)
    longest_token_bytes = 4
    supports_tools = True
    size = VOCABULARY

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([BOS] if add_special_tokens else []), *text.encode()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = {BOS: b"", EOS: b""} if skip_special_tokens else {BOS: b"<s>", EOS: b"</s>"}
        return b"".join(special.get(i, bytes([i & 255])) for i in ids).decode(errors="replace")

    def is_shown(self, token_id: int, skip_special_tokens: bool) -> bool:
        return token_id < VOCABULARY and not (skip_special_tokens and token_id in (BOS, EOS))

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        text = "".join(f"{tool['function']['name']}()\n" for tool in tools or ())
        text += "".join(
            f"{message['role']}: {message.get('content') or ''}\n" for message in messages
        )
        if continue_final_message:
            text = text.removesuffix("\n")
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))


def alphabet(request: Request, index: int) -> Iterator[int]:
    """Sample 0 answers a, b, c, ...; sample 1 b, c, d, ...; a resumed one goes on where it was."""
    position = index + len(request.generated)
    while True:
        yield ALPHABET[position % len(ALPHABET)]
        position += 1


class FakeGenerator:
    """Answers at once, one token per event; `pause` holds every stream until `resume`.

    `requests` and `closed` say what came in and what was let go of.
    """

    def __init__(self, answer: Answer = alphabet, model: ModelInfo = MODEL) -> None:
        self.model = model
        self.ranks = RANKS
        self.requests: list[Request] = []
        self.live: dict[str, FakeStream] = {}
        self.closed: list[str] = []
        self.refusal: Exception | None = None
        self.counters = tuple(
            RankCounters(info.rank, 7, PhaseSeconds(0.5, 1.0, 2.0, 0.25, 0.125, 0.0625, 4.0), 9000)
            for info in RANKS
        )
        self.events = 0
        self._answer = answer
        self._health = Health(HealthState.READY, "", 1_700_000_000.25, 1, ())
        self._changed = asyncio.Event()
        self._paused = False

    def submit(self, request: Request) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if self._health.state is HealthState.NOT_READY:
            raise Unavailable(self._health.cause)
        if request.id in self.live:
            raise InvalidRequest(Violation("request_id", f"{request.id!r} is already running"))
        self.requests.append(request)
        stream = FakeStream(self, request, self._answer)
        self.live[request.id] = stream
        self._notify()
        return stream

    async def abort(self, request_id: str) -> bool:
        stream = self.live.get(request_id)
        if stream is None:
            return False
        stream.abort()
        self._notify()
        return True

    def load(self) -> Load:
        return Load(len(self.live), 0, 64, 3, 16, 7, 1, self.events, 200, 48)

    async def rank_counters(self) -> tuple[RankCounters, ...]:
        return self.counters

    def health(self) -> Health:
        ranks = tuple(
            RankHealth(
                info.rank,
                info.host,
                info.pid,
                self._health.state,
                self._health.cause,
                self._health.since,
            )
            for info in self.ranks
        )
        return replace(self._health, ranks=ranks)

    def set_health(self, state: HealthState, cause: str = "") -> None:
        """Streams that run end with `Unavailable` once the group is NOT_READY."""
        self._health = replace(self._health, state=state, cause=cause)
        self._notify()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something of this generator is so."""
        while not condition():
            await self._changed.wait()

    def release(self, request_id: str) -> None:
        if self.live.pop(request_id, None) is not None:
            self.closed.append(request_id)
            self._notify()

    async def may_go_on(self, stream: FakeStream) -> None:
        """Returns when the stream has something to do; raises when the group has died."""
        while True:
            if self._health.state is HealthState.NOT_READY:
                raise Unavailable(self._health.cause)
            if not self._paused or stream.aborted:
                return
            deadline = stream.request.deadline
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    def emitted(self) -> None:
        self.events += 1
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class FakeStream:
    """Round robin over the samples, one token each."""

    def __init__(self, generator: FakeGenerator, request: Request, answer: Answer) -> None:
        self.request = request
        self.aborted = False
        self._generator = generator
        self._answers = {index: answer(request, index) for index in range(request.n)}
        self._counts = dict.fromkeys(self._answers, len(request.generated))

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while self._answers:
            for index in tuple(self._answers):
                await self._generator.may_go_on(self)
                # A reader of the real one waits for the driver; meanwhile the loop does the rest.
                await asyncio.sleep(0)
                if index in self._answers:
                    yield self._next(index)

    def __iter__(self) -> Iterator[TokenEvent]:
        while self._answers:
            for index in tuple(self._answers):
                if index in self._answers:
                    yield self._next(index)

    def finish_sample(self, index: int) -> None:
        self._answers.pop(index, None)
        self._release_if_done()

    def close(self) -> None:
        self._answers.clear()
        self._release_if_done()

    def abort(self) -> None:
        self.aborted = True

    def _next(self, index: int) -> TokenEvent:
        request, stopping = self.request, self.request.stopping
        first = self._counts[index] == len(request.generated)
        if self.aborted:
            return self._end(TokenEvent(index, ()), FinishReason.ABORTED)
        if request.deadline is not None and time.monotonic() >= request.deadline:
            return self._end(TokenEvent(index, ()), FinishReason.DEADLINE)
        token = next(self._answers[index])
        self._generator.emitted()
        self._counts[index] += 1
        stops = {*stopping.token_ids, *(() if stopping.ignore_eos else self._model_eos())}
        hit = token in stops
        event = TokenEvent(
            index,
            (token,) if not hit or stopping.include_stop else (),
            logprobs=self._logprobs(token) if not hit or stopping.include_stop else (),
            prompt_logprobs=self._prompt_logprobs() if first and index == 0 else None,
            queued=0.25 if first else None,
        )
        if hit:
            return self._end(replace(event, stop_token=token), FinishReason.STOP)
        length = len(request.prompt) + self._counts[index]
        if self._counts[index] == stopping.max_tokens or length == self._generator.model.context:
            return self._end(event, FinishReason.LENGTH)
        return event

    def _end(self, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        usage = Usage(len(self.request.prompt), self._counts[event.index])
        self._answers.pop(event.index)
        self._release_if_done()
        seed = self.request.sampling.seed
        return replace(
            event,
            finish=reason,
            usage=usage,
            timing=Timing(0.25, 0.5, 1.0),
            seed=42 if seed is None else seed,
        )

    def _release_if_done(self) -> None:
        if not self._answers:
            self._generator.release(self.request.id)

    def _model_eos(self) -> tuple[int, ...]:
        return self._generator.model.eos_token_ids

    def _logprobs(self, token: int) -> tuple[Logprobs, ...]:
        wanted = self.request.sampling.logprobs
        return () if wanted is None else (logprobs_of(token, wanted),)

    def _prompt_logprobs(self) -> tuple[Logprobs | None, ...] | None:
        wanted = self.request.sampling.prompt_logprobs
        if wanted is None:
            return None
        return (None, *(logprobs_of(token, wanted) for token in self.request.prompt[1:]))


def logprobs_of(token: int, alternatives: int) -> Logprobs:
    """-0.5 for the token itself, the likeliest; the next ids follow."""
    tops = tuple((token + step) % VOCABULARY for step in range(alternatives))
    return Logprobs(token, -0.5, 1, tops, tuple(-0.5 - step for step in range(alternatives)))
