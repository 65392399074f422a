"""A span a request for OpenTelemetry, sent by OTLP: how it went and what it cost, nothing of what was said."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from treering.errors import UsageError

if TYPE_CHECKING:
    from treering.serve.telemetry import Seen

PROBES = ("/healthz", "/readyz", "/metrics")
"""Asked every few seconds for as long as the server lives, and nobody's trace."""


class Tracing:
    """Where the spans go. OpenTelemetry's own variables say where that is, as whom, and how many of them.

    Raises `UsageError` if OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UsageError(
                f"serve.telemetry is otlp, but OpenTelemetry is not installed ({error}); "
                "run `pip install 'treering[otel]'`, or take the setting out"
            ) from None
        named = Resource({"service.name": "treering"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("treering")

    def ended(self, seen: Seen) -> None:
        """Tell of a request, as a part of the trace that its client is in."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if seen.path in PROBES:
            return
        about: dict[str, str | int | None] = {
            "http.request.method": seen.method,
            "http.route": seen.path,
            "http.response.status_code": seen.status,
            "gen_ai.request.model": seen.model,
            "gen_ai.response.model": seen.version,
            "gen_ai.usage.input_tokens": seen.prompt_tokens if seen.version else None,
            "gen_ai.usage.output_tokens": seen.completion_tokens if seen.version else None,
            "treering.request": seen.id,
            "treering.arm": seen.part.arm if seen.part else None,
        }
        now = time.time_ns()
        span = self._tracer.start_span(
            f"{seen.method} {seen.path}",
            TraceContextTextMapPropagator().extract(seen.trace),
            SpanKind.SERVER,
            {name: value for name, value in about.items() if value is not None},
            start_time=now - int((time.perf_counter() - seen.started) * 1e9),
        )
        if seen.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)

    def stop(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()
