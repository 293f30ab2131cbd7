"""Traces for OpenTelemetry, with the `[otel]` extra: a span for each request, sent to a collector over HTTP.

A span has the route's template, never the path or the query: those hold links' secrets, codes and what people write.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.settings import Settings
from app.web.measures import template

_UNTOLD = ("/static/", "/healthz", "/readyz", "/metrics")

_SECONDS = 2
"""How long the collector may take for a batch."""


def provider_of(settings: Settings) -> Any:
    """Return what makes spans and sends them, in batches from a thread of its own. supervisor looks for the extra."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "sae-atlas-web"}))
    # Less than stopping may take: a collector that is gone must not get the process killed.
    exporter = OTLPSpanExporter(endpoint=f"{settings.otel_endpoint.rstrip('/')}/v1/traces", timeout=_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class Traced:
    """Makes a span of each request; one that comes with a `traceparent` is a part of that trace."""

    def __init__(self, app: ASGIApp, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self._tracer = provider.get_tracer("sae-atlas")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or str(scope["path"]).startswith(_UNTOLD):
            await self.app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent = self._propagator.extract(dict(Headers(scope=scope)))
        with self._tracer.start_as_current_span(
            str(scope["method"])[:10], context=parent, kind=SpanKind.SERVER, record_exception=False
        ) as span:

            async def told(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            try:
                await self.app(scope, receive, told)
            finally:
                route = template(scope)
                span.update_name(f"{str(scope['method'])[:10]} {route}")
                span.set_attribute("http.request.method", str(scope["method"])[:10])
                span.set_attribute("http.route", route)
                span.set_attribute("sae_atlas.request_id", str(scope.get("state", {}).get("request_id", "")))
