"""Generate, Chat, Tokenize and Detokenize through a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from cluster.request import BeamParams, HealthState, Request
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.fakes import ALPHABET, BOS, EOS, FakeCodec, FakeGenerator


@pytest.fixture
async def edge() -> AsyncIterator[RunningEdge]:
    async with running_edge() as edge:
        yield edge


def at_most(tokens: int, **fields: object) -> pb.Stopping:
    return pb.Stopping(max_tokens=tokens, **fields)


def text_of(messages: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


def ids_of(messages: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [token for m in messages if m.index == index for token in m.token_ids]


async def test_deltas_carry_text_and_ids_together_and_end_with_usage(edge: RunningEdge) -> None:
    messages = await edge.generate(request_id="r1", text="hi", stopping=at_most(3))

    assert [message.text for message in messages] == ["a", "b", "c"]
    assert [list(message.token_ids) for message in messages] == [[97], [98], [99]]
    assert messages[0].request_id == "r1"
    assert not any(message.HasField("request_id") for message in messages[1:])
    assert not any(message.HasField("finish") for message in messages[:-1])
    finish = messages[-1].finish
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 3)
    assert (finish.usage.queue_seconds, finish.usage.total_seconds) == (0.25, 1.0)
    assert finish.seed == 42
    assert not finish.HasField("matched")


async def test_text_is_tokenized_with_special_tokens_and_ids_are_not(edge: RunningEdge) -> None:
    await edge.generate(text="hi", stopping=at_most(1))
    await edge.generate(token_ids=pb.TokenIds(ids=[104, 105]), stopping=at_most(1))

    assert [request.prompt for request in edge.generator.requests] == [
        (BOS, 104, 105),
        (104, 105),
    ]


async def test_unset_fields_take_defaults_and_set_ones_arrive(edge: RunningEdge) -> None:
    await edge.generate(text="hi", stopping=at_most(1))
    await edge.generate(
        text="hi",
        stopping=pb.Stopping(max_tokens=1, min_tokens=1, ignore_eos=True),
        sampling=pb.Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=2**63, logit_bias={5: -1.5}),
        priority=-3,
    )

    plain, full = edge.generator.requests
    assert plain == Request(plain.id, plain.prompt, plain.sampling, plain.stopping, deadline=None)
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.seed) == (1, 1, None)
    # The decimal that was written, not its float32 neighbour 0.699999988.
    assert (full.sampling.temperature, full.sampling.top_p) == (0.7, 0.9)
    assert (full.sampling.top_k, full.sampling.seed) == (5, 2**63)
    assert full.sampling.logit_bias == {5: -1.5}
    assert (full.stopping.min_tokens, full.stopping.ignore_eos, full.priority) == (1, True, -3)


async def test_a_beam_search_is_judged_like_the_rest(edge: RunningEdge) -> None:
    await edge.generate(text="hi", stopping=at_most(1), beam_search=pb.BeamSearch(width=2))
    assert edge.generator.requests[0].beams == BeamParams(2)
    with pytest.raises(grpc.aio.AioRpcError, match="0 is not a whole number from 2 to 16"):
        await edge.generate(text="hi", beam_search=pb.BeamSearch())


async def test_a_request_without_an_id_is_given_one(edge: RunningEdge) -> None:
    first = await edge.generate(text="hi", stopping=at_most(1))
    second = await edge.generate(text="hi", stopping=at_most(1))

    assert first[0].request_id
    assert first[0].request_id == edge.generator.requests[0].id
    assert first[0].request_id != second[0].request_id


async def test_the_request_id_is_in_the_trailing_metadata(edge: RunningEdge) -> None:
    request = pb.GenerateRequest(request_id="trace-me", text="hi", stopping=at_most(1))
    call = edge.inference.Generate(request)
    assert [message async for message in call]

    assert dict(await call.trailing_metadata())["headwise-request-id"] == "trace-me"


async def test_samples_are_told_apart_by_index(edge: RunningEdge) -> None:
    messages = await edge.generate(request_id="r1", text="hi", n=3, stopping=at_most(4))

    assert [text_of(messages, index) for index in range(3)] == ["abcd", "bcde", "cdef"]
    for index in range(3):
        own = [message for message in messages if message.index == index]
        assert own[0].request_id == "r1"
        assert [message.HasField("finish") for message in own] == [False, False, False, True]


async def test_stop_strings_end_the_text_before_the_match(edge: RunningEdge) -> None:
    stopping = pb.Stopping(max_tokens=20, conditions=[pb.StopCondition(text="de")])
    messages = await edge.generate(text="hi", stopping=stopping)

    assert text_of(messages) == "abc"
    assert messages[-1].finish.reason == pb.FINISH_REASON_STOP
    assert messages[-1].finish.matched.text == "de"
    assert edge.generator.live == {}


async def test_stop_tokens_and_end_tokens_name_what_matched(edge: RunningEdge) -> None:
    stopping = pb.Stopping(max_tokens=20, conditions=[pb.StopCondition(token_id=ord("c"))])
    messages = await edge.generate(text="hi", stopping=stopping)

    assert ids_of(messages) == [97, 98]
    assert messages[-1].finish.matched.token_id == ord("c")


async def test_the_models_own_end_token_is_the_match() -> None:
    def answer(_request: Request, _index: int) -> Iterator[int]:
        return iter([97, EOS])

    async with running_edge(FakeGenerator(answer)) as edge:
        messages = await edge.generate(text="hi", stopping=at_most(9))

    assert text_of(messages) == "a"
    assert messages[-1].finish.matched.token_id == EOS


async def test_characters_wait_until_their_bytes_are_there() -> None:
    def answer(_request: Request, _index: int) -> Iterator[int]:
        return iter("né€".encode())

    async with running_edge(FakeGenerator(answer)) as edge:
        messages = await edge.generate(text="hi", stopping=at_most(6))

    assert text_of(messages) == "né€"
    assert "\ufffd" not in "".join(message.text for message in messages)


async def test_logprobs_come_with_the_text_of_every_token(edge: RunningEdge) -> None:
    output = pb.OutputOptions(logprobs=2, prompt_logprobs=1)
    messages = await edge.generate(text="hi", output=output, stopping=at_most(2))

    (entry,) = messages[1].logprobs
    assert (entry.token_id, entry.text, entry.logprob, entry.rank) == (98, "b", -0.5, 1)
    assert [(top.token_id, top.text, top.logprob) for top in entry.top] == [
        (98, "b", -0.5),
        (99, "c", -1.5),
    ]
    prompt = messages[0].prompt_logprobs
    assert [(p.token_id, p.text, p.HasField("logprob")) for p in prompt] == [
        (BOS, "<s>", False),
        (104, "h", True),
        (105, "i", True),
    ]
    assert not messages[1].prompt_logprobs


async def test_echo_begins_every_sample_with_the_prompt(edge: RunningEdge) -> None:
    output = pb.OutputOptions(echo=True)
    messages = await edge.generate(text="hi ", n=2, output=output, stopping=at_most(2))

    assert [text_of(messages, index) for index in (0, 1)] == ["hi ab", "hi bc"]
    assert ids_of(messages, 1) == [BOS, *b"hi bc"]


async def test_echo_of_ids_is_their_text(edge: RunningEdge) -> None:
    messages = await edge.generate(
        token_ids=pb.TokenIds(ids=[BOS, *b"hi "]),
        output=pb.OutputOptions(echo=True),
        stopping=at_most(1),
    )

    assert text_of(messages) == "hi a"
    assert ids_of(messages) == [BOS, *b"hi a"]


async def test_skip_text_sends_ids_only_and_still_finds_stop_strings(edge: RunningEdge) -> None:
    stopping = pb.Stopping(max_tokens=9, conditions=[pb.StopCondition(text="c")])
    output = pb.OutputOptions(skip_text=True, echo=True, logprobs=1)
    messages = await edge.generate(text="hi", output=output, stopping=stopping)

    assert text_of(messages) == ""
    assert ids_of(messages)[:5] == [BOS, *b"hiab"]
    assert messages[-1].finish.matched.text == "c"
    assert {entry.text for message in messages for entry in message.logprobs} == {""}


async def test_special_tokens_are_left_out_unless_asked_for() -> None:
    def answer(_request: Request, _index: int) -> Iterator[int]:
        return iter([97, BOS, 98])

    async with running_edge(FakeGenerator(answer)) as edge:
        without = await edge.generate(text="hi", stopping=at_most(3))
        output = pb.OutputOptions(skip_special_tokens=False)
        with_them = await edge.generate(text="hi", stopping=at_most(3), output=output)

    assert (text_of(without), text_of(with_them)) == ("ab", "a<s>b")


async def test_a_resumed_request_goes_on_and_does_not_repeat_the_echo(edge: RunningEdge) -> None:
    messages = await edge.generate(
        text="hi",
        generated=pb.TokenIds(ids=[97, 98]),
        output=pb.OutputOptions(echo=True),
        stopping=at_most(5),
    )

    assert text_of(messages) == "cde"
    assert messages[-1].finish.usage.completion_tokens == 5


async def test_chat_renders_the_conversation(edge: RunningEdge) -> None:
    request = pb.ChatRequest(
        request_id="c1",
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="Hello"),
        ],
        stopping=at_most(2),
        n=2,
    )
    messages = [message async for message in edge.inference.Chat(request)]

    prompt = bytes(edge.generator.requests[0].prompt[1:]).decode()
    assert prompt == "system: Be brief.\nuser: Hello\nassistant: "
    assert "".join(m.text for m in messages if m.index == 1) == "bc"
    assert messages[0].request_id == "c1"
    assert messages[-1].finish.reason == pb.FINISH_REASON_LENGTH


async def test_a_model_without_a_tokenizer_takes_and_gives_ids() -> None:
    async with running_edge(codec=None) as edge:
        messages = await edge.generate(
            token_ids=pb.TokenIds(ids=[1]), stopping=at_most(2), output=pb.OutputOptions(echo=True)
        )

    assert ids_of(messages) == [1, 97, 98]
    assert text_of(messages) == ""


async def test_tokenize_and_detokenize(edge: RunningEdge) -> None:
    tokenized = await edge.inference.Tokenize(pb.TokenizeRequest(text="hé"))
    bare = await edge.inference.Tokenize(pb.TokenizeRequest(text="hé", add_special_tokens=False))
    conversation = pb.Conversation(messages=[pb.ChatMessage(role="user", content="x")])
    chat = await edge.inference.Tokenize(pb.TokenizeRequest(conversation=conversation))
    text = await edge.inference.Detokenize(pb.DetokenizeRequest(token_ids=[BOS, *"hé".encode()]))
    special = await edge.inference.Detokenize(
        pb.DetokenizeRequest(token_ids=[BOS, 104], skip_special_tokens=False)
    )

    assert list(tokenized.token_ids) == [BOS, *"hé".encode()]
    assert tokenized.context == edge.generator.model.context
    assert list(bare.token_ids) == [*"hé".encode()]
    assert bytes(chat.token_ids[1:]) == b"user: x\nassistant: "
    assert (text.text, special.text) == ("hé", "<s>h")


async def test_a_long_text_is_tokenized_beside_the_event_loop(edge: RunningEdge) -> None:
    text = "x" * 200_000
    tokenized = await edge.inference.Tokenize(pb.TokenizeRequest(text=text))

    assert len(tokenized.token_ids) == len(text) + 1


async def test_cancelling_the_call_closes_the_stream(edge: RunningEdge) -> None:
    call = edge.inference.Generate(
        pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(1000))
    )
    edge.generator.pause()
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    call.cancel()

    await edge.generator.until(lambda: edge.generator.closed == ["r1"])


async def test_a_client_that_vanishes_in_the_middle_closes_the_stream(edge: RunningEdge) -> None:
    call = edge.inference.Generate(
        pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(1_000_000))
    )
    assert (await call.read()).text == "a"
    await edge.channel.close()

    await edge.generator.until(lambda: edge.generator.closed == ["r1"])


async def test_the_deadline_reaches_the_request_and_the_client(edge: RunningEdge) -> None:
    edge.generator.pause()
    request = pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(9))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in edge.inference.Generate(request, timeout=0.3):
            pass

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert edge.generator.requests[0].deadline is not None
    await edge.generator.until(lambda: edge.generator.closed == ["r1"])


async def test_abort_ends_the_stream_with_its_reason(edge: RunningEdge) -> None:
    edge.generator.pause()
    call = edge.inference.Generate(
        pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(9))
    )
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    await edge.generator.abort("r1")
    messages = [message async for message in call]

    assert messages[-1].finish.reason == pb.FINISH_REASON_ABORTED


async def test_a_slow_reader_neither_buffers_without_end_nor_delays_others(
    edge: RunningEdge,
) -> None:
    count = 60_000
    slow = edge.inference.Generate(
        pb.GenerateRequest(request_id="slow", text="hi", stopping=at_most(count))
    )
    assert (await slow.read()).text == "a"
    others = [edge.generate(text="hi", stopping=at_most(500)) for _ in range(8)]
    answers = await asyncio.gather(*others)

    assert {text_of(messages) for messages in answers} == {(ALPHABET * 20)[:500].decode()}
    # Flow control holds the slow one back: its tokens are still where they belong, in the stream.
    assert "slow" in edge.generator.live
    text = "a"
    while (message := await slow.read()) is not grpc.aio.EOF:
        text += message.text
    assert text == (ALPHABET * (count // 26 + 1))[:count].decode()


async def test_a_request_in_flight_survives_malformed_ones(edge: RunningEdge) -> None:
    edge.generator.pause()
    good = asyncio.create_task(edge.generate(request_id="good", text="hi", stopping=at_most(5)))
    await edge.generator.until(lambda: "good" in edge.generator.live)
    raw = edge.channel.unary_stream("/headwise.v1.Inference/Generate")
    for message in (b"\xff\xff\xff", b"\x1a\x02\xff\xfe", b""):
        with pytest.raises(grpc.aio.AioRpcError):
            await raw(message).read()
    edge.generator.resume()

    assert text_of(await good) == "abcde"


async def test_streams_end_when_the_group_dies(edge: RunningEdge) -> None:
    edge.generator.pause()
    call = edge.inference.Generate(
        pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(9))
    )
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    edge.generator.set_health(HealthState.NOT_READY, "rank 1 on host b died")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "rank 1 on host b died" in (caught.value.details() or "")


async def test_stopping_the_edge_lets_running_calls_finish(edge: RunningEdge) -> None:
    edge.generator.pause()
    running = asyncio.create_task(edge.generate(request_id="r1", text="hi", stopping=at_most(3)))
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    stopping = asyncio.create_task(edge.edge.stop(60))
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.generate(text="hi", stopping=at_most(1))
    edge.generator.resume()

    assert text_of(await running) == "abc"
    await stopping
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_stopping_the_edge_ends_calls_that_take_too_long(edge: RunningEdge) -> None:
    edge.generator.pause()
    call = edge.inference.Generate(
        pb.GenerateRequest(request_id="r1", text="hi", stopping=at_most(3))
    )
    await edge.generator.until(lambda: "r1" in edge.generator.live)
    await edge.edge.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert edge.generator.closed == ["r1"]


async def test_a_codec_without_a_chat_template_refuses_to_chat() -> None:
    async with running_edge(codec=FakeCodec(has_chat_template=False)) as edge:
        request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.inference.Chat(request).read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no chat template" in (caught.value.details() or "")
