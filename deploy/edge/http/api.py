"""The HTTP side of an edge: the application and its server, started and ended together."""

from __future__ import annotations

from cluster.config import ServerConfig
from deploy.edge.answers import Answers, OnCall
from deploy.edge.http.app import build_app
from deploy.edge.http.exchanges import Exchanges
from deploy.edge.http.operations import Exposition
from deploy.edge.http.server import HttpServer
from deploy.edge.http.service import Service
from deploy.edge.models import Models
from deploy.edge.security import Access


class HttpApi:
    """Serves `models` over HTTP. All methods belong to one event loop."""

    def __init__(
        self,
        models: Models,
        answers: Answers,
        config: ServerConfig,
        access: Access,
        *,
        exposition: Exposition | None = None,
        on_call: OnCall | None = None,
        share_port: bool = False,
    ) -> None:
        """`share_port`: other servers of this host may listen there too."""
        self._exchanges = Exchanges(config.max_concurrent_calls)
        certificates = access.certificates
        self._scheme = "http" if certificates is None else "https"
        app = build_app(
            Service(models, answers, self._exchanges),
            access=access,
            exposition=exposition,
            max_body_bytes=config.max_message_bytes,
            on_call=on_call,
        )
        self._server = HttpServer(
            app,
            config,
            None if certificates is None else certificates.for_http(),
            share_port=share_port,
        )

    async def start(self) -> None:
        """Listen; `StartupError` where the address cannot be had."""
        await self._server.start()

    @property
    def url(self) -> str:
        """As bound."""
        return f"{self._scheme}://{self._server.address}"

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._server.connections

    def retire(self) -> None:
        """Take no new connections, close idle ones, end each other one with its answer; not ready
        from here on."""
        self._exchanges.retire()
        self._server.stop_listening()
        self._server.close_idle()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, give running ones `timeout_s`, end the rest."""
        await self._exchanges.drain(timeout_s)

    async def stop(self) -> None:
        """Close every connection; idempotent."""
        await self._server.stop()
