"""The POSTs that carry images, as the OpenAPI document describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepakit_service import dialects, oip, routes, wire
from jepakit_service.openapi import BINARY, Parameter, Post

_WORD: Mapping[str, Any] = {"type": "string"}
_FACTS = {
    "X-Model-Id": "the vector space",
    "X-Embedding-Shape": "images,length",
    "X-Embedding-Dtype": "float32",
    "X-Precision": "fp32, fp16, int8 or bf16: what was computed",
    "X-Provider": "cpu, cuda, tensorrt or openvino: what computed it",
    "X-Request-Id": "the request's own, or a new one",
}
_MODEL = Parameter("model", "query", dialects.MODEL, _WORD)
_PARTIAL = Parameter(
    "partial",
    "query",
    "true: an image that cannot be read is a row with `error`, and the others are answered",
    {"type": "boolean", "default": False},
)
_NAME = Parameter("name", "path", "the model", _WORD)
_VERSION = Parameter("version", "path", "its `model_id`", _WORD)
_LENGTH = Parameter(oip.JSON_LENGTH, "header", "bytes of JSON, where tensors follow", {"type": "integer"})
_ARRAY = {"type": "string", "format": "binary", "description": "numpy.save of [N, H, W, C], [H, W, C] or [H, W]"}
_FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {"files": {"type": "array", "items": dict(BINARY)}, "model": dict(_WORD)},
}


def _infer_post(path: str, name: str, parameters: tuple[Parameter, ...]) -> Post:
    return Post(
        path,
        name,
        "Embed images by the Open Inference Protocol v2.",
        oip.TITLE,
        takes={wire.JSON: oip.InferRequest, wire.OCTETS: BINARY},
        gives={wire.JSON: oip.InferAnswer, wire.OCTETS: BINARY},
        parameters=(*parameters, _LENGTH),
        answer_headers={**_FACTS, oip.JSON_LENGTH: "bytes of JSON, where the tensor follows"},
    )


POSTS = (
    Post(
        routes.EMBEDDINGS,
        "embed",
        "Embed images: OpenAI's or Jina's JSON, one file's bytes, many files in a form, or an array.",
        "embeddings",
        takes={
            wire.JSON: dialects.EmbeddingRequest,
            "image/*": BINARY,
            "application/dicom": BINARY,
            wire.OCTETS: BINARY,
            "multipart/form-data": _FORM,
            wire.NPY: _ARRAY,
        },
        gives={wire.JSON: dialects.EmbeddingAnswer, wire.OCTETS: BINARY, wire.NPY: BINARY},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.VOYAGE,
        "embed_voyage",
        "Embed images in Voyage's format.",
        "embeddings",
        takes={wire.JSON: dialects.VoyageRequest},
        gives={wire.JSON: dialects.VoyageAnswer},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.COHERE,
        "embed_cohere",
        "Embed images in Cohere's format. All or nothing.",
        "embeddings",
        takes={wire.JSON: dialects.CohereRequest},
        gives={wire.JSON: dialects.CohereAnswer},
        parameters=(_MODEL,),
        answer_headers=_FACTS,
    ),
    _infer_post(routes.INFER, "infer", (_NAME,)),
    _infer_post(routes.INFER_VERSION, "infer_version", (_NAME, _VERSION)),
)
