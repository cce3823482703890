"""What is served and how it is doing: models, health, readiness, version, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deploy.edge.http import replies
from deploy.edge.http.openapi import answers_with
from deploy.edge.http.service import Service
from deploy.edge.models import Served
from deploy.version import version

Exposition = Callable[[str], Awaitable[tuple[bytes, str]]]
"""The metrics of this process in a format that the header `Accept` allows: body, content type."""

OPEN_PATHS = frozenset(("/health", "/ready", "/version", "/metrics"))
"""Who monitors has no token."""


def operations(service: Service, exposition: Exposition | None) -> APIRouter:
    """The endpoints; /metrics where there is an exposition."""
    router = APIRouter()

    @router.get("/v1/models", responses=answers_with(replies.ModelList))
    async def list_models() -> Response:
        """The models that requests may name."""
        models = [_model(served) for served in service.models.all]
        return _json(replies.ModelList(models))

    @router.get("/v1/models/{model:path}", responses=answers_with(replies.Model))
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        return _json(_model(service.models.get(model)))

    @router.get("/health", responses=_monitored(replies.HealthReport))
    async def health() -> Response:
        """Every rank of every model, and why it does not compute; 503 while no model does."""
        models = [_health(served) for served in service.models.all]
        computing = _computes(service)
        report = replies.HealthReport("ok" if computing else "unavailable", models)
        return _json(report, 200 if computing else 503)

    @router.get("/ready", responses=_monitored(replies.Readiness))
    async def ready() -> Response:
        """Whether to send requests here: 503 also while the server finishes its last ones."""
        cause = "" if _computes(service) else "no model computes: /health says why"
        if service.exchanges.retiring:
            cause = "the server is shutting down"
        return _json(replies.Readiness(not cause, cause), 503 if cause else 200)

    @router.get("/version", responses=answers_with(replies.Version, errors=False))
    async def get_version() -> Response:
        """headwise's. Answers as long as the process does."""
        return _json(replies.Version(version()))

    if exposition is not None:

        @router.get("/metrics", response_class=Response)
        async def metrics(request: Request) -> Response:
            """For Prometheus."""
            body, content_type = await exposition(request.headers.get("accept", ""))
            return Response(body, headers={"content-type": content_type})

    return router


def _monitored(reply: type[msgspec.Struct]) -> dict[int | str, dict[str, object]]:
    """Both answers have the same form."""
    found = answers_with(reply, errors=False)
    return {**found, 503: {**found[200], "description": "Not so."}}


def _computes(service: Service) -> bool:
    return any(served.generator.health().state.computes for served in service.models.all)


def _model(served: Served) -> replies.Model:
    return replies.Model(served.name, int(served.facts.started_at), served.generator.model.context)


def _health(served: Served) -> replies.ModelHealth:
    health = served.generator.health()
    return replies.ModelHealth(
        served.name,
        health.state.value,
        health.cause,
        health.since,
        health.epoch,
        [
            replies.RankState(
                rank.rank,
                rank.host,
                rank.pid,
                rank.state.value,
                rank.cause,
                rank.since,
                rank.replica,
            )
            for rank in health.ranks
        ],
    )


def _json(reply: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(reply), status, media_type="application/json")
