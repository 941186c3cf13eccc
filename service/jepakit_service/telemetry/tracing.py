"""OpenTelemetry traces by OTLP over HTTP, switched on by OTEL_TRACES_EXPORTER=otlp or the address of a collector.

OpenTelemetry itself reads everything else (headers, sampling, service name, resource). Spans hold no content.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jepakit.errors import ConfigError, MissingExtraError

_LONGEST_S = 2.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


def wanted() -> bool:
    """Whether the environment asks for traces. ConfigError if it asks for traces that cannot be sent."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    # OpenTelemetry treats an empty variable as unset.
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, _ENDPOINTS)) else "none")
    if exporter not in ("otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER = {exporter!r}: traces are only sent by otlp: set otlp or none")
    if exporter == "none":
        return False
    variable = next(filter(os.environ.get, _PROTOCOLS), None)  # the first of them counts
    if variable is not None and (protocol := os.environ[variable]) != _PROTOCOL:
        raise ConfigError(
            f"{variable} = {protocol!r}: traces are only sent by {_PROTOCOL}, which collectors accept on port 4318: "
            f"set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL={_PROTOCOL}, and the address of that port"
        )
    return True


def check() -> None:
    """Raise what `wanted` raises, and MissingExtraError when traces are wanted and the exporter is not installed."""
    if not wanted():
        return
    try:  # Ray brings other parts of opentelemetry.exporter
        importlib.import_module("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        raise MissingExtraError("OTEL_* variables ask for traces, which need: pip install 'jepakit[tracing]'") from None


class Tracer:
    """Makes one span per request, a child of the caller's if it sent `traceparent`. Raises what `check` raises."""

    def __init__(self) -> None:
        check()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # `create` lets its own attributes win over those of the environment.
        resource = Resource.create({"service.name": "jepakit"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("jepakit")

    @contextmanager
    def request(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of one request; `set_attribute` adds to it."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"{method} {route}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route},
            record_exception=False,
        ) as span:
            yield span

    def flush(self) -> None:
        """Send the remaining spans, taking two seconds at most."""
        _for_a_while(self._provider.force_flush)

    def close(self) -> None:
        """Send the remaining spans, taking two seconds at most; there are no spans afterwards."""
        _for_a_while(self._provider.shutdown)


def answered(span: Any, status: int, request_id: str) -> str:
    """Record the answer in its span, as an error from status 500 on; returns the trace id, for the log."""
    from opentelemetry.trace import StatusCode, format_trace_id

    span.set_attribute("http.response.status_code", status)
    span.set_attribute("jepakit.request_id", request_id)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)
    return format_trace_id(span.get_span_context().trace_id)


def _for_a_while(send: Callable[[], object]) -> None:
    """Wait two seconds at most: a hanging collector must not delay shutdown, and OpenTelemetry does not keep to its timeouts."""
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(_LONGEST_S)
