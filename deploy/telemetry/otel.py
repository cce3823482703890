"""Where spans go: OpenTelemetry's SDK as its standard OTEL_* variables say.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from cluster.errors import StartupError
from deploy.version import version

_EXPORTERS = "opentelemetry_traces_exporter"
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


def provider_from_environment() -> TracerProvider:
    """A provider of its own, not the process's. Sampler, batches, limits and the exporter's target
    are what the SDK reads from its variables; the service's name is `headwise` unless they say.

    Raises `StartupError` for an exporter that is not installed.
    """
    ours = Resource({SERVICE_NAME: "headwise", SERVICE_VERSION: version()})
    resource = Resource.create(ours.merge(OTELResourceDetector().detect()).attributes)
    # `Tracing.close` ends it; an exit handler would hold up a process that is being replaced.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in _names():
        provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
    return provider


def _names() -> list[str]:
    named = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    return [name.strip() for name in named.split(",") if name.strip() != "none"]


def _exporter(name: str) -> SpanExporter:
    asked = name
    if name == "otlp":
        protocol = (
            os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
            or "grpc"
        )
        if protocol not in _PROTOCOLS:
            raise StartupError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r}: use one of {', '.join(_PROTOCOLS)}"
            )
        asked = _PROTOCOLS[protocol]
    found = entry_points(group=_EXPORTERS, name=asked)
    if not found:
        raise StartupError(
            f"no exporter {name!r} for traces is installed: install headwise-cluster[otel] for "
            "otlp, or name another in OTEL_TRACES_EXPORTER (console, none)"
        )
    exporter: SpanExporter = next(iter(found)).load()()
    return exporter
