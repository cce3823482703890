"""Resuming with a model that really computes: tiny and random, two ranks, tokens that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from headwise import RetryPolicy
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher
from tests.unit.client_faults import CuttingProxy, EdgeThread, Loop
from tests.unit.client_server import CLIENTS
from tests.unit.fakes import VOCABULARY


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("llama")
    # Tokens are bytes: a random model's text is characters cut anywhere, and bytes that are none.
    save(tiny_model("llama", vocab_size=VOCABULARY), folder)
    config = ClusterConfig(
        model=str(folder), tensor_parallel=2, kv_memory=1 << 20, threads_per_rank=1
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(2))
    yield driver
    driver.stop()


@pytest.mark.parametrize("kind", CLIENTS)
def test_drawn_tokens_go_on_as_they_would_have(kind: Any, driver: Driver) -> None:
    loop = Loop()
    edge = EdgeThread(loop, driver)
    options = {"max_tokens": 50, "seed": 11, "repetition_penalty": 1.25, "logprobs": 2}
    try:
        with CuttingProxy(loop, edge.address) as proxy, kind(edge.address) as client:
            whole = client.generate("hello", **options)
            for cut in (700, 1500, 2900):
                proxy.cuts.clear()
                proxy.cuts.extend([(cut, True), (700, False)])
                connections = proxy.connections
                with kind(proxy.address, retries=RetryPolicy(initial_backoff=0.01)) as broken:
                    answer = broken.generate("hello", **options)
                assert proxy.connections >= connections + 2
                assert (answer.text, answer.token_ids) == (whole.text, whole.token_ids)
                again, first = answer.choices[0], whole.choices[0]
                assert (again.seed, again.finish_reason) == (first.seed, first.finish_reason)
                assert again.usage.completion_tokens == first.usage.completion_tokens == 50
                assert [entry.logprob for entry in again.logprobs] == pytest.approx(
                    [entry.logprob for entry in first.logprobs], abs=1e-5
                )
    finally:
        edge.stop()
        loop.close()
