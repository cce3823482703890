"""The soak's own judgement: what it counts as growth, as an error, and as a wrong answer."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.soak_load import Customers
from benchmarks.soak_watch import Sample, Watch, error_lines, growth, newcomers
from cluster.request import Request
from headwise import AsyncClient
from tests.unit.edge_server import running_edge
from tests.unit.fakes import ALPHABET, FakeGenerator, alphabet

NAMES = {1: "root", 2: "rank 0", 3: "late", 4: "gone"}


def samples(*rss: dict[int, int]) -> list[Sample]:
    return [Sample(10.0 * number, {}, found) for number, found in enumerate(rss)]


def test_growth_is_from_when_the_load_had_settled() -> None:
    found = growth(
        samples({1: 10}, {1: 100}, {1: 102}, {1: 90}, {1: 110}, {1: 400}, {1: 105}),
        NAMES,
        settled=5.0,
    )

    # Medians of three: 100 of 100, 102, 90 and 110 of 110, 400, 105.
    (only,) = found
    assert (only.name, only.early, only.late) == ("root", 100, 110)
    assert only.share == pytest.approx(0.1)


def test_growth_is_of_processes_that_were_always_there_the_largest_first() -> None:
    taken = samples({1: 5, 2: 9, 4: 1}, {1: 5, 2: 9}, {1: 5, 2: 9, 3: 1})

    assert [each.pid for each in growth(taken, NAMES, settled=0)] == [2, 1]
    assert newcomers(taken, settled=0) == {3}
    assert newcomers(taken, settled=15) == set()


def test_a_watch_sees_its_process_by_the_name_given() -> None:
    watch = Watch(os.getpid(), {os.getpid(): "me"})
    watch.take(0.0, {"running": 1})

    assert watch.samples[0].rss[os.getpid()] > 1 << 20
    assert watch.names[os.getpid()] == "me"


def test_nothing_to_watch_is_no_process_at_all() -> None:
    watch = Watch(None, {})
    watch.take(0.0, {"running": 1})

    assert watch.samples == [Sample(0.0, {"running": 1}, {})]
    assert growth(watch.samples, watch.names, 0) == []


def test_lines_that_tell_of_an_error() -> None:
    bad = [
        '{"event": "unexpected error", "level": "error"}\n',
        "2026-11-22 17:28:27 [error    ] unexpected error\n",
        "Traceback (most recent call last):\n",
    ]
    good = [
        '{"event": "call", "level": "info", "outcome": "error"}\n',
        "2026-11-22 17:28:27 [info     ] call outcome=InternalError\n",
        "7\n",
    ]

    assert error_lines([*good, *bad]) == [line.rstrip() for line in bad]


async def visit(generator: FakeGenerator, acts: int = 80) -> Customers:
    async with running_edge(generator) as edge, AsyncClient(edge.edge.address) as client:
        model, server = await client.model_info(), await client.server_info()
        customers = Customers(edge.edge.address, client, model, server, seed=1)
        await customers.learn()
        await customers.shop(8, lambda: customers.done.total() >= acts)
        await generator.until(lambda: not generator.live)
    return customers


async def test_customers_do_everything_and_find_no_fault_in_a_good_server() -> None:
    customers = await visit(FakeGenerator())

    assert customers.faults == []
    assert set(customers.done) == {
        *("complete", "repeat", "cancel", "disconnect", "deadline", "abort", "bad")
    }


async def test_customers_notice_answers_that_are_not_those_given_alone() -> None:
    answered = 0

    def fickle(request: Request, index: int) -> Iterator[int]:
        nonlocal answered
        answered += 1
        # The references are the first requests.
        return alphabet(request, index) if answered <= 20 else iter(ALPHABET[5:] * 100)

    customers = await visit(FakeGenerator(fickle))

    assert any("otherwise than alone" in fault for fault in customers.faults)
    assert customers.done["fault"] > 0
