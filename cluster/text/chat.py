"""A model's chat templates: conversations to text, as `transformers` renders them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cluster.errors import InvalidRequest, Violation
from cluster.text.watchdog import TookTooLong, Watchdog

# What `transformers` itself says to a template; the special tokens may be replaced, as there.
_RESERVED = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "messages",
        "return_assistant_tokens_mask",
        "self",
        "tools",
    )
)
# Thousands of messages take a tenth of a second; what takes this long has no end, and has by then
# filled about half a gigabyte (one core of Zen 5).
_watchdog = Watchdog(seconds=2.0)


class ChatTemplate:
    """One template, or several by name: `tool_use` serves requests with tools, `default` the rest.

    Templates come with the model and are not trusted. `transformers` renders them in Jinja's
    immutable sandbox: they see plain data, reach no attribute of Python's machinery, change
    nothing, and a `range` has at most 100,000 items. Here rendering is bounded to 2 seconds on top.
    Not bounded is the memory of a single operation of the template's own (`"x" * 10**10`).
    """

    def __init__(
        self, template: str | Mapping[str, str], special_tokens: Mapping[str, str]
    ) -> None:
        """`special_tokens` are what a template sees as `bos_token`, `eos_token` and so on."""
        self._templates = {"default": template} if isinstance(template, str) else dict(template)
        self._special_tokens = dict(special_tokens)

    @cached_property
    def supports_tools(self) -> bool:
        """Whether there is a template for tools, or one that reads the variable `tools`."""
        return "tool_use" in self._templates or any(
            "tools" in _names(text) for text in self._templates.values()
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. See `TextCodec.render_chat`."""
        if continue_final_message and add_generation_prompt:
            raise _refused(
                "continue_final_message",
                "it goes on with the last message, add_generation_prompt begins a new one: set one "
                "of them",
            )
        arguments = _checked_arguments(arguments or {})
        template = self._choose(tools)
        conversation = [_stated(message) for message in _mappings(messages, "messages")]
        parameters = {
            "tools": list(_mappings(tools, "tools")) if tools else None,
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **self._special_tokens,
            **arguments,
        }
        parsed = _with_parsed_arguments(conversation)
        try:
            return _render(parsed, parameters)
        except InvalidRequest as refusal:
            # Some templates, DeepSeek's among them, print the JSON text of a call as it is: they
            # cannot join an object to a string.
            if parsed == conversation or not isinstance(refusal.__cause__, TypeError):
                raise
            return _render(conversation, parameters)

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise _refused(
                "messages",
                f"the model has chat templates {', '.join(sorted(self._templates))} and none of "
                "them is the default: render the conversation yourself and use Generate",
            )
        return self._templates[name]


def _render(conversation: list[dict[str, Any]], parameters: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with _watchdog.watch():
            rendered, _ = render_jinja_template(conversations=[conversation], **parameters)
        return str(rendered[0])
    except TookTooLong:
        raise _refused(
            "messages",
            f"the model's chat template took more than {_watchdog.seconds:g} s to render them: "
            "send fewer or shorter messages, or use Generate",
        ) from None
    except TemplateSyntaxError as error:
        raise _refused(
            "messages",
            f"the model's chat template has a syntax error in line {error.lineno} "
            f"({error.message}): use Generate, or serve the model with a --tokenizer whose "
            "template is right",
        ) from error
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in conversation[:8])
        raise _refused(
            "messages",
            f"the model's chat template refuses a conversation of roles {roles} ({error}): use the "
            "roles and fields it knows, in the order it wants",
        ) from error
    # A template is foreign code: it may fail with anything.
    except Exception as error:
        raise _refused(
            "messages",
            f"the model's chat template cannot render them ({type(error).__name__}: {error}): use "
            "the fields it knows, of the types it wants",
        ) from error


def _mappings(values: Sequence[Mapping[str, Any]], field: str) -> Iterator[Mapping[str, Any]]:
    for position, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise _refused(
                f"{field}[{position}]", f"it is {type(value).__name__}: an object is needed"
            )
        yield value


def _stated(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that are None, which templates would print, as `transformers` does."""
    return {key: value for key, value in message.items() if value is not None}


def _with_parsed_arguments(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, the form that templates are written for: in
    OpenAI's messages they are JSON text. Text that is no JSON object stays."""
    return [
        message | {"tool_calls": [_parsed(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), Sequence) and not isinstance(calls, str)
        else message
        for message in conversation
    ]


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if function is None or not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text)
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _checked_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in arguments:
        if not isinstance(name, str) or name in _RESERVED:
            raise _refused(
                f"template_arguments.{name}",
                "it is set by the request's other fields: leave it out",
            )
    return arguments


def _names(template: str) -> set[str]:
    """The names that a template's expressions use; none where it is no Jinja at all."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = list(Environment().lex(template))
    except TemplateSyntaxError:
        return set()
    return {value for _, kind, value in tokens if kind == "name"}


def _refused(field: str, description: str) -> InvalidRequest:
    return InvalidRequest(Violation(field, description))
