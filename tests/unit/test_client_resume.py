"""Streams whose connection breaks go on at the next token, exactly: both clients, a real edge."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import jobs
from cluster.request import Request
from headwise import Completion, RetryPolicy, UnavailableError
from headwise._resumption import sample_seed
from headwise.v1 import inference_pb2
from tests.unit.client_faults import CuttingProxy, EdgeThread, Loop, seeded_text
from tests.unit.client_server import (
    CLIENTS,
    FAST_RETRIES,
    PATIENCE,
    AnyClient,
    ScriptedServer,
    fails,
    finish,
    says,
    token,
)
from tests.unit.fakes import FakeGenerator

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
DIED = "rank 1 died"
# Through cuts that come before anything has: gRPC waits 100 ms before it connects again.
PATIENT_RETRIES = RetryPolicy(attempts=1000, initial_backoff=0.01, max_backoff=0.02)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def edge(loop: Loop) -> Iterator[EdgeThread]:
    edge = EdgeThread(loop)
    yield edge
    edge.stop()


@pytest.fixture(scope="module")
def proxy(loop: Loop, edge: EdgeThread) -> Iterator[CuttingProxy]:
    with CuttingProxy(loop, edge.address) as proxy:
        yield proxy


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, server: ScriptedServer) -> Iterator[AnyClient]:
    with kind(server.address, retries=FAST_RETRIES) as client:
        yield client


def essence(completion: Completion) -> list[tuple[Any, ...]]:
    """All that a reader is to see alike, whatever broke on the way."""
    return [
        (
            choice.text,
            choice.token_ids,
            choice.logprobs,
            choice.finish_reason,
            choice.matched,
            choice.usage.prompt_tokens,
            choice.usage.completion_tokens,
        )
        for choice in completion.choices
    ]


OPTIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.integers(1, 60),
        "stop": st.sampled_from([[], ["END!"], ["END", "🙂🙂🙂"], ["?"]]),
        "include_stop": st.booleans(),
        "min_tokens": st.sampled_from([None, 0, 20]),
        "echo": st.booleans(),
        "skip_text": st.sampled_from([None, True]),
        "skip_special_tokens": st.booleans(),
        "logprobs": st.sampled_from([None, 1]),
        "n": st.sampled_from([1, 1, 3]),
    }
)
CUTS = st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=4)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(options=OPTIONS, cuts=CUTS)
def test_whatever_is_cut_wherever_the_answer_is_the_same(
    kind: Any, edge: EdgeThread, proxy: CuttingProxy, options: dict[str, Any], cuts: list[Any]
) -> None:
    if options["min_tokens"] is not None:
        options["min_tokens"] = min(options["min_tokens"], options["max_tokens"])
    prompt = "🙂 hello".encode()[1:]
    with kind(edge.address) as client:
        whole = client.generate(list(prompt), **options)
    proxy.cuts.clear()
    proxy.cuts.extend(cuts)
    with kind(proxy.address, retries=PATIENT_RETRIES) as client:
        broken = client.generate(list(prompt), **options)
    assert essence(broken) == essence(whole)


class Halting:
    """A generator that halts in the middle of its first answer, until `go_on`."""

    def __init__(self, loop: Loop, halt_after: int) -> None:
        self._loop = loop
        self._left = halt_after
        self.generator = FakeGenerator(self._answer)

    def go_on(self) -> None:
        self._loop.loop.call_soon_threadsafe(self.generator.resume)

    def _answer(self, request: Request, index: int) -> Iterator[int]:
        for byte in seeded_text(request, index):
            self._left -= 1
            if self._left == 0:
                self.generator.pause()
            yield byte


def test_a_server_restarted_in_the_middle(kind: Any, loop: Loop) -> None:
    halting = Halting(loop, halt_after=12)
    edge = EdgeThread(loop, halting.generator)
    try:
        with kind(edge.address) as client:
            options = {"max_tokens": 40, "stop": ["END?"], "seed": 5}
            stream = client.stream_chat([{"role": "user", "content": "hi"}], **options)
            texts = [next(stream).text for _ in range(12)]
            edge.restart()
            halting.go_on()
            texts += [delta.text for delta in stream]
            assert len(halting.generator.requests[-1].generated) == 12
            whole = client.chat([{"role": "user", "content": "hi"}], **options)
            assert essence(stream.result()) == essence(whole)
            assert "".join(texts) == whole.text
    finally:
        edge.stop()


def test_the_server_may_be_away_for_longer_than_the_attempts_of_a_new_call(
    kind: Any, loop: Loop
) -> None:
    halting = Halting(loop, halt_after=3)
    edge = EdgeThread(loop, halting.generator)
    try:
        with kind(edge.address, retries=FAST_RETRIES) as client:
            stream = client.stream("hello", max_tokens=9)
            for _ in range(3):
                next(stream)
            edge.stop()
            with pytest.raises(UnavailableError):
                client.generate("hello")
            halting.go_on()
            later = threading.Timer(0.2, edge.start)
            later.start()
            assert stream.result().usage.completion_tokens == 9
            later.join()
    finally:
        edge.stop()


def test_a_resumed_request_is_the_same_but_for_what_has_arrived(
    server: ScriptedServer, client: AnyClient
) -> None:
    prompt = inference_pb2.TokenLogprob(token_id=9)
    first = inference_pb2.GenerateResponse(
        text="hello a", token_ids=[8, 9, 1], echoed_tokens=2, prompt_logprobs=[prompt]
    )
    server.script(
        fails(UNAVAILABLE, DIED, after=(first, token("b", 2))), says(token("c", 3), finish())
    )
    stream = client.stream(
        "hello", echo=True, prompt_logprobs=1, request_id="mine", max_tokens=3, stop="x"
    )
    completion = stream.result()
    assert (completion.text, completion.token_ids) == ("hello abc", (8, 9, 1, 2, 3))
    assert len(completion.prompt_logprobs) == 1
    asked, again = (call.request for call in server.calls)
    assert list(again.generated.ids) == [1, 2]
    assert not again.output.echo
    assert not again.output.HasField("prompt_logprobs")
    assert (again.text, again.request_id) == (asked.text, asked.request_id)
    assert (again.sampling, again.stopping) == (asked.sampling, asked.stopping)
    assert again.sampling.HasField("seed")


def test_tokens_of_an_attempt_before_are_kept(server: ScriptedServer, client: AnyClient) -> None:
    server.script(fails(UNAVAILABLE, DIED, after=(token("c", 3),)), says(finish()))
    completion = client.generate("hello", generated=[1, 2])
    assert list(server.calls[1].request.generated.ids) == [1, 2, 3]
    assert completion.token_ids == (3,)


def test_each_sample_goes_on_by_itself(server: ScriptedServer, client: AnyClient) -> None:
    arrived = (token("a", 1), token("x", 8, index=1), finish(), token("u", 5, index=2))

    def rest(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        assert not request.HasField("n")
        index = int(request.request_id.removeprefix("mine."))
        assert request.sampling.seed == sample_seed(7, index)
        assert list(request.generated.ids) == {1: [8], 2: [5], 3: []}[index]
        yield token(str(index), index)
        yield finish()

    server.script(fails(UNAVAILABLE, DIED, after=arrived), rest, rest, rest)
    completion = client.generate("hello", n=4, seed=7, request_id="mine")
    assert [choice.text for choice in completion.choices] == ["a", "x1", "u2", "3"]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert {call.request.request_id for call in server.calls[1:]} == {"mine.1", "mine.2", "mine.3"}


def test_the_seed_of_a_sample_is_the_servers() -> None:
    for seed, index in ((0, 1), (2**64 - 1, 3), (7, 0)):
        assert sample_seed(seed, index) == jobs.sample_seed(seed, index)


def test_progress_gives_new_attempts(server: ScriptedServer, client: AnyClient) -> None:
    breaks = [fails(UNAVAILABLE, DIED, after=(token("a", i),)) for i in range(12)]
    server.script(*breaks, says(finish()))
    assert client.generate("hello").token_ids == tuple(range(12))


def test_without_progress_it_gives_up(kind: Any, server: ScriptedServer) -> None:
    server.script(
        fails(UNAVAILABLE, DIED, after=(token("a", 1),)), *[fails(UNAVAILABLE, DIED)] * 10_000
    )
    impatient = RetryPolicy(initial_backoff=0.001, max_backoff=0.002, resume_timeout=0.1)
    with kind(server.address, retries=impatient) as client:
        stream = client.stream("hello")
        with pytest.raises(UnavailableError, match=DIED):
            stream.result()
        assert (stream.text(), stream.token_ids()) == ("a", (1,))


@pytest.mark.parametrize("retries", [0, RetryPolicy(resume_timeout=0)])
def test_resuming_can_be_switched_off(kind: Any, server: ScriptedServer, retries: Any) -> None:
    server.script(fails(UNAVAILABLE, DIED, after=(token("a", 1),)), says(finish()))
    with (
        kind(server.address, retries=retries) as client,
        pytest.raises(UnavailableError, match=DIED),
    ):
        client.generate("hello")
    assert not server.calls[0].request.sampling.HasField("seed")


def test_an_overloaded_server_is_given_its_time(server: ScriptedServer, client: AnyClient) -> None:
    hint = RetryInfo(retry_delay=Duration(nanos=1_000_000))
    server.script(
        fails(UNAVAILABLE, DIED, after=(token("a", 1),)),
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", hint),
        says(token("b", 2), finish()),
    )
    assert client.generate("hello").text == "ab"


def test_an_id_that_still_runs_is_not_waited_for(server: ScriptedServer, client: AnyClient) -> None:
    """The server may not have noticed that the connection of the first attempt is gone."""
    fault = BadRequest.FieldViolation(field="request_id", description="'mine' is in use")
    in_use = fails(grpc.StatusCode.INVALID_ARGUMENT, "in use", BadRequest(field_violations=[fault]))
    server.script(
        fails(UNAVAILABLE, DIED, after=(token("a", 1),)), in_use, says(token("b", 2), finish())
    )
    assert client.generate("hello", request_id="mine").text == "ab"
    ids = [call.request.request_id for call in server.calls]
    assert ids == ["mine", "mine", "mine~2"]
    server.script(in_use)
    with pytest.raises(ValueError, match="in use"):
        client.generate("hello", request_id="mine")


def test_a_beam_search_is_begun_again_or_not_at_all(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(fails(UNAVAILABLE, DIED), says(finish(), finish(index=1)))
    client.generate("hello", beam_width=2, n=2)
    assert server.calls[0].request == server.calls[1].request
    assert not server.calls[0].request.sampling.HasField("seed")
    server.script(fails(UNAVAILABLE, DIED, after=(finish(),)))
    with pytest.raises(UnavailableError, match=DIED):
        client.generate("hello", beam_width=2, n=2)


def test_what_breaks_after_the_last_token_is_whole(
    server: ScriptedServer, client: AnyClient
) -> None:
    server.script(fails(UNAVAILABLE, DIED, after=(token("a", 1), finish())))
    assert client.generate("hello").text == "a"
    assert len(server.calls) == 1


def test_resuming_keeps_to_the_timeout(server: ScriptedServer, client: AnyClient) -> None:
    hint = RetryInfo(retry_delay=Duration(nanos=400_000_000))
    server.script(
        fails(UNAVAILABLE, DIED, after=(token("a", 1),)),
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", hint),
        says(finish()),
    )
    client.generate("hello", timeout=4)
    seconds = server.calls[2].seconds
    assert seconds is not None
    assert seconds < 3.7


def test_cancel_reaches_a_resumed_stream(server: ScriptedServer, client: AnyClient) -> None:
    ended = threading.Event()

    def hangs(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(ended.set)
        yield token("b", 2)
        ended.wait(PATIENCE)

    server.script(fails(UNAVAILABLE, DIED, after=(token("a", 1),)), hangs)
    with client.stream("hello") as stream:
        assert [next(stream).text, next(stream).text] == ["a", "b"]
    assert ended.wait(PATIENCE)
