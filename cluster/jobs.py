"""What the driver holds of a request: its samples, and when each of them ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

from cluster.request import (
    FinishReason,
    Request,
    SamplingParams,
    Stopping,
    Timing,
    TokenEvent,
    Usage,
)
from cluster.sequence import Sequence
from cluster.stream import EventStream
from shards.contract import Logprobs, PromptLogprobs, Sampled, Sampling

_SEEDS = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive samples get seeds far apart


def sample_seed(seed: int, index: int) -> int:
    """The seed of one of a request's samples; the first one's is the request's own."""
    return (seed + index * _GOLDEN) % _SEEDS


def to_sampling(
    params: SamplingParams,
    stopping: Stopping,
    *,
    seed: int,
    end_tokens: Iterable[int],
    prompt_length: int,
    prompt_logprobs: int | None,
) -> Sampling:
    """The rank's view of a sample's parameters."""
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=seed,
        logit_bias=params.logit_bias,
        barred=tuple(sorted(end_tokens)) if stopping.min_tokens else (),
        barred_before=prompt_length + stopping.min_tokens if stopping.min_tokens else 0,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if prompt_logprobs is None else prompt_logprobs,
    )


class Sample:
    """One continuation of a request's prompt."""

    def __init__(self, job: Job, index: int, sequence: Sequence, seed: int) -> None:
        self.job = job
        self.index = index
        self.sequence = sequence
        self.open = True
        self._seed = seed
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._prompt_logprobs: list[Logprobs | None] | None = None
        if sequence.sampling.prompt_logprobs >= 0:
            self._prompt_logprobs = [None] * sequence.prompt_length

    def note_start(self, now: float) -> bool:
        """Remember when its first plan left; True if it has, or if it never will."""
        if self.sequence.started and self._started_at is None:
            self._started_at = now
        return self.sequence.started or not self.open

    def take_prompt(self, found: PromptLogprobs) -> None:
        """Part of the prompt's log probabilities; again, with equal values, after a preemption."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs[found.start : found.start + len(found.tokens)] = found.tokens

    def take(self, sampled: Sampled, now: float) -> TokenEvent:
        """The event of a token that was just committed; the last one where it ends the sample."""
        sequence, stopping = self.sequence, self.job.request.stopping
        finish = None
        if sampled.token in self.job.end_tokens:
            finish = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.max_length:
            finish = FinishReason.LENGTH
        stopped = finish is FinishReason.STOP
        shown = not stopped or stopping.include_stop
        first = self._first_token_at is None
        if self._first_token_at is None:
            self._first_token_at = now
        event = TokenEvent(
            index=self.index,
            tokens=(sampled.token,) if shown else (),
            logprobs=(sampled.logprobs,) if shown and sampled.logprobs is not None else (),
            prompt_logprobs=self._whole_prompt_logprobs() if first else None,
            seed=self._seed,
        )
        if finish is None:
            return event
        return self._ended(event, finish, sampled.token if stopped else None, now)

    def end(self, finish: FinishReason, now: float) -> TokenEvent:
        """End it for a reason of its caller's."""
        return self._ended(TokenEvent(self.index, (), seed=self._seed), finish, None, now)

    def _ended(
        self, event: TokenEvent, finish: FinishReason, stop_token: int | None, now: float
    ) -> TokenEvent:
        self.open = False
        sequence, arrived = self.sequence, self.job.arrived
        return replace(
            event,
            finish=finish,
            stop_token=stop_token,
            usage=Usage(
                prompt_tokens=sequence.prompt_length,
                completion_tokens=len(sequence.tokens) - sequence.prompt_length,
                cached_tokens=min(sequence.cached_tokens, sequence.prompt_length),
            ),
            timing=Timing(
                queue=(self._started_at or now) - arrived,
                first_token=(self._first_token_at or now) - arrived,
                total=now - arrived,
            ),
        )

    def _whole_prompt_logprobs(self) -> tuple[Logprobs | None, ...] | None:
        return None if self._prompt_logprobs is None else tuple(self._prompt_logprobs)


class Job:
    """A request that was admitted, and where its events go."""

    def __init__(
        self,
        request: Request,
        stream: EventStream,
        *,
        eos_token_ids: Iterable[int],
        context: int,
        arrival: int,
    ) -> None:
        self.request = request
        self.stream = stream
        self.arrived = time.monotonic()
        self.end_tokens = frozenset(request.stopping.token_ids) | (
            frozenset() if request.stopping.ignore_eos else frozenset(eos_token_ids)
        )
        seed = request.sampling.seed
        seed = secrets.randbits(64) if seed is None else seed
        self.samples: list[Sample] = []
        for index in range(request.n):
            # The prompt is the same for all samples: they share the first one's blocks.
            leader = self.samples[0].sequence if self.samples else None
            sample_of = self._sample(index, sample_seed(seed, index), context, arrival, leader)
            self.samples.append(sample_of)

    @property
    def open_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.open]

    def _sample(
        self, index: int, seed: int, context: int, arrival: int, leader: Sequence | None
    ) -> Sample:
        request = self.request
        prompt_length = len(request.prompt)
        sequence = Sequence(
            request_id=request.id,
            index=index,
            tokens=[*request.prompt, *request.generated],
            prompt_length=prompt_length,
            max_length=max_length(request, context),
            sampling=to_sampling(
                request.sampling,
                request.stopping,
                seed=seed,
                end_tokens=self.end_tokens,
                prompt_length=prompt_length,
                # The prompt is the same for all samples: the first one tells of it.
                prompt_logprobs=request.sampling.prompt_logprobs if index == 0 else None,
            ),
            priority=request.priority,
            arrival=arrival,
            cache_salt=cache_salt(request),
            leader=leader,
        )
        return Sample(self, index, sequence, seed)


def cache_salt(request: Request) -> bytes:
    """Requests share cached blocks under the same salt; one that shares with nobody has its own,
    under which its samples still share."""
    if not request.cache:
        return b"request:" + request.id.encode()
    return b"salt:" + request.cache_salt.encode() if request.cache_salt else b""


def max_length(request: Request, context: int) -> int:
    """Tokens, prompt included, at which each of its samples ends for LENGTH."""
    if request.stopping.max_tokens is None:
        return context
    return min(context, len(request.prompt) + request.stopping.max_tokens)
