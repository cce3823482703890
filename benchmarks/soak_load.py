"""Random customers of a server: each does what its seed says, and checks what it gets."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

from headwise import (
    AsyncClient,
    AsyncCompletionStream,
    Completion,
    DeadlineExceededError,
    FinishReason,
    GenerateOptions,
    HeadwiseError,
    InvalidRequestError,
    ModelInfo,
    NotFoundError,
    OverloadedError,
    ServerInfo,
)

_REFERENCES = 8
_PREFIXES = 4
# What takes longer is lost, whatever the load.
_PATIENCE_SECONDS = 300.0
_MOST_FAULTS_KEPT = 50


class Fault(Exception):
    """The server did not do what it should."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, as the SDK's `stream` takes it."""

    prompt: list[int]
    options: GenerateOptions


class Customers:
    """`done` counts what they did, `faults` says what went wrong."""

    def __init__(
        self, address: str, client: AsyncClient, model: ModelInfo, server: ServerInfo, seed: int
    ) -> None:
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self._address = address
        self._client = client
        self._model = model
        self._seed = seed
        self._numbers = count()
        # Two of the longest fill the KV cache, so that there is preemption too.
        self._longest = min(model.context, server.kv_blocks * server.block_size // 2)
        self._ids = sorted(set(range(model.vocabulary)) - set(model.eos_token_ids))
        rng = self._rng("prefixes")
        self._prefixes = [self._draw(rng, self._longest // 4) for _ in range(_PREFIXES)]
        self._references: list[tuple[Ask, Completion]] = []
        # What they do, and how often.
        self._actions: dict[Callable[[random.Random], Awaitable[None]], int] = {
            self._complete: 8,
            self._repeat: 3,
            self._cancel: 2,
            self._disconnect: 1,
            self._deadline: 2,
            self._abort: 1,
            self._bad: 2,
        }

    async def learn(self) -> None:
        """Ask some things alone, to know what they must be answered under load."""
        for number in range(_REFERENCES):
            ask = self._ask(self._rng(f"reference {number}"))
            self._references.append((ask, await self._generate(ask)))

    async def shop(self, width: int, closed: Callable[[], bool]) -> None:
        """`width` at a time until `closed()`; returns when everyone has left."""

        async def customer() -> None:
            while not closed():
                await self._act(next(self._numbers))

        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(customer())

    async def _act(self, number: int) -> None:
        rng = self._rng(str(number))
        (action,) = rng.choices(list(self._actions), list(self._actions.values()))
        name = action.__name__.strip("_")
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await action(rng)
        except OverloadedError:
            name = "refused"
        except (Fault, HeadwiseError, TimeoutError) as error:
            if len(self.faults) < _MOST_FAULTS_KEPT:
                self.faults.append(f"request {number}, {name}: {type(error).__name__}: {error}")
            name = "fault"
        self.done[name] += 1

    async def _complete(self, rng: random.Random) -> None:
        ask = self._ask(rng)
        _check(ask, await self._generate(ask))

    async def _repeat(self, rng: random.Random) -> None:
        ask, expected = rng.choice(self._references)
        found = await self._generate(ask)
        if _tokens(found) != _tokens(expected):
            raise Fault(f"{ask.options} was answered otherwise than alone")

    async def _cancel(self, rng: random.Random) -> None:
        async with self._stream(self._ask(rng)) as stream:
            await _read_some(stream, rng)
            stream.cancel()

    async def _disconnect(self, rng: random.Random) -> None:
        async with AsyncClient(self._address, retries=0) as client:
            ask = self._ask(rng)
            await _read_some(client.stream(ask.prompt, **ask.options), rng)

    async def _deadline(self, rng: random.Random) -> None:
        ask = self._ask(rng)
        ask.options["timeout"] = rng.choice((0.01, 0.1, 1.0))
        try:
            _check(ask, await self._generate(ask))
        except DeadlineExceededError:
            return

    async def _abort(self, rng: random.Random) -> None:
        async with self._stream(self._ask(rng)) as stream:
            await _read_some(stream, rng)
            found = await self._client.abort(stream.request_id)
            reasons = {choice.finish_reason for choice in (await stream.result()).choices}
        # A sample may be whole before the word arrives.
        whole = {FinishReason.LENGTH, FinishReason.STOP}
        _require(reasons <= (whole | {FinishReason.ABORTED} if found else whole), str(reasons))

    async def _bad(self, rng: random.Random) -> None:
        vocabulary, context = self._model.vocabulary, self._model.context
        ids = self._draw(rng, 5)
        bad = rng.choice(
            (
                Ask([*ids, vocabulary], {}),
                Ask(ids * context, {}),
                Ask(ids, {"max_tokens": 0}),
                Ask(ids, {"max_tokens": context}),
                Ask(ids, {"temperature": -1.0, "top_p": 0.0}),
                Ask(ids, {"stop_token_ids": [vocabulary]}),
                Ask(ids, {"logprobs": 1000}),
                Ask(ids, {"model": "no-such-model"}),
            )
        )
        try:
            await self._generate(bad)
        except (InvalidRequestError, NotFoundError):
            return
        raise Fault(f"{bad.options} was answered")

    def _ask(self, rng: random.Random) -> Ask:
        """Lengths over all magnitudes, one of many ways to sample, now and then a shared prefix."""
        prompt = self._draw(rng, _magnitude(rng, self._longest // 2))
        if rng.random() < 0.4:
            prompt = rng.choice(self._prefixes) + prompt[: self._longest // 4]
        samples = 1 if rng.random() < 0.9 else 2
        most = max(1, min(self._longest // samples - len(prompt), self._longest // 2))
        options: GenerateOptions = {
            "n": samples,
            # Short ones keep the queue moving; among long ones blocks run out.
            "max_tokens": rng.choice((_magnitude(rng, most), rng.randint(1, most))),
            "ignore_eos": rng.random() < 0.7,
            "seed": rng.randrange(2**32),
            "temperature": rng.choice((0.0, 0.5, 1.0, 1.5)),
        }
        if rng.random() < 0.3:
            options["top_k"] = rng.choice((1, 5, 40))
        if rng.random() < 0.3:
            options["top_p"] = rng.choice((0.1, 0.9, 0.99))
        if rng.random() < 0.2:
            options["min_p"] = 0.05
        if rng.random() < 0.2:
            options["repetition_penalty"], options["presence_penalty"] = 1.2, 0.5
        if rng.random() < 0.2:
            options["logit_bias"] = {token: rng.uniform(-5, 5) for token in self._draw(rng, 3)}
        if rng.random() < 0.2:
            options["stop_token_ids"] = self._draw(rng, 2)
        if rng.random() < 0.2:
            options["logprobs"] = rng.choice((0, 5))
        if rng.random() < 0.1:
            options["prompt_logprobs"] = 1
        return Ask(prompt, options)

    async def _generate(self, ask: Ask) -> Completion:
        return await self._client.generate(ask.prompt, **ask.options)

    def _stream(self, ask: Ask) -> AsyncCompletionStream:
        return self._client.stream(ask.prompt, **ask.options)

    def _draw(self, rng: random.Random, size: int) -> list[int]:
        return rng.choices(self._ids, k=size)

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self._seed} {purpose}")


def _check(ask: Ask, found: Completion) -> None:
    """Everything that was asked for is there. Raises `Fault`."""
    options = ask.options
    _require(len(found.choices) == options["n"], f"{len(found.choices)} samples for {options}")
    _require(found.usage.prompt_tokens == len(ask.prompt), f"usage {found.usage}")
    scored = len(found.prompt_logprobs)
    _require(scored == ("prompt_logprobs" in options) * len(ask.prompt), f"{scored} scored")
    for choice in found.choices:
        length, most = len(choice.token_ids), options["max_tokens"]
        whole = choice.finish_reason is FinishReason.LENGTH and length == most
        may_stop = not options["ignore_eos"] or "stop_token_ids" in options
        stopped = may_stop and choice.finish_reason is FinishReason.STOP
        _require(whole or stopped, f"{length} tokens, {choice.finish_reason}, for {options}")
        scored = len(choice.logprobs)
        _require(scored == ("logprobs" in options) * length, f"{scored} of {length} scored")


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise Fault(fault)


def _tokens(completion: Completion) -> list[tuple[int, ...]]:
    return [choice.token_ids for choice in completion.choices]


async def _read_some(stream: AsyncCompletionStream, rng: random.Random) -> None:
    left = _magnitude(rng, 32)
    async for _ in stream:
        left -= 1
        if not left:
            return


def _magnitude(rng: random.Random, most: int) -> int:
    """From 1 to `most`, every power of two as likely as the others."""
    return max(1, round(math.exp(rng.uniform(0, math.log(most)))))
