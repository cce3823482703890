"""What the driver holds of a request: its samples or hypotheses, and when each of them ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

from cluster.beams import Beam, BeamSearch, Finished
from cluster.constraints import to_grammar
from cluster.recovery import Suspicion
from cluster.request import (
    BeamParams,
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
    grammar: str = "",
) -> Sampling:
    """The rank's view of a sample's parameters, in plain numbers: a caller's may be numpy's."""
    ends = tuple(sorted(end_tokens))
    return Sampling(
        temperature=float(params.temperature),
        top_k=int(params.top_k),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        seed=int(seed),
        logit_bias=params.logit_bias,
        barred=ends if stopping.min_tokens else (),
        barred_before=prompt_length + int(stopping.min_tokens) if stopping.min_tokens else 0,
        logprobs=-1 if params.logprobs is None else int(params.logprobs),
        prompt_logprobs=-1 if prompt_logprobs is None else int(prompt_logprobs),
        grammar=grammar,
        end_tokens=ends if grammar else (),
    )


class Sample:
    """One continuation of a request's prompt, or one hypothesis of its beam search.

    Its events are for the reader while it is `shown`: of a search, the n best hypotheses.
    """

    def __init__(self, job: Job, index: int, sequence: Sequence, seed: int) -> None:
        self.job = job
        self.index = index
        self.sequence = sequence
        self.open = True
        self.shown = index < job.request.n
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

    def note_token(self, now: float) -> None:
        """Remember when its first token was known."""
        if self._first_token_at is None:
            self._first_token_at = now

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
        self.note_token(now)
        event = TokenEvent(
            index=self.index,
            tokens=(sampled.token,) if shown else (),
            logprobs=(sampled.logprobs,) if shown and sampled.logprobs is not None else (),
            prompt_logprobs=self._whole_prompt_logprobs() if first else None,
            seed=self._seed,
            queued=(self._started_at or now) - self.job.arrived if first else None,
        )
        if finish is None:
            return event
        stop_token = sampled.token if stopped else None
        return self._ended(event, finish, stop_token, self._generated, now)

    def take_found(self, found: Finished, now: float) -> TokenEvent:
        """The one event of a hypothesis: the search is over, and this is what it found."""
        shown = not found.stopped or self.job.request.stopping.include_stop
        return self._ended(
            TokenEvent(
                index=self.index,
                tokens=found.tokens if shown else found.tokens[:-1],
                seed=self._seed,
                score=found.score,
            ),
            FinishReason.STOP if found.stopped else FinishReason.LENGTH,
            found.tokens[-1] if found.stopped else None,
            len(found.tokens),
            now,
        )

    def end(self, finish: FinishReason, now: float) -> TokenEvent:
        """End it for a reason of its caller's."""
        # Nobody gets to see a hypothesis of a search that was cut short.
        generated = 0 if self.job.beam is not None else self._generated
        event = TokenEvent(self.index, (), seed=self._seed)
        return self._ended(event, finish, None, generated, now)

    @property
    def _generated(self) -> int:
        return len(self.sequence.tokens) - self.sequence.prompt_length

    def _ended(
        self,
        event: TokenEvent,
        finish: FinishReason,
        stop_token: int | None,
        generated: int,
        now: float,
    ) -> TokenEvent:
        self.open = False
        arrived = self.job.arrived
        # All hypotheses began as the first.
        first = self if self.job.beam is None else self.job.samples[0]
        return replace(
            event,
            finish=finish,
            stop_token=stop_token,
            usage=Usage(
                prompt_tokens=self.sequence.prompt_length,
                completion_tokens=generated,
                cached_tokens=min(first.sequence.cached_tokens, self.sequence.prompt_length),
            ),
            timing=Timing(
                queue=(first._started_at or now) - arrived,
                first_token=(first._first_token_at or now) - arrived,
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
        self.suspicion = Suspicion()
        self.end_tokens = frozenset(request.stopping.token_ids) | (
            frozenset() if request.stopping.ignore_eos else frozenset(eos_token_ids)
        )
        self.samples: list[Sample] = []
        self.beam: Beam | None = None
        if request.beams is None:
            self._begin_samples(context, arrival)
        else:
            self._begin_search(request.beams, context, arrival)

    @property
    def open_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.open]

    def _begin_samples(self, context: int, arrival: int) -> None:
        request = self.request
        given = request.sampling.seed
        seed = secrets.randbits(64) if given is None else int(given)
        grammar = "" if request.constraint is None else to_grammar(request.constraint)
        for index in range(request.n):
            sampling = to_sampling(
                request.sampling,
                request.stopping,
                seed=sample_seed(seed, index),
                end_tokens=self.end_tokens,
                prompt_length=len(request.prompt),
                # The prompt is the same for all samples: the first one tells of it.
                prompt_logprobs=request.sampling.prompt_logprobs if index == 0 else None,
                grammar=grammar,
            )
            sequence = self._sequence(index, sampling, context, arrival)
            if index:
                sequence.leader = self.samples[0].sequence
            self.samples.append(Sample(self, index, sequence, sampling.seed))

    def _begin_search(self, params: BeamParams, context: int, arrival: int) -> None:
        search = BeamSearch(
            params,
            self.end_tokens,
            max_tokens=max_length(self.request, context) - len(self.request.prompt),
            min_tokens=self.request.stopping.min_tokens,
        )
        # What the ranks pick is of no interest, only what they find likely.
        sampling = Sampling(temperature=0.0, logprobs=int(search.candidates))
        for index in range(params.width):
            sequence = self._sequence(index, sampling, context, arrival)
            sequence.lockstep, sequence.resting = True, index > 0
            self.samples.append(Sample(self, index, sequence, sampling.seed))
        self.beam = Beam(search, [sample.sequence for sample in self.samples])

    def _sequence(self, index: int, sampling: Sampling, context: int, arrival: int) -> Sequence:
        request = self.request
        return Sequence(
            request_id=request.id,
            index=index,
            tokens=[*request.prompt, *request.generated],
            prompt_length=len(request.prompt),
            max_length=max_length(request, context),
            sampling=sampling,
            priority=request.priority,
            arrival=arrival,
            cache_salt=cache_salt(request),
        )


def sequences_of(request: Request) -> int:
    """How many sequences a request may run at a time."""
    return request.n if request.beams is None else request.beams.width


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
