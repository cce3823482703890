"""Measures an engine in this process: TTFT, pure decode rate, and where a step's time goes.

Decode is measured apart from prefill, as llama-bench's tg and llama-batched-bench's S_TG are: over
the window in which every stream decodes, from the last stream's first token to its last.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.driver import Driver
from cluster.request import Request, SamplingParams, Stopping, TokenEvent
from cluster.stream import EventStream
from deploy.bench.suite.errors import BenchmarkError
from shards.contract import PhaseSeconds

_GREEDY = SamplingParams(temperature=0.0)
# Steps by which other streams outlive the one that is watched, beyond those that they are ahead.
_MARGIN = 8


@dataclass(frozen=True, slots=True)
class Decode:
    """`streams` sequences decoding side by side, after prompts of `prompt_tokens` each.

    `ttft_s` has each stream's seconds from when all were sent to its first token; `itl_s` the gaps
    between tokens of one stream; `window_s` is how long it decoded `tokens` tokens; `phases` are
    rank 0's seconds over that window.
    """

    streams: int
    tokens: int
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]
    window_s: float
    phases: PhaseSeconds

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return self.streams * self.tokens / self.window_s

    @property
    def step_s(self) -> float:
        return self.window_s / self.tokens

    @property
    def all_reduce_share(self) -> float:
        """Of rank 0's time, the waiting for slower ranks included."""
        return self.phases.all_reduce / self.phases.total if self.phases.total else 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that were sent at once, from the first step to the last answer."""

    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float


class Probe:
    """Sends random token ids, drawn from `seed`, to a started driver; every prompt is another, so
    that no prefix cache helps."""

    def __init__(self, driver: Driver, seed: int = 0) -> None:
        self._driver = driver
        self._rng = np.random.default_rng(seed)
        self._numbers = itertools.count()
        ends = driver.model.eos_token_ids
        self._ids = np.setdiff1d(np.arange(driver.model.vocabulary), ends)

    def prefill_s(self, tokens: int) -> float:
        """Seconds from one prompt of `tokens` tokens to the first token after it."""
        prompt = self._prompt(tokens)
        began = time.perf_counter()
        for _ in self._submit(prompt, 1):
            pass
        return time.perf_counter() - began

    def decode(self, streams: int, prompt_tokens: int, tokens: int) -> Decode:
        """Let `streams` sequences decode, until the last to start has `tokens` after its first.

        Raises `BenchmarkError` where the engine does not run so many at a time.
        """
        config = self._driver.blueprint.config
        if streams > config.max_sequences:
            raise BenchmarkError(
                f"{streams} streams, and the engine runs max_sequences={config.max_sequences} at a "
                "time: use fewer streams"
            )
        ahead = -(-streams * (prompt_tokens + 1) // config.max_step_tokens)
        prompts = [self._prompt(prompt_tokens) for _ in range(streams)]
        preempted = self._driver.load().preemptions
        began = time.perf_counter()
        opened = [self._submit(prompt, 1 + tokens + ahead + _MARGIN) for prompt in prompts]
        events = [iter(stream) for stream in opened]
        try:
            ttft_s = tuple(_arrival(each) - began for each in events)
            if self._driver.load().running < streams:
                raise self._too_small(streams)
            found = self._watch(events[-1], streams, tokens, ttft_s)
        finally:
            for stream in opened:
                stream.close()
            for each in events:
                for _ in each:
                    pass
        if self._driver.load().preemptions > preempted:
            raise self._too_small(streams)
        return found

    def batch(self, requests: int, prompt_tokens: int, tokens: int) -> Batch:
        """Send `requests` at once and read all answers, each of exactly `tokens` tokens."""
        prompts = [self._prompt(prompt_tokens) for _ in range(requests)]
        began = time.perf_counter()
        for stream in [self._submit(prompt, tokens) for prompt in prompts]:
            for _ in stream:
                pass
        seconds = time.perf_counter() - began
        return Batch(requests, requests * prompt_tokens, requests * tokens, seconds)

    def _watch(
        self, events: Iterator[TokenEvent], streams: int, tokens: int, ttft_s: tuple[float, ...]
    ) -> Decode:
        loop = self._driver.loop
        before, began = loop.seconds, time.perf_counter()
        last, gaps, seen = began, list[float](), 0
        while seen < tokens:
            event = next(events)
            now = time.perf_counter()
            # A reader that comes late finds several tokens in one event.
            gaps += [(now - last) / len(event.tokens)] * len(event.tokens)
            last, seen = now, seen + len(event.tokens)
        phases = difference(loop.seconds, before)
        return Decode(streams, seen, ttft_s, tuple(gaps), last - began, phases)

    def _too_small(self, streams: int) -> BenchmarkError:
        load = self._driver.load()
        return BenchmarkError(
            f"the KV cache holds {load.kv_blocks * load.block_size:,} tokens, too few for "
            f"{streams} streams side by side: give a larger --kv-memory, or fewer streams"
        )

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._ids[self._rng.integers(len(self._ids), size=tokens)].tolist())

    def _submit(self, prompt: tuple[int, ...], tokens: int) -> EventStream:
        stopping = Stopping(max_tokens=tokens, ignore_eos=True)
        name = f"bench-{next(self._numbers)}"
        return self._driver.submit(Request(name, prompt, _GREEDY, stopping, cache=False))


def difference(after: PhaseSeconds, before: PhaseSeconds) -> PhaseSeconds:
    """What was spent between two readings of a rank's sums."""
    names = PhaseSeconds.__struct_fields__
    return PhaseSeconds(*(getattr(after, name) - getattr(before, name) for name in names))


def _arrival(events: Iterator[TokenEvent]) -> float:
    """When the next event is there, in `time.perf_counter` seconds."""
    next(events)
    return time.perf_counter()
