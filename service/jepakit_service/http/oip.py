"""KServe's Open Inference Protocol v2 over HTTP, with the binary tensor extension: what Triton's clients speak.

A model takes one of two inputs: `image`, the files' bytes, or `images`, pixels of the model's own kind and any
size. It gives one output, `embeddings`. A model's version is its `model_id`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from typing_extensions import TypedDict

from jepakit.bundles.manifest import Manifest
from jepakit_service.faults import ApiError
from jepakit_service.http import wire
from jepakit_service.http.wire import EXAMPLE, Ask, Computed, validate
from jepakit_service.models.batcher import ImageData

TITLE = "Open Inference Protocol v2"
NAME, VERSION = "the model's name", "the model's `model_id`"
"""Descriptions of the path parameters of routes that take name and version apart."""
FILES, PIXELS, OUTPUT = "image", "images", "embeddings"
MAX_JSON_VALUES = 1_000_000
_MOST_OUTPUTS = 16
"""There is one output, which may be named repeatedly; each invalid list element costs an error object of half a kB."""
JSON_LENGTH = "Inference-Header-Content-Length"
Datatype = Literal["BYTES", "UINT8", "UINT16", "INT16", "UINT32", "INT32", "FP32"]
_DTYPES = {
    datatype: np.dtype(datatype.lower().replace("fp", "float")).newbyteorder("<")
    for datatype in get_args(Datatype)
    if datatype != "BYTES"
}
_DATATYPES = {dtype.name: datatype for datatype, dtype in _DTYPES.items()}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class InputParameters(_Part):
    """Parameters of one input."""

    binary_data_size: int | None = Field(None, ge=0, description="size in bytes of this tensor, which follows the JSON")


class InferInput(_Part):
    """`image`: files, as BYTES [N] (base64 in JSON); `images`: pixels, [N, H, W, C]."""

    name: str
    shape: list[Annotated[int, Field(le=1 << 31)]] = Field(min_length=1, max_length=4)
    datatype: Datatype
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class OutputParameters(_Part):
    """Parameters of one output."""

    binary_data: bool | None = None
    classification: Any = Field(None, description="not supported")
    shared_memory_region: Any = Field(None, description="not supported")


class InferOutput(_Part):
    """A requested output; the only one is `embeddings`."""

    name: str
    parameters: OutputParameters | None = None


class InferParameters(_Part):
    """Parameters of the request."""

    binary_data_output: bool | None = None


class InferRequest(_Part):
    """The protocol's request; with the binary extension, tensors follow it in the body."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"inputs": [{"name": FILES, "shape": [1], "datatype": "BYTES", "data": [EXAMPLE]}]}
        }
    )

    id: str | None = None
    parameters: InferParameters | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(None, max_length=_MOST_OUTPUTS)


class TensorMetadata(TypedDict):
    """A tensor that a model takes or gives; -1 stands for any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """The answer to `GET /v2/models/{name}`. A request gives one of the inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(TypedDict):
    """The answer to `GET /v2`."""

    name: str
    version: str
    extensions: list[str]


class Live(TypedDict):
    """Whether the service runs."""

    live: bool


class Ready(TypedDict):
    """Whether the service takes requests."""

    ready: bool


class ModelReady(TypedDict):
    """Whether the model takes requests."""

    name: str
    ready: bool


class OutputSize(TypedDict):
    """Size in bytes of the tensor, which follows the JSON."""

    binary_data_size: int


class InferTensor(TypedDict):
    """The vectors, FP32 [N, D], in `data` or after the JSON."""

    name: str
    datatype: Literal["FP32"]
    shape: list[int]
    data: NotRequired[list[float]]
    parameters: NotRequired[OutputSize]


class InferAnswer(TypedDict):
    """The protocol's answer."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[InferTensor]


class OipError(TypedDict):
    """The protocol's error; the request id is in the header `X-Request-Id`."""

    error: str


class Inference(NamedTuple):
    """What a request asks for, and the form of its answer."""

    ask: Ask
    id: str | None
    binary: bool


class Written(NamedTuple):
    """A body, and how many of its bytes are JSON if a tensor follows."""

    body: bytes
    json_length: int | None


def read(body: bytes, json_length: str | None, asked: str, max_images: int) -> Inference:
    """Parse an inference request. `json_length` is the header of the binary extension. Raises ApiError 400 or 413."""
    head, tensors = _split(body, json_length)
    wire.check_json_size(head, MAX_JSON_VALUES)
    request = _parse(head, json_length)
    given = request.inputs[0]
    size = given.parameters.binary_data_size if given.parameters else None
    if size is None and given.data is None:
        raise _wrong(
            f"input {given.name[:100]!r} has neither `data` nor `binary_data_size`: send one of them", "inputs[0]"
        )
    if size is not None and given.data is not None:
        raise _wrong(
            f"input {given.name[:100]!r} has both `data` and `binary_data_size`: send one of them", "inputs[0]"
        )
    if (size or 0) != len(tensors):
        raise _wrong(
            f"the JSON announces {size or 0} bytes of tensors, and {len(tensors)} follow it: set the header "
            f"{JSON_LENGTH} to the JSON's length",
            "inputs[0].parameters.binary_data_size",
        )
    images = _images(given, tensors if size is not None else None, max_images)
    return Inference(Ask(images, asked, "inputs[0]"), request.id, _wants_binary(request))


def write(inference: Inference, computed: Computed) -> Written:
    """The answer, JSON or JSON followed by the tensor."""
    vectors = computed.vectors
    output: InferTensor = {
        "name": OUTPUT,
        "datatype": "FP32",
        "shape": [len(vectors), computed.manifest.embedding.dim],
    }
    answer: InferAnswer = {
        "model_name": computed.manifest.name,
        "model_version": computed.manifest.model_id,
        "outputs": [output],
    }
    if inference.id is not None:
        answer["id"] = inference.id
    if not inference.binary:
        output["data"] = np.concatenate(vectors).tolist()
        return Written(to_json(answer), None)
    tensor = wire.write_tensor(vectors)
    output["parameters"] = {"binary_data_size": len(tensor)}
    head = to_json(answer)
    return Written(head + tensor, len(head))


def write_error(error: ApiError) -> bytes:
    """An error in the protocol's shape."""
    return json.dumps({"error": error.message}).encode()


def describe(manifest: Manifest) -> ModelMetadata:
    """What the model takes and gives."""
    spec = manifest.preprocess
    return {
        "name": manifest.name,
        "versions": [manifest.model_id],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": FILES, "datatype": "BYTES", "shape": [-1]},
            {"name": PIXELS, "datatype": _DATATYPES[spec.stored_as], "shape": [-1, -1, -1, spec.bands]},
        ],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, manifest.embedding.dim]}],
    }


def _split(body: bytes, json_length: str | None) -> tuple[bytes, memoryview]:
    if json_length is None:
        return body, memoryview(b"")
    if not json_length.isascii() or not json_length.isdigit() or not 0 < int(json_length[:12]) <= len(body):
        raise _wrong(
            f"{JSON_LENGTH} is {json_length[:20]!r}, and the body has {len(body)} bytes: give the "
            "length of the JSON at its start",
            JSON_LENGTH,
        )
    length = int(json_length[:12])
    return body[:length], memoryview(body)[length:]


def _parse(head: bytes, json_length: str | None) -> InferRequest:
    try:
        return validate(InferRequest, head)
    except ApiError:
        if json_length is None and b"binary_data_size" in head:
            raise _wrong(
                f"the JSON announces a tensor, and the header {JSON_LENGTH} is missing: set it to the JSON's length",
                JSON_LENGTH,
            ) from None
        raise


def _wants_binary(request: InferRequest) -> bool:
    """Whether the answer should be binary; an output's own parameter overrides the request's."""
    outputs = request.outputs or []
    for output in outputs:
        if output.name != OUTPUT:
            raise _wrong(f"there is no output {output.name[:100]!r}: the only one is {OUTPUT!r}", "outputs")
        for name in ("classification", "shared_memory_region"):
            if getattr(output.parameters, name, None) is not None:
                raise _wrong(f"the output's parameter {name} is not supported: leave it out", f"outputs.{name}")
    of_request = bool(request.parameters and request.parameters.binary_data_output)
    wishes = [output.parameters.binary_data for output in outputs if output.parameters]
    return of_request if not wishes or wishes[0] is None else wishes[0]


def _images(given: InferInput, tensor: memoryview | None, max_images: int) -> list[ImageData]:
    if given.name not in (FILES, PIXELS) or (given.name == FILES) != (given.datatype == "BYTES"):
        raise _wrong(
            f"input {given.name[:100]!r} of {given.datatype} is not accepted: send {FILES!r} as BYTES, or {PIXELS!r} as numbers",
            "inputs[0]",
        )
    if min(given.shape) < 1:
        raise _wrong(f"shape {given.shape} holds no image", "inputs[0].shape")
    wire.check_number(given.shape[0], max_images, "inputs[0]")
    if given.name == FILES:
        return _files(given, tensor)
    return list(_pixels(given, tensor))


def _files(given: InferInput, tensor: memoryview | None) -> list[ImageData]:
    count = given.shape[0]
    if math.prod(given.shape) != count:
        raise _wrong(f"shape {given.shape} of {FILES!r}: send [N] or [N, 1]", "inputs[0].shape")
    if tensor is None:
        texts = list(_flat(given.data or []))
        if len(texts) != count or not all(isinstance(text, str) for text in texts):
            raise _wrong(f"{FILES!r} of shape {given.shape} needs {count} strings of base64", "inputs[0].data")
        return [wire.read_text(text, f"inputs[0][{index}]") for index, text in enumerate(texts)]
    # Read no further than the shape says: a body of zeros is millions of empty elements.
    files = list(itertools.islice(_elements(tensor), count + 1))
    if len(files) != count:
        found = f"{len(files)}" if len(files) < count else "more"
        raise _wrong(f"{found} elements follow the JSON, but the shape says {count}", "inputs[0].shape")
    return [bytes(file) for file in files]


def _elements(tensor: memoryview) -> Iterator[memoryview]:
    """The elements of a BYTES tensor, each preceded by its length in 4 bytes, little-endian."""
    at = 0
    while at < len(tensor):
        end = at + 4 + int.from_bytes(tensor[at : at + 4], "little")
        if end > len(tensor) or at + 4 > len(tensor):
            raise _wrong(
                f"an element of the BYTES tensor ends beyond its {len(tensor)} bytes: each begins with its "
                "length in 4 bytes, little-endian",
                "inputs[0]",
            )
        yield tensor[at + 4 : end]
        at = end


def _pixels(given: InferInput, tensor: memoryview | None) -> np.ndarray[Any, Any]:
    """Pixels [N, H, W, C]: a view of the body, or made from the numbers in the JSON."""
    if len(given.shape) != 4:
        raise _wrong(f"shape {given.shape} of {PIXELS!r}: send [N, H, W, C]", "inputs[0].shape")
    dtype, count = _DTYPES[given.datatype], math.prod(given.shape)
    if tensor is not None:
        if count * dtype.itemsize != len(tensor):
            raise _wrong(
                f"shape {given.shape} of {given.datatype} takes {count * dtype.itemsize} bytes, but "
                f"{len(tensor)} follow the JSON",
                "inputs[0].shape",
            )
        return np.frombuffer(tensor, dtype).reshape(given.shape)
    numbers = list(_flat(given.data or []))
    if len(numbers) != count:
        raise _wrong(f"shape {given.shape} takes {count} numbers, but `data` holds {len(numbers)}", "inputs[0].data")
    return _cast(numbers, dtype, given.datatype).reshape(given.shape)


def _cast(numbers: list[Any], dtype: np.dtype[Any], datatype: str) -> np.ndarray[Any, Any]:
    """Numbers from JSON as `dtype`; refused if they do not fit the type."""
    kinds = (int,) if dtype.kind in "iu" else (int, float)
    if not all(type(number) in kinds for number in numbers):
        raise _wrong(f"`data` of {datatype} holds something other than numbers of that type", "inputs[0].data")
    try:
        with np.errstate(over="ignore"):  # preprocessing refuses what is infinite as float32
            return np.array(numbers, dtype)
    except OverflowError:
        raise _wrong(f"`data` holds a number outside {datatype}", "inputs[0].data") from None


def _flat(data: Sequence[Any]) -> Iterator[Any]:
    """The values of nested lists in row-major order. No recursion: lists nest as deep as the JSON parser allows."""
    levels = [iter(data)]
    while levels:
        for value in levels[-1]:
            if isinstance(value, list):
                levels.append(iter(value))
                break
            yield value
        else:
            levels.pop()


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_tensor", message, param=param)
