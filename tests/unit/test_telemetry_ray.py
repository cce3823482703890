"""The copy of the metrics that Ray's endpoint has."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deploy.telemetry import ray_mirror


class FakeGauge:
    """Keeps what Ray would expose, by name."""

    exposed: dict[str, dict[tuple[str, ...], float]]

    def __init__(self, name: str, tag_keys: tuple[str, ...]) -> None:
        self._tags = tag_keys
        self._values = self.exposed.setdefault(name, {})

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._values[tuple(tags[tag] for tag in self._tags)] = value


@pytest.fixture
def exposed(monkeypatch: pytest.MonkeyPatch) -> Any:
    FakeGauge.exposed = {}
    monkeypatch.setattr(ray_mirror, "Gauge", FakeGauge)
    return FakeGauge.exposed


def test_samples_keep_their_values_and_labels(exposed: Any) -> None:
    registry = CollectorRegistry()
    mirror = ray_mirror.RayMirror(registry)
    tokens = Counter("vllm:tokens", "", ("model_name",), registry=registry)
    latency = Histogram("vllm:latency_seconds", "", buckets=(1.0,), registry=registry)
    tokens.labels("m").inc(3)
    latency.observe(0.5)
    mirror.copy()
    tokens.labels("m").inc(4)
    mirror.copy()

    assert exposed == {
        "vllm_tokens_total": {("m",): 7},
        "vllm_latency_seconds_bucket": {("1.0",): 1, ("+Inf",): 1},
        "vllm_latency_seconds_count": {(): 1},
        "vllm_latency_seconds_sum": {(): 0.5},
    }


def test_a_series_that_ends_is_0(exposed: Any) -> None:
    registry = CollectorRegistry()
    mirror = ray_mirror.RayMirror(registry)
    info = Gauge("headwise_rank_info", "", ("cause",), registry=registry)
    info.labels("rank 1 died").set(1)
    mirror.copy()
    info.clear()
    info.labels("").set(1)
    mirror.copy()

    assert exposed["headwise_rank_info"] == {("rank 1 died",): 0, ("",): 1}


@pytest.mark.filterwarnings("error")
def test_ray_takes_the_names() -> None:
    registry = CollectorRegistry()
    Counter("vllm:tokens", "", ("model_name",), registry=registry).labels("m").inc()
    ray_mirror.RayMirror(registry).copy()
