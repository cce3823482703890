"""The ASGI application: every endpoint, inside the boundary."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from deploy.edge.answers import OnCall
from deploy.edge.http.boundary import Boundary
from deploy.edge.http.chat import chats
from deploy.edge.http.completions import completions
from deploy.edge.http.errors import fall_silent, respond
from deploy.edge.http.exchanges import ClientGone
from deploy.edge.http.openapi import describe
from deploy.edge.http.operations import Exposition, operations
from deploy.edge.http.service import Service
from deploy.edge.http.tokens import tokens
from deploy.edge.security import Access
from deploy.version import version
from shards.errors import HeadwiseError


def build_app(
    service: Service,
    *,
    access: Access,
    exposition: Exposition | None,
    max_body_bytes: int,
    on_call: OnCall | None = None,
) -> ASGIApp:
    """`access` says who may call; `exposition` is what GET /metrics answers."""
    app = FastAPI(
        title="headwise",
        version=version(),
        summary="OpenAI-compatible HTTP API of a headwise cluster.",
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    routers = (
        completions(service),
        chats(service),
        tokens(service),
        operations(service, exposition),
    )
    for router in routers:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, HeadwiseError, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(ClientGone, fall_silent)
    describe(app)
    return Boundary(
        app,
        # Not the application's own, where FastAPI nests what it includes.
        [route for router in routers for route in router.routes],
        access=access,
        exchanges=service.exchanges,
        max_body_bytes=max_body_bytes,
        on_call=on_call,
    )
