"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.edge.http.errors import error_of
from deploy.edge.http.exchanges import ClientGone, Exchanges

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would keep events back until its buffer is full.
    "x-accel-buffering": "no",
}

_encode = msgspec.json.Encoder().encode


def event(reply: msgspec.Struct) -> bytes:
    """One event; JSON has no line break outside its strings, and none inside."""
    return b"data: %b\n\n" % _encode(reply)


class EventStream(Response):
    """Sends events as they come. What goes wrong before the first has a status of its own; later,
    an error object is the last event."""

    def __init__(self, events: AsyncGenerator[bytes], exchanges: Exchanges) -> None:
        super().__init__(headers=_HEADERS)
        # A response knows its length, a stream does not.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events = events
        self._exchanges = exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with (
                self._exchanges.answering(receive),
                contextlib.aclosing(self._events) as events,
            ):
                async for piece in events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ClientGone:
            return
        except Exception as error:
            if not started:
                raise
            last = b"data: %b\n\n" % error_of(error).body
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
