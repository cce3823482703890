"""The gRPC server of one replica: services, interceptors, ports, and an orderly end."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge import health, security
from deploy.edge.answers import Answers, Watcher
from deploy.edge.calls import Calls
from deploy.edge.control import ControlService
from deploy.edge.inference import InferenceService
from deploy.edge.models import Models
from headwise.v1 import control_pb2_grpc, inference_pb2_grpc

_KEEPALIVE_MS = 30_000
_LAST_WORDS_SECONDS = 0.5


class Edge:
    """Serves `models`, which others add and remove. All methods belong to one event loop."""

    def __init__(
        self, models: Models, config: ServerConfig, watchers: Sequence[Watcher] = ()
    ) -> None:
        """`watchers` are told of every request."""
        self._config = config
        self._models = models
        self._calls = Calls()
        self._health = health.HealthService(models)
        interceptors: list[grpc.aio.ServerInterceptor] = [self._calls]
        if config.token_file is not None:
            # Before everything else: a stranger's message is not even read.
            interceptors.insert(0, security.BearerTokens(security.read_tokens(config.token_file)))
        self._credentials = security.server_credentials(config)
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                # Otherwise a second server may share the port, and each gets some of the calls.
                ("grpc.so_reuseport", 0),
                # A client whose machine vanished holds its KV cache until somebody notices.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 3),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        inference = InferenceService(models, Answers(*watchers))
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)  # type: ignore[no-untyped-call]
        control = ControlService(models)
        control_pb2_grpc.add_ControlServicer_to_server(control, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (health.INFERENCE, health.CONTROL, health.SERVICE, reflection.SERVICE_NAME),
            self._server,
        )
        self._port = 0

    async def start(self) -> None:
        """Listen; `StartupError` where the address cannot be had."""
        address = f"{self._config.host}:{self._config.grpc_port}"
        try:
            if self._credentials is None:
                self._port = self._server.add_insecure_port(address)
            else:
                self._port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise port_taken(self._config) from error
        await self._server.start()

    @property
    def address(self) -> str:
        """host:port as bound."""
        return f"{self._config.host}:{self._port}"

    async def stop(self, drain_timeout_s: float) -> None:
        """Say NOT_SERVING, take nothing new, give running calls `drain_timeout_s`, end the rest."""
        self._health.close()
        try:
            await self._calls.drain(drain_timeout_s)
        finally:
            # For health watchers, who are still being told.
            await self._server.stop(grace=_LAST_WORDS_SECONDS)
            for served in self._models.all:
                served.texts.close()


def port_taken(config: ServerConfig) -> StartupError:
    """What to say where the configured address is not free."""
    return StartupError(
        f"{config.host}:{config.grpc_port} cannot be listened on: the port is in use or the host "
        "is not this machine's; give another grpc_port (0 takes any free one) or host"
    )
