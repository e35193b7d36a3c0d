"""OpenTelemetry traces, where an operator asks for them: one span a call, through either door.

Off unless `server.traces_endpoint` is set, and then nothing of OpenTelemetry is imported: a span costs one comparison.
A caller that sends a W3C `traceparent` with its call finds ours among its own. Spans carry the method, the status, who
called and how many keys it was about, never a key, a tenant's data or a token.
Thread rule: any thread; the exporter has a thread of its own, and what it cannot send it drops.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Protocol

from kvstore.errors import ConfigError

SERVICE = "kvstored"


class Span(Protocol):
    """A call under way."""

    def set_attribute(self, key: str, value: str | int) -> None:
        """Say something of it."""
        ...

    def end(self) -> None:
        """It is over."""
        ...


class Spans:
    """Begins and ends spans, or does nothing. provider: OpenTelemetry's TracerProvider; None: off."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer(SERVICE)
        if provider is not None:
            self._server = import_module("opentelemetry.trace").SpanKind.SERVER
            status = import_module("opentelemetry.trace.status")
            self._error = status.Status(status.StatusCode.ERROR)
            # Not the global propagator: an operator's environment could add baggage, which is the callers' own.
            self._parents = import_module(
                "opentelemetry.trace.propagation.tracecontext"
            ).TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Iterable[tuple[str, Any]] = ()) -> Span | None:
        """A call begins. method: as "Cache/Get"; metadata: what came with it. None: traces are off."""
        if self._tracer is None:
            return None
        sent = {name: str(value) for name, value in metadata if name in ("traceparent", "tracestate")}
        service, _, name = method.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": f"kvstored.v1.{service}", "rpc.method": name}
        span: Span = self._tracer.start_span(
            f"kvstored.v1.{method}",
            context=self._parents.extract(sent) if sent else None,
            kind=self._server,
            attributes=attributes,
        )
        return span

    def end(self, span: Span | None, code: str, said: Mapping[str, str | int]) -> None:
        """It ended with a status; said: attributes known by now."""
        if span is None:
            return
        span.set_attribute("rpc.grpc.status", code)
        for name, value in said.items():
            span.set_attribute(f"kvstored.{name}", value)
        if code != "OK":
            span.set_status(self._error)  # type: ignore[attr-defined]
        span.end()

    def close(self) -> None:
        """Send what waits, for a few seconds at most. Blocks."""
        if self._provider is not None:
            self._provider.shutdown()


def open_spans(endpoint: str, version: str) -> Spans:
    """Spans sent to an OTLP endpoint over HTTP; off where it is empty. Raises ConfigError.

    Everything else is said in OpenTelemetry's own variables: OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...
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
    # create() adds what OTEL_RESOURCE_ATTRIBUTES says.
    resource = resources.Resource.create({"service.name": SERVICE, "service.version": version})
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    return Spans(provider)
