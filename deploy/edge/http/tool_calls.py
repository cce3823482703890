"""Calls of tools inside an answer: where a model writes them, or where a constraint has it.

A model is asked to call tools in the words of its own chat template, and answers in them. Those
that stand as JSON between two markers, `<tool_call>{"name": ..., "arguments": ...}</tool_call>`
(Hermes, Qwen and many others), are recognised by having the template render a call.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from cluster.errors import InvalidRequest
from cluster.text import TextCodec


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a call: the first of its `index` has `id` and `name`. `arguments` is JSON text."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


Piece = str | CallPiece


class AnswerReader(Protocol):
    """Parts a growing text into content and calls."""

    def push(self, text: str, *, last: bool) -> list[Piece]:
        """What `text` completes; with `last`, everything that was held back as well."""
        ...


class PlainText:
    """No calls."""

    def push(self, text: str, *, last: bool) -> list[Piece]:
        return _content(text)


class NamedCall:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def push(self, text: str, *, last: bool) -> list[Piece]:
        name, self._name = self._name, ""
        if name:
            return [CallPiece(0, text, _new_id(), name)]
        return [CallPiece(0, text)] if text else []


class RequiredCalls:
    """The whole text is a JSON array of calls. One that was cut off is content."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str, *, last: bool) -> list[Piece]:
        self._text += text
        if not last:
            return []
        calls: list[Piece] = [*_calls(self._text, 0)]
        return calls or _content(self._text)


class MarkedCalls:
    """Content, and JSON calls between markers. What is no call after all is content; white space
    around a call is neither."""

    def __init__(self, markers: Markers) -> None:
        self._markers = markers
        self._held = ""
        self._searched = 0
        self._inside = False
        self._count = 0

    def push(self, text: str, *, last: bool) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            marker = self._markers.end if self._inside else self._markers.begin
            at = self._held.find(marker, self._searched)
            if at < 0:
                # A marker may have begun at the end.
                self._searched = max(0, len(self._held) - len(marker) + 1)
                break
            head, tail = self._held[:at], self._held[at + len(marker) :]
            self._searched = 0
            pieces += self._between(head, marker) if self._inside else _content(head.rstrip())
            self._held = tail
            self._inside = not self._inside
        if last:
            if self._inside:
                pieces += self._between(self._held, "")
            elif self._held.strip() or not self._count:
                pieces += _content(self._held)
            self._held, self._searched = "", 0
        elif not self._inside:
            cut = len(self._held) - _possible_beginning(self._held, self._markers.begin)
            cut = len(self._held[:cut].rstrip())
            pieces += _content(self._held[:cut])
            self._held = self._held[cut:]
            self._searched = 0
        return pieces

    def _between(self, text: str, end: str) -> list[Piece]:
        calls = _calls(text, self._count)
        self._count += len(calls)
        return [*calls] if calls else [self._markers.begin + text + end]


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands around a call."""

    begin: str
    end: str


_known: WeakKeyDictionary[TextCodec, Markers | None] = WeakKeyDictionary()

_PROBE = "headwise_probe"
_PROBE_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00000",
            "type": "function",
            "function": {"name": _PROBE, "arguments": {"key": "value"}},
        }
    ],
}
_BEFORE = re.compile(r"(<[^<>\s]+>)\s*$")
_BEHIND = re.compile(r"\s*(</[^<>\s]+>)")


def markers_of(codec: TextCodec) -> Markers | None:
    """What the chat template writes around a call; None where that is not JSON between a pair of
    tags, or the tags are special tokens, which an answer's text is without."""
    if codec not in _known:
        _known[codec] = _probe(codec)
    return _known[codec]


def _probe(codec: TextCodec) -> Markers | None:
    try:
        ids = codec.render_chat(
            ({"role": "user", "content": "?"}, _PROBE_CALL), add_generation_prompt=False
        )
    except InvalidRequest:
        return None
    text = codec.decode(ids, skip_special_tokens=True)
    for brace in re.finditer("{", text):
        found = _first_json(text, brace.start())
        if found is not None and isinstance(found[0], dict) and found[0].get("name") == _PROBE:
            before, behind = _BEFORE.search(text[: brace.start()]), _BEHIND.match(text, found[1])
            return Markers(before[1], behind[1]) if before and behind else None
    return None


def _first_json(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _calls(text: str, count: int) -> list[CallPiece]:
    """The calls that a JSON text is, one or an array of them; none where it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [_call(entry) for entry in (value if isinstance(value, list) else [value])]
    if any(call is None for call in calls):
        return []
    return [
        CallPiece(count + position, arguments, _new_id(), name)
        for position, (name, arguments) in enumerate(call for call in calls if call is not None)
    ]


def _call(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        return entry["name"], arguments
    return entry["name"], json.dumps(arguments, ensure_ascii=False)


def _content(text: str) -> list[Piece]:
    return [text] if text else []


def _possible_beginning(text: str, marker: str) -> int:
    """Characters at the end of `text` that may become the marker."""
    return next(
        (n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])),
        0,
    )


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
