"""How much a message may hold, judged before each of its entries costs Python any work.

gRPC bounds a message's bytes alone, and a million empty entries fit into few of them. What
`cluster.validation` judges later on is cheap only within these bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized

from google.protobuf import struct_pb2

from cluster.errors import InvalidRequest, Violation
from cluster.request import ModelInfo
from cluster.validation import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from headwise.v1 import inference_pb2

MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_TOOL_CALLS = 256
MAX_TEMPLATE_VALUES = 4096

# A field, what it holds, how much it may hold.
_Size = tuple[str, Sized, int]

_MAX_CONDITIONS = MAX_STOP_STRINGS + MAX_STOP_TOKENS


def check_request(
    message: inference_pb2.GenerateRequest | inference_pb2.ChatRequest, model: ModelInfo
) -> None:
    """Raise `InvalidRequest` naming every field that holds too much, or return."""
    sizes: list[_Size] = [
        ("sampling.logit_bias", message.sampling.logit_bias, MAX_LOGIT_BIAS_ENTRIES),
        ("stopping.conditions", message.stopping.conditions, _MAX_CONDITIONS),
        ("generated", message.generated.ids, model.context),
        ("constraint.choices", message.constraint.choices.texts, MAX_CHOICES),
    ]
    if isinstance(message, inference_pb2.GenerateRequest):
        sizes.append(("prompt", message.token_ids.ids, model.context))
        _raise_any(_too_many(sizes))
    else:
        _raise_any((*_too_many(sizes), *_conversation_faults(message)))


def check_conversation(message: inference_pb2.Conversation) -> None:
    """The same, of a conversation alone."""
    _raise_any(_conversation_faults(message))


def _raise_any(faults: Iterable[Violation]) -> None:
    found = tuple(faults)
    if found:
        raise InvalidRequest(*found)


def _too_many(sizes: Iterable[_Size]) -> Iterator[Violation]:
    for field, value, most in sizes:
        if len(value) > most:
            yield Violation(field, f"{len(value)} entries are more than {most}: send fewer")


def _conversation_faults(
    message: inference_pb2.ChatRequest | inference_pb2.Conversation,
) -> Iterator[Violation]:
    yield from _too_many(
        [("messages", message.messages, MAX_MESSAGES), ("tools", message.tools, MAX_TOOLS)]
    )
    for position, entry in enumerate(message.messages[:MAX_MESSAGES]):
        field = f"messages[{position}].tool_calls"
        yield from _too_many([(field, entry.tool_calls, MAX_TOOL_CALLS)])
    if _values(message.template_arguments, MAX_TEMPLATE_VALUES + 1) > MAX_TEMPLATE_VALUES:
        yield Violation(
            "template_arguments",
            f"more than {MAX_TEMPLATE_VALUES} values: leave out what the template does not use",
        )


def _values(struct: struct_pb2.Struct, most: int) -> int:
    """How many values there are in it, at any depth; stops counting at `most`."""
    count = 0
    waiting: list[Iterable[struct_pb2.Value]] = [struct.fields.values()]
    while waiting and count < most:
        for value in itertools.islice(waiting.pop(), most - count):
            count += 1
            kind = value.WhichOneof("kind")
            if kind == "struct_value":
                waiting.append(value.struct_value.fields.values())
            elif kind == "list_value":
                waiting.append(value.list_value.values)
    return count
