"""vLLM's gRPC service, spoken by the stubs that its gateway ships."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from transformers import AutoTokenizer

from cluster.config import ServerConfig
from cluster.constraints import to_grammar
from cluster.request import Constraint, HealthState, Language, Request, SamplingParams, Stopping
from cluster.text import TextCodec
from deploy.edge.models import Models, Served
from deploy.edge.server import Edge
from deploy.edge.text import Texts
from deploy.edge.vllm import SERVICE
from deploy.edge.vllm.throughput import Throughput
from tests.unit.edge_server import FACTS, RunningEdge, running_edge
from tests.unit.fakes import BOS, EOS, MODEL, FakeGenerator
from tests.unit.tiny_tokenizers import CHAT_TEMPLATE, byte_level

PROMPT = (104, 105)


@dataclasses.dataclass
class Engine:
    """The stubs, and what stands behind them."""

    stub: Any
    edge: RunningEdge

    @property
    def generator(self) -> FakeGenerator:
        return self.edge.generator

    def call(self, *, stream: bool = False, params: dict[str, Any] | None = None, **fields: Any):
        fields = {"tokenized": pb.TokenizedInput(input_ids=PROMPT), **fields}
        sampling = pb.SamplingParams(**{"max_tokens": 3, **(params or {})})
        return self.stub.Generate(
            pb.GenerateRequest(stream=stream, sampling_params=sampling, **fields)
        )

    async def generate(self, **how: Any) -> list[pb.GenerateResponse]:
        return [message async for message in self.call(**how)]

    async def request(self, **how: Any) -> Request:
        """What one call asks of the generator."""
        await self.generate(**how)
        return self.generator.requests[-1]

    async def refusal(self, **how: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.generate(**how)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return refused.value.details()


def over(edge: RunningEdge) -> Engine:
    return Engine(vllm_engine_pb2_grpc.VllmEngineStub(edge.channel), edge)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_edge() as edge:
        yield over(edge)


async def test_what_does_not_stream_comes_as_one_message_a_sample_in_their_order(
    engine: Engine,
) -> None:
    messages = await engine.generate(request_id="r", params={"n": 2})

    assert [m.WhichOneof("response") for m in messages] == ["complete", "complete"]
    first, second = (m.complete for m in messages)
    assert (first.index, bytes(first.output_ids)) == (0, b"abc")
    assert (second.index, bytes(second.output_ids)) == (1, b"bcd")
    assert first.finish_reason == "length"
    assert (first.prompt_tokens, first.completion_tokens) == (2, 3)
    assert first.WhichOneof("matched_stop") is None
    assert engine.generator.closed == ["r"]


async def test_a_stream_has_deltas_and_closes_each_sample_with_all_of_it(engine: Engine) -> None:
    messages = await engine.generate(stream=True, params={"n": 2})

    for index, text in enumerate((b"abc", b"bcd")):
        chunks = [m.chunk for m in messages if m.HasField("chunk") and m.chunk.index == index]
        assert [bytes(chunk.token_ids) for chunk in chunks] == [text[:1], text[1:2], text[2:]]
        assert [chunk.completion_tokens for chunk in chunks] == [1, 1, 1]
        assert {chunk.prompt_tokens for chunk in chunks} == {2}
        (complete,) = (
            m.complete for m in messages if m.HasField("complete") and m.complete.index == index
        )
        assert bytes(complete.output_ids) == text
        assert complete.completion_tokens == 3


async def test_zeros_that_are_no_values_mean_unset(engine: Engine) -> None:
    request = await engine.request(params={"max_tokens": 1})

    assert request.sampling == SamplingParams()
    assert request.n == 1
    assert request.stopping == Stopping(max_tokens=1, include_stop=True)
    assert request.constraint is None


async def test_every_parameter_arrives(engine: Engine) -> None:
    request = await engine.request(
        params={
            "temperature": 0.0,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "frequency_penalty": -0.5,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "stop": ["zz"],
            "stop_token_ids": [7],
            "ignore_eos": True,
            "logprobs": 2,
            "prompt_logprobs": 1,
            "seed": 11,
            "logit_bias": {5: -1.5},
        }
    )

    # Decimals as they were written, not their float32 neighbours.
    assert request.sampling == SamplingParams(
        temperature=0,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        logit_bias={5: -1.5},
        logprobs=2,
        prompt_logprobs=1,
    )
    assert request.stopping == Stopping(
        max_tokens=3,
        min_tokens=1,
        strings=("zz",),
        token_ids=(7,),
        ignore_eos=True,
        include_stop=True,
    )


@pytest.mark.parametrize(("seed", "drawn_with"), [(-1, None), (-2, 2**64 - 2), (0, 0)])
async def test_seeds_are_signed_and_minus_one_is_none(
    engine: Engine, seed: int, drawn_with: int | None
) -> None:
    assert (await engine.request(params={"seed": seed})).sampling.seed == drawn_with


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        ({"json_schema": "{}"}, Constraint(Language.JSON_SCHEMA, ("{}",))),
        ({"regex": "a+"}, Constraint(Language.REGEX, ("a+",))),
        ({"grammar": 'start: "a"'}, Constraint(Language.LARK, ('start: "a"',))),
        ({"json_object": True}, Constraint(Language.JSON_SCHEMA, ('{"type": "object"}',))),
        ({"json_object": False}, None),
        (
            {"choice": pb.ChoiceConstraint(choices=["a", "b"])},
            Constraint(Language.CHOICES, ("a", "b")),
        ),
    ],
)
async def test_constraints_keep_their_language(
    given: dict[str, Any], constraint: Constraint | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_edge() as edge:
        monkeypatch.setattr("deploy.edge.text.ConstraintChecker.check", lambda *_: None)
        assert (await over(edge).request(params=given)).constraint == constraint


async def test_ebnf_becomes_a_grammar_of_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_edge() as edge:
        monkeypatch.setattr("deploy.edge.text.ConstraintChecker.check", lambda *_: None)
        request = await over(edge).request(params={"grammar": 'root ::= "yes" | "no" [!?]+'})

    assert request.constraint is not None
    assert request.constraint.language is Language.LARK
    assert "start:" in to_grammar(request.constraint)


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"params": {"top_p": 1.5}}, "sampling_params.top_p: 1.5"),
        ({"params": {"max_tokens": 0}}, "sampling_params.max_tokens: 0"),
        ({"params": {"logprobs": -1}}, "sampling_params.logprobs: -1"),
        ({"params": {"prompt_logprobs": -1}}, "sampling_params.prompt_logprobs: -1"),
        ({"params": {"n": 1000}}, "sampling_params.n: 1000"),
        ({"params": {"stop": [""]}}, "sampling_params.stop: a stop string is empty"),
        ({"params": {"stop": ["x"] * 17}}, "sampling_params.stop: 17"),
        ({"params": {"stop_token_ids": [999]}}, "sampling_params.stop_token_ids: token id 999"),
        ({"params": {"logit_bias": {-3: 1.0}}}, "sampling_params.logit_bias: token id -3"),
        ({"params": {"truncate_prompt_tokens": 0}}, "sampling_params.truncate_prompt_tokens: 0"),
        ({"params": {"structural_tag": "{}"}}, "sampling_params.structural_tag: "),
        ({"params": {"grammar": "root ::= ("}}, "sampling_params.grammar: it is not EBNF"),
        ({"params": {"grammar": "a ::= b\n" * 2000}}, "sampling_params.grammar: 16000 characters"),
        ({"params": {"regex": ""}}, "sampling_params.regex: it is empty"),
        ({"tokenized": pb.TokenizedInput()}, "tokenized.input_ids: it has no tokens"),
        ({"tokenized": pb.TokenizedInput(input_ids=[999])}, "tokenized.input_ids: token id 999"),
        ({"tokenized": None, "text": ""}, "text: it has no tokens"),
        ({"tokenized": None}, "input: not set"),
        ({"mm_inputs": pb.MultimodalInputs()}, "mm_inputs: "),
        ({"extra_mm_inputs": [pb.MultimodalInputs()]}, "extra_mm_inputs: "),
        ({"media_refs": pb.MediaRefs()}, "media_refs: "),
        ({"kv_transfer_params": pb.KvTransferParams()}, "kv_transfer_params: "),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json: "),
        ({"data_parallel_rank": 1}, "data_parallel_rank: 1"),
    ],
)
async def test_faults_go_by_the_names_of_this_api(
    engine: Engine, how: dict[str, Any], field: str
) -> None:
    assert (await engine.refusal(**how)).startswith(field)
    assert engine.generator.requests == []


async def test_every_fault_is_named(engine: Engine) -> None:
    refusal = await engine.refusal(params={"top_p": 2, "structural_tag": "x"}, media_refs={})
    assert all(name in refusal for name in ("top_p", "structural_tag", "media_refs"))


async def test_text_is_tokenized_and_truncation_keeps_the_end(engine: Engine) -> None:
    text = {"tokenized": None, "text": "hello"}
    whole = await engine.request(**text)
    cut = await engine.request(**text, params={"truncate_prompt_tokens": 2})
    ids = await engine.request(params={"truncate_prompt_tokens": 1})
    unneeded = await engine.request(params={"truncate_prompt_tokens": -1})

    assert whole.prompt == (BOS, *b"hello")
    assert cut.prompt == tuple(b"lo")
    assert ids.prompt == PROMPT[-1:]
    assert unneeded.prompt == PROMPT


async def test_stop_strings_end_a_sample_and_its_tokens_stay(engine: Engine) -> None:
    (message,) = await engine.generate(params={"stop": ["bc"], "max_tokens": 9})

    assert bytes(message.complete.output_ids) == b"abc"
    assert message.complete.finish_reason == "stop"
    assert message.complete.matched_stop_str == "bc"


async def test_stop_tokens_are_among_the_tokens_and_only_asked_for_ones_are_named() -> None:
    async with running_edge(FakeGenerator(lambda _request, _index: iter((97, EOS)))) as edge:
        engine = over(edge)
        (ended,) = await engine.generate()
        (stopped,) = await engine.generate(params={"stop_token_ids": [97]})

    assert list(ended.complete.output_ids) == [97, EOS]
    assert ended.complete.finish_reason == "stop"
    assert ended.complete.WhichOneof("matched_stop") is None
    assert list(stopped.complete.output_ids) == [97]
    assert stopped.complete.matched_token_id == 97


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_come_once(engine: Engine, stream: bool) -> None:
    messages = await engine.generate(
        stream=stream, params={"logprobs": 2, "prompt_logprobs": 1, "max_tokens": 2}
    )

    parts = [getattr(m, m.WhichOneof("response")) for m in messages]
    told = [part.output_logprobs for part in parts if part.HasField("output_logprobs")]
    assert [token for one in told for token in one.token_ids] == [97, 98]
    assert [value for one in told for value in one.token_logprobs] == [-0.5, -0.5]
    assert list(told[0].top_logprobs[0].token_ids) == [97, 98]
    assert list(told[0].top_logprobs[0].values) == [-0.5, -1.5]
    (prompt,) = (part.input_logprobs for part in parts if part.HasField("input_logprobs"))
    assert list(prompt.token_ids) == list(PROMPT)
    assert not prompt.token_logprobs[0].HasField("value")
    assert prompt.token_logprobs[1].value == -0.5


async def test_logprobs_of_zero_have_no_alternatives(engine: Engine) -> None:
    (message,) = await engine.generate(params={"logprobs": 0})
    assert len(message.complete.output_logprobs.token_logprobs) == 3
    assert not message.complete.output_logprobs.top_logprobs


async def test_abort_ends_each_request_that_it_names(engine: Engine) -> None:
    engine.generator.pause()
    calls = [engine.call(request_id=name) for name in ("a", "b", "c")]
    await engine.generator.until(lambda: len(engine.generator.live) == 3)

    await engine.stub.Abort(pb.AbortRequest(request_ids=["a", "unknown", "c"]))

    for call in (calls[0], calls[2]):
        (message,) = [message async for message in call]
        assert message.complete.finish_reason == "abort"
    assert list(engine.generator.live) == ["b"]
    calls[1].cancel()


async def test_a_cancelled_call_lets_go_of_its_request(engine: Engine) -> None:
    engine.generator.pause()
    call = engine.call(request_id="r", stream=True)
    await engine.generator.until(lambda: "r" in engine.generator.live)
    call.cancel()
    await engine.generator.until(lambda: engine.generator.closed == ["r"])


async def test_a_calls_deadline_travels_along(engine: Engine) -> None:
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=PROMPT), sampling_params=pb.SamplingParams(n=1)
    )
    engine.generator.pause()
    call = engine.stub.Generate(request, timeout=60)
    await engine.generator.until(lambda: bool(engine.generator.live))
    assert engine.generator.requests[-1].deadline is not None
    call.cancel()


async def test_a_group_that_dies_is_a_status(engine: Engine) -> None:
    engine.generator.pause()
    call = engine.call(stream=True)
    await engine.generator.until(lambda: bool(engine.generator.live))
    engine.generator.set_health(HealthState.NOT_READY, "rank 1 is gone")

    with pytest.raises(grpc.aio.AioRpcError) as broken:
        await call.read()
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    assert broken.value.details() == "rank 1 is gone"


async def test_health_tells_the_cause_in_both_services(engine: Engine) -> None:
    health = health_pb2_grpc.HealthStub(engine.edge.channel)
    question = health_pb2.HealthCheckRequest(service=SERVICE)

    up = await engine.stub.HealthCheck(pb.HealthCheckRequest())
    assert (up.healthy, up.message) == (True, "ready")
    assert (await health.Check(question)).status == health_pb2.HealthCheckResponse.SERVING

    engine.generator.set_health(HealthState.NOT_READY, "rank 1 is gone")
    down = await engine.stub.HealthCheck(pb.HealthCheckRequest())
    assert (down.healthy, down.message) == (False, "not_ready: rank 1 is gone")
    assert (await health.Check(question)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_server_on_its_way_out_says_so_while_it_answers(engine: Engine) -> None:
    assert (await engine.stub.HealthCheck(pb.HealthCheckRequest())).healthy
    await engine.edge.edge.retire(0)
    leaving = await engine.stub.HealthCheck(pb.HealthCheckRequest())
    assert not leaving.healthy
    assert "shutting down" in leaving.message
    assert await engine.generate()


async def test_the_model_and_the_server_are_described(engine: Engine) -> None:
    model = await engine.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.model_path, model.served_model_name) == ("fake", "fake")
    assert (model.is_generation, model.supports_vision) == (True, False)
    assert (model.max_context_length, model.vocab_size) == (1 << 20, 258)
    assert list(model.eos_token_ids) == [EOS]
    assert list(model.architectures) == ["FakeForCausalLM"]

    server = await engine.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.max_num_seqs, server.block_size) == (32, 16)
    assert server.data_parallel_size == 1
    assert server.model_dtype == "torch.float32"
    assert server.last_receive_timestamp == 0
    assert server.uptime_seconds > 0


async def test_of_several_models_the_first_by_name_answers_and_without_any_none() -> None:
    def served(name: str) -> Served:
        generator = FakeGenerator(model=dataclasses.replace(MODEL, name=name))
        return Served(generator, Texts(None, generator.model), FACTS)

    models = Models(served("b"), served("a"))
    edge = Edge(models, ServerConfig(grpc_port=0, http=False))
    await edge.start()
    try:
        async with grpc.aio.insecure_channel(edge.address) as channel:
            stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            info = await stub.GetModelInfo(pb.GetModelInfoRequest())
            assert info.served_model_name == "a"
            assert info.tokenizer_path == ""

            for name in models.names:
                models.remove(name)
            health = await stub.HealthCheck(pb.HealthCheckRequest())
            assert (health.healthy, health.message) == (
                False,
                "no model is served yet: try again later",
            )
    finally:
        await edge.stop(0)


async def test_loads_are_those_of_the_generator(engine: Engine) -> None:
    loads = await engine.stub.GetLoads(pb.GetLoadsRequest())
    (load,) = loads.loads
    assert (loads.dp_rank_count, loads.version) == (1, "1.2.3")
    assert (load.num_used_tokens, load.max_total_num_tokens) == (3 * 16, 64 * 16)
    assert load.token_usage == 3 / 64
    assert load.cache_hit_rate == 48 / 200
    assert load.max_running_requests == 32
    assert not (await engine.stub.GetLoads(pb.GetLoadsRequest(dp_rank=1))).loads


def test_throughput_is_of_a_second_at_least() -> None:
    times = iter((0.0, 0.5, 2.0, 2.1, 4.0, 5.0))
    throughput = Throughput(lambda: next(times))
    rates = [throughput.of("m", count) for count in (100, 150, 300, 400, 300, 0)]
    assert rates == [0, 0, 100, 100, 0, 0]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Embed", pb.EmbedRequest()),
        ("FlushCache", common_pb2.FlushCacheRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
    ],
)
async def test_what_there_is_not_says_why(engine: Engine, method: str, request_: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(engine.stub, method)(request_)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert method in (refused.value.details() or "")


async def test_the_tokenizer_travels_as_a_folder_of_transformers(tmp_path: Path) -> None:
    codec = TextCodec(byte_level())
    async with running_edge(codec=codec) as edge:  # type: ignore[arg-type]
        call = over(edge).stub.GetTokenizer(common_pb2.GetTokenizerRequest())
        chunks = [chunk async for chunk in call]

    data = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
    there = AutoTokenizer.from_pretrained(tmp_path)
    assert there.chat_template == CHAT_TEMPLATE
    for text in ("hello <|end|>", "naïve 🙂"):
        assert there(text)["input_ids"] == codec.encode(text)


async def test_reflection_knows_the_service(engine: Engine) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(engine.edge.channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, found = [answer async for answer in stub.ServerReflectionInfo(iter(questions))]
    assert SERVICE in [one.name for one in listed.list_services_response.service]
    assert found.file_descriptor_response.file_descriptor_proto


async def test_limits_hold_here_too(tmp_path: Path) -> None:
    limits = tmp_path / "limits.yaml"
    limits.write_text("default: {requests_per_minute: 1}\n")
    async with running_edge(limits_file=str(limits)) as edge:
        await over(edge).generate()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await over(edge).generate()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_token_is_asked_for_here_too(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("gateway:secret\n")
    async with running_edge(token_file=str(tokens)) as edge:
        stub = over(edge).stub
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.HealthCheck(pb.HealthCheckRequest())
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        known = (("authorization", "Bearer secret"),)
        assert (await stub.HealthCheck(pb.HealthCheckRequest(), metadata=known)).healthy
