"""OpenTelemetry spans of requests and of steps.

Names and attributes are those of the semantic conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); what they have no name for is
`headwise.*`. Never a text: not of prompts, answers, stop strings or errors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.engine_loop import StepSample
from cluster.request import Request, Timing, Usage
from cluster.text import TextDelta
from deploy.edge.answers import Caller
from deploy.telemetry.requests import code_of
from deploy.version import version
from shards.timing import PHASES

_PROVIDER = "headwise"
# What is the server's fault: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/#grpc-status
_FAILURES = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)


class Tracing:
    """A `deploy.edge.answers.Watcher` that makes a span of every request that is sampled; `step`
    is an `OnStep` of the engine loop."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headwise", version())
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, model: str, request: Request, caller: Caller) -> RequestSpan | _NoSpan:
        parent = self._propagator.extract({"traceparent": caller.traceparent}, Context())
        began = _Clock()
        span = self._tracer.start_span(
            f"{caller.operation} {model}",
            parent,
            SpanKind.SERVER,
            _attributes(model, request, caller),
            start_time=began.ns(0),
        )
        if not span.is_recording():
            return _NO_SPAN
        trace_id = format(span.get_span_context().trace_id, "032x")
        structlog.contextvars.bind_contextvars(trace_id=trace_id)
        return RequestSpan(self._tracer, span, began, request)

    def step(self, sample: StepSample) -> None:
        """A span from the plan's departure to the arrival of its result, in a trace of its own: a
        step is many requests'. Phases are attributes, since every layer comes by all of them."""
        seconds = sample.seconds
        span = self._tracer.start_span(
            "step",
            Context(),
            attributes={
                "headwise.step": sample.step,
                "headwise.step.epoch": sample.epoch,
                "headwise.step.sequences": sample.sequences,
                "headwise.step.tokens": sample.tokens,
                "headwise.step.seconds": seconds.total,
                **{f"headwise.step.{name}_seconds": getattr(seconds, name) for name in PHASES},
            },
            start_time=sample.sent_ns,
        )
        span.end(sample.received_ns)

    def close(self) -> None:
        """Send what is left; blocks until it is sent, or the exporter's timeout."""
        self._provider.shutdown()


class _Clock:
    """Unix time in ns of seconds after its making: durations are the monotonic clock's."""

    def __init__(self) -> None:
        self._began_ns = time.time_ns()
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def ns(self, seconds: float) -> int:
        return self._began_ns + round(seconds * 1e9)


class RequestSpan:
    """One request's span, with `queue`, `prefill` and `decode` of each sample below it."""

    def __init__(self, tracer: Tracer, span: Span, clock: _Clock, request: Request) -> None:
        self._tracer = tracer
        self._span = span
        self._below = set_span_in_context(span)
        self._clock = clock
        self._samples = {index: _Sample() for index in range(request.n)}
        self._finishes: dict[int, str] = {}
        self._generated = 0

    def delta(self, delta: TextDelta) -> None:
        sample = self._samples.get(delta.index)
        if sample is None:
            return
        self._generated += len(delta.tokens)
        if sample.queued is None:
            sample.queued = delta.queued
        if sample.first_token is None and delta.tokens:
            sample.first_token = self._clock.elapsed
            if not any(other.first_token for other in self._samples.values() if other != sample):
                self._span.set_attribute(
                    gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, sample.first_token
                )
        if delta.finish is not None:
            self._finishes[delta.index] = delta.finish.value
            self._phases(delta.index, self._samples.pop(delta.index).timed(delta.timing))
            if delta.usage is not None and delta.index == 0:
                self._note_prompt(delta.usage)

    def end(self, error: BaseException | None) -> None:
        for index, sample in self._samples.items():
            self._phases(index, sample)
        span, code = self._span, code_of(error)
        finishes = [reason for _, reason in sorted(self._finishes.items())]
        span.set_attribute(gen_ai.GEN_AI_RESPONSE_FINISH_REASONS, finishes)
        span.set_attribute(gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS, self._generated)
        if code != "OK":
            span.set_attribute(error_attributes.ERROR_TYPE, code)
        if code in _FAILURES:
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(self._clock.ns(self._clock.elapsed))

    def _note_prompt(self, usage: Usage) -> None:
        self._span.set_attribute(gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, usage.cached_tokens)

    def _phases(self, index: int, sample: _Sample) -> None:
        """Spans of what a sample went through; of one that did not end by itself, up to now."""
        end = self._clock.elapsed if sample.total is None else sample.total
        queued = end if sample.queued is None else sample.queued
        first = end if sample.first_token is None else sample.first_token
        self._phase("queue", index, 0.0, queued)
        if sample.queued is not None:
            self._phase("prefill", index, queued, first)
        if sample.first_token is not None:
            self._phase("decode", index, first, end)

    def _phase(self, name: str, index: int, start: float, end: float) -> None:
        span = self._tracer.start_span(
            name,
            self._below,
            attributes={"headwise.sample": index},
            start_time=self._clock.ns(start),
        )
        span.end(self._clock.ns(max(start, end)))


class _Sample:
    """When what happened to one sample, in seconds after the request came."""

    def __init__(self) -> None:
        self.queued: float | None = None
        self.first_token: float | None = None
        self.total: float | None = None

    def timed(self, timing: Timing | None) -> _Sample:
        """The same by the driver's clock, where it has told."""
        if timing is not None:
            self.queued, self.total = timing.queue, timing.total
            if self.first_token is not None:
                self.first_token = timing.first_token
        return self


class _NoSpan:
    """Watches nothing: the request is not sampled."""

    def delta(self, delta: TextDelta) -> None: ...
    def end(self, error: BaseException | None) -> None: ...


_NO_SPAN = _NoSpan()


def _attributes(model: str, request: Request, caller: Caller) -> Mapping[str, str | int | float]:
    sampling = request.sampling
    found: dict[str, str | int | float | None] = {
        gen_ai.GEN_AI_OPERATION_NAME: caller.operation,
        gen_ai.GEN_AI_PROVIDER_NAME: _PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: model,
        gen_ai.GEN_AI_RESPONSE_MODEL: model,
        gen_ai.GEN_AI_RESPONSE_ID: request.id,
        gen_ai.GEN_AI_REQUEST_MAX_TOKENS: request.stopping.max_tokens,
        gen_ai.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
        gen_ai.GEN_AI_REQUEST_TOP_P: sampling.top_p,
        gen_ai.GEN_AI_REQUEST_TOP_K: sampling.top_k or None,
        gen_ai.GEN_AI_REQUEST_FREQUENCY_PENALTY: sampling.frequency_penalty,
        gen_ai.GEN_AI_REQUEST_PRESENCE_PENALTY: sampling.presence_penalty,
        gen_ai.GEN_AI_REQUEST_CHOICE_COUNT: None if request.n == 1 else request.n,
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: len(request.prompt),
        "headwise.api": caller.api,
    }
    return {name: value for name, value in found.items() if value is not None}
