"""A real driver's counters, through the exposition, against what was sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.driver import Driver
from cluster.engine_loop import StepSample
from cluster.request import HealthState, Request, SamplingParams, Stopping
from deploy.telemetry.metrics import Metrics
from tests.models import save, tiny_model
from tests.ranks import ThreadLauncher

WORLD = 2


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    save(tiny_model("llama", num_attention_heads=9, num_key_value_heads=3), tmp_path)
    config = ClusterConfig(
        model=str(tmp_path),
        served_name="tiny",
        tensor_parallel=WORLD,
        kv_memory=1 << 20,  # type: ignore[arg-type]
        threads_per_rank=1,
        block_size=8,
    )
    driver = Driver(draw_up(config))
    driver.start(ThreadLauncher(WORLD))
    yield driver
    driver.stop()


def run(driver: Driver, name: str, prompt: tuple[int, ...], tokens: int, n: int = 1) -> None:
    stopping = Stopping(max_tokens=tokens, ignore_eos=True)
    request = Request(name, prompt, SamplingParams(temperature=0.0), stopping, n=n)
    assert sum(len(event.tokens) for event in driver.submit(request)) == tokens * n


async def test_counters_equal_what_was_sent(driver: Driver) -> None:
    prompt = tuple(range(1, 21))
    run(driver, "first", prompt, 5)
    run(driver, "again", prompt, 7)
    run(driver, "twice", (9, 8, 7), 4, n=2)
    metrics = Metrics(lambda: (driver,))
    await metrics.refresh()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})

    assert value("vllm:generation_tokens_total", engine="0") == 5 + 7 + 2 * 4
    assert value("vllm:prompt_tokens_total", engine="0") == 20 + 20 + 2 * 3
    # The second time, the two whole blocks of the prompt are there.
    assert value("vllm:prefix_cache_hits_total", engine="0") == 16
    assert value("vllm:num_requests_running", engine="0") == 0
    steps = value("headwise_steps_total")
    assert steps is not None
    assert steps >= 5 + 7 + 4
    for rank in map(str, range(WORLD)):
        assert value("headwise_rank_steps_total", rank=rank) == steps
        whole = value("headwise_rank_step_seconds_total", rank=rank)
        phases = [
            value("headwise_rank_phase_seconds_total", rank=rank, phase=phase)
            for phase in ("embed", "attention", "ffn", "all_reduce", "output", "sample")
        ]
        assert whole == pytest.approx(sum(phase or 0.0 for phase in phases))
        assert whole
        assert value("headwise_rank_up", rank=rank) == 1
        assert value("headwise_rank_resident_bytes", rank=rank)


async def test_ranks_that_are_gone_keep_nobody_waiting(driver: Driver) -> None:
    told = await driver.rank_counters()
    assert [one.rank for one in told] == [0, 1]
    driver.stop()
    assert [one.rank for one in await driver.rank_counters()] == [0, 1]


def test_one_step_in_so_many_is_told_of(driver: Driver) -> None:
    samples = []
    driver.loop.sample_steps(2, samples.append)
    run(driver, "sampled", tuple(range(10)), 9)

    assert [sample.step for sample in samples] == [2, 4, 6, 8]
    assert {sample.tokens for sample in samples} == {1}
    assert all(sample.sent_ns < sample.received_ns for sample in samples)
    assert all(sample.seconds.total > 0 for sample in samples)


def test_a_watcher_that_fails_is_not_asked_again(driver: Driver) -> None:
    asked = []

    def fail(sample: StepSample) -> None:
        asked.append(sample.step)
        raise RuntimeError("no room for spans")

    driver.loop.sample_steps(1, fail)
    run(driver, "watched", tuple(range(10)), 5)

    assert len(asked) == 1
    assert driver.health().state is HealthState.READY
