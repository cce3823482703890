"""The API as its clients use it: the `openai` package, and whatever its own document allows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.unit.fakes import EOS, MODEL, FakeGenerator
from tests.unit.http_server import RunningApi, running_api, says

MESSAGES = says("hi")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(autouse=True)
def _unchecked_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a model's texts can be held to them is for others to say: these are bytes."""
    monkeypatch.setattr("cluster.constraints.ConstraintChecker.check", lambda *_: None)


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    async with running_api() as running:
        yield running


def client_of(api: RunningApi) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{api.api.url}/v1", api_key="none", max_retries=0)


async def test_openai_lists_models_and_completes(api: RunningApi) -> None:
    async with client_of(api) as client:
        (model,) = [model.id async for model in client.models.list()]
        answer = await client.completions.create(model=model, prompt="x", max_tokens=3, logprobs=1)
        assert answer.choices[0].text == "abc"
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
        stream = await client.completions.create(
            model=model,
            prompt="x",
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "abc"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_openai_chats(api: RunningApi) -> None:
    async with client_of(api) as client:
        chat = client.chat.completions
        answer = await chat.create(
            model="fake", messages=MESSAGES, max_completion_tokens=2, n=2, logprobs=True
        )
        assert [choice.message.content for choice in answer.choices] == ["ab", "bc"]
        assert answer.choices[0].logprobs is not None
        stream = await chat.create(model="fake", messages=MESSAGES, max_tokens=2, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "ab"


async def test_openai_parses_structured_output() -> None:
    text = b'{"name": "Ada", "age": 36}'
    async with (
        running_api(FakeGenerator(lambda _request, _index: iter([*text, EOS]))) as api,
        client_of(api) as client,
    ):
        answer = await client.chat.completions.parse(
            model="fake", messages=MESSAGES, response_format=Person
        )
        (request,) = api.generator.requests
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    assert request.constraint is not None
    assert json.loads(request.constraint.source[0])["required"] == ["name", "age"]


async def test_openai_calls_tools() -> None:
    text = b'[{"name": "weather", "arguments": {}}]'
    async with (
        running_api(FakeGenerator(lambda _request, _index: iter([*text, EOS]))) as api,
        client_of(api) as client,
    ):
        answer = await client.chat.completions.create(
            model="fake", messages=MESSAGES, tools=[TOOL], tool_choice="required"
        )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", "{}")]


async def test_openai_raises_its_own_errors(api: RunningApi) -> None:
    async with client_of(api) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.completions.create(model="other", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="fake", prompt="x", temperature=-1)
        assert bad.value.param == "temperature"
        assert bad.value.request_id


async def test_openai_closes_a_stream(api: RunningApi) -> None:
    async with client_of(api) as client:
        stream = await client.completions.create(
            model="fake", prompt="x", max_tokens=1_000_000, stream=True
        )
        await anext(aiter(stream))
        api.generator.pause()
        await stream.close()
        await api.generator.until(lambda: not api.generator.live)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a thread of its own: schemathesis blocks its own."""
    found: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        # What has no other end comes to this one.
        model = replace(MODEL, context=64)
        async with running_api(FakeGenerator(model=model)) as api:
            found.append(api.api.url)
            started.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20)
    yield found[0]
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()


_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_document_allows_and_what_not(url: str, mode: GenerationMode) -> None:
    """No fault of the server's, and answers as declared, whatever is sent. What a schema cannot
    say (the vocabulary, the context) is refused: so not all that it allows is accepted."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=15,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=_CHECKS)

        holds()
