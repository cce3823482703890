"""Any message at all, with any value in any field: a status that says why, or an answer; never
INTERNAL or UNKNOWN, never a hang, and the server goes on answering."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import hypothesis
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from pydantic import ByteSize

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from headwise.v1 import control_pb2
from headwise.v1 import inference_pb2 as pb
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.fakes import MODEL
from tests.unit.tiny_tokenizers import byte_level

GENERATE = "/headwise.v1.Inference/Generate"
ANSWER_SECONDS = 20
# So many batches of up to five calls; set it to look for more than a change may have broken.
EXAMPLES = int(os.environ.get("HEADWISE_FUZZ", "60"))
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHODS: dict[str, type[Message]] = {
    "/headwise.v1.Inference/Generate": pb.GenerateRequest,
    "/headwise.v1.Inference/Chat": pb.ChatRequest,
    "/headwise.v1.Inference/Tokenize": pb.TokenizeRequest,
    "/headwise.v1.Inference/Detokenize": pb.DetokenizeRequest,
    "/headwise.v1.Control/GetServerInfo": control_pb2.GetServerInfoRequest,
    "/headwise.v1.Control/Abort": control_pb2.AbortRequest,
}

Strategy = st.SearchStrategy[Any]

TEXTS = st.one_of(
    st.sampled_from(["", "fake", "user", "{}", "[", '{"a": 1e999}', '{"type": "object"}', "(a*)*"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, -3.4e38]),
    st.floats(width=32),
)


def integers(low: int, high: int) -> Strategy:
    edges = [value for value in (low, 0, 1, 2, MODEL.vocabulary, high) if low <= value <= high]
    return st.one_of(st.sampled_from(edges), st.integers(0, 4), st.integers(low, high))


SCALARS: dict[int, Strategy] = {
    FieldDescriptor.CPPTYPE_INT32: integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.one_of(FLOATS, st.floats()),
    FieldDescriptor.CPPTYPE_FLOAT: FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: TEXTS,
    FieldDescriptor.CPPTYPE_ENUM: integers(0, 2**31 - 1),
}


def values(field: FieldDescriptor, depth: int) -> Strategy:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth - 1)
    return SCALARS[field.cpp_type]


@st.composite
def messages(draw: Any, descriptor: Descriptor, depth: int = 4) -> Message:
    """A message with any of its fields set to anything."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        deep = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if (deep and depth == 0) or not draw(st.integers(0, 2)):
            continue
        if deep and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name.values()
            entries = draw(st.dictionaries(values(key, 0), values(value, depth), max_size=3))
            into = getattr(message, field.name)
            for name, entry in entries.items():
                if isinstance(entry, Message):
                    into[name].CopyFrom(entry)
                else:
                    into[name] = entry
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field, depth), max_size=4)))
        elif deep:
            getattr(message, field.name).CopyFrom(draw(values(field, depth)))
        else:
            setattr(message, field.name, draw(values(field, depth)))
    return message


@st.composite
def calls(draw: Any) -> tuple[str, bytes]:
    """A method, and a message of it: sometimes damaged on the way."""
    method = draw(st.sampled_from(sorted(METHODS)))
    data = draw(messages(METHODS[method].DESCRIPTOR)).SerializeToString()
    if data and not draw(st.integers(0, 5)):
        position = draw(st.integers(0, len(data) - 1))
        data = data[:position] + draw(st.binary(max_size=3)) + data[position + 1 :]
    return method, data


async def answer(edge: RunningEdge, method: str, data: bytes) -> grpc.StatusCode:
    """The status; a long answer is broken off."""
    call = edge.channel.unary_stream(method)(data, timeout=ANSWER_SECONDS)
    read = 0
    try:
        async for _ in call:
            read += 1
            if read == 50:
                call.cancel()
                return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@contextlib.contextmanager
def edge_on_a_loop(**arguments: Any) -> Iterator[tuple[RunningEdge, asyncio.Runner]]:
    """Hypothesis' examples are functions; all of them share an edge, and the loop it belongs to."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        edge = runner.run(stack.enter_async_context(running_edge(**arguments)))
        yield edge, runner
        runner.run(stack.aclose())


def fuzz(edge: RunningEdge, runner: asyncio.Runner, examples: int) -> None:
    healthy = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]), stopping=pb.Stopping(max_tokens=1)
    ).SerializeToString()

    async def send(batch: list[tuple[str, bytes]]) -> None:
        codes = await asyncio.gather(*(answer(edge, method, data) for method, data in batch))
        for code, (method, data) in zip(codes, batch, strict=True):
            assert code in EXPECTED, (code, method, data)
        assert await answer(edge, GENERATE, healthy) is grpc.StatusCode.OK

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize="HEADWISE_FUZZ" not in os.environ,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(calls(), min_size=1, max_size=5))
    def check(batch: list[tuple[str, bytes]]) -> None:
        runner.run(send(batch))

    check()


def test_any_message_over_a_fake_generator() -> None:
    with edge_on_a_loop() as (edge, runner):
        fuzz(edge, runner, EXAMPLES)


def test_any_message_over_a_real_engine(tmp_path: Path) -> None:
    tokenizer = byte_level()
    save(tiny_model("llama", vocab_size=len(tokenizer)), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ClusterConfig(
        model=str(tmp_path),
        tensor_parallel=2,
        kv_memory=ByteSize(1 << 20),
        max_sequences=4,
        max_context=32,
        threads_per_rank=1,
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(2))
    try:
        with edge_on_a_loop(generator=driver, codec=driver.codec) as (edge, runner):
            fuzz(edge, runner, EXAMPLES // 2)
    finally:
        driver.stop()
