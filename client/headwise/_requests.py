"""From Python arguments to protobuf messages.

What a value may be is the server's to say, which names every fault at once. Here only that is
refused which no message can carry: wrong types (`TypeError`), and integers and text outside what
the field's wire type holds (`InvalidRequestError`).
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from google.protobuf.message import Message

from headwise.errors import InvalidRequestError, Violation
from headwise.options import ChatOptions, GenerateOptions
from headwise.types import ChatMessage
from headwise.v1 import control_pb2
from headwise.v1 import inference_pb2 as pb

MessageLike: TypeAlias = ChatMessage | Mapping[str, str]
Prompt: TypeAlias = str | Sequence[int]

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
_OUTPUT = ("logprobs", "prompt_logprobs", "echo", "skip_text", "skip_special_tokens")

_LIMITS = {
    "uint32": (0, 2**32 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint64": (0, 2**64 - 1),
}


class _Faults:
    """Values that no message can carry, gathered so that one error names them all."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def out_of_range(self, argument: str, value: object, kind: str = "uint32") -> None:
        low, high = _LIMITS[kind]
        self._violations.append(Violation(argument, f"{value} is not in [{low}, {high}]"))

    def not_utf8(self, argument: str, error: UnicodeEncodeError) -> None:
        self._violations.append(
            Violation(argument, f"not valid Unicode: lone surrogate at {error.start}")
        )

    def check(self) -> None:
        if self._violations:
            message = "; ".join(f"{fault.field}: {fault.description}" for fault in self._violations)
            raise InvalidRequestError(message, violations=self._violations)


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Raises TypeError and InvalidRequestError as this module's head says."""
    _refuse_unknown(options, GenerateOptions.__optional_keys__)
    faults = _Faults()
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        _set(request, "text", prompt, faults, argument="prompt")
    else:
        _check_not_text(prompt, "prompt", "text or a sequence of token ids")
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, prompt, "prompt", faults)
    _apply(request, options, faults)
    given: Mapping[str, object] = {**options}
    for option, field in _BEAM_SEARCH.items():
        if given.get(option) is not None:
            request.beam_search.SetInParent()
            _set(request.beam_search, field, given[option], faults, argument=option)
    faults.check()
    return request


def chat_request(messages: Sequence[MessageLike], options: ChatOptions) -> pb.ChatRequest:
    """Raises as `generate_request` does."""
    _refuse_unknown(options, ChatOptions.__optional_keys__)
    faults = _Faults()
    request = pb.ChatRequest(messages=_messages(messages, faults))
    _apply(request, options, faults)
    faults.check()
    return request


def tokenize_request(
    prompt: str | Sequence[MessageLike], add_special_tokens: bool | None, model: str | None
) -> pb.TokenizeRequest:
    """Raises as `generate_request` does."""
    faults = _Faults()
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _set(request, "text", prompt, faults, argument="prompt")
    else:
        _check_not_text(prompt, "prompt", "text or a sequence of messages")
        request.conversation.SetInParent()
        request.conversation.messages.extend(_messages(prompt, faults))
    _set_given(request, {"add_special_tokens": add_special_tokens, "model": model}, faults)
    faults.check()
    return request


def detokenize_request(
    token_ids: Sequence[int], skip_special_tokens: bool | None, model: str | None
) -> pb.DetokenizeRequest:
    """Raises as `generate_request` does."""
    faults = _Faults()
    request = pb.DetokenizeRequest()
    _check_not_text(token_ids, "token_ids", "a sequence of token ids")
    _extend(request.token_ids, token_ids, "token_ids", faults)
    _set_given(request, {"skip_special_tokens": skip_special_tokens, "model": model}, faults)
    faults.check()
    return request


def abort_request(request_id: str) -> control_pb2.AbortRequest:
    """Raises as `generate_request` does."""
    faults = _Faults()
    request = control_pb2.AbortRequest()
    _set(request, "request_id", request_id, faults)
    faults.check()
    return request


def model_info_request(model: str | None) -> control_pb2.GetModelInfoRequest:
    """Raises as `generate_request` does."""
    faults = _Faults()
    request = control_pb2.GetModelInfoRequest()
    _set_given(request, {"model": model}, faults)
    faults.check()
    return request


def _apply(
    request: pb.GenerateRequest | pb.ChatRequest,
    options: GenerateOptions | ChatOptions,
    faults: _Faults,
) -> None:
    given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    groups: tuple[tuple[Message, tuple[str, ...]], ...] = (
        (request, _REQUEST),
        (request.sampling, _SAMPLING),
        (request.stopping, _STOPPING),
        (request.output, _OUTPUT),
    )
    for message, names in groups:
        _set_given(message, {name: given.get(name) for name in names}, faults)
    if not request.request_id:
        # Known to both sides from the start: the caller can abort and search the logs with it.
        request.request_id = uuid.uuid4().hex
    if "logit_bias" in given:
        _set_logit_bias(request.sampling, given["logit_bias"], faults)
    _add_stops(request.stopping, given.get("stop", ()), given.get("stop_token_ids", ()), faults)
    if "generated" in given:
        request.generated.SetInParent()
        _check_not_text(given["generated"], "generated", "a sequence of token ids")
        _extend(request.generated.ids, given["generated"], "generated", faults)


def _set_given(message: Message, values: Mapping[str, object], faults: _Faults) -> None:
    for field, value in values.items():
        if value is not None:
            _set(message, field, value, faults)


def _set(
    message: Message, field: str, value: object, faults: _Faults, argument: str | None = None
) -> None:
    argument = argument or field
    kind = message.DESCRIPTOR.fields_by_name[field]
    if kind.type == kind.TYPE_STRING and not isinstance(value, str):
        # protobuf would take bytes for text.
        raise TypeError(f"{argument} must be str, not {_type_name(value)}")
    try:
        setattr(message, field, value)
    except TypeError:
        expected = {kind.TYPE_FLOAT: "float", kind.TYPE_BOOL: "bool"}.get(kind.type, "int")
        raise TypeError(f"{argument} must be {expected}, not {_type_name(value)}") from None
    except UnicodeEncodeError as error:
        faults.not_utf8(argument, error)
    except (ValueError, OverflowError):
        wire = {kind.TYPE_INT32: "int32", kind.TYPE_UINT64: "uint64"}.get(kind.type, "uint32")
        faults.out_of_range(argument, value, wire)


def _extend(target: Any, ids: Iterable[int], argument: str, faults: _Faults) -> None:
    """Append token ids. A long prompt is converted in one call, and looked at singly only if that
    fails."""
    ids = list(ids)
    try:
        target.extend(ids)
    except (TypeError, ValueError, OverflowError):
        for position, token in enumerate(ids):
            try:
                pb.TokenIds(ids=[token])
            except TypeError:
                raise TypeError(
                    f"{argument}[{position}] must be a token id (int), not {_type_name(token)}"
                ) from None
            except (ValueError, OverflowError):
                faults.out_of_range(f"{argument}[{position}]", token)


def _set_logit_bias(sampling: pb.Sampling, bias: Mapping[int, float], faults: _Faults) -> None:
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must map token ids to floats, not {_type_name(bias)}")
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
    faults: _Faults,
) -> None:
    if isinstance(texts, str):
        texts = [texts]
    _check_not_text(texts, "stop", "text or a sequence of texts")
    for position, text in enumerate(texts):
        condition = stopping.conditions.add()
        _set(condition, "text", text, faults, argument=f"stop[{position}]")
    _check_not_text(token_ids, "stop_token_ids", "a sequence of token ids")
    for position, token in enumerate(token_ids):
        condition = stopping.conditions.add()
        _set(condition, "token_id", token, faults, argument=f"stop_token_ids[{position}]")


def _messages(messages: Sequence[MessageLike], faults: _Faults) -> list[pb.ChatMessage]:
    _check_not_text(messages, "messages", "a sequence of messages")
    converted = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        fields: dict[str, object]
        if isinstance(message, ChatMessage):
            fields = {"role": message.role, "content": message.content}
        elif isinstance(message, Mapping):
            fields = dict(message)
        else:
            raise TypeError(f"{where} must be a ChatMessage or a dict, not {_type_name(message)}")
        if fields.keys() != {"role", "content"}:
            found = ", ".join(map(repr, fields)) or "nothing"
            raise ValueError(f"{where} must have 'role' and 'content'; it has {found}")
        target = pb.ChatMessage()
        for name, value in fields.items():
            _set(target, name, value, faults, argument=f"{where}.{name}")
        converted.append(target)
    return converted


def _check_not_text(value: object, argument: str, expected: str) -> None:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be {expected}, not {_type_name(value)}")


def _refuse_unknown(options: Mapping[str, object], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r}{hint}")


def _type_name(value: object) -> str:
    return type(value).__name__
