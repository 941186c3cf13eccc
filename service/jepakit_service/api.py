"""The HTTP surface, as an ASGI application behind the gate. Knows nothing of Ray."""

from __future__ import annotations

import json

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from jepakit.errors import ImageError
from jepakit_service import operations, wire
from jepakit_service.gate import Gate
from jepakit_service.models import LoadedModel
from jepakit_service.replica import AskAll, Replica
from jepakit_service.settings import ServeSettings
from jepakit_service.wire import ApiError, Ask, EmbeddingRequest

_STATUS_OF_IMAGE_ERROR = {"too_large": 413, "unsupported_format": 415}

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": EmbeddingRequest.model_json_schema()},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/dicom": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def build_app(settings: ServeSettings, ask_all: AskAll | None = None) -> Gate:
    """Load every model, check it, and return the application that serves them. Raises BundleError otherwise.

    ask_all  the reports of all replicas of the deployment; None: this is the only one
    """
    replica = Replica(settings, ask_all)
    # The pages of /docs load scripts from elsewhere; the description itself is served.
    app = FastAPI(title="jepakit", version="1", docs_url=None, redoc_url=None)
    app.include_router(operations.router(replica))

    @app.post("/v1/embeddings", openapi_extra=_BODY)
    async def embeddings(request: Request) -> Response:
        ask = wire.parse(request.headers.get("content-type", ""), await request.body(), max_images=settings.max_images)
        answer = await replica.engine.answer(ask.model or request.query_params.get("model"), ask.images)
        partial = request.query_params.get("partial", "").lower() in ("1", "true")
        return _answer(answer.model, ask, answer.results, accept=request.headers.get("accept", ""), partial=partial)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        body = error.body(request.state.request_id)
        return Response(body, error.status, error.headers, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return await on_api_error(
            request, ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
        )

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        # The exception's text stays inside: it could hold what was sent.
        fault = ApiError(500, "internal_error", f"the service failed ({type(error).__name__}); the fault is ours")
        return await on_api_error(request, fault)

    return Gate(app, replica)


def _answer(
    model: LoadedModel,
    ask: Ask,
    results: list[NDArray[np.float32] | ImageError],
    *,
    accept: str,
    partial: bool,
) -> Response:
    manifest = model.manifest
    headers = {
        "X-Model-Id": manifest.model_id,
        "X-Embedding-Shape": f"{len(results)},{manifest.embedding.dim}",
        "X-Embedding-Dtype": "float32",
        "X-Precision": model.precision,
        "X-Provider": model.provider,
    }
    if not partial:
        for index, result in enumerate(results):
            if isinstance(result, ImageError):
                raise _image_error(result, index)
        if raw := wire.write_raw([result for result in results if not isinstance(result, ImageError)], accept):
            return Response(raw.body, 200, headers, media_type=raw.content_type)
    data = [
        {"object": "embedding", "index": index, "error": {"code": result.code, "message": str(result)}}
        if isinstance(result, ImageError)
        else {"object": "embedding", "index": index, "embedding": wire.write_vector(result, ask.encoding)}
        for index, result in enumerate(results)
    ]
    answer = {
        "object": "list",
        "data": data,
        "model": manifest.name,
        "model_id": manifest.model_id,
        "precision": model.precision,
        "provider": model.provider,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    return Response(json.dumps(answer, separators=(",", ":")), 200, headers, media_type="application/json")


def _image_error(error: ImageError, index: int) -> ApiError:
    """Every image that cannot be read rightly is named by its index."""
    status = _STATUS_OF_IMAGE_ERROR.get(error.code, 422)
    return ApiError(status, error.code, f"input[{index}]: {error}", param=f"input[{index}]")
