"""The paths: which take images, which need no key, and what metrics and logs call each."""

from __future__ import annotations

import re

METRICS = "/metrics"
EMBEDDINGS, VOYAGE, COHERE = "/v1/embeddings", "/v1/multimodalembeddings", "/v2/embed"
REPEATED_AS = {EMBEDDINGS: "detail", VOYAGE: "detail", COHERE: "message"}
"""By route, the top-level field in which errors repeat their message: clients of Jina and Voyage read `detail`, of Cohere `message`."""
INFER, INFER_VERSION = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
_INFER = re.compile(r"^/v2/models/([^/]+)(?:/versions/([^/]+))?/infer$")
_OPEN = frozenset({"/", "/healthz", "/readyz", "/openapi.json", "/docs", "/v2/health/live", "/v2/health/ready"})
ROUTES = ("/healthz", "/readyz", METRICS, "/openapi.json", "/docs", EMBEDDINGS, VOYAGE, "/v1/models", COHERE, "/v2")
"""Paths without a model's name, to suggest for mistyped ones."""
STEADY = ("/v2/health", "/v2/models", *ROUTES)
"""The labels of paths in metrics and logs: the first of these that a path begins with."""


def model_of_inference(path: str) -> str | None:
    """The model that an inference of the Open Inference Protocol asks for, as NAME or NAME@MODEL_ID; None elsewhere."""
    match = _INFER.match(path)
    if match is None:
        return None
    return match[1] if match[2] is None else f"{match[1]}@{match[2]}"


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in _OPEN or path.startswith("/docs/")


def is_oip(path: str) -> bool:
    """Whether errors have the shape of the Open Inference Protocol: also below `/v2/repository` and the like, which its
    clients may ask for."""
    return path == "/v2" or (path.startswith("/v2/") and path != COHERE)


def label(path: str) -> str:
    """A path as metrics and logs show it: without names of models, or whatever strangers ask for."""
    if _INFER.match(path):
        return INFER
    return next((steady for steady in STEADY if f"{path}/".startswith(f"{steady}/")), "other")
