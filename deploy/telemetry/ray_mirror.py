"""The same metrics through Ray's own endpoint, for those who scrape Ray clusters as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample
from ray.util.metrics import Gauge

from deploy.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

_PERIOD_S = 10.0

_Labels = tuple[tuple[str, str], ...]


class RayMirror:
    """Copies every sample into a Ray gauge: `vllm:x` appears there as `ray_vllm_x`.

    Ray's counters and histograms take increments and observations, not what was counted elsewhere.
    A gauge holds a cumulative sample as it is, and `rate()` and `histogram_quantile()` do with it
    what they do with a counter.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}
        self._known: set[tuple[str, _Labels]] = set()

    def copy(self) -> None:
        """Once. Series that have ended are 0 from then on: Ray has no way to end one."""
        seen: set[tuple[str, _Labels]] = set()
        for sample in self._samples():
            labels = tuple(sorted(sample.labels.items()))
            seen.add((sample.name, labels))
            self._gauge(sample.name, labels).set(sample.value, dict(labels))
        for name, labels in self._known - seen:
            self._gauge(name, labels).set(0, dict(labels))
        self._known = seen

    def _samples(self) -> Iterator[Sample]:
        for family in self._registry.collect():
            yield from (one for one in family.samples if not one.name.endswith("_created"))

    def _gauge(self, name: str, labels: _Labels) -> Gauge:
        found = self._gauges.get(name)
        if found is None:
            # Colons are for recording rules, and Ray refuses them.
            tags = tuple(label for label, _ in labels)
            found = self._gauges[name] = Gauge(name.replace(":", "_"), tag_keys=tags)
        return found


async def mirror(metrics: Metrics) -> None:
    """Copy now and then, until cancelled; a round that fails is logged, and the next one tried."""
    copies = RayMirror(metrics.registry)
    while True:
        try:
            await metrics.refresh()
            copies.copy()
        except Exception:
            log.exception("metrics could not be copied to Ray")
        await asyncio.sleep(_PERIOD_S)
