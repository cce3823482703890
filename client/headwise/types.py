"""What the client returns: frozen pydantic models, so that `.model_dump_json()` works on each.

They are built with their ordinary constructors on the token path too: validating a delta takes
2.0 us, `model_construct` 3.4 us (pydantic 2.14).
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    """An end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` were generated, or the context is full."""
    ABORTED = "aborted"
    """Someone called `abort`."""
    UNKNOWN = "unknown"
    """A reason that a newer server knows and this client does not."""


class HealthState(StrEnum):
    """State of a rank, or of all of them together."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    """Computing, but not as it should."""
    NOT_READY = "not_ready"
    UNKNOWN = "unknown"
    """A state that a newer server knows and this client does not."""


class ChatMessage(_Frozen):
    """One message of a conversation; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


class TopToken(_Frozen):
    """An alternative to a token; `logprob` is a natural logarithm."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(_Frozen):
    """One token and how likely it was, before penalties and temperature.

    `logprob` is a natural logarithm, None for the first token of a prompt. `rank` 1 is the
    likeliest token. `top` holds the likeliest ones, likeliest first.
    """

    token_id: int
    text: str
    logprob: float | None
    rank: int
    top: tuple[TopToken, ...] = ()


class Usage(_Frozen):
    """Tokens counted and seconds spent.

    `cached_tokens` of the prompt were found in the KV cache. Seconds count from the arrival of the
    request at the server: in the queue, to the first token, to the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


class Finish(_Frozen):
    """How a sample ended.

    `matched` is the stop string or the id of the stop or end token that was met, if any. `seed` is
    the one that was used: give it again to draw the same tokens. `score` is that of a hypothesis of
    a beam search.
    """

    reason: FinishReason
    matched: str | int | None
    usage: Usage
    seed: int
    score: float | None = None


class Delta(_Frozen):
    """What is new of one sample; `index` says of which.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    `logprobs` holds one entry per token id if asked for, `prompt_logprobs` one per token of the
    prompt in the first delta of sample 0. `finish` is set on the last delta of each sample.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Choice(_Frozen):
    """One sample, whole. Fields as in `Delta` and `Finish`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    matched: str | int | None
    usage: Usage
    seed: int
    score: float | None = None

    @property
    def message(self) -> ChatMessage:
        """The text as the assistant's message, to be appended to the conversation."""
        return ChatMessage(role="assistant", content=self.text)


class Completion(_Frozen):
    """The whole answer to one request: its samples, in order."""

    request_id: str
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sample."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.choices[0].finish_reason

    @property
    def message(self) -> ChatMessage:
        """The first sample as the assistant's message."""
        return self.choices[0].message

    @property
    def usage(self) -> Usage:
        """Over all samples: the prompt once, completion tokens summed, the shortest wait for the
        queue and a first token, the longest time in all."""
        usages = [choice.usage for choice in self.choices]
        return Usage(
            prompt_tokens=usages[0].prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=usages[0].cached_tokens,
            queue_seconds=min(usage.queue_seconds for usage in usages),
            first_token_seconds=min(usage.first_token_seconds for usage in usages),
            total_seconds=max(usage.total_seconds for usage in usages),
        )


class Tokenization(_Frozen):
    """Token ids of a text, and `context`, the longest sequence that the server takes."""

    token_ids: tuple[int, ...]
    context: int


class Range(_Frozen):
    """Part of a whole: [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Rank(_Frozen):
    """What one shard holds: heads of the first layer, FFN channels, vocabulary rows, bytes."""

    rank: int
    host: str
    pid: int
    heads: Range
    kv_heads: Range
    channels: Range
    vocabulary: Range
    weight_bytes: int
    kv_bytes: int


class ServerInfo(_Frozen):
    """The server, its limits and its ranks.

    `libraries` maps a name to a version. `max_sequences` may run at a time, `max_step_tokens` be
    computed in a step; the KV cache has `kv_blocks` of `block_size` tokens.
    """

    version: str
    libraries: dict[str, str]
    tensor_parallel: int
    device: str
    collective: str
    ranks: tuple[Rank, ...]
    started_at: datetime | None
    max_sequences: int
    max_step_tokens: int
    kv_blocks: int
    block_size: int


class ModelInfo(_Frozen):
    """The model that is served; `context` is the longest sequence, prompt and answer together."""

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
    has_tokenizer: bool
    has_chat_template: bool


class Load(_Frozen):
    """Sequences and KV blocks at this moment; steps, preemptions and tokens since the start.

    `cached_tokens` of `prompt_tokens` were found in the KV cache.
    """

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


class RankHealth(_Frozen):
    """One rank's state; `cause` is empty while READY."""

    rank: int
    host: str
    pid: int
    state: HealthState
    cause: str
    since: datetime | None


class Health(_Frozen):
    """The state of the whole and of every rank; `epoch` counts how often the group was built."""

    state: HealthState
    cause: str
    since: datetime | None
    epoch: int
    ranks: tuple[RankHealth, ...]
