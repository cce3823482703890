"""grpc.health.v1 over `Generator.health()`.

Services that generate (and the whole, "") serve while a model computes, READY or DEGRADED. Control
answers in any state, which is when an operator needs it. During a shutdown nothing serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import Overloaded
from cluster.request import HealthState
from deploy.edge import errors
from deploy.edge.models import Models, Served

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

SERVICE = "grpc.health.v1.Health"
INFERENCE = "headwise.v1.Inference"
CONTROL = "headwise.v1.Control"

_POLL_SECONDS = 0.2
_MOST_WATCHERS = 256
_RETRY_SECONDS = 5.0

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """Check asks the generators; Watch asks them again and again, and tells what changed.

    Open to anybody, so at most 256 may watch.
    """

    def __init__(self, models: Models, generating: Sequence[str] = (INFERENCE,)) -> None:
        """`generating` are the services that generate."""
        self._models = models
        self._generating = frozenset(("", *generating))
        self._closing = asyncio.Event()
        self._watchers = 0

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            known = ", ".join(sorted({*self._generating, CONTROL} - {""}))
            unknown = errors.UnknownService(f"no service {request.service[:128]!r} here: {known}")
            await errors.abort(context, unknown, request_id="")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if self._watchers >= _MOST_WATCHERS:
            full = Overloaded(f"{_MOST_WATCHERS} are watching already: use Check", _RETRY_SECONDS)
            await errors.abort(context, full, request_id="")
        self._watchers += 1
        try:
            await self._tell(request.service, context)
        finally:
            self._watchers -= 1

    def serves(self, service: str) -> bool:
        """What `Check` says of a service."""
        return self._status(service) == _SERVING

    def close(self) -> None:
        """Nothing serves from here on; watchers are told so, and their calls end."""
        self._closing.set()

    async def _tell(self, service: str, context: Context) -> None:
        told: int | None = None
        while True:
            closing = self._closing.is_set()
            status = self._status(service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if closing:
                return
            try:
                await asyncio.wait_for(self._closing.wait(), _POLL_SECONDS)
            except TimeoutError:
                continue

    def _status(self, service: str) -> int:
        if service not in self._generating and service != CONTROL:
            return _SERVICE_UNKNOWN
        if self._closing.is_set():
            return _NOT_SERVING
        if service == CONTROL:
            return _SERVING
        computing = any(_computes(served) for served in self._models.all)
        return _SERVING if computing else _NOT_SERVING


def _computes(served: Served) -> bool:
    return served.generator.health().state in (HealthState.READY, HealthState.DEGRADED)
