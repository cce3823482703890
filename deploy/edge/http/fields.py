"""The fields that completions and chats share, and what they mean to a request.

OpenAI's, and those that vLLM's clients add. Unknown fields are ignored, as OpenAI's server does:
clients send many. Fields that are known, not supported, and would change the answer are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from cluster import validation
from cluster.errors import InvalidRequest
from cluster.request import SamplingParams, Stopping

# The least share of the distribution that float32 can tell from none: the likeliest token.
_SMALLEST_TOP_P = 1e-6

# pydantic's own mark warns whoever reads the field.
DEPRECATED: dict[str, JsonValue] = {"deprecated": True}

T = TypeVar("T")

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Told of is the first fault alone: those of a million entries, which fit into a body, would take
# gigabytes.
Entries = Annotated[list[T], Field(fail_fast=True)]


def _few_biases(value: object) -> object:
    """pydantic counts the entries of an object when it has judged each of them."""
    if isinstance(value, dict) and len(value) > validation.MAX_LOGIT_BIAS_ENTRIES:
        raise ValueError(
            f"{len(value)} entries are more than {validation.MAX_LOGIT_BIAS_ENTRIES}: send fewer"
        )
    return value


class StreamOptions(BaseModel):
    """`continuous_usage_stats`: every chunk says how many tokens there are so far."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(strict=True, populate_by_name=True, protected_namespaces=())

    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`json_object` is any JSON object; `json_schema` is what its schema says."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """vLLM's: what the text has to be; one of them."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    schema_: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[Entries[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chats share. A field that is null counts as left out."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = Field(default=None, description="May be left out where there is only one.")
    temperature: Annotated[float, Field(ge=0, le=validation.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1, description="-1 or 0: all")] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]+$", max_length=10)],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(
                max_length=validation.MAX_LOGIT_BIAS_ENTRIES,
                json_schema_extra={"additionalProperties": False},
            ),
            BeforeValidator(_few_biases),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=validation.MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: Text | Annotated[Entries[Text], Field(max_length=validation.MAX_STOP_STRINGS)] | None = (
        None
    )
    stop_token_ids: (
        Annotated[Entries[TokenId], Field(max_length=validation.MAX_STOP_TOKENS)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=validation.MAX_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = Field(default=None, json_schema_extra=DEPRECATED)
    guided_regex: Text | None = Field(default=None, json_schema_extra=DEPRECATED)
    guided_choice: Annotated[Entries[Text], Field(min_length=1)] | None = Field(
        default=None, json_schema_extra=DEPRECATED
    )
    guided_grammar: Text | None = Field(default=None, json_schema_extra=DEPRECATED)
    user: str | None = None
    # Below: known, not supported, and refused unless they ask for nothing.
    use_beam_search: Literal[False] | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    truncate_prompt_tokens: None = None
    bad_words: Annotated[Entries[str], Field(max_length=0)] | None = None
    allowed_token_ids: Annotated[Entries[int], Field(max_length=0)] | None = None
    logits_processors: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def skips_special_tokens(self) -> bool:
        return self.skip_special_tokens is not False

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_usage(self) -> bool:
        """Whether each chunk says how much there is so far."""
        options = self.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)

    def sampling(self, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """How tokens are drawn."""
        given: dict[str, Any] = {
            name: value
            for name in (
                "temperature",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
            if (value := getattr(self, name)) is not None
        }
        if self.top_p is not None:
            given["top_p"] = max(self.top_p, _SMALLEST_TOP_P)
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.seed is not None:
            # OpenAI's are signed: two's complement makes them headwise's, one to one.
            given["seed"] = self.seed & validation.MAX_SEED
        return SamplingParams(
            **given,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def stopping(self, max_tokens: int | None) -> Stopping:
        """When a sample ends."""
        stop = self.stop
        return Stopping(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            strings=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            include_stop=bool(self.include_stop_str_in_output),
        )

    def renamed(self, error: InvalidRequest, **names: str) -> InvalidRequest:
        """The same faults under the names that fields have in this API: `names` for those of
        `cluster.request`, else without the group that they belong to in `headwise.v1`."""
        known = {
            "stopping.conditions": "stop" if self.stop else "stop_token_ids",
            "stopping.max_tokens": names.get("max_tokens", "max_tokens"),
            "output.logprobs": names.get("logprobs", "logprobs"),
            "constraint": names.get("constraint", "constraint"),
        }
        return InvalidRequest(
            *(replace(fault, field=_name(fault.field, known)) for fault in error.violations)
        )


_GROUPS = ("sampling.", "stopping.", "output.")


def _name(path: str, names: Mapping[str, str]) -> str:
    for given, name in names.items():
        if path == given or path.startswith(f"{given}["):
            return name + path[len(given) :]
        # What is inside of a renamed field has names of its own here.
        if path.startswith(f"{given}."):
            return name
    for group in _GROUPS:
        path = path.removeprefix(group)
    return path
