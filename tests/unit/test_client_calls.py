"""Both clients against a real server: what is sent, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel

from headwise import (
    ChatMessage,
    Completion,
    FinishReason,
    HeadwiseError,
    HealthState,
    Range,
    TokenLogprob,
    Tool,
    ToolCall,
    TopToken,
)
from headwise.v1 import control_pb2, inference_pb2
from tests.unit.client_server import (
    CLIENTS,
    FAST_RETRIES,
    AnyClient,
    ScriptedServer,
    finish,
    says,
    token,
)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[AnyClient]:
    with request.param(server.address, retries=FAST_RETRIES) as client:
        yield client


def test_generate_gathers_every_sample(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(
            token("a", 1),
            token("x", 8, index=1),
            token("b", 2),
            finish(matched=inference_pb2.StopCondition(text="END")),
            token("y", 9, index=1),
            finish(
                index=1,
                completion_tokens=5,
                reason=inference_pb2.FINISH_REASON_STOP,
                matched=inference_pb2.StopCondition(token_id=0),
            ),
        )
    )
    completion = client.generate("hello", n=2, request_id="mine")
    first, second = completion.choices
    assert (completion.request_id, completion.text, completion.token_ids) == ("mine", "ab", (1, 2))
    assert (first.finish_reason, first.matched, first.seed) == (FinishReason.LENGTH, "END", 7)
    assert (second.text, second.token_ids, second.matched) == ("xy", (8, 9), 0)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 7)
    assert Completion.model_validate_json(completion.model_dump_json()) == completion


def test_stream_yields_deltas_and_then_the_whole(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(token("a", 1), token("b", 2), finish()))
    with client.stream("hello") as stream:
        deltas = list(stream)
        assert [delta.text for delta in deltas] == ["a", "b", ""]
        assert [delta.token_ids for delta in deltas] == [(1,), (2,), ()]
        assert [delta.finish is None for delta in deltas] == [True, True, False]
        assert stream.result().text == stream.text() == "ab"
        assert stream.result().token_ids == stream.token_ids() == (1, 2)


def test_logprobs(server: ScriptedServer, client: AnyClient) -> None:
    top = inference_pb2.TopToken(token_id=4, text="t", logprob=-0.5)
    scored = inference_pb2.TokenLogprob(token_id=5, text="s", logprob=-1.5, rank=2, top=[top])
    unscored = inference_pb2.TokenLogprob(token_id=6, text="f")
    message = inference_pb2.GenerateResponse(
        token_ids=[5], logprobs=[scored], prompt_logprobs=[unscored, scored]
    )
    server.script(says(message, finish()))
    completion = client.generate("hello", logprobs=1, prompt_logprobs=1)
    expected = TokenLogprob(
        token_id=5,
        text="s",
        logprob=-1.5,
        rank=2,
        top=(TopToken(token_id=4, text="t", logprob=-0.5),),
    )
    assert completion.choices[0].logprobs == (expected,)
    assert completion.prompt_logprobs[0].logprob is None
    assert completion.prompt_logprobs[1] == expected


def test_a_stream_that_ends_too_early_is_an_error(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(says(token("a", 1)))
    with pytest.raises(HeadwiseError, match="ended before sample 0 finished"):
        client.generate("hello")


def test_a_sample_that_was_not_asked_for_is_an_error(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(says(token("a", 1, index=1)))
    with pytest.raises(HeadwiseError, match="sent sample 1; 1 were asked for"):
        client.generate("hello")


def test_a_finish_reason_of_a_newer_server_is_unknown(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(says(finish(reason=99)))
    assert client.generate("hello").finish_reason is FinishReason.UNKNOWN


def test_every_option_reaches_its_field(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(*(finish(index=index) for index in range(3))))
    client.generate(
        [1, 2, 3],
        max_tokens=4,
        min_tokens=1,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=2**64 - 1,
        logit_bias={9: -2.0},
        stop=["one", "two"],
        stop_token_ids=[6],
        ignore_eos=True,
        include_stop=False,
        logprobs=0,
        prompt_logprobs=2,
        echo=True,
        skip_text=False,
        skip_special_tokens=True,
        n=3,
        generated=[7, 8],
        priority=-1,
        model="m",
        request_id="r",
        timeout=30,
    )
    conditions = [
        inference_pb2.StopCondition(text="one"),
        inference_pb2.StopCondition(text="two"),
        inference_pb2.StopCondition(token_id=6),
    ]
    assert server.calls[0].request == inference_pb2.GenerateRequest(
        request_id="r",
        model="m",
        token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
        sampling=inference_pb2.Sampling(
            temperature=0.5,
            top_k=40,
            top_p=0.75,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            seed=2**64 - 1,
            logit_bias={9: -2.0},
        ),
        stopping=inference_pb2.Stopping(
            max_tokens=4,
            min_tokens=1,
            conditions=conditions,
            ignore_eos=True,
            include_stop=False,
        ),
        output=inference_pb2.OutputOptions(
            logprobs=0, prompt_logprobs=2, echo=True, skip_text=False, skip_special_tokens=True
        ),
        n=3,
        generated=inference_pb2.TokenIds(ids=[7, 8]),
        priority=-1,
    )
    assert server.calls[0].seconds is not None


def test_beam_search(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(finish(index=0, score=-0.25), finish(index=1)))
    completion = client.generate("hello", beam_width=4, early_stopping=True, n=2)
    assert [choice.score for choice in completion.choices] == [-0.25, None]
    assert server.calls[0].request.beam_search == inference_pb2.BeamSearch(
        width=4, early_stopping=True
    )


def test_what_is_left_out_is_left_to_the_server(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(finish()))
    completion = client.generate("hello", temperature=None)
    request = server.calls[0].request
    # But for the seed, without which a stream that breaks could not go on.
    assert request == inference_pb2.GenerateRequest(
        text="hello",
        request_id=completion.request_id,
        sampling=inference_pb2.Sampling(seed=request.sampling.seed),
    )
    assert server.calls[0].seconds is None


def test_requests_are_named_apart(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(finish()), says(finish()))
    ids = {client.generate("hello").request_id for _ in range(2)}
    assert len(ids) == 2
    assert ids == {call.request.request_id for call in server.calls}


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": "hi"}, ChatMessage(role="user", content="hi")],
    ids=["dict", "ChatMessage"],
)
def test_chat(
    server: ScriptedServer, client: AnyClient, message: ChatMessage | dict[str, str]
) -> None:
    answer = inference_pb2.ChatResponse(text="hello", token_ids=[4], finish=finish().finish)
    server.script(says(answer))
    completion = client.chat([message], max_tokens=5)
    assert completion.choices[0].message == ChatMessage(role="assistant", content="hello")
    call = server.calls[0]
    assert call.method == "Chat"
    assert list(call.request.messages) == [inference_pb2.ChatMessage(role="user", content="hi")]
    assert call.request.stopping.max_tokens == 5


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}


class Weather(BaseModel):
    city: str


@pytest.mark.parametrize(
    ("tool", "call"),
    [
        (
            Tool(name="weather", description="of a city", parameters=WEATHER),
            ToolCall(id="c1", name="weather", arguments='{"city": "Oslo"}'),
        ),
        (
            {"name": "weather", "description": "of a city", "parameters": WEATHER},
            {"id": "c1", "name": "weather", "arguments": {"city": "Oslo"}},
        ),
        (
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "of a city",
                    "parameters": WEATHER,
                },
            },
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            },
        ),
    ],
    ids=["models", "dicts", "OpenAI"],
)
def test_tools_and_templates(
    server: ScriptedServer, client: AnyClient, tool: Any, call: Any
) -> None:
    server.script(
        says(inference_pb2.ChatResponse(finish=finish().finish)),
        says(inference_pb2.TokenizeResponse()),
    )
    messages: list[Any] = [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        ChatMessage(role="tool", content="rain", tool_call_id="c1"),
        ChatMessage(role="assistant", content="It"),
    ]
    template: dict[str, Any] = {
        "tools": [tool],
        "template_arguments": {"enable_thinking": False},
        "continue_final_message": True,
    }
    client.chat(messages, **template)
    client.tokenize(messages, **template)
    asked, conversation = server.calls[0].request, server.calls[1].request.conversation
    user, assistant, answer, _ = asked.messages
    assert (user.name, answer.tool_call_id) == ("ann", "c1")
    assert list(assistant.tool_calls) == [
        inference_pb2.ToolCall(id="c1", name="weather", arguments='{"city": "Oslo"}')
    ]
    (sent,) = asked.tools
    assert (sent.name, sent.description) == ("weather", "of a city")
    assert json.loads(sent.parameters) == WEATHER
    assert asked.template_arguments["enable_thinking"] is False
    assert asked.turn == inference_pb2.TURN_CONTINUE
    for field in ("messages", "tools", "template_arguments", "turn"):
        assert getattr(conversation, field) == getattr(asked, field)


def test_a_tools_parameters_may_be_a_pydantic_model(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(says(inference_pb2.ChatResponse(finish=finish().finish)))
    client.chat([{"role": "user", "content": "hi"}], tools=[Tool(name="w", parameters=Weather)])
    (sent,) = server.calls[0].request.tools
    assert json.loads(sent.parameters) == Weather.model_json_schema()


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"json_schema": WEATHER}, {"json_schema": json.dumps(WEATHER)}),
        ({"json_schema": Weather}, {"json_schema": json.dumps(Weather.model_json_schema())}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"lark": 'start: "a"'}, {"lark": 'start: "a"'}),
        ({"choices": ["yes", "no"]}, {"choices": {"texts": ["yes", "no"]}}),
    ],
)
def test_constraints(
    server: ScriptedServer, client: AnyClient, options: Any, constraint: Any
) -> None:
    server.script(says(finish()))
    client.generate("hello", **options)
    assert server.calls[0].request.constraint == inference_pb2.Constraint(**constraint)


def test_parsed(server: ScriptedServer, client: AnyClient) -> None:
    server.script(*[says(token('{"city": "Oslo"}', 1), finish())] * 2, says(finish()))
    typed = client.generate("hello", json_schema=Weather)
    assert typed.parsed == typed.choices[0].parsed == Weather(city="Oslo")
    assert client.generate("hello", json_schema=WEATHER).parsed == {"city": "Oslo"}
    with pytest.raises(ValueError, match="Weather"):
        _ = client.generate("hello", json_schema=Weather).parsed


def test_prefix_cache(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(finish()), says(finish()))
    client.generate("hello", cache=False)
    client.generate("hello", cache_salt="mine")
    off, salted = (call.request.prefix_cache for call in server.calls)
    assert off == inference_pb2.PrefixCache(disabled=True)
    assert salted == inference_pb2.PrefixCache(salt="mine")


def test_stream_chat(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(
            inference_pb2.ChatResponse(text="hel"),
            inference_pb2.ChatResponse(text="lo", finish=finish().finish),
        )
    )
    with client.stream_chat([{"role": "user", "content": "hi"}]) as stream:
        assert [delta.text for delta in stream] == ["hel", "lo"]
        assert stream.result().message.content == "hello"


def test_tokenize_and_detokenize(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(inference_pb2.TokenizeResponse(token_ids=[1, 2], context=64)),
        says(inference_pb2.TokenizeResponse(token_ids=[3], context=64)),
        says(inference_pb2.DetokenizeResponse(text="hello")),
    )
    assert client.tokenize("hello", add_special_tokens=False).token_ids == (1, 2)
    assert client.tokenize([{"role": "user", "content": "hi"}]).context == 64
    assert client.detokenize([1, 2], skip_special_tokens=False) == "hello"
    text, conversation, back = (call.request for call in server.calls)
    assert text == inference_pb2.TokenizeRequest(text="hello", add_special_tokens=False)
    assert conversation.conversation.messages[0].content == "hi"
    assert back == inference_pb2.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=False)


def test_server_info(server: ScriptedServer, client: AnyClient) -> None:
    rank = control_pb2.Rank(
        rank=1, host="h", pid=5, heads=control_pb2.Range(start=6, stop=9), weight_bytes=2**40
    )
    server.script(
        says(
            control_pb2.GetServerInfoResponse(
                version="0.1.0",
                libraries={"ray": "2"},
                tensor_parallel=2,
                ranks=[rank],
                started_at=Timestamp(seconds=60),
            )
        )
    )
    info = client.server_info()
    assert info.libraries == {"ray": "2"}
    assert info.started_at == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
    assert info.ranks[0].heads == Range(start=6, stop=9)
    assert len(info.ranks[0].heads) == 3
    assert info.ranks[0].weight_bytes == 2**40


def test_model_info(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(control_pb2.GetModelInfoResponse(name="m", context=2048, eos_token_ids=[2, 0]))
    )
    info = client.model_info("m")
    assert (info.name, info.context, info.eos_token_ids) == ("m", 2048, (2, 0))
    assert server.calls[0].request.model == "m"


def test_a_model_can_be_asked_about(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(control_pb2.ListModelsResponse(names=["a", "b"])),
        says(control_pb2.GetServerInfoResponse(ranks=[control_pb2.Rank(replica="r1")])),
        says(control_pb2.GetLoadResponse()),
        says(health(control_pb2.HEALTH_STATE_READY)),
        says(health(control_pb2.HEALTH_STATE_READY)),
    )
    assert client.list_models() == ("a", "b")
    assert client.server_info("b").ranks[0].replica == "r1"
    client.load(model="b")
    client.health("b")
    client.wait_until_ready(5, model="b")
    assert [call.request.model for call in server.calls[1:]] == ["b"] * 4


def test_load_and_abort(server: ScriptedServer, client: AnyClient) -> None:
    server.script(
        says(control_pb2.GetLoadResponse(running=3, kv_blocks=10, kv_blocks_used=4)),
        says(control_pb2.AbortResponse(found=True)),
    )
    load = client.load()
    assert (load.running, load.kv_blocks, load.kv_blocks_used) == (3, 10, 4)
    assert client.abort("r") is True
    assert server.calls[1].request.request_id == "r"


def health(state: control_pb2.HealthState, cause: str = "") -> control_pb2.GetHealthResponse:
    ranks = [control_pb2.RankHealth(rank=0, state=state, cause=cause)]
    return control_pb2.GetHealthResponse(state=state, cause=cause, epoch=2, ranks=ranks)


def test_health(server: ScriptedServer, client: AnyClient) -> None:
    server.script(says(health(control_pb2.HEALTH_STATE_NOT_READY, "rank 0 died")))
    answer = client.health()
    assert (answer.state, answer.cause, answer.epoch) == (HealthState.NOT_READY, "rank 0 died", 2)
    assert answer.ranks[0].state is HealthState.NOT_READY
    assert answer.since is None


@pytest.mark.parametrize(
    ("default", "given", "limited"),
    [
        (None, None, False),
        (30.0, None, True),
        (None, 30.0, True),
        (30.0, float("inf"), False),
    ],
    ids=["none", "default", "given", "infinite"],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_the_timeout_becomes_the_deadline(
    server: ScriptedServer,
    kind: type[Any],
    default: float | None,
    given: float | None,
    limited: bool,
) -> None:
    server.script(says(control_pb2.GetLoadResponse()), says(finish()))
    with kind(server.address, timeout=default) as client:
        client.load(timeout=given)
        client.generate("hello", timeout=given)
    assert [call.seconds is not None for call in server.calls] == [limited, limited]
