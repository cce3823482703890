"""Logs, metrics and traces of one replica, put together as its configuration says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from cluster.config import ServerConfig
from cluster.driver import Driver
from deploy.edge.answers import Watcher
from deploy.edge.http.operations import Exposition
from deploy.edge.server import Edge
from deploy.telemetry.metrics import Metrics
from deploy.telemetry.ray_mirror import mirror
from deploy.telemetry.request_log import RequestLog


class Telemetry:
    """What watches the requests of a replica's edge and counts for its driver.

    `watchers` and `exposition` go into the edge, which `start` is then given. Raises `StartupError`
    where traces are asked for and nothing is installed that sends them.
    """

    def __init__(self, driver: Driver, config: ServerConfig) -> None:
        self._driver = driver
        self._steps = config.trace_steps
        self._edge: Edge | None = None
        self._mirror: asyncio.Task[None] | None = None
        self.metrics = Metrics(
            lambda: (driver,),
            connections=self._connections,
            certificate_expiry=self._certificate_expiry,
        )
        self.watchers: list[Watcher] = [self.metrics.requests, RequestLog()]
        self._tracing = None
        if config.trace:
            from deploy.telemetry.otel import provider_from_environment
            from deploy.telemetry.traces import Tracing

            self._tracing = Tracing(provider_from_environment())
            self.watchers.append(self._tracing)

    @property
    def exposition(self) -> Exposition:
        return self.metrics.exposition

    def start(self, edge: Edge) -> None:
        """Begin what goes on by itself; `edge` and the driver are running."""
        self._edge = edge
        self._mirror = asyncio.create_task(mirror(self.metrics))
        if self._tracing is not None and self._steps:
            self._driver.loop.sample_steps(self._steps, self._tracing.step)

    async def stop(self) -> None:
        """Send what is left. Idempotent."""
        if self._mirror is not None:
            self._mirror.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._mirror
            self._mirror = None
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    def _connections(self) -> Mapping[str, int]:
        return {} if self._edge is None else self._edge.connections

    def _certificate_expiry(self) -> float | None:
        return None if self._edge is None else self._edge.certificate_expiry
