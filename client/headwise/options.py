"""What a caller may choose: settings of a client, and options of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headwise.types import JsonSchema, Tool


class TLSOptions(BaseModel):
    """How the server is recognised and how the client shows who it is.

    Each PEM is a path, or its content as bytes. Without `root_certificates` the system's are
    used. `certificate_chain` and `private_key` go together (mutual TLS). `server_name` is what the
    server's certificate says, where that is not the host of the address.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root_certificates: str | Path | bytes | None = None
    certificate_chain: str | Path | bytes | None = None
    private_key: Annotated[str | Path | bytes | None, Field(repr=False)] = None
    server_name: str | None = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("certificate_chain and private_key go together: give both or none")
        return self


class RetryPolicy(BaseModel):
    """When a call is tried again: the server is unavailable, or overloaded and says for how long.

    A call is begun at most `attempts` times. A stream that breaks after its first message is
    resumed where it was, as often as it takes, until nothing has arrived for `resume_timeout`
    seconds; `attempts` 1 or `resume_timeout` 0 switches that off.

    The pause before retry n is between half of `initial_backoff` * 2^n seconds and the whole, at
    most `max_backoff`, on top of what the server asked for. An `OverloadedError` that asks for more
    than `max_retry_after` seconds is raised at once. Nothing begins after the call's timeout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempts: Annotated[int, Field(ge=1)] = 5
    initial_backoff: Annotated[float, Field(gt=0)] = 0.1
    max_backoff: Annotated[float, Field(gt=0)] = 5.0
    max_retry_after: Annotated[float, Field(ge=0)] = 30.0
    resume_timeout: Annotated[float, Field(ge=0)] = 60.0

    @property
    def resumes(self) -> bool:
        """Whether a stream that breaks is resumed."""
        return self.attempts > 1 and self.resume_timeout > 0


DEFAULT_RETRIES = RetryPolicy()
NO_RETRIES = RetryPolicy(attempts=1)


class RequestOptions(TypedDict, total=False):
    """Options of every request. What is left out, or None, is the server's default."""

    max_tokens: int | None
    """At most this many tokens; as far as the context goes by default."""
    min_tokens: int | None
    """Nothing ends a sample before this many tokens."""
    temperature: float | None
    """0 is greedy; 1 by default."""
    top_k: int | None
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float | None
    """Keep the likeliest tokens whose probabilities reach this sum, in (0, 1]."""
    min_p: float | None
    """Drop tokens less likely than this share of the likeliest one, in [0, 1)."""
    repetition_penalty: float | None
    """Divides the logits of every token seen (multiplies the negative ones); > 0."""
    presence_penalty: float | None
    """Subtracted once from the logits of every generated token, in [-2, 2]."""
    frequency_penalty: float | None
    """Subtracted per occurrence among the generated tokens, in [-2, 2]."""
    seed: int | None
    """The same seed, prompt and options give the same tokens. Drawn by the client by default."""
    logit_bias: Mapping[int, float] | None
    """Token id -> value added to its logit, in [-100, 100]."""
    stop: str | Sequence[str] | None
    """Text that ends a sample, also across token boundaries."""
    stop_token_ids: Sequence[int] | None
    """Tokens that end a sample, besides the model's own."""
    ignore_eos: bool | None
    """Go on past the model's own end tokens."""
    include_stop: bool | None
    """Leave the matched stop token or string in the output."""
    json_schema: JsonSchema | None
    """The text is a JSON value that this JSON Schema describes: a pydantic model, or a schema as a
    dict or as JSON text. `{}` is any JSON value. `Completion.parsed` is the value."""
    regex: str | None
    """The text matches this regular expression as a whole."""
    lark: str | None
    """The text follows this context-free grammar in Lark's notation."""
    choices: Sequence[str] | None
    """The text is one of these."""
    logprobs: int | None
    """Log probabilities of each token and of this many alternatives, 0 to 20."""
    skip_text: bool | None
    """Receive token ids only."""
    skip_special_tokens: bool | None
    """Leave special tokens out of the text; True by default."""
    n: int | None
    """Number of samples; 1 by default."""
    generated: Sequence[int] | None
    """Tokens that an earlier attempt already received: only what follows them is sent. Needs
    n = 1."""
    resume: bool | None
    """Go on where it was if the stream breaks; True by default. A beam search cannot be resumed."""
    cache: bool | None
    """Take part in prefix caching; True by default."""
    cache_salt: str | None
    """Share cached prefixes only with requests that give the same salt."""
    priority: int | None
    """Among waiting requests the higher goes first; 0 by default."""
    model: str | None
    """The model's name; the one that is served by default."""
    request_id: str | None
    """Names the request for `abort` and in logs; made up by the client by default."""
    timeout: float | None
    """Seconds for the whole call, retries included; infinity for no limit. The client's by
    default."""


class ChatOptions(RequestOptions, total=False):
    """Options of `chat` and `stream_chat`."""

    tools: Sequence[Tool | Mapping[str, Any]] | None
    """Functions that the model may call, told to it by its chat template."""
    template_arguments: Mapping[str, Any] | None
    """What else the chat template is to know, such as `{"enable_thinking": False}`."""
    continue_final_message: bool | None
    """Go on with the last message, which is the assistant's, instead of beginning one."""


class GenerateOptions(RequestOptions, total=False):
    """Options of `generate` and `stream`."""

    beam_width: int | None
    """Search for the likeliest continuation with this many hypotheses, 2 to 16, instead of
    sampling one. The `n` best come whole, the best first, each with its `score`. Leave sampling
    options out."""
    length_penalty: float | None
    """With `beam_width`: a hypothesis' score is its log probability over its length to this power;
    1 by default."""
    early_stopping: bool | None
    """With `beam_width`: stop as soon as there are that many finished hypotheses."""
    prompt_logprobs: int | None
    """As `logprobs`, for the tokens of the prompt."""
    echo: bool | None
    """Begin the text and the token ids with the prompt's own."""
