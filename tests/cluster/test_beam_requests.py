"""The life of a beam search in the driver, whatever becomes of it; what it finds is for parity."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.engine import Engine, Generation
from cluster.errors import InvalidRequest, Overloaded
from cluster.request import BeamParams, FinishReason, Request, SamplingParams, Stopping
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

LONG = Request("long", (1, 2, 3), stopping=Stopping(max_tokens=240), n=2, beams=BeamParams(3))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = save(tiny_model("llama"), tmp_path_factory.mktemp("llama"))
    config = ClusterConfig(model=str(path), threads_per_rank=1, max_queued_requests=2)
    with Engine(config, launcher=ThreadLauncher(1)) as engine:
        yield engine


@pytest.fixture
def driver(engine: Engine) -> Iterator[Driver]:
    yield engine.driver
    settle(engine.driver)
    load = engine.driver.load()
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)


def settle(driver: Driver) -> None:
    """Returns when the driver has computed some steps since it was called."""
    sampling = SamplingParams(temperature=0.0)
    list(driver.submit(Request("settle", (1,), sampling, Stopping(max_tokens=4))))


def test_the_engine_gives_the_best_hypothesis(engine: Engine) -> None:
    best = engine.generate([1, 2, 3], max_tokens=8, beam_width=4, length_penalty=0.5)
    assert isinstance(best, Generation)
    likely = engine.generate([1, 2, 3], max_tokens=8, temperature=0, logprobs=0)
    assert len(best.token_ids) == 8
    assert best.score is not None
    assert likely.logprobs is not None
    assert best.score >= sum(entry.logprob for entry in likely.logprobs) / 8**0.5
    assert likely.score is None


def test_the_engine_refuses_what_a_search_cannot_do(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.generate([1], beam_width=1, temperature=0.5)
    fields = [violation.field for violation in refused.value.violations]
    assert fields == ["beam_search.width", "sampling.temperature"]


def test_usage_tells_of_the_hypothesis_and_the_prompt_they_share(driver: Driver) -> None:
    prompt = tuple(range(40))
    request = replace(LONG, prompt=prompt, stopping=Stopping(max_tokens=6), n=3)
    for cached in (0, 32):
        events = list(driver.submit(request))
        assert [event.index for event in events] == [0, 1, 2]
        for event in events:
            assert event.usage is not None
            assert event.timing is not None
            assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (40, 6)
            assert event.usage.cached_tokens == cached
            assert 0 <= event.timing.queue <= event.timing.first_token <= event.timing.total
            assert event.seed == 0


def test_an_aborted_search_tells_so_for_each_hypothesis(driver: Driver) -> None:
    stream = driver.submit(LONG)
    settle(driver)
    assert asyncio.run(driver.abort("long"))
    events = list(stream)
    assert [event.finish for event in events] == [FinishReason.ABORTED] * 2
    assert [event.tokens for event in events] == [(), ()]
    assert [event.usage.completion_tokens for event in events if event.usage] == [0, 0]


def test_a_deadline_ends_a_search(driver: Driver) -> None:
    stream = driver.submit(replace(LONG, deadline=time.monotonic()))
    assert {event.finish for event in stream} == {FinishReason.DEADLINE}


def test_a_search_that_nobody_reads_ends(driver: Driver) -> None:
    stream = driver.submit(LONG)
    settle(driver)
    stream.close()


def test_a_hypothesis_that_its_reader_gives_up_is_not_sent(driver: Driver) -> None:
    request = replace(LONG, stopping=Stopping(max_tokens=60))
    expected = list(driver.submit(request))
    stream = driver.submit(request)
    stream.finish_sample(0)
    assert [(event.index, event.tokens) for event in stream] == [(1, expected[1].tokens)]


def test_a_search_is_admitted_with_all_its_hypotheses(driver: Driver) -> None:
    searches = [driver.submit(replace(LONG, id=f"long-{i}", n=1)) for i in range(11)]
    with pytest.raises(Overloaded, match="33 sequences are waiting or running"):
        driver.submit(LONG)
    for stream in searches:
        stream.close()
