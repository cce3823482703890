"""uvicorn on the edge's event loop, on a socket of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from cluster.config import ServerConfig
from cluster.errors import StartupError
from deploy.edge.http.protocol import BoundedConnection

# Longer than common load balancers keep connections to a server: it is for them to close.
_IDLE_SECONDS = 75
_MOST_HEADER_BYTES = 32 << 10
_END_SECONDS = 1
_BACKLOG = 1024
# A client whose machine vanished holds its KV cache until somebody notices, and one that reads no
# more the memory of its answer.
_KEEPALIVE_SECONDS = 30
_UNREAD_MS = 60_000


class HttpServer:
    """Serves an ASGI application. All methods belong to one event loop."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        context: ssl.SSLContext | None,
        *,
        share_port: bool = False,
    ) -> None:
        """`context` None is plain text. `share_port`: others of this host may listen there too."""
        self._config = config
        self._share_port = share_port
        settings = uvicorn.Config(
            app,
            http=partial(BoundedConnection, most_connections=config.max_connections),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_END_SECONDS,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        )
        settings.load()
        settings.ssl = context
        self._server = _Server(settings)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; `StartupError` where the address cannot be had."""
        self._socket = bind(self._config, share_port=self._share_port)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if not self._server.listening.is_set():
            ended, self._task = self._task, None
            self._socket.close()
            raise StartupError(
                "the HTTP server ended as it began: see the cause above, or set http_port to "
                "another port"
            ) from ended.exception()

    @property
    def address(self) -> str:
        """host:port as bound."""
        assert self._socket is not None
        return f"{self._config.host}:{self._socket.getsockname()[1]}"

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._server.server_state.connections)

    def stop_listening(self) -> None:
        """Take no new connections."""
        for server in self._server.servers:
            server.close()

    def close_idle(self) -> None:
        """Close connections that wait for a request, and each other one behind its answer."""
        for connection in tuple(self._server.server_state.connections):
            if not connection.transport.is_closing():
                connection.shutdown()

    async def stop(self) -> None:
        """Close every connection; idempotent."""
        task, self._task = self._task, None
        if task is not None:
            self._server.should_exit = True
            await task


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(config: ServerConfig, *, share_port: bool = False) -> socket.socket:
    """A listening socket at the configured address; `StartupError` where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(
            config.host.strip("[]"), config.http_port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.create_server(
            address[:2], family=family, backlog=_BACKLOG, reuse_port=share_port
        )
    except OSError as error:
        raise StartupError(
            f"{config.host}:{config.http_port} cannot be listened on: the port is in use or the "
            "host is not this machine's; give another http_port (0 takes any free one) or host"
        ) from error
    # Connections inherit these.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_SECONDS // 3),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _UNREAD_MS),
    ):
        # Linux has them all.
        if hasattr(socket, option):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listening
