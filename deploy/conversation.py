"""A conversation on its way to a chat template, whichever API it came in by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders.

    `messages` and `tools` are as OpenAI has them, with the arguments of tool calls parsed.
    `continues`: the answer goes on with the last message, instead of beginning one.
    `begins_answer` False, without `continues`: the text ends with the last message.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    begins_answer: bool = True
