"""What the edge and the driver say to each other. Plain data: no torch, no ray, no proto."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shards.contract import Logprobs, PhaseSeconds


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; defaults leave the model's distribution as it is.

    `temperature` 0 is greedy. `seed` None lets the driver draw one (reported with the result).
    `logprobs` / `prompt_logprobs`: None for none, N for the token's own and the N likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends. `max_tokens` None: as far as the context goes.

    `strings` end the text before the match unless `include_stop`; `token_ids` come on top of the
    model's own end tokens, which `ignore_eos` switches off.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Beam search of `width` hypotheses, as `transformers` defines it: a hypothesis' score is the
    sum of its log probabilities over its length to the power of `length_penalty`;
    `early_stopping` ends as soon as there are `width` finished ones."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool = False


class Language(enum.StrEnum):
    """What kind of language a constraint's texts belong to."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    CHOICES = "choices"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the generated text has to be: `source` is one schema, expression or grammar, or all the
    choices."""

    language: Language
    source: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and `n` samples of its continuation.

    `cache` False shares no KV blocks with other requests; `cache_salt` shares them only with
    requests of the same salt. `beams` turns sampling into a beam search (n is then the number of
    hypotheses to return). `generated` are tokens that an earlier attempt already delivered (n = 1
    only): generation goes on after them and only what is new is sent. `deadline` is
    `time.monotonic()` seconds.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stopping: Stopping = Stopping()
    n: int = 1
    generated: tuple[int, ...] = ()
    deadline: float | None = None
    priority: int = 0
    cache: bool = True
    cache_salt: str = ""
    beams: BeamParams | None = None
    constraint: Constraint | None = None


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ABORTED = "aborted"  # the client or an operator ended it
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one sample: waiting in the queue, prefill to the first token, and in all."""

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step brought for one sample (`index`) of a request.

    `tokens` are new, never repeated. The last event of a sample carries `finish`, `usage` and
    `timing`; a stop token is not among its `tokens` unless `include_stop`, `stop_token` names it.
    `prompt_logprobs` come once, with the first event of sample 0: None stands for the first token.
    `seed` is the one that the sample is drawn with. `queued` comes with its first tokens: the
    seconds that it waited until a step took it in. `score` comes with the end of a hypothesis of
    a beam search, whose tokens all come in that one event; the best hypothesis is sample 0.
    """

    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    seed: int | None = None
    score: float | None = None
    queued: float | None = None


class TokenStream(Protocol):
    """The events of one request, for one reader: iterate it with `async for` or `for`.

    Iteration ends after the last sample's finish; it raises `Unavailable` if the group dies.
    Events that arrive while nobody reads are merged per sample, so that what waits is bounded by
    what the request may generate. `finish_sample` ends one sample early (a stop string was seen);
    no event of it follows. `close` aborts whatever is unfinished and is idempotent.
    """

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...
    def __iter__(self) -> Iterator[TokenEvent]: ...
    def finish_sample(self, index: int) -> None: ...
    def close(self) -> None: ...


class HealthState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    NOT_READY = "not_ready"

    @property
    def computes(self) -> bool:
        """Requests are served."""
        return self in (HealthState.READY, HealthState.DEGRADED)


@dataclass(frozen=True, slots=True)
class RankHealth:
    """`since` is unix time; `cause` is empty while READY; `replica` names the copy of the model,
    where there are several."""

    rank: int
    host: str
    pid: int
    state: HealthState
    cause: str
    since: float
    replica: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    state: HealthState
    cause: str
    since: float
    epoch: int
    ranks: tuple[RankHealth, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """`kv_blocks_used` of `kv_blocks` hold live sequences. What follows `block_size` is counted
    since the start; `cached_tokens` of `prompt_tokens` were found in the KV cache. `waiting_tokens`
    have to be computed before every waiting sequence yields its next one, cache aside."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    block_size: int
    steps: int
    preemptions: int
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    waiting_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RankCounters:
    """What one rank has counted: `steps` and `seconds` since its epoch began, `expert_tokens`
    (layer -> the tokens that each of its experts was sent, on whatever rank it lies) since it
    loaded its weights. `rss` is its resident memory now, in bytes."""

    rank: int
    steps: int
    seconds: PhaseSeconds
    rss: int
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What one rank holds, for people: `heads` and `kv_heads` are of the first layer."""

    rank: int
    host: str
    pid: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    channels: tuple[int, int]
    vocabulary: tuple[int, int]
    weight_bytes: int
    kv_bytes: int
    replica: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    architecture: str
    vocabulary: int
    context: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    parameters: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    longest_prompt: int | None = None  # where a step must hold it whole; else the context bounds it


class Generator(Protocol):
    """The one interface between an edge and a driver; fakes implement it too."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def ranks(self) -> tuple[RankInfo, ...]: ...

    def submit(self, request: Request) -> TokenStream:
        """Admit a request, or raise `InvalidRequest` (it can never be served: too long for the
        context or the KV cache, a duplicate id), `Overloaded` or `Unavailable`. Never blocks."""
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request; its stream finishes with ABORTED. False if it is not known."""
        ...

    def load(self) -> Load: ...
    def health(self) -> Health: ...
