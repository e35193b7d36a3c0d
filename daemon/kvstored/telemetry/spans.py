"""OpenTelemetry traces, if an operator enables them: one span per call, through either door.

Off unless `server.traces_endpoint` is set; while off, OpenTelemetry is not imported and a span costs one comparison.
If a caller sends a W3C `traceparent` with its call, the span is part of the caller's trace. Spans have the method, the
status, the caller and the number of keys, never a key, a tenant's data or a token.
Thread rule: any thread; the exporter has its own thread, and drops spans that it cannot send.
"""

import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from kvstore.errors import ConfigError

SERVICE = "kvstored"
Metadata = Iterable[tuple[str, Any]]


class Spans:
    """Makes a span for each ended call. provider: OpenTelemetry's TracerProvider; None: off."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self.wanted = provider is not None
        if provider is not None:
            self._tracer = provider.get_tracer(SERVICE)
            self._server = import_module("opentelemetry.trace").SpanKind.SERVER
            status = import_module("opentelemetry.trace.status")
            self._error = status.Status(status.StatusCode.ERROR)
            # Not the global propagator: the environment could add baggage to it, which is the callers' private data.
            self._parents = import_module(
                "opentelemetry.trace.propagation.tracecontext"
            ).TraceContextTextMapPropagator()

    def record(
        self, method: str, code: str, seconds: float, metadata: Metadata, attributes: Mapping[str, str | int]
    ) -> None:
        """Record a call that has just ended. method: such as "Cache/Get"; metadata: the call's."""
        if not self.wanted:
            return
        sent = {name: str(value) for name, value in metadata if name in ("traceparent", "tracestate")}
        service, _, name = method.partition("/")
        now = time.time_ns()
        span = self._tracer.start_span(
            f"kvstored.v1.{method}",
            context=self._parents.extract(sent) if sent else None,
            kind=self._server,
            start_time=now - int(seconds * 1e9),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": f"kvstored.v1.{service}",
                "rpc.method": name,
                "rpc.grpc.status": code,
                **{f"kvstored.{name}": value for name, value in attributes.items()},
            },
        )
        if code != "OK":
            span.set_status(self._error)
        span.end(now)

    def close(self) -> None:
        """Send the waiting spans, for a few seconds at most. Blocks."""
        if self._provider is not None:
            self._provider.shutdown()


def open_spans(endpoint: str, version: str) -> Spans:
    """Spans sent to an OTLP endpoint over HTTP; off if it is empty. Raises ConfigError.

    All other options are OpenTelemetry's own variables: OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...
    """
    if not endpoint:
        return Spans()
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
        resources = import_module("opentelemetry.sdk.resources")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigError(
            f"server.traces_endpoint needs what is not installed ({error.name}): pip install 'kvstored[otel]'"
        ) from None
    # create() adds the attributes in OTEL_RESOURCE_ATTRIBUTES.
    resource = resources.Resource.create({"service.name": SERVICE, "service.version": version})
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    return Spans(provider)
