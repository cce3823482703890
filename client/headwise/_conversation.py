"""Messages, tools and what else a chat template is handed, as protobuf.

Messages, tools and calls of tools may be this package's models or dicts; a dict may have OpenAI's
shape (`{"type": "function", "function": {...}}`), since that is what people have at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from google.protobuf import json_format
from pydantic import BaseModel

from headwise._fields import Faults, check_sequence, set_field, type_name
from headwise.types import ChatMessage, Tool, ToolCall
from headwise.v1 import inference_pb2 as pb

MessageLike: TypeAlias = ChatMessage | Mapping[str, Any]
ToolLike: TypeAlias = Tool | Mapping[str, Any]


def write_conversation(
    target: pb.ChatRequest | pb.Conversation,
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[ToolLike] | None,
    template_arguments: Mapping[str, Any] | None,
    continue_final_message: bool | None,
    faults: Faults,
) -> None:
    """Raises TypeError and ValueError that name the argument."""
    check_sequence(messages, "messages", "a sequence of messages")
    for position, message in enumerate(messages):
        _write_message(target.messages.add(), message, f"messages[{position}]", faults)
    if tools is not None:
        check_sequence(tools, "tools", "a sequence of tools")
        for position, tool in enumerate(tools):
            _write_tool(target.tools.add(), tool, f"tools[{position}]", faults)
    if template_arguments is not None:
        if not isinstance(template_arguments, Mapping):
            raise TypeError(
                f"template_arguments must be a dict, not {type_name(template_arguments)}"
            )
        try:
            json_format.ParseDict(dict(template_arguments), target.template_arguments)
        except (json_format.ParseError, TypeError, ValueError) as error:
            faults.add("template_arguments", f"not values of JSON: {error}")
    if continue_final_message:
        target.turn = pb.TURN_CONTINUE


def write_schema(schema: object, argument: str, faults: Faults) -> str:
    """A JSON Schema as JSON text: of a pydantic model, a dict, or text as it is."""
    if isinstance(schema, str):
        return schema
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return json.dumps(schema.model_json_schema())
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"{argument} must be a pydantic model, a dict or JSON text, not {type_name(schema)}"
        )
    return _write_json(schema, argument, faults)


def _write_message(
    target: pb.ChatMessage, message: MessageLike, where: str, faults: Faults
) -> None:
    if isinstance(message, ChatMessage):
        fields: dict[str, Any] = {name: getattr(message, name) for name in _MESSAGE_FIELDS}
    elif isinstance(message, Mapping):
        fields = dict(message)
    else:
        raise TypeError(f"{where} must be a ChatMessage or a dict, not {type_name(message)}")
    calls = fields.pop("tool_calls", None) or ()
    if calls and fields.get("content") is None:
        fields["content"] = ""  # as OpenAI has it where an assistant does nothing but call
    given = {name: value for name, value in fields.items() if value is not None}
    if "content" in fields:
        given["content"] = fields["content"]
    _check_keys(given, where, needed=("role", "content"), allowed=("name", "tool_call_id"))
    for name, value in given.items():
        set_field(target, name, value, faults, argument=f"{where}.{name}")
    check_sequence(calls, f"{where}.tool_calls", "a sequence of calls")
    for position, call in enumerate(calls):
        _write_call(target.tool_calls.add(), call, f"{where}.tool_calls[{position}]", faults)


_MESSAGE_FIELDS = tuple(ChatMessage.model_fields)


def _write_call(target: pb.ToolCall, call: object, where: str, faults: Faults) -> None:
    fields = _function(call, where, ToolCall)
    _check_keys(fields, where, needed=("name",), allowed=("id", "arguments"))
    if isinstance(fields.get("arguments"), Mapping):
        fields["arguments"] = _write_json(fields["arguments"], f"{where}.arguments", faults)
    for name, value in fields.items():
        set_field(target, name, value, faults, argument=f"{where}.{name}")


def _write_tool(target: pb.Tool, tool: object, where: str, faults: Faults) -> None:
    fields = _function(tool, where, Tool)
    _check_keys(fields, where, needed=("name",), allowed=("description", "parameters"))
    if fields.get("parameters") is not None:
        argument = f"{where}.parameters"
        fields["parameters"] = write_schema(fields["parameters"], argument, faults)
    for name, value in fields.items():
        if value is not None:
            set_field(target, name, value, faults, argument=f"{where}.{name}")


def _function(value: object, where: str, model: type[ToolCall] | type[Tool]) -> dict[str, Any]:
    """The fields of a tool or a call, whichever shape it comes in."""
    if isinstance(value, model):
        return {name: getattr(value, name) for name in model.model_fields}
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a {model.__name__} or a dict, not {type_name(value)}")
    fields = dict(value)
    function = fields.pop("function", None)
    if isinstance(function, Mapping):
        fields.pop("type", None)
        return fields | dict(function)
    return dict(value)


def _check_keys(
    fields: Mapping[str, Any], where: str, *, needed: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    if not all(name in fields for name in needed) or fields.keys() - {*needed, *allowed}:
        must = " and ".join(map(repr, needed))
        may = ", ".join(map(repr, allowed))
        found = ", ".join(map(repr, fields)) or "nothing"
        raise ValueError(f"{where} must have {must}, and may have {may}; it has {found}")


def _write_json(value: Mapping[str, Any], argument: str, faults: Faults) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        faults.add(argument, f"not values of JSON: {error}")
        return "{}"
