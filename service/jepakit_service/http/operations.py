"""The routes for operators and health probes: liveness, readiness, metrics and models.

Readiness, metrics and updates describe the whole deployment, whichever replica answers; the list of models is that of the
answering replica, since it would embed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from typing_extensions import TypedDict

from jepakit_service.faults import unavailable
from jepakit_service.http.dialects import NAMED
from jepakit_service.models.engine import max_images_in_time
from jepakit_service.models.model import LoadedModel
from jepakit_service.models.registry import Update
from jepakit_service.replica import Replica, Report, Round
from jepakit_service.settings import SERVICE, ServeSettings
from jepakit_service.telemetry.metrics import merge

ModelName = Annotated[str, Path(description=NAMED)]


class Alive(TypedDict):
    """The process that answers is alive."""

    status: Literal["alive"]


class Readiness(TypedDict):
    """How many of the replicas answer correctly, for which models, and what is wrong with the others."""

    status: Literal["ready", "degraded"]
    replicas: int
    replicas_ready: int
    models: list[str]
    faults: dict[str, list[str]]


class ModelLimits(TypedDict):
    """What one request may hold; `max_images_in_time` applies to all requests in progress together.

    `request_timeout_s` is how long a request may take: a client that waits less gets fewer images answered in time.
    """

    max_body_mb: int
    max_images: int
    max_images_in_time: int
    max_pixels: int
    request_timeout_s: float


class ModelDescription(TypedDict):
    """OpenAI's model (`id`, `object`, `created`, `owned_by`), and what a client needs to know about it.

    `created` is always 0: a bundle stores no time, so that exporting again gives the same bundle.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model_id: str
    digest: str
    dim: int
    precision: str
    provider: str
    backbone: str
    license: str
    preprocess: dict[str, Any]
    embedding: dict[str, Any]
    verdict: str | None
    max_batch: int
    lanes: int
    limits: ModelLimits
    serving: list[str]
    all_heard: bool
    update: Update | None


class ModelList(TypedDict):
    """The models in service."""

    object: Literal["list"]
    data: list[ModelDescription]


def router(replica: Replica) -> APIRouter:
    """/healthz, /readyz, /metrics, /v1/models and /v1/models/{name}."""
    routes = APIRouter()

    @routes.get("/healthz")
    async def healthz() -> Alive:
        """Whether the process that answers is alive."""
        return {"status": "alive"}

    @routes.get("/readyz")
    async def readyz(response: Response) -> Readiness:
        """Whether the models answer correctly: `ready`; `degraded` if some replica does not; 503 if none does."""
        if replica.draining:
            raise unavailable("draining", "the service is stopping")
        response.headers[SERVICE] = replica.settings.service
        return _readiness((await replica.reports()).reports, replica.settings.replicas)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics of all replicas in Prometheus' text format, each sample with the label `replica`."""
        reports = (await replica.reports(with_metrics=True)).reports
        text = merge({report.replica: report.families for report in reports})
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        """The models in service."""
        heard = await replica.reports()
        return {
            "object": "list",
            "data": [_describe(model, replica.settings, heard) for model in replica.registry],
        }

    @routes.get("/v1/models/{name}")
    async def get_model(name: ModelName) -> ModelDescription:
        """One model in service.

        `limits` says what one request may hold, `max_images_in_time` how many images all requests in progress may hold
        together, and `request_timeout_s` how long they may take. `update` reports a newer version that is not in service
        yet, or was refused. Where not `all_heard`, a replica did not answer, and `serving` may lack its version.
        """
        heard = await replica.reports()  # a switch may come meanwhile: the model is looked up after them
        return _describe(replica.registry.find(name), replica.settings, heard)

    return routes


def _readiness(reports: Sequence[Report], wanted: int) -> Readiness:
    in_service = {name for report in reports for name in report.in_service}
    faults = {report.replica: found for report in reports if (found := _faults(report, in_service))}
    ready = len(reports) - len(faults)
    if ready == 0:
        reason = "; ".join(fault for some in faults.values() for fault in some) or "no replica answered"
        raise unavailable("not_ready", reason)
    return {
        "status": "ready" if ready >= wanted and not faults else "degraded",
        "replicas": wanted,
        "replicas_ready": ready,
        "models": sorted(in_service),
        "faults": faults,
    }


def _faults(report: Report, in_service: set[str]) -> list[str]:
    """What is wrong with a replica: the faults it reports, and models that only other replicas have in service."""
    lacking = sorted(in_service - report.in_service)
    return [*report.faults, *(f"{name} is not in service on this replica" for name in lacking)]


def _describe(model: LoadedModel, settings: ServeSettings, heard: Round) -> ModelDescription:
    """What a client needs to know about a model, and which versions of it the replicas have."""
    manifest = model.manifest
    states = [report.models[manifest.name] for report in heard.reports if manifest.name in report.models]
    return {
        "id": manifest.name,
        "object": "model",
        "created": 0,
        "owned_by": "jepakit",
        "model_id": manifest.model_id,
        "digest": manifest.digest,
        "dim": manifest.embedding.dim,
        "precision": model.precision,
        "provider": model.provider,
        "backbone": manifest.backbone.name,
        "license": manifest.backbone.start.license,
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "embedding": manifest.embedding.model_dump(mode="json", exclude={"center", "scale"}),
        "verdict": None if manifest.comparison is None else manifest.comparison.verdict.word,
        "max_batch": model.plan.max_batch,
        "lanes": model.plan.lanes,
        "limits": {
            "max_body_mb": settings.max_body_mb,
            "max_images": settings.max_images,
            "max_images_in_time": max_images_in_time(model, settings),
            "max_pixels": settings.max_pixels,
            "request_timeout_s": settings.request_timeout_s,
        },
        "serving": sorted({state.current for state in states if state.current}),
        "all_heard": heard.is_whole,
        "update": _worst([state.update for state in states if state.update]),
    }


def _worst(updates: Sequence[Update]) -> Update | None:
    """The update to report: a failure on one replica is what the operator must know first."""
    order = ("failed", "incomplete", "loading", "waiting")
    return min(updates, key=lambda update: order.index(update.state), default=None)
