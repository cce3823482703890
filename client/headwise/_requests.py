"""From Python arguments to protobuf messages.

What a value may be is the server's to say, which names every fault at once. Here only that is
refused which no message can carry: wrong types (`TypeError`), and integers and text outside what
the field's wire type holds (`InvalidRequestError`).
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue

from headwise._conversation import MessageLike, ToolLike, write_conversation, write_schema
from headwise._fields import (
    Faults,
    check_sequence,
    extend_ids,
    set_field,
    set_given,
    type_name,
)
from headwise.options import ChatOptions, GenerateOptions, RequestOptions
from headwise.v1 import control_pb2
from headwise.v1 import inference_pb2 as pb

Prompt: TypeAlias = str | Sequence[int]

_AboutModel = TypeVar(
    "_AboutModel",
    control_pb2.GetServerInfoRequest,
    control_pb2.GetModelInfoRequest,
    control_pb2.GetLoadRequest,
    control_pb2.GetHealthRequest,
)

# Options whose name and meaning are those of a field, by the message that has it.
_REQUEST = ("request_id", "model", "n", "priority")
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos", "include_stop")
_BEAM_SEARCH = {
    "beam_width": "width",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
_LANGUAGES = ("json_schema", "regex", "lark", "choices")
_OUTPUT = ("logprobs", "prompt_logprobs", "echo", "skip_text", "skip_special_tokens")


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Raises TypeError and InvalidRequestError as this module's head says."""
    _refuse_unknown(options, GenerateOptions.__optional_keys__)
    faults = Faults()
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        set_field(request, "text", prompt, faults, argument="prompt")
    else:
        check_sequence(prompt, "prompt", "text or a sequence of token ids")
        request.token_ids.SetInParent()
        extend_ids(request.token_ids.ids, prompt, "prompt", faults)
    _apply(request, options, faults)
    given: Mapping[str, object] = {**options}
    for option, field in _BEAM_SEARCH.items():
        if given.get(option) is not None:
            request.beam_search.SetInParent()
            set_field(request.beam_search, field, given[option], faults, argument=option)
    faults.check()
    return request


def chat_request(messages: Sequence[MessageLike], options: ChatOptions) -> pb.ChatRequest:
    """Raises as `generate_request` does."""
    _refuse_unknown(options, ChatOptions.__optional_keys__)
    faults = Faults()
    request = pb.ChatRequest()
    write_conversation(
        request,
        messages,
        tools=options.get("tools"),
        template_arguments=options.get("template_arguments"),
        continue_final_message=options.get("continue_final_message"),
        faults=faults,
    )
    _apply(request, options, faults)
    faults.check()
    return request


def tokenize_request(
    prompt: str | Sequence[MessageLike],
    *,
    add_special_tokens: bool | None,
    tools: Sequence[ToolLike] | None,
    template_arguments: Mapping[str, Any] | None,
    continue_final_message: bool | None,
    model: str | None,
) -> pb.TokenizeRequest:
    """Raises as `generate_request` does."""
    faults = Faults()
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        set_field(request, "text", prompt, faults, argument="prompt")
    else:
        check_sequence(prompt, "prompt", "text or a sequence of messages")
        request.conversation.SetInParent()
        write_conversation(
            request.conversation,
            prompt,
            tools=tools,
            template_arguments=template_arguments,
            continue_final_message=continue_final_message,
            faults=faults,
        )
    set_given(request, {"add_special_tokens": add_special_tokens, "model": model}, faults)
    faults.check()
    return request


def detokenize_request(
    token_ids: Sequence[int], skip_special_tokens: bool | None, model: str | None
) -> pb.DetokenizeRequest:
    """Raises as `generate_request` does."""
    faults = Faults()
    request = pb.DetokenizeRequest()
    check_sequence(token_ids, "token_ids", "a sequence of token ids")
    extend_ids(request.token_ids, token_ids, "token_ids", faults)
    set_given(request, {"skip_special_tokens": skip_special_tokens, "model": model}, faults)
    faults.check()
    return request


def abort_request(request_id: str) -> control_pb2.AbortRequest:
    """Raises as `generate_request` does."""
    faults = Faults()
    request = control_pb2.AbortRequest()
    set_field(request, "request_id", request_id, faults)
    faults.check()
    return request


def about(kind: type[_AboutModel], model: str | None) -> _AboutModel:
    """A request of the Control service that asks about a model. Raises as `generate_request`."""
    faults = Faults()
    request = kind()
    set_given(request, {"model": model}, faults)
    faults.check()
    return request


def _apply(
    request: pb.GenerateRequest | pb.ChatRequest,
    options: RequestOptions,
    faults: Faults,
) -> None:
    given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    groups: tuple[tuple[Message, tuple[str, ...]], ...] = (
        (request, _REQUEST),
        (request.sampling, _SAMPLING),
        (request.stopping, _STOPPING),
        (request.output, _OUTPUT),
    )
    for message, names in groups:
        set_given(message, {name: given.get(name) for name in names}, faults)
    if not request.request_id:
        # Known to both sides from the start: the caller can abort and search the logs with it.
        request.request_id = uuid.uuid4().hex
    if "logit_bias" in given:
        _set_logit_bias(request.sampling, given["logit_bias"], faults)
    _add_stops(request.stopping, given.get("stop", ()), given.get("stop_token_ids", ()), faults)
    _set_constraint(request, given, faults)
    _set_prefix_cache(request, given, faults)
    if "generated" in given:
        request.generated.SetInParent()
        check_sequence(given["generated"], "generated", "a sequence of token ids")
        extend_ids(request.generated.ids, given["generated"], "generated", faults)


def _set_constraint(
    request: pb.GenerateRequest | pb.ChatRequest, given: Mapping[str, Any], faults: Faults
) -> None:
    languages = [name for name in _LANGUAGES if name in given]
    if len(languages) > 1:
        faults.add(languages[1], f"does not go with {languages[0]}: a text is held to one language")
    for language in languages[:1]:
        value = given[language]
        if language == "choices":
            check_sequence(value, "choices", "a sequence of texts")
            request.constraint.choices.SetInParent()
            for position, text in enumerate(value):
                checked = StringValue()
                set_field(checked, "value", text, faults, argument=f"choices[{position}]")
                request.constraint.choices.texts.append(checked.value)
        else:
            if language == "json_schema":
                value = write_schema(value, language, faults)
            set_field(request.constraint, language, value, faults)


def _set_prefix_cache(
    request: pb.GenerateRequest | pb.ChatRequest, given: Mapping[str, Any], faults: Faults
) -> None:
    if "cache" in given:
        if not isinstance(given["cache"], bool):
            raise TypeError(f"cache must be bool, not {type_name(given['cache'])}")
        request.prefix_cache.disabled = not given["cache"]
    if "cache_salt" in given:
        set_field(request.prefix_cache, "salt", given["cache_salt"], faults, argument="cache_salt")


def _set_logit_bias(sampling: pb.Sampling, bias: Mapping[int, float], faults: Faults) -> None:
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must map token ids to floats, not {type_name(bias)}")
    for token, value in bias.items():
        try:
            sampling.logit_bias[token] = value
        except TypeError:
            raise TypeError(
                f"logit_bias must map token ids to floats, not {token!r} to {value!r}"
            ) from None
        except (ValueError, OverflowError):
            faults.out_of_range(f"logit_bias[{token}]", token)


def _add_stops(
    stopping: pb.Stopping,
    texts: str | Sequence[str],
    token_ids: Sequence[int],
    faults: Faults,
) -> None:
    if isinstance(texts, str):
        texts = [texts]
    check_sequence(texts, "stop", "text or a sequence of texts")
    for position, text in enumerate(texts):
        condition = stopping.conditions.add()
        set_field(condition, "text", text, faults, argument=f"stop[{position}]")
    check_sequence(token_ids, "stop_token_ids", "a sequence of token ids")
    for position, token in enumerate(token_ids):
        condition = stopping.conditions.add()
        set_field(condition, "token_id", token, faults, argument=f"stop_token_ids[{position}]")


def _refuse_unknown(options: Mapping[str, object], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r}{hint}")
