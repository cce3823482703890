"""Counters against what was sent, and the exposition against the catalog and the guide."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cluster.errors import InvalidRequest, Overloaded, Unavailable, Violation
from cluster.request import FinishReason, HealthState, Stopping
from deploy.edge.answers import Caller
from deploy.telemetry.catalog import CATALOG, Metric
from deploy.telemetry.engines import MOST_EXPERT_SERIES
from deploy.telemetry.metrics import Metrics
from tests.conftest import ROOT
from tests.unit.fakes import FakeGenerator
from tests.unit.watched import GRPC, answer, request

MODEL = {"model_name": "fake", "engine": "0"}


class Scrape:
    """What one exposition says."""

    def __init__(self, metrics: Metrics, generator: FakeGenerator) -> None:
        self.metrics, self.generator = metrics, generator

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def model(self, name: str, **labels: str) -> float | None:
        return self(name, **MODEL, **labels)

    def finished(self) -> dict[str, float | None]:
        return {
            reason: self.model("vllm:request_success_total", finished_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        }

    def errors(self, code: str) -> float | None:
        return self("headwise_request_errors_total", model_name="fake", api="grpc", code=code)

    def streams(self) -> float | None:
        return self("headwise_streams_open", model_name="fake", api="grpc")


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def scrape(generator: FakeGenerator) -> Scrape:
    metrics = Metrics(
        lambda: (generator,), connections=lambda: {"grpc": 3}, certificate_expiry=lambda: 2e9
    )
    return Scrape(metrics, generator)


async def test_finished_requests_are_counted_by_sample(
    generator: FakeGenerator, scrape: Scrape
) -> None:
    watchers = [scrape.metrics.requests]
    await answer(generator, watchers, request("a", prompt=3, max_tokens=4))
    await answer(generator, watchers, request("b", prompt=5, max_tokens=6, n=2))
    stop = Stopping(max_tokens=9, strings=("c",))
    await answer(generator, watchers, request("c", prompt=2, stopping=stop))

    assert scrape.finished() == {"stop": 1, "length": 3, "abort": 0, "error": 0}
    assert scrape.model("vllm:request_prompt_tokens_sum") == 3 + 5 + 5 + 2
    assert scrape.model("vllm:request_generation_tokens_sum") == 4 + 6 + 6 + 3
    assert scrape.model("vllm:request_params_n_sum") == 1 + 2 + 1
    assert scrape.model("vllm:request_params_max_tokens_sum") == 4 + 6 + 9
    assert scrape.model("vllm:time_to_first_token_seconds_count") == 4
    # Every token but each sample's first came some time after another.
    assert scrape.model("vllm:inter_token_latency_seconds_count") == 3 + 5 + 5 + 2
    assert scrape.streams() == 0


async def test_durations_are_the_drivers(generator: FakeGenerator, scrape: Scrape) -> None:
    """The fake's timing: 0.25 s in the queue, the first token after 0.5 s, the end after 1 s."""
    await answer(generator, [scrape.metrics.requests], request("a", max_tokens=6))

    found = {
        name: scrape.model(f"vllm:{name}_seconds_sum")
        for name in (
            "request_queue_time",
            "request_prefill_time",
            "request_decode_time",
            "request_inference_time",
            "e2e_request_latency",
            "request_time_per_output_token",
        )
    }
    assert list(found.values()) == [0.25, 0.25, 0.5, 0.75, 1.0, 0.1]


async def test_tokens_that_come_together_share_their_time(
    generator: FakeGenerator, scrape: Scrape
) -> None:
    watch = scrape.metrics.requests.begin("fake", request("a"), GRPC)
    (first, *_) = await answer(generator, [], request("b"))
    watch.delta(replace(first, tokens=(1, 2, 3)))
    watch.delta(replace(first, tokens=(4, 5)))
    watch.end(None)

    assert scrape.model("vllm:inter_token_latency_seconds_count") == 2
    assert scrape.model("vllm:time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (Overloaded("full", retry_after=2.0), "RESOURCE_EXHAUSTED"),
        (InvalidRequest(Violation("prompt", "too long")), "INVALID_ARGUMENT"),
    ],
)
async def test_a_refused_request_is_an_error_and_never_ended(
    generator: FakeGenerator, scrape: Scrape, refusal: Exception, code: str
) -> None:
    generator.refusal = refusal
    with pytest.raises(type(refusal)):
        await answer(generator, [scrape.metrics.requests], request("a"))

    assert scrape.errors(code) == 1
    assert set(scrape.finished().values()) == {0}
    hints = scrape("headwise_retry_hint_seconds_sum", model_name="fake", api="grpc")
    assert hints == (2.0 if isinstance(refusal, Overloaded) else 0.0)
    assert scrape.streams() == 0


async def test_requests_that_a_dying_group_ends(generator: FakeGenerator, scrape: Scrape) -> None:
    generator.pause()
    running = asyncio.create_task(answer(generator, [scrape.metrics.requests], request("a", n=2)))
    await generator.until(lambda: "a" in generator.live)
    assert scrape.streams() == 1
    generator.set_health(HealthState.NOT_READY, "rank 1 died")
    with pytest.raises(Unavailable):
        await running

    assert scrape.errors("UNAVAILABLE") == 1
    assert scrape.finished() == {"stop": 0, "length": 0, "abort": 0, "error": 2}
    assert scrape("headwise_ready", model_name="fake") == 0
    assert scrape("headwise_rank_up", model_name="fake", rank="1") == 0


async def test_a_client_that_leaves(generator: FakeGenerator, scrape: Scrape) -> None:
    generator.pause()
    running = asyncio.create_task(answer(generator, [scrape.metrics.requests], request("a")))
    await generator.until(lambda: "a" in generator.live)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert scrape.errors("CANCELLED") == 1
    assert scrape.finished()["abort"] == 1


async def test_a_request_that_an_operator_ends(generator: FakeGenerator, scrape: Scrape) -> None:
    generator.pause()
    running = asyncio.create_task(answer(generator, [scrape.metrics.requests], request("a")))
    await generator.until(lambda: "a" in generator.live)
    await generator.abort("a")
    assert (await running)[-1].finish is FinishReason.ABORTED

    assert scrape.errors("CANCELLED") == 1
    assert scrape.finished() == {"stop": 0, "length": 0, "abort": 1, "error": 0}


async def test_what_engine_and_ranks_say(generator: FakeGenerator, scrape: Scrape) -> None:
    await scrape.metrics.refresh()

    assert scrape.model("vllm:kv_cache_usage_perc") == 3 / 64
    assert scrape.model("vllm:prompt_tokens_total") == 200
    assert scrape.model("vllm:prefix_cache_hits_total") == 48
    assert scrape.model("vllm:num_preemptions_total") == 1
    config = {"block_size": "16", "num_gpu_blocks": "64", "cache_dtype": "float32"}
    assert scrape.model("vllm:cache_config_info", **config) == 1
    rank = {"model_name": "fake", "rank": "1"}
    assert scrape("headwise_rank_phase_seconds_total", **rank, phase="all_reduce") == 0.25
    assert scrape("headwise_rank_step_seconds_total", **rank) == 4.0
    assert scrape("headwise_rank_resident_bytes", **rank) == 9000
    assert scrape("headwise_rank_weight_bytes", **rank) == 4096
    assert scrape("headwise_connections", api="grpc") == 3
    assert scrape("headwise_certificate_expiry_timestamp_seconds") == 2e9


async def test_the_experts_series_are_bounded(generator: FakeGenerator, scrape: Scrape) -> None:
    expert = {"model_name": "fake", "layer": "1", "expert": "0"}

    def count(*layers: tuple[int, ...]) -> None:
        of = dict(enumerate(layers))
        generator.counters = tuple(replace(one, expert_tokens=of) for one in generator.counters)

    count((1, 1, 1, 1), (6, 0, 2, 0))
    await scrape.metrics.refresh()
    assert scrape("headwise_expert_tokens_total", **expert) == 6
    assert scrape("headwise_expert_imbalance", model_name="fake", layer="0") == 1
    assert scrape("headwise_expert_imbalance", model_name="fake", layer="1") == 3

    count((1,) * MOST_EXPERT_SERIES, (3, 1))
    await scrape.metrics.refresh()
    assert scrape("headwise_expert_tokens_total", **expert) is None
    assert scrape("headwise_expert_imbalance", model_name="fake", layer="1") == 1.5


async def test_the_exposition_is_the_catalog(generator: FakeGenerator, scrape: Scrape) -> None:
    """Every metric with its type and labels, in both formats, and nothing else of ours."""
    everything(generator)
    scrape.metrics.count_call("grpc", "/headwise.v1.Control/GetLoad", "OK")
    await answer(generator, [scrape.metrics.requests], request("a"))
    generator.refusal = Overloaded("full", retry_after=1.0)
    with pytest.raises(Overloaded):
        await answer(generator, [scrape.metrics.requests], request("b"))

    asked = "application/openmetrics-text; version=1.0.0, text/plain;version=0.0.4;q=0.5"
    body, content_type = await scrape.metrics.exposition(asked)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = dict(described(body.decode()))
    assert found == {
        metric.name: (metric.kind, frozenset(metric.labels), metric.help) for metric in CATALOG
    }

    body, content_type = await scrape.metrics.exposition()
    assert content_type.startswith("text/plain; version=0.0.4")
    parsed = [sample.name for family in parse_text(body.decode()) for sample in family.samples]
    assert {name for metric in CATALOG for name in metric.samples} <= set(parsed)


def everything(generator: FakeGenerator) -> None:
    generator.counters = tuple(
        replace(one, expert_tokens={0: (1, 2)}) for one in generator.counters
    )


def described(body: str) -> Iterator[tuple[str, tuple[str, frozenset[str], str]]]:
    """Our metrics in OpenMetrics text: name, type, labels, help."""
    for family in parse_openmetrics(body):
        if family.name.startswith(("vllm:", "headwise_")):
            labels = frozenset(label for sample in family.samples for label in sample.labels)
            yield family.name, (family.type, labels - {"le"}, family.documentation)


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exposed}` | {metric.kind} | {labels} | {metric.help} |"


def test_the_guide_lists_every_metric() -> None:
    guide = (ROOT / "docs/observability.md").read_text()
    listed = [line for line in guide.splitlines() if line.startswith(("| `vllm:", "| `headwise_"))]
    assert listed == [row(metric) for metric in CATALOG]


async def test_two_edges_of_a_process_count_apart(generator: FakeGenerator) -> None:
    one, other = (Metrics(lambda: (generator,)) for _ in range(2))
    await answer(generator, [one.requests], request("a"), Caller("http"))
    labels = {**MODEL, "finished_reason": "length"}
    assert one.registry.get_sample_value("vllm:request_success_total", labels) == 1
    assert other.registry.get_sample_value("vllm:request_success_total", labels) is None
