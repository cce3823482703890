"""A driver used over a link is the driver: its events, its refusals, its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest, NoToken, Overloaded, Unavailable, Violation
from cluster.request import FinishReason, HealthState, SamplingParams, TokenEvent
from deploy.fleet.directory import Entry
from deploy.fleet.link_server import LinkServer
from deploy.fleet.messages import error_of, fault_of
from deploy.fleet.remote import RemoteGenerator
from deploy.fleet.wire import LinkBroken
from tests.unit.edge_server import FACTS
from tests.unit.fakes import FakeGenerator
from tests.unit.fleet_replicas import HOST, KEY, linked, request


async def test_events_arrive_as_they_were_sent() -> None:
    asked = request(
        n=2, max_tokens=4, sampling=SamplingParams(seed=2**64 - 1, logprobs=2, prompt_logprobs=1)
    )
    direct = [event async for event in FakeGenerator().submit(asked)]
    async with linked() as link:
        events = [event async for event in link.remote.submit(asked)]

        assert link.generator.requests == [asked]
    assert _merged(events) == _merged(direct)


def _merged(events: list[TokenEvent]) -> dict[int, tuple[object, ...]]:
    """What matters however events were put together on the way."""
    samples: dict[int, list[TokenEvent]] = {}
    for event in events:
        samples.setdefault(event.index, []).append(event)
    return {
        index: (
            tuple(token for part in parts for token in part.tokens),
            tuple(entry for part in parts for entry in part.logprobs),
            parts[0].prompt_logprobs,
            parts[0].queued,
            replace(parts[-1], tokens=(), logprobs=(), prompt_logprobs=None, queued=None),
        )
        for index, parts in samples.items()
    }


async def test_many_streams_share_a_link() -> None:
    async with linked() as link:

        async def read(number: int) -> list[int]:
            stream = link.remote.submit(request(str(number), max_tokens=number + 1))
            return [token async for event in stream for token in event.tokens]

        lengths = [len(tokens) for tokens in await asyncio.gather(*map(read, range(32)))]
    assert lengths == list(range(1, 33))


async def test_a_deadline_is_one_on_the_other_host_too() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.remote.submit(request(deadline=time.monotonic() + 0.05))
        last = [event async for event in stream][-1]
    assert last.finish is FinishReason.DEADLINE


async def test_what_nobody_reads_any_more_is_let_go_of() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.remote.submit(request())
        await link.generator.until(lambda: "r" in link.generator.live)
        stream.close()
        await link.generator.until(lambda: link.generator.closed == ["r"])


async def test_abort_reaches_the_driver() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.remote.submit(request())
        await link.generator.until(lambda: "r" in link.generator.live)

        assert await link.remote.abort("r")
        assert [event async for event in stream][-1].finish is FinishReason.ABORTED
        assert not await link.remote.abort("r")


async def test_abort_tells_of_what_another_edge_submitted() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.generator.submit(request())

        assert await link.remote.abort("r")
        assert [event async for event in stream][-1].finish is FinishReason.ABORTED


async def test_finish_sample_ends_one_of_several() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.remote.submit(request(n=2, max_tokens=3))
        await link.generator.until(lambda: "r" in link.generator.live)
        stream.finish_sample(0)
        # Behind `finish_sample` on the link: it has been taken when this one has.
        link.remote.submit(request("next"))
        await link.generator.until(lambda: "next" in link.generator.live)
        link.generator.resume()
        ended = {event.index for event in [e async for e in stream] if event.finish is not None}
    assert ended == {1}


@pytest.mark.parametrize(
    "refusal",
    [
        Overloaded("full", 1.5),
        Unavailable("rank 1 is gone"),
        NoToken("NaN"),
        InvalidRequest(Violation("prompt", "too long"), Violation("n", "too many")),
    ],
)
async def test_refusals_keep_their_meaning(refusal: Exception) -> None:
    generator = FakeGenerator()
    generator.refusal = refusal
    async with linked(generator) as link:
        with pytest.raises(type(refusal)) as caught:
            [event async for event in link.remote.submit(request())]
    assert str(caught.value) == str(refusal)
    assert vars(caught.value) == vars(refusal)


def test_an_unexpected_error_is_told_as_one() -> None:
    error = error_of(fault_of(KeyError("lost")))
    assert isinstance(error, RuntimeError)
    assert "KeyError" in str(error)


async def test_streams_of_a_broken_link_end_unavailable_and_its_requests_are_dropped() -> None:
    async with linked() as link:
        link.generator.pause()
        stream = link.remote.submit(request())
        await link.generator.until(lambda: "r" in link.generator.live)
        await link.server.close()
        with pytest.raises(Unavailable, match="replica far is gone"):
            [event async for event in stream]
        await link.generator.until(lambda: link.generator.closed == ["r"])

        assert link.remote.health().state is HealthState.NOT_READY
        with pytest.raises(Unavailable):
            link.remote.submit(request())


async def test_a_retiring_driver_refuses_what_is_new_and_ends_what_runs() -> None:
    async with linked() as link:
        link.generator.pause()
        running = link.remote.submit(request("old"))
        await link.generator.until(lambda: "old" in link.generator.live)
        link.server.retire()
        with pytest.raises(Unavailable, match="retiring"):
            [event async for event in link.remote.submit(request("new"))]
        assert link.remote.retiring
        link.generator.resume()

        assert [event async for event in running][-1].finish is FinishReason.LENGTH
        await link.server.drained(5)


async def test_the_other_end_has_to_know_the_key() -> None:
    server = LinkServer(FakeGenerator(), None, FACTS, KEY)
    address = await server.start(HOST)
    with pytest.raises(LinkBroken):
        await RemoteGenerator.connect(Entry("far", "fake", "v1", 1.0, address, b"another"))
    await server.close()


async def test_an_address_without_a_listener_is_a_broken_link() -> None:
    with pytest.raises(LinkBroken, match="cannot be reached"):
        await RemoteGenerator.connect(Entry("far", "fake", "v1", 1.0, f"{HOST}:1", KEY))
