"""Sending the load: how many at a time, what a failure does, how a run is cut short."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import Overloaded
from deploy.bench.record import INTERRUPTED, OK, Record
from deploy.bench.report import in_flight
from deploy.bench.run import Measured, measure
from deploy.bench.settings import BadLoad, Settings
from headwise import AsyncClient, UnavailableError
from tests.unit.edge_server import RunningEdge, running_edge


async def measured(
    edge: RunningEdge, *, on_end: Any = lambda record: None, **options: Any
) -> Measured:
    settings = Settings(**{"warmup": 0, "input_len": "6", "output_len": "4", **options})
    async with AsyncClient(edge.edge.address, retries=0) as client:
        return await measure(client, settings.completed(), on_end)


def statuses(found: Measured) -> set[str]:
    return {record.status for record in found.records}


async def test_a_closed_loop_sends_every_request_once() -> None:
    ended: list[Record] = []
    async with running_edge() as edge:
        found = await measured(edge, requests=20, concurrency=3, on_end=ended.append)

    assert sorted(record.index for record in found.records) == list(range(20))
    assert statuses(found) == {OK}
    assert {(record.tokens, record.prompt_tokens) for record in found.records} == {(4, 6)}
    assert len(edge.generator.requests) == len(ended) == 20
    assert all(request.stopping.ignore_eos for request in edge.generator.requests)
    assert all(record.due == record.sent for record in found.records)
    assert not found.interrupted


async def test_a_closed_loop_keeps_as_many_going_as_asked() -> None:
    async with running_edge() as edge:
        edge.generator.pause()
        running = asyncio.create_task(measured(edge, requests=9, concurrency=3))
        await edge.generator.until(lambda: len(edge.generator.live) == 3)
        edge.generator.resume()
        found = await running

    assert in_flight(found.records, found.seconds).peak == 3


async def test_an_open_loop_sends_whether_it_is_answered_or_not() -> None:
    async with running_edge() as edge:
        edge.generator.pause()
        running = asyncio.create_task(measured(edge, requests=12, rate=2000))
        await edge.generator.until(lambda: len(edge.generator.live) == 12)
        edge.generator.resume()
        found = await running

    due = [record.due for record in found.records]
    assert due == sorted(due)
    assert all(record.sent >= record.due for record in found.records)
    assert in_flight(found.records, found.seconds).peak == 12


async def test_what_waits_for_a_place_is_late_and_counts_as_such() -> None:
    async with running_edge() as edge:
        found = await measured(edge, requests=6, rate=1e6, concurrency=1)

    assert in_flight(found.records, found.seconds).peak == 1
    for before, record in zip(found.records, found.records[1:], strict=False):
        assert record.sent >= before.ended > record.due
        assert record.ttft == record.arrivals[0] - record.due


async def test_the_same_seed_is_the_same_load() -> None:
    async with running_edge() as edge:
        options = {"requests": 8, "rate": 1e6, "seed": 5, "input_len": "lognormal:30,1"}
        first = await measured(edge, **options)
        prompts = {request.prompt for request in edge.generator.requests}
        second = await measured(edge, **options)

    assert [each.due for each in first.records] == [each.due for each in second.records]
    assert {request.prompt for request in edge.generator.requests} == prompts


async def test_nothing_is_sent_after_the_duration() -> None:
    async with running_edge() as edge:
        closed = await measured(edge, duration_s=0.2, concurrency=2)
        opened = await measured(edge, duration_s=0.2, rate=100)

    assert statuses(closed) == statuses(opened) == {OK}
    assert max(record.due for record in closed.records) < 0.2
    assert max(record.due for record in opened.records) < 0.2


async def test_a_refusal_is_counted_not_tried_again() -> None:
    async with running_edge() as edge:
        edge.generator.refusal = Overloaded("the queue is full", retry_after=0.01)
        found = await measured(edge, requests=3, concurrency=3)

    assert statuses(found) == {"RESOURCE_EXHAUSTED"}
    assert len(found.records) == 3
    assert found.records[0].message.startswith("the queue is full")


async def test_a_request_that_takes_too_long_has_run_into_its_deadline() -> None:
    async with running_edge() as edge:
        edge.generator.pause()
        found = await measured(edge, requests=2, concurrency=2, timeout_s=0.1)

    assert statuses(found) == {"DEADLINE_EXCEEDED"}


async def test_a_warm_up_that_fails_ends_it() -> None:
    async with running_edge() as edge:
        edge.generator.refusal = Overloaded("the queue is full", retry_after=0.01)
        with pytest.raises(BadLoad, match="RESOURCE_EXHAUSTED: the queue is full"):
            await measured(edge, requests=1, warmup=2)


async def test_warm_up_requests_are_not_counted() -> None:
    async with running_edge() as edge:
        found = await measured(edge, requests=4, warmup=3)

    assert len(found.records) == 4
    assert len({request.prompt for request in edge.generator.requests}) == 7


@pytest.mark.parametrize("loop", [{"concurrency": 3}, {"rate": 1e6, "requests": 3}])
async def test_a_run_cut_short_returns_what_there_is(loop: dict[str, Any]) -> None:
    async with running_edge() as edge:
        edge.generator.pause()
        running = asyncio.create_task(measured(edge, **loop))
        await edge.generator.until(lambda: len(edge.generator.live) == 3)
        running.cancel()
        found = await running
        await edge.generator.until(lambda: not edge.generator.live)

    assert found.interrupted
    assert statuses(found) == {INTERRUPTED}
    assert len(found.records) == 3


async def test_a_server_that_goes_away_is_counted_and_reported() -> None:
    async with running_edge() as edge:
        edge.generator.pause()
        running = asyncio.create_task(measured(edge, requests=4, concurrency=2))
        await edge.generator.until(lambda: len(edge.generator.live) == 2)
        await edge.edge.stop(0)
        found = await running

    assert statuses(found) == {"UNAVAILABLE"}
    assert len(found.records) == 4
    assert found.after is None


async def test_a_server_that_was_never_there() -> None:
    async with running_edge() as edge:
        pass
    with pytest.raises(UnavailableError):
        await measured(edge)
