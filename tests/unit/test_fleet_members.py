"""Edges follow the fleet: replicas, models and versions come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from cluster.errors import Unavailable
from cluster.text import TextCodec
from deploy.fleet.directory import Entry, SoftDirectory
from tests.unit.fleet_replicas import KEY, Replica, join, request
from tests.unit.tiny_tokenizers import TRICKY, byte_level

LetIn = Callable[..., Awaitable[Replica]]


@pytest.fixture
async def fleet() -> AsyncIterator[LetIn]:
    """Lets replicas in, and ends them."""
    directory, replicas = SoftDirectory(), list[Replica]()

    async def let_in(name: str, **fields: Any) -> Replica:
        replicas.append(await join(directory, name, **fields))
        return replicas[-1]

    yield let_in
    for replica in replicas:
        await replica.kill()


async def settled(condition: Callable[[], bool]) -> None:
    """A link tells nobody in this test what became of it: it has to be asked."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_every_edge_answers_for_every_model(fleet: LetIn) -> None:
    one, other = await fleet("a", model="m1"), await fleet("b", model="m2")
    for replica in (one, other):
        models = replica.models
        await settled(lambda models=models: models.names == ("m1", "m2"))  # type: ignore[misc]
        for name in ("m1", "m2"):
            stream = replica.models.get(name).generator.submit(request(f"{replica.name}-{name}"))
            assert len([token async for event in stream for token in event.tokens]) == 5

    assert [asked.id for asked in one.generator.requests] == ["a-m1", "b-m1"]
    assert [asked.id for asked in other.generator.requests] == ["a-m2", "b-m2"]


async def test_the_tokenizer_comes_with_the_model(fleet: LetIn) -> None:
    codec = TextCodec(byte_level())
    await fleet("a", model="m1", codec=codec)
    other = await fleet("b", model="m2")
    await settled(lambda: "m1" in other.models.names)
    texts = other.models.get("m1").texts

    assert texts.has_chat_template
    for text in TRICKY:
        ids = await texts.encode(text, add_special_tokens=True, field="prompt")
        assert list(ids) == codec.encode(text)


async def test_replicas_of_a_model_are_one_generator(fleet: LetIn) -> None:
    replicas = [await fleet(name) for name in "abc"]
    generator = replicas[0].models.get("fake").generator

    assert {rank.replica for rank in generator.ranks} == {"a", "b", "c"}
    assert {rank.replica for rank in generator.health().ranks} == {"a", "b", "c"}
    assert generator.load().kv_blocks == 3 * replicas[0].generator.load().kv_blocks


async def test_new_requests_go_to_the_newest_version(fleet: LetIn) -> None:
    old = await fleet("old", version="v1", since=1.0)
    new = await fleet("new", version="v2", since=2.0)
    for replica in (old, new):
        [_ async for _ in replica.models.get("fake").generator.submit(request(replica.name))]

    assert not old.generator.requests
    assert [asked.id for asked in new.generator.requests] == ["old", "new"]


async def test_a_retiring_replicas_own_edge_hands_over(fleet: LetIn) -> None:
    old = await fleet("old")
    old.generator.pause()
    running = old.models.get("fake").generator.submit(request("running"))
    new = await fleet("new")

    assert await old.fleet.retire()
    old.links.retire()
    later = old.models.get("fake").generator.submit(request("later"))
    assert len([token async for event in later for token in event.tokens]) == 5
    assert [asked.id for asked in new.generator.requests] == ["later"]
    old.generator.resume()
    assert len([token async for event in running for token in event.tokens]) == 5


async def test_the_last_replica_of_a_model_has_nobody_to_hand_over_to(
    fleet: LetIn,
) -> None:
    one, _other = await fleet("a", model="m1"), await fleet("b", model="m2")
    assert not await one.fleet.retire()
    with pytest.raises(Unavailable, match="shutting down"):
        one.models.get("m1").generator.submit(request())


async def test_a_stream_goes_on_elsewhere_when_its_replica_dies(
    fleet: LetIn,
) -> None:
    asking, dying, spare = await fleet("a", model="m0"), await fleet("b"), await fleet("c")
    await settled(lambda: "fake" in asking.models.names)
    for replica in (dying, spare):
        replica.generator.pause()
    stream = asking.models.get("fake").generator.submit(request(max_tokens=6))
    tokens: list[int] = []

    async def read() -> None:
        async for event in stream:
            tokens.extend(event.tokens)

    reading = asyncio.create_task(read())
    await settled(lambda: bool(dying.generator.live or spare.generator.live))
    if spare.generator.live:
        dying, spare = spare, dying
    await dying.kill()
    spare.generator.resume()
    await reading

    assert bytes(tokens) == b"abcdef"
    assert [asked.id for asked in spare.generator.requests] == ["r"]


async def test_a_model_without_replicas_is_unavailable_before_it_is_unknown(
    fleet: LetIn,
) -> None:
    one, other = await fleet("a", model="m1"), await fleet("b", model="m2")
    await settled(lambda: one.models.names == ("m1", "m2"))
    await other.kill()
    served = one.models.get("m2")
    await settled(lambda: not served.generator.ranks)
    with pytest.raises(Unavailable, match="no replica of m2"):
        served.generator.submit(request())


async def test_entries_that_are_not_renewed_are_dropped() -> None:
    now = 0.0
    directory = SoftDirectory(clock=lambda: now)
    entry = Entry("a", "m", "v1", 1.0, "h:1", KEY)
    first = await directory.meet(entry, None)
    assert first.entries == (entry,)
    now = 4.0
    assert (await directory.meet(entry, None)).revision == first.revision
    now = 8.0
    assert (await directory.meet(None, None)).entries == (entry,)
    now = 10.0
    assert (await directory.meet(None, None)).entries == ()


async def test_whoever_waits_is_told_of_a_change_at_once() -> None:
    directory = SoftDirectory()
    known = (await directory.meet(None, None)).revision
    waiting = asyncio.create_task(directory.meet(None, known))
    await asyncio.sleep(0)
    entry = Entry("a", "m", "v1", 1.0, "h:1", KEY)
    await directory.meet(entry, None)
    assert (await waiting).entries == (entry,)
    await directory.leave("a")
    assert (await directory.meet(None, known)).entries == ()
