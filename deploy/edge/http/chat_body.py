"""What POST /v1/chat/completions takes, and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from cluster import validation
from cluster.errors import InvalidRequest, Violation
from cluster.request import Constraint
from deploy.conversation import Conversation
from deploy.edge.extent import MAX_MESSAGES, MAX_TOOLS
from deploy.edge.http.constraints import asked_constraint, json_constraint
from deploy.edge.http.fields import DEPRECATED, Entries, GenerationBody

# Keywords of JSON schema whose values are no schemas, and those with schemas by name.
_VERBATIM = frozenset(("const", "default", "enum", "examples"))
_BY_NAME = frozenset(
    ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
)


def _text_alone(kind: str) -> str:
    if kind != "text":
        raise ValueError(f"{kind[:32]!r} cannot be read: this server's models take text alone")
    return kind


class TextPart(BaseModel):
    """A part of a message."""

    # Another kind of part is refused by its type, not for having no text.
    model_config = ConfigDict(strict=True, json_schema_extra={"required": ["type", "text"]})

    type: Annotated[
        str, AfterValidator(_text_alone), WithJsonSchema({"type": "string", "const": "text"})
    ]
    text: str = ""


class Function(BaseModel):
    """What a model is told of a tool; `parameters` is a JSON schema."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class CalledFunction(BaseModel):
    """`arguments` is JSON text."""

    model_config = ConfigDict(strict=True)

    name: str
    arguments: str = ""


class PastCall(BaseModel):
    """A call in a message of the assistant's."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message; what else it holds is for the model's chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Entries[TextPart] | None = None
    name: str | None = None
    tool_calls: Entries[PastCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: parts of a text are its lines."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        elif self.role == "assistant":
            # Null where all it did was to call tools, of which not every template knows.
            message.setdefault("content", "")
        return message


def _few_messages(value: object) -> object:
    """Before each of them becomes an object, which takes a hundred times its bytes."""
    count = 0
    for message in value if isinstance(value, list) else ():
        count += 1
        for key in ("content", "tool_calls"):
            parts = message.get(key) if isinstance(message, dict) else None
            count += len(parts) if isinstance(parts, list) else 0
        if count > MAX_MESSAGES:
            raise ValueError(
                f"messages, their parts and their calls are more than {MAX_MESSAGES}: leave out or "
                "join the oldest ones"
            )
    return value


Messages = Annotated[Entries[Message], Field(min_length=1), BeforeValidator(_few_messages)]


class ChosenFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class ToolChoice(BaseModel):
    """The one tool to call."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: ChosenFunction


class ChatBody(GenerationBody):
    """The next message of a conversation."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        default=None, json_schema_extra=DEPRECATED
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=validation.MAX_LOGPROBS)] | None = None
    tools: Annotated[Entries[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = Field(
        default=None, description="A variable of the chat template, where it knows it."
    )
    # Known, not supported, and refused unless they ask for nothing.
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: Entries[Literal["text"]] | None = None
    audio: None = None
    chat_template: None = None
    documents: Annotated[list[Any], Field(max_length=0)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """How many at most, and the field that says so; None as far as the context goes."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log probabilities of each token; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chosen_tool(self) -> str | None:
        """The one tool that is to be called."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, ToolChoice) else None

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model is to know of."""
        return [] if self.tool_choice == "none" else (self.tools or [])

    def conversation(self) -> Conversation:
        """What the chat template renders."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
        return Conversation(
            tuple(message.plain() for message in self.messages),
            tuple(tool.model_dump(exclude_none=True) for tool in self.offered_tools),
            arguments,
            continues=bool(self.continue_final_message),
            begins_answer=self.add_generation_prompt is not False,
        )

    def faults(self) -> list[Violation]:
        """What does not go together."""
        found = []
        if self.top_logprobs is not None and not self.logprobs:
            found.append(Violation("top_logprobs", "it needs logprobs: set logprobs to true"))
        if self.continue_final_message and self.add_generation_prompt:
            found.append(
                Violation(
                    "continue_final_message",
                    "it goes on with the last message, add_generation_prompt begins a new one: set "
                    "one of them",
                )
            )
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none") and not names:
            found.append(Violation("tool_choice", "there are no tools to choose from: set tools"))
        elif self.chosen_tool is not None and self.chosen_tool not in names:
            found.append(
                Violation(
                    "tool_choice.function.name",
                    f"{self.chosen_tool[:64]!r} is none of the tools: there is {', '.join(names)}",
                )
            )
        return found

    def constraint(self) -> tuple[str, Constraint] | None:
        """What the text has to be and the field that says so: calls count as text."""
        asked = asked_constraint(self)
        schema = self._call_schema()
        if schema is None:
            return asked
        if asked is not None:
            raise InvalidRequest(
                Violation(asked[0], "the answer is to be a call by tool_choice: keep one of them")
            )
        return "tools", json_constraint(schema)

    def _call_schema(self) -> dict[str, Any] | None:
        anything: dict[str, Any] = {"type": "object"}
        functions = [tool.function for tool in self.tools or ()]
        if self.chosen_tool is not None:
            chosen = next(entry for entry in functions if entry.name == self.chosen_tool)
            return closed(chosen.parameters) if chosen.parameters else anything
        if self.tool_choice != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": closed(function.parameters) if function.parameters else anything,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
        ]
        most = {"maxItems": 1} if self.parallel_tool_calls is False else {}
        return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}


def closed(schema: Any) -> Any:
    """A tool's schema, whose objects have the properties that it lists and no others, where it does
    not say otherwise: a function takes no others, and small models do not stop inventing them."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed_inside(key, value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object":
        inner.setdefault("additionalProperties", False)
    return inner


def _closed_inside(key: str, value: Any) -> Any:
    if key in _VERBATIM:
        return value
    if key in _BY_NAME and isinstance(value, dict):
        return {name: closed(schema) for name, schema in value.items()}
    return closed(value)
