"""grpc.health.v1 over `Generator.health()`.

Services that generate (and the whole, "") serve while a model computes, READY or DEGRADED. Control
answers in any state, which is when an operator needs it. During a shutdown nothing serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import Overloaded
from deploy.edge import errors
from deploy.edge.calls import write
from deploy.edge.models import Models

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

SERVICE = "grpc.health.v1.Health"
INFERENCE = "headwise.v1.Inference"
CONTROL = "headwise.v1.Control"

_POLL_SECONDS = 0.2
# On one connection: a client needs one for each service that it asks. Were there a bound on all of
# them together, strangers could reach it, and gRPC's clients take a refusal for a server that is
# down.
_MOST_WATCHES = 16
_RETRY_SECONDS = 5.0

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """Check asks the generators; while anybody watches, they are asked again and again, and all
    watchers are told what changed.

    Open to anybody, so at most 16 may watch on a connection.
    """

    def __init__(self, models: Models, generating: Sequence[str] = (INFERENCE,)) -> None:
        """`generating` are the services that generate."""
        self._models = models
        self._generating = frozenset(("", *generating))
        self._closing = False
        self._computing = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()
        self._looking: asyncio.Task[None] | None = None

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
        try:
            with self._watching(context.peer()):
                await self._tell(request.service, context)
        except (errors.DeadlineExceeded, Overloaded) as error:
            await errors.abort(context, error, request_id="")

    def serves(self, service: str) -> bool:
        """What `Check` says of a service."""
        return self._status(service) == _SERVING

    def close(self) -> None:
        """Nothing serves from here on; watchers are told so, and their calls end."""
        self._closing = True
        self._wake()

    @contextlib.contextmanager
    def _watching(self, peer: str) -> Iterator[None]:
        """Raises `Overloaded` where the connection has its share of watches."""
        if self._watches[peer] >= _MOST_WATCHES:
            raise Overloaded(
                f"{_MOST_WATCHES} watches are open on this connection already: use Check",
                _RETRY_SECONDS,
            )
        self._watches[peer] += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_again())
        try:
            yield
        finally:
            self._watches[peer] -= 1
            if not self._watches[peer]:
                del self._watches[peer]
            if not self._watches:
                self._looking.cancel()
                self._looking = None

    async def _look_again(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(_POLL_SECONDS)

    def _look(self) -> None:
        computing = any(served.generator.health().state.computes for served in self._models.all)
        if computing != self._computing:
            self._computing = computing
            self._wake()

    def _wake(self) -> None:
        """All that watch; who comes from here on waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _tell(self, service: str, context: Context) -> None:
        told: int | None = None
        while True:
            changed, closing = self._changed, self._closing
            status = self._status(service)
            if status != told:
                await write(context, health_pb2.HealthCheckResponse(status=status))
                told = status
            if closing:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._generating and service != CONTROL:
            return _SERVICE_UNKNOWN
        if self._closing:
            return _NOT_SERVING
        if service == CONTROL:
            return _SERVING
        self._look()
        return _SERVING if self._computing else _NOT_SERVING
