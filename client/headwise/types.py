"""What the client returns: frozen pydantic models, so that `.model_dump_json()` works on each.

They are built with their ordinary constructors on the token path too: validating a delta takes
2.0 us, `model_construct` 3.4 us (pydantic 2.14).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr


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


class ToolCall(_Frozen):
    """An assistant's call of a function: `arguments` is a JSON object, as text."""

    id: str
    name: str
    arguments: str = "{}"


class Tool(_Frozen):
    """A function that the model may call.

    `parameters` is a JSON Schema of its arguments, or a pydantic model; None for no arguments.
    """

    name: str
    description: str = ""
    parameters: type[BaseModel] | dict[str, Any] | None = None


class ChatMessage(_Frozen):
    """One message of a conversation; `role` is "system", "user", "assistant" or "tool".

    `name` tells several users or tools apart. `tool_calls` are what an assistant called, and
    `tool_call_id` says which of them a tool's message answers.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


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


JsonSchema = type[BaseModel] | Mapping[str, Any] | str
"""What `json_schema=` takes: a pydantic model, or a schema as a dict or as JSON text."""


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
    _model: type[BaseModel] | None = PrivateAttr(default=None)

    @property
    def message(self) -> ChatMessage:
        """The text as the assistant's message, to be appended to the conversation."""
        return ChatMessage(role="assistant", content=self.text)

    @property
    def parsed(self) -> Any:
        """The text, which is JSON, as a value: an instance of the pydantic model that was given as
        `json_schema`, else of dicts and lists. Raises ValueError for text that is not such JSON,
        as where `max_tokens` cut it short."""
        if self._model is not None:
            return self._model.model_validate_json(self.text)
        return json.loads(self.text)

    def parsed_as(self, model: type[BaseModel]) -> Choice:
        """This choice, whose `parsed` is an instance of `model`."""
        choice = self.model_copy()
        choice._model = model
        return choice


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
    def parsed(self) -> Any:
        """The first sample's JSON as a value: see `Choice.parsed`."""
        return self.choices[0].parsed

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
    """What one shard holds: heads of the first layer, FFN channels, vocabulary rows, bytes.

    `replica` names the copy of the model that it belongs to, empty where there is one.
    """

    rank: int
    host: str
    pid: int
    heads: Range
    kv_heads: Range
    channels: Range
    vocabulary: Range
    weight_bytes: int
    kv_bytes: int
    replica: str = ""


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
    """One rank's state; `cause` is empty while READY, `replica` as in `Rank`."""

    rank: int
    host: str
    pid: int
    state: HealthState
    cause: str
    since: datetime | None
    replica: str = ""


class Health(_Frozen):
    """The state of the whole and of every rank; `epoch` counts how often the group was built."""

    state: HealthState
    cause: str
    since: datetime | None
    epoch: int
    ranks: tuple[RankHealth, ...]
