"""The POSTs that carry images, as the OpenAPI document describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepakit_service.http import dialects, oip, routes
from jepakit_service.http.media import JSON, NPY, OCTETS
from jepakit_service.http.openapi import BINARY, Parameter, Post

_WORD: Mapping[str, Any] = {"type": "string"}
_FACTS = {
    "X-Model-Id": "names the vector space",
    "X-Embedding-Shape": "images,length",
    "X-Embedding-Dtype": "float32",
    "X-Precision": "the precision used: fp32, fp16, int8 or bf16",
    "X-Provider": "what ran the model: cpu, cuda, tensorrt or openvino",
    "X-Request-Id": "the request's own id, or a new one",
}
_MODEL = Parameter("model", "query", dialects.MODEL, _WORD)
_PARTIAL = Parameter(
    "partial",
    "query",
    "true: an image that cannot be read becomes a row with `error`, and the others are embedded",
    {"type": "boolean", "default": False},
)
_NAMED = Parameter("name", "path", dialects.NAMED, _WORD)
_NAME = Parameter("name", "path", oip.NAME, _WORD)
_VERSION = Parameter("version", "path", oip.VERSION, _WORD)
_LENGTH = Parameter(oip.JSON_LENGTH, "header", "length of the JSON in bytes, if tensors follow it", {"type": "integer"})
_ARRAY = {
    "type": "string",
    "format": "binary",
    "description": "an array of shape [N, H, W, C], [H, W, C] or [H, W], as numpy.save writes it",
}
_FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {"files": {"type": "array", "items": dict(BINARY)}, "model": dict(_WORD)},
}


def _infer_post(path: str, name: str, parameters: tuple[Parameter, ...]) -> Post:
    return Post(
        path,
        name,
        "Embed images with the Open Inference Protocol v2.",
        oip.TITLE,
        takes={JSON: oip.InferRequest, OCTETS: BINARY},
        gives={JSON: oip.InferAnswer, OCTETS: BINARY},
        parameters=(*parameters, _LENGTH),
        answer_headers={**_FACTS, oip.JSON_LENGTH: "length of the JSON in bytes, if the tensor follows it"},
    )


POSTS = (
    Post(
        routes.EMBEDDINGS,
        "embed",
        "Embed images, sent as OpenAI's or Jina's JSON, as the bytes of one file, as several files in a form, or as an array.",
        "embeddings",
        takes={
            JSON: dialects.EmbeddingRequest,
            "image/*": BINARY,
            "application/dicom": BINARY,
            OCTETS: BINARY,
            "multipart/form-data": _FORM,
            NPY: _ARRAY,
        },
        gives={JSON: dialects.EmbeddingAnswer, OCTETS: BINARY, NPY: BINARY},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.VOYAGE,
        "embed_voyage",
        "Embed images in Voyage's format.",
        "embeddings",
        takes={JSON: dialects.VoyageRequest},
        gives={JSON: dialects.VoyageAnswer},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.COHERE,
        "embed_cohere",
        "Embed images in Cohere's format. If one image cannot be read, the whole request fails.",
        "embeddings",
        takes={JSON: dialects.CohereRequest},
        gives={JSON: dialects.CohereAnswer},
        parameters=(_MODEL,),
        answer_headers=_FACTS,
    ),
    _infer_post(routes.INFER, "infer", (_NAMED,)),
    _infer_post(routes.INFER_VERSION, "infer_version", (_NAME, _VERSION)),
)
