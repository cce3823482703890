"""Around every HTTP request: an id, the caller, bounds on its body, a log line, and a last resort
for errors."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.edge.answers import Caller, OnCall
from deploy.edge.http.errors import error_of
from deploy.edge.http.exchanges import Exchanges
from deploy.edge.http.operations import OPEN_PATHS
from deploy.edge.http.protocol import CLIENT_NAMES
from deploy.edge.http.service import CALLER
from deploy.edge.security import Access

log = structlog.get_logger(__name__)

REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[!-~]{1,128}")

_BODY_SECONDS = 30.0
# All bodies that are being read or answered, in the largest ones: what strangers can fill memory
# with is this, however many come.
_MOST_BODIES = 16


class Boundary:
    """ASGI middleware outside everything else."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        *,
        access: Access,
        exchanges: Exchanges,
        max_body_bytes: int,
        on_call: OnCall | None = None,
    ) -> None:
        """`routes` are those whose calls are counted by their path."""
        self._app = app
        self._routes = routes
        self._on_call = on_call
        self._exchanges = exchanges
        self._access = access
        self._room = _Room(max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent[REQUEST_ID] = request_id
                if self._exchanges.retiring:
                    sent["connection"] = "close"
            await send(message)

        body = _Body(receive, self._room)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                name = ""
                if scope["path"] not in OPEN_PATHS:
                    certificate = scope.get("state", {}).get(CLIENT_NAMES, ())
                    name = self._access.caller(headers.get("authorization"), certificate)
                scope[CALLER] = Caller(
                    "http",
                    name,
                    headers.get("traceparent", ""),
                    # Nothing between client and server is believed about whose it is.
                    (scope.get("client") or ("",))[0],
                    operation="chat" if "/chat/" in scope["path"] else "text_completion",
                )
                await self._app(scope, body.receive, send_with_id)
            except Exception as error:
                # Those of the application were answered, and logged, further in.
                if status == 0:
                    told = error_of(error)
                    response = Response(told.body, told.status, told.headers, "application/json")
                    await response(scope, receive, send_with_id)
            finally:
                body.close()
                outcome = status or "DISCONNECTED"
                if self._on_call is not None:
                    self._on_call("http", _served(self._routes, scope), str(outcome))
                log.info(
                    "call",
                    method=f"{scope['method']} {scope['path']}",
                    outcome=outcome,
                    seconds=round(time.monotonic() - started, 4),
                )


def _served(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """The method and path of the route that a request is for; "other" where there is none."""
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] is Match.FULL:
            return f"{scope['method']} {route.path}"
    return "other"


@dataclass
class _Room:
    """For bodies: `most_bytes` is the largest one's size, `taken` all that there are."""

    most_bytes: int
    taken: int = 0

    def take(self, size: int) -> None:
        """Raises `HTTPException` 429 where others leave none."""
        if self.taken + size > _MOST_BODIES * self.most_bytes:
            raise HTTPException(
                429,
                "the bodies of other requests fill the memory that there is for them: try again",
                {"retry-after": "1"},
            )
        self.taken += size


class _Body:
    """A request's body on its way in, bounded in size and time.

    Raises starlette's `HTTPException`, which FastAPI lets through where it reads bodies.
    """

    def __init__(self, receive: Receive, room: _Room) -> None:
        self._receive = receive
        self._room = room
        self._size = 0
        self._deadline = asyncio.get_running_loop().time() + _BODY_SECONDS
        self._whole = False

    async def receive(self) -> Message:
        """The next piece; without bounds once the body is there, to wait for the client to go."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the body was not sent within {_BODY_SECONDS:g} s: send it faster"
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self._size + size > self._room.most_bytes:
                raise HTTPException(
                    413, f"the body is larger than {self._room.most_bytes} bytes: send less at once"
                )
            self._room.take(size)
            self._size += size
            self._whole = not message.get("more_body", False)
        return message

    def close(self) -> None:
        """Give back its room."""
        self._room.taken -= self._size
