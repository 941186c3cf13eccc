"""Prometheus metrics of the service: one registry per replica, combined for the deployment by `merge`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ALARMING = ("overloaded", "timeout", "out_of_memory", "internal_error")
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_RESULTS, _STAGES = ("ok", "error"), ("decode", "queue", "inference")


class Metrics:
    """The counters of one replica. Times are seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("jepakit_requests", "Answered requests", ("route", "status"), registry=self.registry)
        self.request_seconds = Histogram(
            "jepakit_request_seconds",
            "Seconds from a request's headers to its answer, its body included",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.refused = Counter("jepakit_refused", "Refused requests, by code", ("code",), registry=self.registry)
        for code in _ALARMING:  # a counter that only appears with its first refusal shows no rate
            self.refused.labels(code)
        self.in_flight = Gauge("jepakit_in_flight_requests", "Requests in progress", registry=self.registry)
        self.ready = Gauge("jepakit_ready", "1 when every model answers", registry=self.registry)
        self.images = Counter(
            "jepakit_images", "Images embedded, or refused as images", ("model", "result"), registry=self.registry
        )
        self.waiting = Gauge("jepakit_waiting_images", "Images waiting or running", ("model",), registry=self.registry)
        self.batch_size = Histogram(
            "jepakit_batch_size", "Images in one inference", ("model",), buckets=_SIZES, registry=self.registry
        )
        self.stage_seconds = Histogram(
            "jepakit_stage_seconds",
            "Seconds. decode: decoding one image; queue: from its arrival until its batch runs, decoding included; inference: one batch",
            ("model", "stage"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.model_info = Gauge(
            "jepakit_model_info",
            "1 for each model in service",
            ("model", "model_id", "digest", "precision", "provider"),
            registry=self.registry,
        )
        self.update = Gauge(
            "jepakit_update",
            "1 for each model of which a version on disk is not in service: incomplete, loading, waiting or failed",
            ("model", "state"),
            registry=self.registry,
        )

    def of_model(self, model: str) -> ModelMetrics:
        """The counters of one model."""
        return ModelMetrics(self, model)

    def forget(self, model: str) -> None:
        """Remove a model's metrics, even if its last images are still being counted."""
        for metric in (self.waiting, self.batch_size):
            _remove(metric, model)
        for result in _RESULTS:
            _remove(self.images, model, result)
        for stage in _STAGES:
            _remove(self.stage_seconds, model, stage)

    def families(self) -> list[Metric]:
        """All metrics with their current values; can be pickled."""
        return list(self.registry.collect())


class ModelMetrics:
    """The counters of one model: its images, and its batcher's stages as they end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._ok, self._bad = (metrics.images.labels(model, result) for result in _RESULTS)
        self._size = metrics.batch_size.labels(model)
        self._decode, self._queue, self._inference = (metrics.stage_seconds.labels(model, stage) for stage in _STAGES)
        self.waiting = metrics.waiting.labels(model)

    def answered(self, good: int, bad: int) -> None:
        """Count the images of a request that were embedded, and those that could not be read."""
        self._ok.inc(good)
        self._bad.inc(bad)

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        self._size.observe(size)
        for wait in queued:
            self._queue.observe(wait)
        self._inference.observe(seconds)


def _remove(metric: MetricWrapperBase, *labels: str) -> None:
    with contextlib.suppress(KeyError):  # older versions of prometheus-client raise it for labels that are not there
        metric.remove(*labels)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge(by_replica: Mapping[str, Sequence[Metric]]) -> bytes:
    """The metrics of several replicas as Prometheus' text: every sample once, with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, own in by_replica.items():
        for family in own:
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            joined.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)
