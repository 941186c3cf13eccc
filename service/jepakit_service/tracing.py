"""OpenTelemetry traces, switched on by the usual variables (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER=otlp).

Everything else (headers, sampling, service name, resource) is OpenTelemetry's own to read. Spans hold no content.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jepakit.errors import MissingExtraError

_LONGEST_S = 2.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def wanted() -> bool:
    """Whether the environment asks for traces."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp" if any(map(os.environ.get, _ENDPOINTS)) else "none")
    return exporter == "otlp" and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def check() -> None:
    """Raise MissingExtraError when traces are wanted and the exporter is not installed."""
    if not wanted():
        return
    try:  # Ray brings other parts of opentelemetry.exporter
        importlib.import_module("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        raise MissingExtraError("OTEL_* variables ask for traces, which need: pip install 'jepakit[tracing]'") from None


class Tracer:
    """A span a request, as a child of the caller's where it sent `traceparent`. Raises what `check` raises."""

    def __init__(self) -> None:
        check()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "jepakit"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("jepakit")

    @contextmanager
    def request(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of one request; `set_attribute` adds to it."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(
            f"{method} {route}", context=extract(headers), kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route}, record_exception=False,
        ) as span:  # fmt: skip
            yield span

    def flush(self) -> None:
        """Send what is left, for two seconds at most."""
        _for_a_while(self._provider.force_flush)

    def close(self) -> None:
        """Send what is left, for two seconds at most; there is no span after it."""
        _for_a_while(self._provider.shutdown)


def _for_a_while(send: Callable[[], object]) -> None:
    """A collector that hangs must not hold up the end: OpenTelemetry's own limits are not kept."""
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(_LONGEST_S)
