"""Routes of the Open Inference Protocol other than inference."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

import jepakit
from jepakit_service.faults import unavailable
from jepakit_service.http import oip
from jepakit_service.http.operations import ModelName
from jepakit_service.replica import Replica

BareName = Annotated[str, Path(description=oip.NAME)]
ModelVersion = Annotated[str, Path(description=oip.VERSION)]


def router(replica: Replica) -> APIRouter:
    """`/v2` without its POSTs."""
    routes = APIRouter(prefix="/v2", tags=[oip.TITLE])

    @routes.get("")
    async def server_metadata() -> oip.ServerMetadata:
        """What this server is."""
        return {"name": "jepakit", "version": jepakit.__version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live")
    async def server_live() -> oip.Live:
        """Whether the process that answers is alive."""
        return {"live": True}

    @routes.get("/health/ready")
    async def server_ready() -> oip.Ready:
        """Whether some replica answers correctly; 503 otherwise."""
        if replica.draining or all(report.faults for report in (await replica.reports()).reports):
            raise unavailable("not_ready", "no replica takes requests")
        return {"ready": True}

    @routes.get("/models/{name}")
    async def model_metadata(name: ModelName) -> oip.ModelMetadata:
        """What a model takes and gives."""
        return oip.describe(replica.registry.find(name).manifest)

    @routes.get("/models/{name}/versions/{version}")
    async def model_version_metadata(name: BareName, version: ModelVersion) -> oip.ModelMetadata:
        """What a version of a model takes and gives."""
        return oip.describe(replica.registry.find(f"{name}@{version}").manifest)

    @routes.get("/models/{name}/ready")
    async def model_ready(name: ModelName) -> oip.ModelReady:
        """Whether a model answers correctly; 503 otherwise."""
        return await _ready(replica, name)

    @routes.get("/models/{name}/versions/{version}/ready")
    async def model_version_ready(name: BareName, version: ModelVersion) -> oip.ModelReady:
        """Whether a version of a model answers correctly; 503 otherwise."""
        return await _ready(replica, f"{name}@{version}")

    return routes


async def _ready(replica: Replica, asked: str) -> oip.ModelReady:
    model = replica.registry.find(asked)
    if fault := await model.heartbeat():
        raise unavailable("not_ready", fault)
    return {"name": model.name, "ready": True}
