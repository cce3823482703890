"""Spans of requests and steps, as an exporter gets them."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from cluster.engine_loop import StepSample
from cluster.errors import Overloaded, StartupError, Unavailable
from cluster.request import HealthState
from deploy.edge.answers import Caller
from deploy.telemetry.otel import provider_from_environment
from deploy.telemetry.traces import Tracing
from shards.contract import PhaseSeconds
from tests.unit.fakes import FakeGenerator
from tests.unit.watched import answer, request

TRACE = "0af7651916cd43dd8448eb211c80319c"
CHAT = Caller("http", traceparent=f"00-{TRACE}-b7ad6b7169203331-01", operation="chat")


class Spans:
    """A tracing whose spans are kept."""

    def __init__(self, **options: object) -> None:
        self._kept = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False, **options)  # type: ignore[arg-type]
        provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.tracing = Tracing(provider)

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self._kept.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.all if span.name == name]
        return span


def seconds(span: ReadableSpan, since: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    assert since.start_time is not None
    return (span.start_time - since.start_time) / 1e9, (span.end_time - since.start_time) / 1e9


async def test_a_request_with_its_phases() -> None:
    spans = Spans()
    asked = request("id-1", prompt=3, max_tokens=4)
    await answer(FakeGenerator(), [spans.tracing], asked, CHAT)

    span = spans.named("chat fake")
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is not None
    assert format(span.context.trace_id, "032x") == TRACE
    assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"
    attributes = dict(span.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0  # type: ignore[operator]
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headwise",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": "id-1",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "headwise.api": "http",
    }
    # The fake's timing.
    for name, expected in {"queue": (0, 0.25), "prefill": (0.25, 0.5), "decode": (0.5, 1)}.items():
        below = spans.named(name)
        assert below.parent is not None
        assert below.parent.span_id == span.context.span_id
        assert seconds(below, span) == pytest.approx(expected)


async def test_each_sample_has_its_phases() -> None:
    spans = Spans()
    await answer(FakeGenerator(), [spans.tracing], request("a", n=2))

    decodes = [span.attributes or {} for span in spans.all if span.name == "decode"]
    assert sorted(one["headwise.sample"] for one in decodes) == [0, 1]  # type: ignore[type-var]
    attributes = spans.named("text_completion fake").attributes or {}
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attributes["gen_ai.usage.output_tokens"] == 8


async def test_a_failure_of_the_server() -> None:
    spans, generator = Spans(), FakeGenerator()
    generator.pause()
    running = asyncio.create_task(answer(generator, [spans.tracing], request("a")))
    await generator.until(lambda: "a" in generator.live)
    generator.set_health(HealthState.NOT_READY, "rank 1 died")
    with pytest.raises(Unavailable):
        await running

    span = spans.named("text_completion fake")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "UNAVAILABLE")
    assert (span.attributes or {})["error.type"] == "UNAVAILABLE"
    # No step ever took it in.
    assert [one.name for one in spans.all] == ["queue", "text_completion fake"]


async def test_a_refusal_is_no_failure_of_the_server() -> None:
    spans, generator = Spans(), FakeGenerator()
    generator.refusal = Overloaded("full", retry_after=1.0)
    with pytest.raises(Overloaded):
        await answer(generator, [spans.tracing], request("a"))

    span = spans.named("text_completion fake")
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["error.type"] == "RESOURCE_EXHAUSTED"


async def test_what_is_not_sampled_is_answered_all_the_same() -> None:
    spans = Spans(sampler=ALWAYS_OFF)
    deltas = await answer(FakeGenerator(), [spans.tracing], request("a", max_tokens=4))
    assert sum(len(delta.tokens) for delta in deltas) == 4
    assert not spans.all


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-01"])
async def test_no_trace_context_begins_a_trace(traceparent: str) -> None:
    spans = Spans()
    caller = Caller("grpc", traceparent=traceparent)
    await answer(FakeGenerator(), [spans.tracing], request("a"), caller)
    assert spans.named("text_completion fake").parent is None


def test_a_step_tells_where_its_time_went() -> None:
    spans = Spans()
    phases = PhaseSeconds(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 2.1)
    spans.tracing.step(StepSample(100, 1, 10, 30, sequences=2, tokens=17, seconds=phases))

    span = spans.named("step")
    assert (span.start_time, span.end_time, span.parent) == (10, 30, None)
    attributes = span.attributes or {}
    assert attributes["headwise.step"] == 100
    assert attributes["headwise.step.tokens"] == 17
    assert attributes["headwise.step.all_reduce_seconds"] == 0.4
    assert attributes["headwise.step.seconds"] == 2.1


def test_the_environment_names_service_and_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    provider = provider_from_environment()
    assert provider.resource.attributes["service.name"] == "headwise"

    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    attributes = provider_from_environment().resource.attributes
    assert attributes["service.name"] == "mine"
    assert attributes["deployment.environment.name"] == "test"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("OTEL_TRACES_EXPORTER", "telegraph", "no exporter 'telegraph'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke", "use one of grpc, http/protobuf"),
    ],
)
def test_an_exporter_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=words):
        provider_from_environment()
