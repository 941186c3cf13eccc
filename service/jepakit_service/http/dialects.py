"""Requests and answers of the embedding services whose clients people already have: OpenAI, Jina, Voyage and Cohere.

The models here are the only definition of each: they validate requests, and the OpenAPI document is made from them.
Fields of those services that do not affect vectors are ignored; fields that do are honoured or refused by name, and so
are names that look like theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypeAliasType, TypedDict

from jepakit.bundles.manifest import Manifest
from jepakit.errors import ImageError
from jepakit_service.faults import ApiError
from jepakit_service.http import wire
from jepakit_service.http.wire import Ask, Computed, Dimensions, Encoding
from jepakit_service.models.batcher import ImageData, Result

NAMED = "NAME, or NAME@MODEL_ID to pin the vector space"
MODEL = f"{NAMED}; may be left out if only one model is loaded"
DIMENSIONS = "must be the model's own length: cutting vectors short would change the space"
_EXAMPLE_URI = f"data:image/png;base64,{wire.EXAMPLE}"
_IMAGE_FIELDS = ("image", "image_url", "image_base64", "image_bytes", "url")


# Tags tell the members of unions apart; pydantic adds them to an error's location, hence the parentheses.
def _form_of_url(value: object) -> str:
    return "(plain)" if isinstance(value, str) else "(object)"


def _form_of_input(value: object) -> str | None:
    if isinstance(value, list) and value and isinstance(value[0], int):
        raise ApiError(
            400,
            "text_not_supported",
            "token ids stand for text, and only images can be embedded here: send data URIs or base64 (LangChain: "
            "check_embedding_ctx_length=False)",
            param="input",
        )
    if isinstance(value, str):
        return "(text)"
    return "(item)" if isinstance(value, dict | ImageInput) else None


def _form_of_inputs(value: object) -> str:
    return "(many)" if isinstance(value, list) else "(one)"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Body(BaseModel):
    """A whole request. Other fields are those of other services and ignored, unless they look like a field that counts."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _no_misspelt_field(self) -> Self:
        for name in islice(self.model_extra or (), _MOST_FIELDS):
            if name == "partial":
                raise ApiError(400, "invalid_request", "partial is a query parameter: ?partial=true", param=name)
            if name == "input_type" or len(name) > _LONGEST_FIELD:
                continue
            fields = type(self).model_fields
            meant = [field for field in _ELSEWHERE.get(name, ()) if field in fields]
            if meant := meant or get_close_matches(name, fields, n=1, cutoff=_ALIKE):
                raise ApiError(400, "invalid_request", f"unknown field {name!r}; did you mean {meant[0]}?", param=name)
        return self


_LONGEST_FIELD, _MOST_FIELDS = 40, 64
_ALIKE = 0.68
"""Similarity from which a name counts as misspelt. Above are slips and other services' names of our fields (`output_dimension`
and `dimensions` have 0.69), below are fields that only they have; the exception, `input_type`, is let through by name."""
_LENGTH = ("dimensions", "output_dimension")
_ELSEWHERE = {
    "dim": _LENGTH,
    "truncate_dim": _LENGTH,
    "output_dimensionality": _LENGTH,
    "normalize_embeddings": ("normalized",),
}
"""Other services' names of our fields that are not similar to ours."""
_Asked = TypeVar("_Asked", bound=BaseModel)


class ImageUrl(_Part):
    """OpenAI's wrapper around a URL."""

    url: str = Field(description="a data URI; http(s) is never fetched")


class ImagePart(_Part):
    """One image, in exactly one of these fields. `text` is refused: there is no text model here."""

    type: str | None = None
    image: str | None = Field(None, description="Jina: base64 or a data URI")
    image_url: (
        Annotated[Annotated[str, Tag("(plain)")] | Annotated[ImageUrl, Tag("(object)")], Discriminator(_form_of_url)]
        | None
    ) = Field(None, description="OpenAI, Cohere, Voyage: a data URI, or an object with one")
    image_base64: str | None = Field(None, description="Voyage: a data URI or base64")
    image_bytes: str | None = Field(None, alias="bytes", description="Jina, formerly: base64 or a data URI")
    url: str | None = Field(None, description="LlamaIndex: a data URI")
    text: str | None = None


class ImageInput(ImagePart):
    """An image, or (Cohere, Voyage) `content` holding one image."""

    content: list[ImagePart] | None = None


Input = TypeAliasType(
    "Input",
    Annotated[
        Annotated[str, Tag("(text)")] | Annotated[ImageInput, Tag("(item)")],
        Discriminator(
            _form_of_input,
            custom_error_type="not_an_image",
            custom_error_message="An image is a data URI or base64, or an object that holds one",
        ),
    ],
)


class EmbeddingRequest(_Body):
    """OpenAI's and Jina's request, with images instead of text."""

    model_config = ConfigDict(json_schema_extra={"example": {"input": [_EXAMPLE_URI], "encoding_format": "float"}})

    model: str | None = Field(None, description=MODEL)
    input: Annotated[
        Annotated[Input, Tag("(one)")] | Annotated[list[Input], Tag("(many)")], Discriminator(_form_of_inputs)
    ] = Field(description="one or many images, as data URIs or base64")
    encoding_format: Encoding | None = Field(None, description="`base64` is little-endian float32; default `float`")
    embedding_type: Encoding | None = Field(None, description="Jina's name for `encoding_format`")
    encoding_type: Encoding | None = Field(None, description="LlamaIndex's name for `encoding_format`")
    output_dtype: Literal["float"] | None = Field(None, description="Voyage's; only float32 is supported")
    dimensions: int | None = Field(None, description=DIMENSIONS)
    normalized: bool | None = Field(None, description="must agree with what the model does")


class VoyageRequest(_Body):
    """Voyage's multimodal request."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"inputs": [{"content": [{"type": "image_base64", "image_base64": _EXAMPLE_URI}]}]}
        }
    )

    model: str | None = Field(None, description=MODEL)
    inputs: list[ImageInput]
    encoding_format: Literal["base64"] | None = None
    output_dtype: Literal["float"] | None = Field(None, description="only float32 is supported")
    output_dimension: int | None = Field(None, description=DIMENSIONS)


class CohereRequest(_Body):
    """Cohere's v2 embed request: `images` or `inputs`."""

    model_config = ConfigDict(json_schema_extra={"example": {"images": [_EXAMPLE_URI], "embedding_types": ["float"]}})

    model: str | None = Field(None, description=MODEL)
    images: list[str] | None = Field(None, description="data URIs")
    inputs: list[ImageInput] | None = None
    texts: list[Any] | None = None
    embedding_types: list[Encoding] | None = Field(
        None, description="`float`, `base64` or both; other types are not supported"
    )
    output_dimension: int | None = Field(None, description=DIMENSIONS)


class Row(TypedDict):
    """A vector."""

    object: Literal["embedding"]
    index: int
    embedding: str | list[float]


class ItemError(TypedDict):
    """Why there is no vector for an image."""

    code: str
    message: str


class BadRow(TypedDict):
    """An image without a vector; only with `?partial=true`."""

    object: Literal["embedding"]
    index: int
    error: ItemError


class Usage(TypedDict):
    """`image_pixels` is the sum over the decoded images; the tokens are always 0."""

    prompt_tokens: int
    total_tokens: int
    image_pixels: int


class EmbeddingAnswer(TypedDict):
    """OpenAI's answer, with the vector space, precision and provider."""

    object: Literal["list"]
    data: list[Row | BadRow]
    model: str
    model_id: str
    precision: str
    provider: str
    usage: Usage


class VoyageUsage(TypedDict):
    """`image_pixels` is the sum over the decoded images; tokens and video pixels are always 0."""

    text_tokens: int
    image_pixels: int
    video_pixels: int
    total_tokens: int


class VoyageAnswer(TypedDict):
    """Voyage's answer, with the vector space."""

    object: Literal["list"]
    data: list[Row | BadRow]
    model: str
    model_id: str
    usage: VoyageUsage


class CohereVersion(TypedDict):
    """The version of Cohere's API that this is."""

    version: Literal["2"]


class CohereMeta(TypedDict):
    """The version of Cohere's API that this is."""

    api_version: CohereVersion


class CohereAnswer(TypedDict):
    """Cohere's answer, with the vector space. `embeddings` maps each requested type to the vectors."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[Encoding, list[str | list[float]]]
    texts: list[str]
    model: str
    model_id: str
    meta: CohereMeta


def read_openai(body: bytes, max_images: int) -> Ask:
    """`POST /v1/embeddings` in JSON: OpenAI's request, or Jina's."""
    request = _parse(EmbeddingRequest, body, max_images)
    items = request.input if isinstance(request.input, list) else [request.input]
    return Ask(
        _images(items, "input", max_images),
        request.model,
        encodings=(request.encoding_format or request.embedding_type or request.encoding_type or "float",),
        dimensions=_dimensions("dimensions", request.dimensions),
        normalized=request.normalized,
    )


def read_voyage(body: bytes, max_images: int) -> Ask:
    """`POST /v1/multimodalembeddings`."""
    request = _parse(VoyageRequest, body, max_images)
    return Ask(
        _images(request.inputs, "inputs", max_images),
        request.model,
        "inputs",
        (request.encoding_format or "float",),
        _dimensions("output_dimension", request.output_dimension),
    )


def read_cohere(body: bytes, max_images: int) -> Ask:
    """`POST /v2/embed`."""
    request = _parse(CohereRequest, body, max_images)
    if request.texts:
        raise _no_text("texts")
    if request.images and request.inputs:
        raise ApiError(400, "invalid_input", "both `images` and `inputs` are given: send one of them", param="inputs")
    field, items = ("inputs", request.inputs) if request.inputs else ("images", request.images or [])
    return Ask(
        _images(items, field, max_images),
        request.model,
        field,
        tuple(dict.fromkeys(request.embedding_types or ("float",))),
        _dimensions("output_dimension", request.output_dimension),
    )


def write_openai(ask: Ask, computed: Computed) -> EmbeddingAnswer:
    """The answer to `read_openai`, and to bodies that are not JSON."""
    return {
        "object": "list",
        "data": _rows(ask, computed.results),
        "model": computed.manifest.name,
        "model_id": computed.manifest.model_id,
        "precision": computed.precision,
        "provider": computed.provider,
        "usage": {"prompt_tokens": 0, "total_tokens": 0, "image_pixels": computed.pixels},
    }


def write_voyage(ask: Ask, computed: Computed) -> VoyageAnswer:
    """The answer to `read_voyage`."""
    return {
        "object": "list",
        "data": _rows(ask, computed.results),
        "model": computed.manifest.name,
        "model_id": computed.manifest.model_id,
        "usage": {"text_tokens": 0, "image_pixels": computed.pixels, "video_pixels": 0, "total_tokens": 0},
    }


def write_cohere(ask: Ask, computed: Computed) -> CohereAnswer:
    """The answer to `read_cohere`. It has no place for an image that could not be read: all or nothing."""
    return {
        "id": computed.request_id,
        "response_type": "embeddings_by_type",
        "embeddings": {
            encoding: [wire.write_vector(vector, encoding) for vector in computed.vectors] for encoding in ask.encodings
        },
        "texts": [],
        "model": computed.manifest.name,
        "model_id": computed.manifest.model_id,
        "meta": {"api_version": {"version": "2"}},
    }


def check_space(ask: Ask, manifest: Manifest) -> None:
    """Refuse a request for vectors that the model does not give: a `model_id` names exactly one vector space."""
    spec = manifest.embedding
    if ask.dimensions is not None and ask.dimensions.value != spec.dim:
        raise ApiError(
            400,
            "dimensions_not_supported",
            f"{ask.dimensions.field} = {ask.dimensions.value}, but {manifest.name} gives {spec.dim}: cutting vectors "
            f"short would change the space; leave `{ask.dimensions.field}` out, or send {spec.dim}",
            param=ask.dimensions.field,
        )
    if ask.normalized is not None and ask.normalized != spec.normalize:
        gives = "vectors of length 1" if spec.normalize else "vectors that are not of length 1"
        raise ApiError(
            400,
            "normalized_not_supported",
            f"normalized = {str(ask.normalized).lower()}, but {manifest.name} gives {gives}: other vectors would be "
            f"another space; leave `normalized` out, or send {str(spec.normalize).lower()}",
            param="normalized",
        )


def _rows(ask: Ask, results: Sequence[Result]) -> list[Row | BadRow]:
    return [_row(index, result, ask.encodings[0]) for index, result in enumerate(results)]


def _row(index: int, result: Result, encoding: Encoding) -> Row | BadRow:
    if isinstance(result, ImageError):
        return {"object": "embedding", "index": index, "error": {"code": result.code, "message": str(result)}}
    return {"object": "embedding", "index": index, "embedding": wire.write_vector(result, encoding)}


def _dimensions(field: str, value: int | None) -> Dimensions | None:
    return None if value is None else Dimensions(field, value)


def _parse(model: type[_Asked], body: bytes, max_images: int) -> _Asked:
    wire.check_json_size(body, max_images * wire.VALUES_AN_IMAGE + wire.VALUES_BESIDE)
    return wire.validate(model, body)


def _images(items: Sequence[str | ImageInput], field: str, max_images: int) -> list[ImageData]:
    wire.check_number(len(items), max_images, field)
    return [_image(item, f"{field}[{index}]") for index, item in enumerate(items)]


def _image(item: str | ImageInput, where: str) -> bytes:
    if isinstance(item, str):
        return wire.read_text(item, where)
    if item.content is None:
        return wire.read_text(_only_image(item, where), where)
    if item.text is not None or any(part.text is not None for part in item.content):
        raise _no_text(where)
    if len(item.content) != 1 or _given(item):
        raise ApiError(
            400,
            "invalid_input",
            f"{where} holds {len(item.content) + len(_given(item))} parts: send exactly one image in each",
            param=where,
        )
    return wire.read_text(_only_image(item.content[0], where), where)


def _given(part: ImagePart) -> list[str | ImageUrl]:
    """The images that one part holds."""
    return [value for name in _IMAGE_FIELDS if (value := getattr(part, name)) is not None]


def _only_image(part: ImagePart, where: str) -> str:
    if part.text is not None:
        raise _no_text(where)
    given = _given(part)
    if len(given) != 1:
        raise ApiError(
            400,
            "invalid_input",
            f"{where} holds {len(given)} images: send exactly one, as `image`, `image_url`, `image_base64`, `bytes` or `url`",
            param=where,
        )
    return given[0].url if isinstance(given[0], ImageUrl) else str(given[0])


def _no_text(where: str) -> ApiError:
    return ApiError(
        400, "text_not_supported", f"{where} is text, and only images can be embedded here: leave it out", param=where
    )
