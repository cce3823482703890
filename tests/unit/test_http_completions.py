"""POST /v1/completions: what OpenAI's and vLLM's fields do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.request import Constraint, Language
from tests.unit.fakes import BOS, EOS, FakeGenerator
from tests.unit.http_server import RunningApi, ok, running_api

PATH = "/v1/completions"


@pytest.fixture
async def api() -> AsyncIterator[RunningApi]:
    async with running_api() as running:
        yield running


async def test_an_answer(api: RunningApi) -> None:
    answer = await api.complete(model="fake", prompt="xy")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "abcdefghijklmnop",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 16,
        "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [(BOS, 97, 98)]),
        (["ab", "c"], [(BOS, 97, 98), (BOS, 99)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_forms_of_a_prompt(
    api: RunningApi, prompt: Any, prompts: list[tuple[int, ...]]
) -> None:
    answer = await api.complete(prompt=prompt, max_tokens=1)
    assert sorted(request.prompt for request in api.generator.requests) == sorted(prompts)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_samples_of_several_prompts_are_numbered_through(api: RunningApi) -> None:
    answer = await api.complete(prompt=["x", "y"], n=2, max_tokens=2)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "ab"), (1, "bc"), (2, "ab"), (3, "bc")]
    assert answer["usage"]["completion_tokens"] == 8


async def test_more_prompts_than_the_model_has_places_for(api: RunningApi) -> None:
    answer = await api.complete(prompt=["x"] * 100, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == ["ab"] * 100


async def test_fields_reach_the_request(api: RunningApi) -> None:
    await api.complete(
        prompt="x",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        repetition_penalty=1.1,
        logit_bias={"97": -100},
        seed=5,
        stop=["yes", "no"],
        stop_token_ids=[4],
        max_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        include_stop_str_in_output=True,
        priority=3,
        cache_salt="mine",
        user="ignored",
        metadata={"unknown": "ignored"},
    )
    (request,) = api.generator.requests
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        *(0.5, 0.9, 7, 0.1),
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.1)
    assert (sampling.repetition_penalty, sampling.logit_bias, sampling.seed) == (1.1, {97: -100}, 5)
    assert (stopping.strings, stopping.token_ids) == (("yes", "no"), (4,))
    assert (stopping.max_tokens, stopping.min_tokens) == (9, 2)
    assert stopping.ignore_eos
    assert stopping.include_stop
    assert (request.priority, request.cache_salt) == (3, "mine")


@pytest.mark.parametrize(
    ("given", "seed"), [(-1, 2**64 - 1), (-(2**63), 2**63), (2**64 - 1, 2**64 - 1)]
)
async def test_seeds_may_be_signed(api: RunningApi, given: int, seed: int) -> None:
    await api.complete(prompt="x", seed=given)
    assert api.generator.requests[0].sampling.seed == seed


async def test_values_that_mean_none(api: RunningApi) -> None:
    await api.complete(prompt="x", top_k=-1, top_p=0, temperature=None, stop=None, n=None)
    sampling = api.generator.requests[0].sampling
    assert sampling.top_k == 0
    assert 0 < sampling.top_p < 1e-5
    assert sampling.temperature == 1


async def test_echo_with_log_probabilities(api: RunningApi) -> None:
    answer = await api.complete(prompt="xy", max_tokens=2, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "xyab"
    assert choice["logprobs"] == {
        "tokens": ["<s>", "x", "y", "a", "b"],
        "text_offset": [0, 3, 4, 5, 6],
        "token_logprobs": [None, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"x": -0.5}, {"y": -0.5}, {"a": -0.5}, {"b": -0.5}],
    }


async def test_each_sample_echoes_the_prompts_scores(api: RunningApi) -> None:
    answer = await api.complete(prompt="x", max_tokens=1, echo=True, logprobs=0, n=2)
    tokens = [choice["logprobs"]["tokens"] for choice in answer["choices"]]
    assert tokens == [["<s>", "x", "a"], ["<s>", "x", "b"]]


async def test_no_tokens_but_the_prompts_scores(api: RunningApi) -> None:
    answer = await api.complete(prompt=[97, 98], max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]


async def test_prompt_log_probabilities_by_id(api: RunningApi) -> None:
    answer = await api.complete(prompt=[97, 98], max_tokens=1, prompt_logprobs=1)
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}


async def test_tokens_by_their_ids(api: RunningApi) -> None:
    answer = await api.complete(
        prompt="x", max_tokens=1, logprobs=1, return_tokens_as_token_ids=True
    )
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:97": -0.5}]


async def test_a_stop_string(api: RunningApi) -> None:
    answer = await api.complete(prompt="x", stop="cd")
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")
    assert answer["usage"]["completion_tokens"] == 4


async def test_an_end_token_counts_and_is_not_shown() -> None:
    generator = FakeGenerator(lambda request, index: iter([97, EOS]))
    async with running_api(generator) as api:
        answer = await api.complete(prompt="x")
    assert answer["choices"][0]["text"] == "a"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_stream(api: RunningApi) -> None:
    *chunks, done = await api.events(PATH, prompt="x", max_tokens=3)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_a_streams_usage(api: RunningApi) -> None:
    options = {"include_usage": True}
    *chunks, last, _ = await api.events(PATH, prompt="x", max_tokens=2, stream_options=options)
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 4


async def test_a_streams_usage_in_every_chunk(api: RunningApi) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = await api.events(PATH, prompt="x", max_tokens=2, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


async def test_a_stream_of_several_prompts_with_echo(api: RunningApi) -> None:
    *chunks, _ = await api.events(PATH, prompt=["x", "y"], max_tokens=2, echo=True, logprobs=0)
    texts = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
    assert texts == {0: "xab", 1: "yab"}
    assert tokens == {0: ["<s>", "x", "a", "b"], 1: ["<s>", "y", "a", "b"]}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"guided_regex": "a+"}, Constraint(Language.REGEX, ("a+",))),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint(Language.CHOICES, ("a", "b"))),
        (
            {"structured_outputs": {"grammar": "start: A"}},
            Constraint(Language.LARK, ("start: A",)),
        ),
        (
            {"response_format": {"type": "json_object"}},
            Constraint(Language.JSON_SCHEMA, ('{"type":"object"}',)),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "integer"}},
                }
            },
            Constraint(Language.JSON_SCHEMA, ('{"type":"integer"}',)),
        ),
        (
            {"structured_outputs": {"json": '{"type": "null"}'}},
            Constraint(Language.JSON_SCHEMA, ('{"type": "null"}',)),
        ),
        ({"response_format": {"type": "text"}}, None),
    ],
)
async def test_structured_output(
    api: RunningApi,
    fields: dict[str, Any],
    constraint: Constraint | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whether a real model's texts can be held to it is for others to say: this one's are bytes.
    monkeypatch.setattr("cluster.constraints.ConstraintChecker.check", lambda *_: None)
    ok(await api.post(PATH, prompt="x", max_tokens=1, **fields))
    assert api.generator.requests[0].constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "field required"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [1, "x"]}, "prompt[0]", "should be"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": "1"}, "temperature", "valid number"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "set echo"),
        ({"prompt": "x", "best_of": 2}, "best_of", "choose n"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "''"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "x", "stop": [""]}, "stop[0]", "at least 1"),
        ({"prompt": "x", "stop": "y" * 2000}, "stop", "2000 bytes"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias", "not in the vocabulary of 258"),
        ({"prompt": [999]}, "prompt", "not in the vocabulary of 258"),
        ({"prompt": ["x", "y" * 5_000_000]}, "prompt[1]", "cannot fit"),
        ({"prompt": "x", "max_tokens": 2**30}, "max_tokens", "beyond the context"),
        ({"prompt": "x", "min_tokens": 20}, "min_tokens", "0 to 16"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search", "False"),
        ({"prompt": "x", "bad_words": ["y"]}, "bad_words", "at most 0"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs", "says nothing"),
        (
            {"prompt": "x", "guided_regex": "a", "guided_choice": ["b"]},
            "guided_choice",
            "keep one",
        ),
        (
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "missing",
        ),
        ({"prompt": "x", "model": "other"}, "model", "there is 'fake'"),
    ],
)
async def test_what_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    async with running_api(max_message_bytes=16 << 20) as api:
        response = await api.post(PATH, **fields)
    assert response.status_code == (404 if param == "model" else 400)
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], words in error["message"]) == (param, True), error


async def test_every_fault_is_named(api: RunningApi) -> None:
    response = await api.post(PATH, prompt=[999], logit_bias={"998": 1}, min_tokens=17)
    message = response.json()["error"]["message"]
    for field in ("prompt:", "logit_bias:", "min_tokens:"):
        assert field in message
