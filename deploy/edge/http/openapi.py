"""The OpenAPI document: FastAPI's of the requests, msgspec's of the replies."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from deploy.edge.http import replies
from deploy.edge.http.errors import ErrorBody

_REF = "#/components/schemas/{name}"
_BODIES: tuple[type[msgspec.Struct], ...] = (
    replies.Completion,
    replies.Chat,
    replies.ChatChunk,
    replies.ModelList,
    replies.Model,
    replies.Tokens,
    replies.Detokenized,
    replies.HealthReport,
    replies.Readiness,
    replies.Version,
    ErrorBody,
)
_ERRORS = {
    400: "The request cannot be served; `param` names the field at fault.",
    401: "No known bearer token.",
    403: "The caller may not ask for this.",
    404: "No such model, or no such path.",
    408: "The request was not sent in time.",
    413: "The request's body is too large.",
    415: "The request's body is not JSON by its media type.",
    429: "Too much is asked for just now; `Retry-After` says when to try again.",
    499: "An operator ended the request.",
    500: "A fault of the server's, whose log has the cause under the id.",
    503: "The model cannot compute just now, or the server is shutting down.",
    504: "The deadline that the request gave has passed.",
}

Responses = dict[int | str, dict[str, Any]]


def answers_with(
    reply: type[msgspec.Struct], *, streams: bool = False, errors: bool = True
) -> Responses:
    """What an endpoint declares of its responses; `streams`: with `stream`, they are events."""
    content: dict[str, Any] = {"application/json": _schema(reply)}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found: Responses = {200: {"content": content, "description": "The answer."}}
    if errors:
        found |= {
            status: {"content": {"application/json": _schema(ErrorBody)}, "description": text}
            for status, text in _ERRORS.items()
        }
    return found


def describe(app: FastAPI) -> None:
    """Have the application's document hold the replies as well, and FastAPI's own errors not."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_REF)
            known = document.setdefault("components", {}).setdefault("schemas", {})
            known.update(schemas)
            for name in ("HTTPValidationError", "ValidationError"):
                known.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way


def _schema(reply: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(name=reply.__name__)}}
