"""One line in the log for every request, and its ids on every other line about it.

Lengths, never texts: what a user wrote or was answered is in no log.
"""

from __future__ import annotations

import re
import time

import structlog

from cluster.request import Request
from cluster.text import TextDelta
from deploy.edge.answers import Caller
from deploy.telemetry.requests import code_of

log = structlog.get_logger(__name__)

# https://www.w3.org/TR/trace-context/#traceparent-header; an id of zeros alone is no id.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-")


def trace_id(traceparent: str) -> str:
    """The trace id of a W3C trace context; empty where it has none."""
    found = _TRACEPARENT.match(traceparent)
    return "" if found is None else found[1]


class RequestLog:
    """A `deploy.edge.answers.Watcher`; binds the ids to the context of the request's task."""

    def begin(self, model: str, request: Request, caller: Caller) -> RequestLine:
        ids = {"request_id": request.id}
        if trace := trace_id(caller.traceparent):
            ids["trace_id"] = trace
        structlog.contextvars.bind_contextvars(**ids)
        return RequestLine(model, request, caller, ids)


class RequestLine:
    """Collects what the line will say."""

    def __init__(self, model: str, request: Request, caller: Caller, ids: dict[str, str]) -> None:
        self._log = log.bind(
            model=model, api=caller.api, prompt_tokens=len(request.prompt), samples=request.n, **ids
        )
        if caller.name:
            self._log = self._log.bind(caller=caller.name)
        self._began = time.monotonic()
        self._queued: float | None = None
        self._first: float | None = None
        self._generated = 0
        self._finishes: dict[int, str] = {}

    def delta(self, delta: TextDelta) -> None:
        self._generated += len(delta.tokens)
        if self._first is None and delta.tokens:
            self._first = time.monotonic() - self._began
            self._queued = delta.queued
        if delta.finish is not None:
            self._finishes[delta.index] = delta.finish.value

    def end(self, error: BaseException | None) -> None:
        self._log.info(
            "request",
            code=code_of(error),
            finish=[reason for _, reason in sorted(self._finishes.items())],
            generated_tokens=self._generated,
            queue_s=_rounded(self._queued),
            first_token_s=_rounded(self._first),
            seconds=_rounded(time.monotonic() - self._began),
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
