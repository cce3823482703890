"""Every error is OpenAI's object with a status that says what to do, on streams as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import NoToken, Overloaded, Unavailable
from cluster.request import HealthState
from tests.unit.fakes import MODEL, FakeGenerator
from tests.unit.http_server import RunningApi, read_events, running_api, says

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    async with running_api() as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there(
    api: RunningApi, method: str, path: str, status: int, code: str
) -> None:
    response = await api.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{", JSON, 400, "not JSON"),
        (b'{"prompt": NaN}', JSON, 400, "not JSON"),
        (b'{"prompt": "x", "top_p": 1e999}', JSON, 400, "out of range"),
        (b'{"prompt": "x", "max_tokens": 2.0}', JSON, 200, '"ab"'),
        (b'{"prompt": "x", "max_tokens": 2.5}', JSON, 400, "integer"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "not JSON"),
        (b"\xff", JSON, 400, "not JSON"),
        (b"[" * 100_000, JSON, 400, "not JSON"),
        (b"[]", JSON, 400, "dictionary"),
        (b"", JSON, 400, "required"),
        (b'{"prompt": "x"}', {}, 415, "send JSON"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415, "'text/plain'"),
        (b'{"prompt": "x", "max_tokens": 1}', {"content-type": "application/x+json"}, 200, ""),
        (b'{"prompt": "x"}', {**JSON, "content-encoding": "gzip"}, 415, "'gzip'"),
    ],
)
async def test_bodies(
    api: RunningApi, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    response = await api.http.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code == status
    assert words in response.text


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(chunked: bool) -> None:
    content = b'{"prompt": "' + b"x" * 200_000 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    async with running_api(max_message_bytes=1 << 16) as api:
        response = await api.http.post(
            COMPLETIONS, content=pieces() if chunked else content, headers=JSON
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "65536" in response.json()["error"]["message"]
        # What was given back is there for the next ones.
        for _ in range(20):
            await api.complete(prompt="x" * 60_000, max_tokens=1)


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "headers"),
    [
        (Overloaded("busy", 2.0), 429, "rate_limit_error", {"retry-after": "2"}),
        (Unavailable("rank 1 died"), 503, "service_unavailable_error", {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(
    api: RunningApi,
    refusal: Exception,
    status: int,
    kind: str,
    headers: dict[str, str],
    stream: bool,
) -> None:
    api.generator.refusal = refusal
    response = await api.post(COMPLETIONS, prompt="x", stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert response.json()["error"]["message"] == str(refusal)
    assert {name: response.headers[name] for name in headers} == headers


async def test_what_nobody_expected_is_not_told(api: RunningApi) -> None:
    api.generator.refusal = RuntimeError("the password is 1234")
    response = await api.post(CHATS, messages=says("x"))
    assert response.status_code == 500
    assert "1234" not in response.text
    assert response.json()["error"]["message"].startswith("internal error ")


def dies_after_two(error: Exception) -> FakeGenerator:
    def answer(_request: Any, _index: int) -> Any:
        yield from b"ab"
        raise error

    return FakeGenerator(answer)


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(path: str) -> None:
    async with running_api(dies_after_two(Unavailable("rank 1 died"))) as api:
        prompt = {"prompt": "x"} if path == COMPLETIONS else {"messages": says("x")}
        *before, last = await api.events(path, **prompt)
    assert before
    assert last["error"]["message"] == "rank 1 died"
    assert last["error"]["code"] == "service_unavailable"


async def test_an_error_of_one_prompt_ends_the_others() -> None:
    async with running_api(dies_after_two(NoToken("no token"))) as api:
        response = await api.post(COMPLETIONS, prompt=["x", "y", "z"])
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "no token"
        assert not api.generator.live


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline(api: RunningApi, stream: bool) -> None:
    api.generator.pause()
    response = await api.http.post(
        COMPLETIONS,
        json={"prompt": "x", "stream": stream},
        headers={"x-request-timeout-ms": "20"},
    )
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


async def test_a_deadline_that_is_none(api: RunningApi) -> None:
    response = await api.http.post(
        COMPLETIONS, json={"prompt": "x"}, headers={"x-request-timeout-ms": "soon"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout-ms"


async def test_a_request_that_an_operator_ends(api: RunningApi) -> None:
    api.generator.pause()
    call = asyncio.create_task(api.post(COMPLETIONS, prompt="x"))
    await api.generator.until(lambda: bool(api.generator.live))
    (request_id,) = api.generator.live
    await api.generator.abort(request_id)
    response = await call
    assert response.status_code == 499
    assert "operator" in response.json()["error"]["message"]


async def test_health_names_every_rank_and_its_cause(api: RunningApi) -> None:
    assert (await api.http.get("/health")).status_code == 200
    assert (await api.http.get("/ready")).json() == {"ready": True, "cause": ""}
    api.generator.set_health(HealthState.NOT_READY, "rank 1 died")
    response = await api.http.get("/health")
    assert response.status_code == 503
    (model,) = response.json()["models"]
    assert [(rank["rank"], rank["state"], rank["cause"]) for rank in model["ranks"]] == [
        (0, "not_ready", "rank 1 died"),
        (1, "not_ready", "rank 1 died"),
    ]
    assert (await api.http.get("/ready")).status_code == 503
    assert (await api.http.get("/version")).status_code == 200


async def test_models(api: RunningApi) -> None:
    (model,) = (await api.http.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 1 << 20)
    assert (await api.http.get("/v1/models/fake")).json() == model


async def test_metrics_are_those_of_the_exposition(api: RunningApi) -> None:
    assert (await api.http.get("/metrics")).status_code == 404

    async def exposition(accept: str) -> tuple[bytes, str]:
        return f"# {accept}\n".encode(), "text/plain; version=0.0.4"

    async with running_api(exposition=exposition) as other:
        response = await other.http.get("/metrics", headers={"accept": "text/plain"})
    assert response.text == "# text/plain\n"
    assert response.headers["content-type"] == "text/plain; version=0.0.4"


async def test_tokens(api: RunningApi) -> None:
    reply = (await api.post("/tokenize", prompt="hi", return_token_strs=True)).json()
    assert reply == {
        "count": 3,
        "max_model_len": 1 << 20,
        "tokens": [256, 104, 105],
        "token_strs": ["<s>", "h", "i"],
    }
    reply = (await api.post("/tokenize", prompt="hi", add_special_tokens=False)).json()
    assert reply["tokens"] == [104, 105]
    reply = (await api.post("/detokenize", tokens=[256, 104, 105])).json()
    assert reply == {"prompt": "<s>hi"}


async def test_tokens_of_a_conversation(api: RunningApi) -> None:
    reply = (await api.post("/tokenize", messages=says("hi"), add_generation_prompt=False)).json()
    text = (await api.post("/detokenize", tokens=reply["tokens"][1:])).json()["prompt"]
    assert text == "user: hi\n"


async def test_a_model_without_a_tokenizer() -> None:
    async with running_api(tokenizer=False) as api:
        answer = await api.complete(prompt=[1, 2], max_tokens=2)
        assert answer["choices"][0]["text"] == ""
        assert answer["usage"]["completion_tokens"] == 2
        for path, body in (("/tokenize", {"prompt": "x"}), (COMPLETIONS, {"prompt": "x"})):
            response = await api.post(path, **body)
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]


async def test_every_answer_has_a_request_id(api: RunningApi) -> None:
    response = await api.http.get("/version", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    for insane in ("with space", "x" * 129):
        response = await api.http.get("/nowhere", headers={"x-request-id": insane})
        assert len(response.headers["x-request-id"]) == 32


async def test_the_document_names_every_endpoint_and_its_errors(api: RunningApi) -> None:
    document = (await api.http.get("/openapi.json")).json()
    assert {COMPLETIONS, CHATS, "/tokenize", "/health"} < document["paths"].keys()
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    assert (await api.http.get("/docs")).status_code == 200


async def test_the_first_event_is_not_waited_for_in_vain(api: RunningApi) -> None:
    """A stream whose model dies before the first token has a status of its own."""
    api.generator.pause()
    call = asyncio.create_task(api.post(CHATS, messages=says("x"), stream=True))
    await api.generator.until(lambda: bool(api.generator.live))
    api.generator.set_health(HealthState.NOT_READY, "rank 0 died")
    response = await call
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "rank 0 died"


async def test_a_stream_is_sent_as_it_comes(api: RunningApi) -> None:
    async with api.http.stream(
        "POST", COMPLETIONS, json={"prompt": "x", "stream": True, "max_tokens": 1000}
    ) as response:
        events = read_events(response)
        first = await anext(events)
        api.generator.pause()
        assert first["choices"][0]["text"] == "a"
        api.generator.resume()
        assert [event async for event in events][-1] == "[DONE]"


@pytest.mark.parametrize(
    ("path", "content", "param", "words"),
    [
        (COMPLETIONS, b'{"prompt": [' + b"{}," * 1_300_000 + b"{}]}", "prompt", "2048"),
        (COMPLETIONS, b'{"prompt": [0' + b",{}" * 1_300_000 + b"]}", "prompt[0]", "string"),
        (COMPLETIONS, b'{"prompt": "x", "stop": [' + b"0," * 1_900_000 + b"0]}", "stop[0]", ""),
        (CHATS, b'{"messages": [' + b"{}," * 1_300_000 + b"{}]}", "messages", "4096"),
        (
            CHATS,
            b'{"messages": [{"role": "user", "content": [' + b"{}," * 1_300_000 + b"{}]}]}",
            "messages",
            "4096",
        ),
        ("/detokenize", b'{"tokens": [' + b"{}," * 1_300_000 + b"{}]}", "tokens[0]", "integer"),
    ],
)
async def test_a_million_faults_are_not_listed(
    api: RunningApi, path: str, content: bytes, param: str, words: str
) -> None:
    response = await api.http.post(path, content=content, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert len(response.content) < 1000


async def test_too_many_biases_are_counted_alone(api: RunningApi) -> None:
    response = await api.post(COMPLETIONS, prompt="x", logit_bias={f"{i}": "" for i in range(2000)})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("logit_bias: 2000 entries are more than")


async def test_what_an_error_quotes_is_short(api: RunningApi) -> None:
    response = await api.post(COMPLETIONS, prompt="x", model="m" * 100_000)
    assert response.status_code == 404
    assert len(response.content) < 5000
    response = await api.post(COMPLETIONS, prompt="x", logit_bias={"k" * 100_000: 1})
    assert response.status_code == 400
    assert len(response.content) < 5000


async def test_what_is_nested_too_deeply(api: RunningApi) -> None:
    schema = b'{"items": ' * 900 + b"{}" + b"}" * 900
    content = (
        b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required", "tools": '
        b'[{"type": "function", "function": {"name": "f", "parameters": ' + schema + b"}}]}"
    )
    response = await api.http.post(CHATS, content=content, headers=JSON)
    assert response.status_code == 400
    assert "nested too deeply" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [{"prompt": [1] * 64}, {"prompt": "x" * 1000}, {"prompt": [1], "max_tokens": 64}]
)
async def test_what_the_context_does_not_hold_has_a_code_of_its_own(body: dict[str, Any]) -> None:
    async with running_api(FakeGenerator(model=replace(MODEL, context=64))) as api:
        error = (await api.post(COMPLETIONS, **body)).json()["error"]
    assert error["code"] == "context_length_exceeded"
