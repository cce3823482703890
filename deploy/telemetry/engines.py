"""Metrics of what this process computes itself: read off its drivers whenever somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cluster.request import Generator, RankCounters
from deploy.telemetry import catalog
from deploy.telemetry.catalog import ENGINE, Metric
from shards.timing import PHASES

# Series that the experts of one model may take: an exposition grows with every one of them.
MOST_EXPERT_SERIES = 1024


class Engine(Generator, Protocol):
    """A generator whose ranks are this process's own, so that nobody else counts them."""

    async def rank_counters(self) -> tuple[RankCounters, ...]: ...


class EngineMetrics(Collector):
    """Collects what `engines` say of themselves, and what their ranks said at the last `refresh`.

    Only of own engines: where every edge told of every replica, sums would count each many times.
    """

    def __init__(self, engines: Callable[[], Iterable[Engine]]) -> None:
        self._engines = engines
        self._counters: dict[str, tuple[RankCounters, ...]] = {}

    async def refresh(self) -> None:
        """Have the ranks asked for their counters, between two steps."""
        self._counters = {
            engine.model.name: await engine.rank_counters() for engine in self._engines()
        }

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        families = _Families()
        for engine in self._engines():
            name = engine.model.name
            _add_load(families, engine)
            _add_health(families, engine)
            for info in engine.ranks:
                rank = (name, str(info.rank))
                families.add(catalog.RANK_WEIGHTS, info.weight_bytes, *rank)
                families.add(catalog.RANK_KV, info.kv_bytes, *rank)
            counters = self._counters.get(name, ())
            for one in counters:
                _add_rank(families, name, one)
            if counters:
                # Every rank routes every token, and so counts the same.
                _add_experts(families, name, counters[0].expert_tokens)
        yield from families

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Nothing: a registry would otherwise collect in order to know the names."""
        return iter(())


class _Families:
    """Metric families being filled, in the order of their first sample."""

    def __init__(self) -> None:
        self._families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        family = self._families.get(metric.name)
        if family is None:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = self._families[metric.name] = kind(
                metric.name, metric.help, labels=metric.labels
            )
        family.add_metric(labels, value)

    def __iter__(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        return iter(self._families.values())


def _add_load(families: _Families, engine: Engine) -> None:
    load, name = engine.load(), engine.model.name
    model = (name, ENGINE)
    families.add(catalog.RUNNING, load.running, *model)
    families.add(catalog.WAITING, load.waiting, *model)
    families.add(catalog.KV_USAGE, load.kv_blocks_used / max(1, load.kv_blocks), *model)
    families.add(
        catalog.CACHE_CONFIG,
        1,
        *model,
        str(load.block_size),
        str(load.kv_blocks),
        engine.model.dtype,
    )
    families.add(catalog.PREFIX_QUERIES, load.prompt_tokens, *model)
    families.add(catalog.PREFIX_HITS, load.cached_tokens, *model)
    families.add(catalog.PREEMPTIONS, load.preemptions, *model)
    families.add(catalog.PROMPT_TOKENS, load.prompt_tokens, *model)
    families.add(catalog.GENERATION_TOKENS, load.generated_tokens, *model)
    families.add(catalog.QUEUE_TOKENS, load.waiting_tokens, name)
    families.add(catalog.KV_BLOCKS, load.kv_blocks, name)
    families.add(catalog.KV_BLOCKS_USED, load.kv_blocks_used, name)
    families.add(catalog.STEPS, load.steps, name)


def _add_health(families: _Families, engine: Engine) -> None:
    health, name = engine.health(), engine.model.name
    families.add(catalog.READY, health.state.computes, name)
    families.add(catalog.EPOCH, health.epoch, name)
    for rank in health.ranks:
        number = str(rank.rank)
        families.add(catalog.RANK_UP, rank.state.computes, name, number)
        families.add(
            catalog.RANK_INFO, 1, name, number, rank.host, str(rank.pid), rank.state, rank.cause
        )


def _add_rank(families: _Families, name: str, counters: RankCounters) -> None:
    rank = (name, str(counters.rank))
    families.add(catalog.RANK_STEPS, counters.steps, *rank)
    families.add(catalog.RANK_STEP_SECONDS, counters.seconds.total, *rank)
    families.add(catalog.RANK_RSS, counters.rss, *rank)
    for phase in PHASES:
        families.add(catalog.RANK_PHASE_SECONDS, getattr(counters.seconds, phase), *rank, phase)


def _add_experts(families: _Families, name: str, layers: Mapping[int, Sequence[int]]) -> None:
    few = sum(map(len, layers.values())) <= MOST_EXPERT_SERIES
    for layer, tokens in layers.items():
        total = sum(tokens)
        imbalance = max(tokens) * len(tokens) / total if total else 1.0
        families.add(catalog.EXPERT_IMBALANCE, imbalance, name, str(layer))
        for expert, count in enumerate(tokens if few else ()):
            families.add(catalog.EXPERT_TOKENS, count, name, str(layer), str(expert))
