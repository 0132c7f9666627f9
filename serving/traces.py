"""Spans of requests, by OpenTelemetry, sent by OTLP over HTTP. Knows nothing of what is served.

A request's span is kept in a context variable of its task, so that whatever works for the request
may add a step to it. Where nothing is traced, a step is one look at that variable.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from serving import settings

SERVICE = "liftyard"

_NOTHING: AbstractContextManager[None] = nullcontext()


class _Request:
    """A request that is traced: its span, and what makes more of them."""

    def __init__(self, tracer: Any, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self.tracer, self.span = tracer, span
        self.within = set_span_in_context(span)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        with self.tracer.start_as_current_span(name, context=self.within):
            yield


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def step(name: str) -> AbstractContextManager[None]:
    """A span of this name in the request that this task works for, where that is traced."""
    request = _request.get()
    return _NOTHING if request is None else request.step(name)


def took(name: str, began_ns: int, ended_ns: int) -> None:
    """A step that is over, which others shared; times are `time.time_ns`."""
    request = _request.get()
    if request is not None:
        span = request.tracer.start_span(name, context=request.within, start_time=began_ns)
        span.end(ended_ns)


class Traces:
    """Makes spans and sends them, in a thread of its own."""

    def __init__(self, chosen: settings.Traces) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        endpoint = chosen.endpoint
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(chosen.sample)),
            resource=Resource.create({"service.name": SERVICE}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._read = TraceContextTextMapPropagator().extract

    def begin(self, name: str, traceparent: bytes | None, told: Mapping[str, Any]) -> str:
        """Begins the span of the request that this task works for; gives the trace's id.

        Args:
            name: The span's.
            traceparent: The client's W3C header; one that can't be read counts as none.
            told: The span's attributes.
        """
        context = None
        if traceparent is not None:
            context = self._read({"traceparent": traceparent.decode("latin-1")})
        span = self._tracer.start_span(name, context=context, attributes=told)
        _request.set(_Request(self._tracer, span) if span.is_recording() else None)
        return f"{span.get_span_context().trace_id:032x}"

    def end(self, told: Mapping[str, Any], *, failed: bool) -> None:
        """Ends the span of the request that this task works for."""
        from opentelemetry.trace import StatusCode

        request = _request.get()
        if request is None:
            return
        request.span.set_attributes({key: each for key, each in told.items() if each is not None})
        if failed:
            request.span.set_status(StatusCode.ERROR)
        request.span.end()
        _request.set(None)

    def close(self) -> None:
        """Sends what is left; may wait for the endpoint for seconds."""
        self._provider.shutdown()
