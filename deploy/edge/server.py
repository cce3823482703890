"""The gRPC and HTTP servers of one replica: services, interceptors, ports, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge import health, listener, transport, vllm
from deploy.edge.answers import Answers, OnCall, Operation, Watcher
from deploy.edge.calls import Calls
from deploy.edge.control import ControlService
from deploy.edge.http.api import HttpApi
from deploy.edge.http.operations import Exposition
from deploy.edge.inference import InferenceService
from deploy.edge.limits import CallerLimits
from deploy.edge.models import Models
from deploy.edge.security import Access
from deploy.edge.vllm.service import VllmService
from headwise.v1 import control_pb2_grpc, inference_pb2_grpc

_LAST_WORDS_SECONDS = 0.5
_LOOK_SECONDS = 1.0

# Methods that ask a model for an answer, by what they ask for. Their requests have a `request_id`.
_ANSWERING: Final[Mapping[str, Operation]] = {
    f"/{health.INFERENCE}/Generate": "text_completion",
    f"/{health.INFERENCE}/Chat": "chat",
    f"/{vllm.SERVICE}/Generate": "text_completion",
}


class Edge:
    """Serves `models`, which others add, remove and close. All methods belong to one event loop."""

    def __init__(
        self,
        models: Models,
        config: ServerConfig,
        watchers: Sequence[Watcher] = (),
        *,
        exposition: Exposition | None = None,
        on_call: OnCall | None = None,
        share_port: bool = False,
    ) -> None:
        """`watchers` are told of every request, `on_call` of every call that is not gRPC's own
        health; `exposition` is what GET /metrics answers.
        `share_port`: other edges of this host may listen there too, and each gets some of the
        connections."""
        self._config = config
        self._access = Access(config)
        self._calls = Calls(self._access, config.max_concurrent_calls, _ANSWERING, on_call)
        self._health = health.HealthService(models, (health.INFERENCE, vllm.SERVICE))
        limits = None if config.limits_file is None else CallerLimits(config.limits_file)
        self._answers = Answers(*watchers, limiter=limits)
        self._http = (
            HttpApi(
                models,
                self._answers,
                config,
                self._access,
                exposition=exposition,
                on_call=on_call,
                share_port=share_port,
            )
            if config.http
            else None
        )
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            # Otherwise a second server may share the port, and each gets some of the connections.
            options=[*transport.options(config), ("grpc.so_reuseport", int(share_port))],
        )
        inference = InferenceService(models, self._answers)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)  # type: ignore[no-untyped-call]
        control = ControlService(models)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)  # type: ignore[no-untyped-call]
        engine = VllmService(models, self._answers, self._health)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(engine, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (
                health.INFERENCE,
                health.CONTROL,
                vllm.SERVICE,
                health.SERVICE,
                reflection.SERVICE_NAME,
            ),
            self._server,
        )
        self._port = 0
        self._connections = listener.ConnectionCount(0)

    async def start(self) -> None:
        """Listen; `StartupError` where the address cannot be had."""
        transport.raise_file_limit(self._config)
        address = f"{self._config.host}:{self._config.grpc_port}"
        try:
            if self._access.certificates is None:
                self._port = self._server.add_insecure_port(address)
            else:
                credentials = self._access.certificates.for_grpc()
                self._port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise port_taken(self._config) from error
        self._connections = listener.ConnectionCount(self._port)
        await self._server.start()
        if self._http is not None:
            await self._http.start()

    @property
    def address(self) -> str:
        """host:port as bound."""
        return f"{self._config.host}:{self._port}"

    @property
    def http_address(self) -> str:
        """URL as bound; empty where there is no HTTP."""
        return "" if self._http is None else self._http.url

    @property
    def _ports(self) -> tuple[int, ...]:
        if self._http is None:
            return (self._port,)
        return self._port, int(self._http.url.rpartition(":")[2])

    @property
    def connections(self) -> dict[str, int]:
        """How many clients are connected to each API; gRPC's as of the last time that this was
        asked for, and 0 at first."""
        held = {"grpc": self._connections.latest}
        return held if self._http is None else {**held, "http": self._http.connections}

    @property
    def certificate_expiry(self) -> float | None:
        """Unix time at which the certificate in use expires; None without TLS."""
        certificates = self._access.certificates
        return None if certificates is None else certificates.not_after

    async def retire(self, timeout_s: float) -> None:
        """Say NOT_SERVING, take no new connections, and answer on until those that are there have
        made way (`max_connection_age_s`), at most `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._health.close()
        for port in self._ports:
            await asyncio.to_thread(listener.turn_away, port)
        await asyncio.sleep(min(listener.SETTLE_SECONDS, timeout_s))
        await asyncio.to_thread(listener.stop_listening, self._port)
        if self._http is not None:
            self._http.retire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while await self._connections.count() or (  # noqa: ASYNC110 (no event tells)
                    self._http is not None and self._http.connections
                ):
                    await asyncio.sleep(_LOOK_SECONDS)

    async def stop(self, drain_timeout_s: float) -> None:
        """Say NOT_SERVING, take nothing new, give running calls `drain_timeout_s`, end the rest."""
        self._health.close()
        try:
            drains = [self._calls.drain(drain_timeout_s)]
            if self._http is not None:
                drains.append(self._http.drain(drain_timeout_s))
            await asyncio.gather(*drains)
        finally:
            if self._http is not None:
                await self._http.stop()
            # For health watchers, who are still being told.
            await self._server.stop(grace=_LAST_WORDS_SECONDS)


def port_taken(config: ServerConfig) -> StartupError:
    """What to say where the configured address is not free."""
    return StartupError(
        f"{config.host}:{config.grpc_port} cannot be listened on: the port is in use or the host "
        "is not this machine's; give another grpc_port (0 takes any free one) or host"
    )
