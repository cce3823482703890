"""The metrics of one edge: a registry of its own, and its text for whoever scrapes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client import exposition as text
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from deploy.telemetry import catalog
from deploy.telemetry.engines import Engine, EngineMetrics
from deploy.telemetry.requests import RequestMetrics, counter
from deploy.version import version


class Metrics:
    """`requests` is a `deploy.edge.answers.Watcher`; `engines` are those that this process runs.

    `connections` says how many clients are connected to each API, `certificate_expiry` when the
    server's certificate expires (unix time, None without TLS); both are asked at every exposition.
    """

    def __init__(
        self,
        engines: Callable[[], Iterable[Engine]],
        *,
        connections: Callable[[], Mapping[str, int]] = dict,
        certificate_expiry: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry)
        self._calls = counter(catalog.CALLS, self.registry)
        self._engines = EngineMetrics(engines)
        self.registry.register(self._engines)
        self.registry.register(_Edge(connections, certificate_expiry))
        ProcessCollector(registry=self.registry)

    def count_call(self, api: str, method: str, code: str) -> None:
        """A `deploy.edge.answers.OnCall`."""
        self._calls.labels(api, method, code).inc()

    async def refresh(self) -> None:
        """Have what the ranks count read, which is as old as the last refresh."""
        await self._engines.refresh()

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type of an answer to `GET /metrics`: OpenMetrics where the header
        `Accept` asks for it, else the Prometheus text format."""
        await self.refresh()
        _, content_type = choose_encoder(accept)
        asked = openmetrics if content_type.startswith("application/openmetrics-text") else text
        # All names are legal everywhere. The client's own way of escaping those that are not would
        # take the colon of `vllm:` for one of them in OpenMetrics.
        return asked.generate_latest(self.registry, escaping=ALLOWUTF8), content_type


class _Edge(Collector):
    """What is no model's."""

    def __init__(
        self,
        connections: Callable[[], Mapping[str, int]],
        certificate_expiry: Callable[[], float | None],
    ) -> None:
        self._connections = connections
        self._certificate_expiry = certificate_expiry

    def collect(self) -> Iterator[GaugeMetricFamily]:
        build = catalog.BUILD
        family = GaugeMetricFamily(build.name, build.help, labels=build.labels)
        family.add_metric((version(),), 1)
        yield family
        held = catalog.CONNECTIONS
        family = GaugeMetricFamily(held.name, held.help, labels=held.labels)
        for api, count in self._connections().items():
            family.add_metric((api,), count)
        yield family
        when = self._certificate_expiry()
        if when is not None:
            expiry = catalog.CERTIFICATE_EXPIRY
            yield GaugeMetricFamily(expiry.name, expiry.help, value=when)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: asking for the names would ask for the values."""
        return iter(())
