"""Metrics of requests, as their edge sees them: a `Watcher` that counts and observes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.errors import Overloaded
from cluster.request import FinishReason, Request, Timing, Usage
from cluster.text import TextDelta
from deploy.edge import errors
from deploy.edge.answers import Caller
from deploy.telemetry import catalog
from deploy.telemetry.catalog import ENGINE, Metric

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.DEADLINE: "abort",
}
_CODES = {FinishReason.ABORTED: "CANCELLED", FinishReason.DEADLINE: "DEADLINE_EXCEEDED"}
_FREQUENT = ("CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
# Codes of requests that were never taken on, and so did not end either.
_REFUSALS = frozenset(
    ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
)


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(
        metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
    )


class RequestMetrics:
    """Watches every request of one edge; all in that edge's event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._success = counter(catalog.SUCCESS, registry)
        self._errors = counter(catalog.ERRORS, registry)
        self._streams = gauge(catalog.STREAMS, registry)
        self._retry_hints = _histogram(catalog.RETRY_HINTS, registry)
        self._histograms = {
            metric: _histogram(metric, registry)
            for metric in catalog.CATALOG
            if metric.kind == "histogram" and metric is not catalog.RETRY_HINTS
        }
        self._series: dict[tuple[str, str], _Series] = {}

    def begin(self, model: str, request: Request, caller: Caller) -> RequestWatch:
        series = self._series.get((model, caller.api))
        if series is None:
            series = self._series[model, caller.api] = self._series_of(model, caller.api)
        return RequestWatch(series, request)

    def _series_of(self, model: str, api: str) -> _Series:
        # All of them at once, here and below, so that a rate is known from the first one on.
        for code in _FREQUENT:
            self._errors.labels(model, api, code)
        return _Series(
            histograms={
                metric: histogram.labels(model, ENGINE)
                for metric, histogram in self._histograms.items()
            },
            finished={
                reason: self._success.labels(model, ENGINE, reason)
                for reason in ("stop", "length", "abort", "error")
            },
            streams=self._streams.labels(model, api),
            retry_hints=self._retry_hints.labels(model, api),
            errors=self._errors,
            labels=(model, api),
        )


@dataclass(frozen=True, slots=True)
class _Series:
    """The time series of one model and API."""

    histograms: dict[Metric, Histogram]
    finished: dict[str, Counter]
    streams: Gauge
    retry_hints: Histogram
    errors: Counter
    labels: tuple[str, str]

    def observe(self, metric: Metric, value: float) -> None:
        self.histograms[metric].observe(max(0.0, value))


class RequestWatch:
    """Observes one request."""

    def __init__(self, series: _Series, request: Request) -> None:
        self._series = series
        self._began = time.monotonic()
        self._last: dict[int, float] = {}  # of every sample: when it brought tokens last
        self._open = set(range(request.n))
        self._code: str | None = None  # where a sample's finish says why the request failed
        self._itl = series.histograms[catalog.ITL]
        series.streams.inc()
        series.observe(catalog.PARAMS_N, request.n)
        if request.stopping.max_tokens is not None:
            series.observe(catalog.PARAMS_MAX_TOKENS, request.stopping.max_tokens)

    def delta(self, delta: TextDelta) -> None:
        count = len(delta.tokens)
        if count:
            now, last = time.monotonic(), self._last.get(delta.index)
            self._last[delta.index] = now
            if last is None:
                self._series.observe(catalog.TTFT, now - self._began)
            else:
                each = (now - last) / count
                for _ in range(count):
                    self._itl.observe(each)
        if delta.finish is not None:
            self._finish(delta.index, delta.finish, delta.usage, delta.timing)

    def end(self, error: BaseException | None) -> None:
        series = self._series
        series.streams.dec()
        if isinstance(error, Overloaded | errors.LimitExceeded):
            series.retry_hints.observe(error.retry_after)
        code = self._code or code_of(error)
        if code != "OK":
            series.errors.labels(*series.labels, code).inc()
        if code in _REFUSALS:
            return
        reason = "abort" if code in ("CANCELLED", "DEADLINE_EXCEEDED") else "error"
        series.finished[reason].inc(len(self._open))
        self._open.clear()

    def _finish(
        self, index: int, reason: FinishReason, usage: Usage | None, timing: Timing | None
    ) -> None:
        series = self._series
        self._open.discard(index)
        self._code = _CODES.get(reason, self._code)
        series.finished[_REASONS[reason]].inc()
        if timing is not None:
            series.observe(catalog.E2E, timing.total)
            series.observe(catalog.QUEUE_TIME, timing.queue)
            series.observe(catalog.PREFILL_TIME, timing.first_token - timing.queue)
            series.observe(catalog.DECODE_TIME, timing.total - timing.first_token)
            series.observe(catalog.INFERENCE_TIME, timing.total - timing.queue)
        if usage is not None:
            series.observe(catalog.REQUEST_PROMPT, usage.prompt_tokens)
            series.observe(catalog.REQUEST_GENERATION, usage.completion_tokens)
        if timing is not None and usage is not None and usage.completion_tokens > 1:
            decode = timing.total - timing.first_token
            series.observe(catalog.TPOT, decode / (usage.completion_tokens - 1))


def code_of(error: BaseException | None) -> str:
    """The name of the gRPC status that a request's end has, whichever API it came in by."""
    if error is None:
        return "OK"
    # What the edge raises where nobody reads any more.
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.BaseError):
        return "CANCELLED"
    return errors.code_of(error).name
