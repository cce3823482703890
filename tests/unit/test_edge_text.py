"""What the event loop never does itself, and what is refused before any work is done on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.constraints import ConstraintChecker
from headwise.v1 import inference_pb2 as pb
from tests.unit.edge_server import RunningEdge, running_edge
from tests.unit.fakes import MODEL, FakeCodec, FakeGenerator
from tests.unit.test_edge_errors import error_of, violations

ONE = pb.Stopping(max_tokens=1)


class WatchedCodec(FakeCodec):
    """Says which of its methods ran, and whether on the loop's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = threading.get_ident()
        self.calls: set[tuple[str, bool]] = set()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        self._note("render_chat")
        return super().render_chat(messages, **options)

    def token_text(self, token_id: int) -> str:
        self._note("token_text")
        return super().token_text(token_id)

    def _note(self, method: str) -> None:
        self.calls.add((method, threading.get_ident() == self.loop))


async def refused(edge: RunningEdge, messages: Sequence[pb.ChatMessage]) -> dict[str, str]:
    """What Chat finds wrong with a conversation; Tokenize says the same of it."""
    chat = await error_of(edge.inference.Chat(pb.ChatRequest(messages=messages, stopping=ONE)))
    conversation = pb.Conversation(messages=messages)
    other = await error_of(edge.inference.Tokenize(pb.TokenizeRequest(conversation=conversation)))
    found = violations(chat)
    assert violations(other) == {f"conversation.{field}": said for field, said in found.items()}
    return found


async def test_a_role_is_bounded() -> None:
    codec = WatchedCodec()
    messages = [
        pb.ChatMessage(role="user", content="x"),
        pb.ChatMessage(role="r" * 65, content="x"),
    ]
    async with running_edge(codec=codec) as edge:
        found = await refused(edge, messages)

    assert found.keys() == {"messages[1].role"}
    assert "65 bytes are more than 64" in found["messages[1].role"]
    assert codec.calls == set()


async def test_the_number_of_messages_is_bounded() -> None:
    codec = WatchedCodec()
    async with running_edge(codec=codec) as edge:
        found = await refused(edge, [pb.ChatMessage()] * 4097)

    assert found.keys() == {"messages"}
    assert "4097 entries are more than 4096" in found["messages"]
    assert codec.calls == set()


@pytest.mark.parametrize(("count", "inline"), [(1, True), (1000, False)])
async def test_many_messages_without_text_are_rendered_off_the_loop(
    count: int, inline: bool
) -> None:
    codec = WatchedCodec()
    async with running_edge(codec=codec) as edge:
        messages = [pb.ChatMessage(role="u")] * count
        call = edge.inference.Chat(pb.ChatRequest(messages=messages, stopping=ONE))
        assert [message.text async for message in call] == ["a"]

    assert codec.calls == {("render_chat", inline)}


async def test_detokenizing_more_than_a_context_is_refused() -> None:
    async with running_edge(FakeGenerator(model=replace(MODEL, context=8))) as edge:
        fits = await edge.inference.Detokenize(pb.DetokenizeRequest(token_ids=[97] * 8))
        error = await error_of(edge.inference.Detokenize(pb.DetokenizeRequest(token_ids=[97] * 9)))

    assert fits.text == "a" * 8
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "9 tokens are more than the context of 8" in violations(error)["token_ids"]


@pytest.mark.parametrize(("prompt", "inline"), [(10, True), (200, False)])
async def test_log_probabilities_of_a_long_prompt_are_spelled_off_the_loop(
    prompt: int, inline: bool
) -> None:
    codec = WatchedCodec()
    async with running_edge(codec=codec) as edge:
        (message,) = await edge.generate(
            token_ids=pb.TokenIds(ids=[97] * prompt),
            stopping=ONE,
            output=pb.OutputOptions(prompt_logprobs=3),
        )

    assert len(message.prompt_logprobs) == prompt
    assert message.prompt_logprobs[1].top[1].text == "b"
    assert codec.calls == {("token_text", inline)}


async def test_constraints_do_not_hold_up_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()
    monkeypatch.setattr(ConstraintChecker, "check", lambda _self, _request: tried.wait())
    async with running_edge() as edge:
        request = pb.GenerateRequest(text="x", constraint=pb.Constraint(regex="a"), stopping=ONE)
        waiting = [asyncio.ensure_future(_texts(edge.inference.Generate(request))) for _ in "abc"]
        try:
            long = pb.GenerateRequest(text="x" * 5000, stopping=ONE)
            assert await _texts(edge.inference.Generate(long)) == ["a"]
        finally:
            tried.set()
        await asyncio.gather(*waiting)


async def _texts(call: Any) -> list[str]:
    return [message.text async for message in call]
