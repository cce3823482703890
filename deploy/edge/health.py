"""grpc.health.v1 over `Generator.health()`.

Inference (and the whole, "") serves while a model computes, READY or DEGRADED. Control answers
in any state, which is when an operator needs it. During a shutdown nothing serves.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.request import HealthState
from deploy.edge.models import Models, Served

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

SERVICE = "grpc.health.v1.Health"
INFERENCE = "headwise.v1.Inference"
CONTROL = "headwise.v1.Control"

_POLL_SECONDS = 0.2

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """Check asks the generators; Watch asks them again and again, and tells what changed."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._closing = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"no service {request.service!r} here: ask for {INFERENCE} or {CONTROL}",
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told: int | None = None
        while True:
            closing = self._closing.is_set()
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if closing:
                return
            try:
                await asyncio.wait_for(self._closing.wait(), _POLL_SECONDS)
            except TimeoutError:
                continue

    def close(self) -> None:
        """Nothing serves from here on; watchers are told so, and their calls end."""
        self._closing.set()

    def _status(self, service: str) -> int:
        if service not in ("", INFERENCE, CONTROL):
            return _SERVICE_UNKNOWN
        if self._closing.is_set():
            return _NOT_SERVING
        if service == CONTROL:
            return _SERVING
        computing = any(_computes(served) for served in self._models.all)
        return _SERVING if computing else _NOT_SERVING


def _computes(served: Served) -> bool:
    return served.generator.health().state in (HealthState.READY, HealthState.DEGRADED)
