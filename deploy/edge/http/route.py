"""How bodies are read: JSON as RFC 8259 has it, of the JSON media type."""

from __future__ import annotations

import email.message
import math
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_MOST_EXACT = 2.0**53


def _number(literal: str) -> float:
    """JSON has one kind of number: 16.0 is 16, and some clients write it so."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {literal[:32]} is out of range")
    return int(value) if value.is_integer() and abs(value) <= _MOST_EXACT else value


_decoder = msgspec.json.Decoder(float_hook=_number)


class JsonRequest(Request):
    """Refuses what Python's parser lets pass: NaN, lone surrogates, integers without end."""

    async def json(self) -> Any:
        """Raises `HTTPException` 400 where the body is no JSON."""
        body = await self.body()
        try:
            return _decoder.decode(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, must say that it is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field is not None and not _is_json(request):
                given = request.headers.get("content-type", "")
                raise HTTPException(415, f"content-type {given!r}: send JSON, as application/json")
            coding = request.headers.get("content-encoding", "identity")
            if coding.lower() != "identity":
                raise HTTPException(415, f"content-encoding {coding!r}: send the body as it is")
            try:
                return await handle(JsonRequest(request.scope, request.receive))
            except RecursionError:
                # Templates, schemas and calls are walked by many hands.
                raise HTTPException(
                    400, "the body holds something that is nested too deeply: make it flatter"
                ) from None

        return handle_json


def _is_json(request: Request) -> bool:
    message = email.message.Message()
    message["content-type"] = request.headers.get("content-type", "text/plain")
    subtype = message.get_content_subtype()
    is_application = message.get_content_maintype() == "application"
    return is_application and (subtype == "json" or subtype.endswith("+json"))
