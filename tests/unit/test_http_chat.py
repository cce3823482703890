"""POST /v1/chat/completions: conversations, their streams, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cluster.request import Language, Request
from tests.unit.fakes import EOS, FakeCodec, FakeGenerator
from tests.unit.http_server import RunningApi, running_api, says

PATH = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CLOSED = {**SCHEMA, "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'


class HermesCodec(FakeCodec):
    """Renders calls as many templates do."""

    def render_chat(self, messages: Any, **options: Any) -> list[int]:
        shown = [
            {
                **message,
                "content": (message.get("content") or "")
                + "".join(
                    f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
                    for call in message.get("tool_calls", ())
                ),
            }
            for message in messages
        ]
        return super().render_chat(shown, **options)


def answers(text: str) -> FakeGenerator:
    """A generator whose every sample says `text`."""

    def answer(_request: Request, _index: int) -> Iterator[int]:
        return iter([*text.encode(), EOS])

    return FakeGenerator(answer)


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    async with running_api() as running:
        yield running


@pytest.fixture(autouse=True)
def _unchecked_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a model's texts can be held to them is for others to say: these are bytes."""
    monkeypatch.setattr("cluster.constraints.ConstraintChecker.check", lambda *_: None)


def prompt_of(api: RunningApi) -> str:
    """What the last request's conversation was rendered as."""
    return FakeCodec().decode(api.generator.requests[-1].prompt)


async def test_an_answer(api: RunningApi) -> None:
    answer = await api.chat("hi", max_completion_tokens=3)
    assert prompt_of(api) == "user: hi\nassistant: "
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_parts_of_text_are_lines(api: RunningApi) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await api.chat(parts, max_tokens=1)  # type: ignore[arg-type]
    assert prompt_of(api) == "user: one\ntwo\nassistant: "


async def test_max_completion_tokens_is_max_tokens_new_name(api: RunningApi) -> None:
    await api.chat("hi", max_tokens=1, max_completion_tokens=2)
    assert api.generator.requests[0].stopping.max_tokens == 2


async def test_an_answer_that_goes_on(api: RunningApi) -> None:
    messages = [*says("hi"), {"role": "assistant", "content": "we"}]
    await api.post(PATH, messages=messages, max_tokens=1, continue_final_message=True)
    assert prompt_of(api) == "user: hi\nassistant: we"


async def test_a_prompt_without_an_answers_beginning(api: RunningApi) -> None:
    await api.chat("hi", max_tokens=1, add_generation_prompt=False)
    assert prompt_of(api) == "user: hi\n"


async def test_log_probabilities(api: RunningApi) -> None:
    answer = await api.chat("hi", max_tokens=1, logprobs=True, top_logprobs=2)
    top = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert answer["choices"][0]["logprobs"] == {
        "content": [{**top, "top_logprobs": [top, {"token": "b", "logprob": -1.5, "bytes": [98]}]}]
    }


async def test_a_stream(api: RunningApi) -> None:
    options = {"include_usage": True}
    role, *chunks, usage, done = await api.events(
        PATH, messages=says("hi"), max_tokens=2, n=2, stream_options=options
    )
    deltas = [choice["delta"] for choice in role["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}] * 2
    texts = {0: "", 1: ""}
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
    assert texts == {0: "ab", 1: "bc"}
    assert usage["usage"]["completion_tokens"] == 4
    assert done == "[DONE]"


async def test_calls_between_markers() -> None:
    text = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"
    async with running_api(answers(text), HermesCodec()) as api:
        answer = await api.chat("hi", tools=[WEATHER])
        (choice,) = answer["choices"]
        assert prompt_of(api).startswith("weather()")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Ulm"}'}
    ] * 2
    assert len({call["id"] for call in calls}) == 2


async def test_calls_in_a_stream() -> None:
    async with running_api(answers(f"<tool_call>{CALL}</tool_call>"), HermesCodec()) as api:
        _role, *chunks, _done = await api.events(PATH, messages=says("hi"), tools=[WEATHER])
    calls = [
        call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert len(calls) == 1
    assert calls[0]["index"] == 0
    assert calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert all("content" not in chunk["choices"][0]["delta"] for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "text", ["<tool_call>no call</tool_call>", "a < b and <tool", "<tool_call>[1]"]
)
async def test_what_is_no_call_is_content(text: str) -> None:
    async with running_api(answers(text), HermesCodec()) as api:
        answer = await api.chat("hi", tools=[WEATHER])
        _role, *chunks, _done = await api.events(PATH, messages=says("hi"), tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text


async def test_a_template_that_renders_no_calls_leaves_the_answer_as_it_is() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    async with running_api(answers(text)) as api:
        answer = await api.chat("hi", tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"] == text


async def test_no_call_is_wanted() -> None:
    async with running_api(answers("hello"), HermesCodec()) as api:
        answer = await api.chat("hi", tools=[WEATHER], tool_choice="none")
        assert prompt_of(api) == "user: hi\nassistant: "
    assert answer["choices"][0]["message"]["content"] == "hello"


async def test_a_call_is_required() -> None:
    async with running_api(answers(f"[{CALL}]")) as api:
        answer = await api.chat("hi", tools=[WEATHER], tool_choice="required")
        constraint = api.generator.requests[0].constraint
    assert constraint is not None
    assert constraint.language is Language.JSON_SCHEMA
    (schema,) = map(json.loads, constraint.source)
    assert schema["type"] == "array"
    (call,) = schema["items"]["anyOf"]
    assert call["properties"] == {"name": {"const": "weather"}, "arguments": CLOSED}
    (choice,) = answer["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Ulm"}'
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_one_tool_is_required() -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    async with running_api(answers('{"city": "Ulm"}')) as api:
        body = {"messages": says("hi"), "tools": [WEATHER], "tool_choice": choice}
        answer = (await api.post(PATH, **body)).json()["choices"][0]
        _role, *chunks, _done = await api.events(PATH, **body)
        constraint = api.generator.requests[0].constraint
    assert constraint is not None
    assert json.loads(constraint.source[0]) == CLOSED
    call = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert answer["message"]["tool_calls"][0]["function"] == call
    assert answer["finish_reason"] == "stop"
    deltas = [chunk["choices"][0]["delta"].get("tool_calls", [{}])[0] for chunk in chunks]
    assert deltas[0]["function"]["name"] == "weather"
    arguments = [delta["function"]["arguments"] for delta in deltas if delta]
    assert "".join(arguments) == '{"city": "Ulm"}'


async def test_messages_that_tell_of_calls() -> None:
    past = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *says("hi"),
        {"role": "assistant", "content": None, "tool_calls": [past]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    async with running_api(codec=HermesCodec()) as api:
        await api.post(PATH, messages=messages, tools=[WEATHER], max_tokens=1)
        assert "<tool_call>" in prompt_of(api)
        assert "tool: rain" in prompt_of(api)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": says(5)}, "messages[0].content", "valid string"),
        (
            {"messages": says([{"type": "image_url", "image_url": {"url": "x"}}])},
            "messages[0].content[0].type",
            "'image_url' cannot be read",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs"),
        ({"max_completion_tokens": 2**30}, "max_completion_tokens", "beyond the context"),
        ({"max_tokens": 2**30}, "max_tokens", "beyond the context"),
        ({"tool_choice": "required"}, "tool_choice", "set tools"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice.function.name",
            "there is weather",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
            "keep one",
        ),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "set one",
        ),
        ({"functions": [{}]}, "functions", "at most 0"),
        ({"modalities": ["audio"]}, "modalities[0]", "'text'"),
        ({"chat_template": "x"}, "chat_template", "None"),
    ],
)
async def test_what_is_refused(
    api: RunningApi, fields: dict[str, Any], param: str, words: str
) -> None:
    response = await api.post(PATH, **{"messages": says("hi"), **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error


async def test_tools_without_a_place_in_the_template() -> None:
    codec = FakeCodec()
    codec.supports_tools = False
    async with running_api(codec=codec) as api:
        response = await api.post(PATH, messages=says("hi"), tools=[WEATHER])
    assert response.status_code == 400
    assert "no place for tools" in response.json()["error"]["message"]


async def test_a_model_without_a_chat_template() -> None:
    async with running_api(codec=FakeCodec(has_chat_template=False)) as api:
        response = await api.post(PATH, messages=says("hi"))
    assert response.json()["error"]["param"] == "messages"
    assert "no chat template" in response.json()["error"]["message"]


async def test_a_message_of_calls_alone_has_no_words() -> None:
    """Templates that know nothing of tools want a text."""
    seen: list[Any] = []

    class Seeing(FakeCodec):
        def render_chat(self, messages: Any, **options: Any) -> list[int]:
            seen.extend(messages)
            return super().render_chat(messages, **options)

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*says("x"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    async with running_api(codec=Seeing()) as api:
        response = await api.post(PATH, messages=messages, max_tokens=1)
        assert response.status_code == 200
    assert [message["content"] for message in seen] == ["x", ""]
