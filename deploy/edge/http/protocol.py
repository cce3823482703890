"""HTTP/1.1 connections of uvicorn's, bounded in number and in the time that headers may take."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.edge.http.errors import ErrorBody, ErrorDetail
from deploy.edge.tls import names_in

CLIENT_NAMES = "headwise.client_names"
"""Key of a request's `state`: the names in its client's certificate."""

_HEADERS_SECONDS = 20.0


class BoundedConnection(H11Protocol):
    """Closes connections beyond `most_connections`, and those on which no request has begun
    20 s after they were opened or after the first byte since the last answer: uvicorn itself
    waits for ever."""

    def __init__(self, *, most_connections: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._most_connections = most_connections
        self._no_request: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        names = names_in(tls.getpeercert()) if tls is not None else ()
        self.app_state = {**self.app_state, CLIENT_NAMES: names}
        if len(self.connections) > self._most_connections:
            transport.close()
        else:
            self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unbound()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._bound()

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP. In the form of every other error."""
        detail = ErrorDetail(msg, "invalid_request_error", code="malformed_request")
        body = msgspec.json.encode(ErrorBody(detail))
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def _bound(self) -> None:
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._unbound()
        elif self._no_request is None:
            self._no_request = self.loop.call_later(_HEADERS_SECONDS, self.transport.close)

    def _unbound(self) -> None:
        if self._no_request is not None:
            self._no_request.cancel()
            self._no_request = None
