"""Bytes on the wire to images, and vectors to bytes: everything about request and answer formats.

Nothing here decodes an image, touches a disk, or fetches a URL.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from jepakit._messages import explain

Encoded = bytes | NDArray[Any]
_NPY_TYPES = frozenset({"|u1", "<u2", "<i2", "<u4", "<i4", "<f4"})


class ApiError(Exception):
    """An answer other than 200: status, stable code, message, and the parameter at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> bytes:
        """OpenAI's error shape, with the request id."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        error = {
            "message": self.message,
            "type": kind,
            "code": self.code,
            "param": self.param,
            "request_id": request_id,
        }
        return json.dumps({"error": error}).encode()


class Ask(NamedTuple):
    """One request's images, the model asked for, and how the answer's vectors are to be written."""

    images: list[Encoded]
    model: str | None = None
    encoding: str = "float"


class EmbeddingRequest(BaseModel):
    """OpenAI's request, with images for text. Fields of other services are passed over."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: str | list[Any] = Field(description="data URIs or base64 of image files, one or many")
    encoding_format: str = Field("float", pattern="^(float|base64)$")
    dimensions: int | None = None


def parse(content_type: str, body: bytes, *, max_images: int) -> Ask:
    """Read a request's body by its content type; ApiError 400, 413 or 415 names what is wrong."""
    kind, options = parse_options_header(content_type)
    media = kind.decode("latin-1").lower()
    if media == "application/json":
        ask = _parse_json(body)
    elif media == "multipart/form-data":
        ask = _parse_multipart(body, options.get(b"boundary", b""), max_images)
    elif media == "application/x-npy":
        ask = Ask(_parse_npy(body, max_images))
    elif media.startswith("image/") or media in ("application/octet-stream", "application/dicom"):
        ask = Ask([body])
    else:
        raise ApiError(
            415, "unsupported_media_type",
            f"content type {media or 'none'} is not read here: send application/json, image/*, application/dicom, multipart/form-data or application/x-npy",
        )  # fmt: skip
    if not ask.images:
        raise ApiError(400, "no_images", "the request holds no image", param="input")
    if len(ask.images) > max_images:
        raise ApiError(
            413,
            "too_many_images",
            f"{len(ask.images)} images in one request, the limit is {max_images}: send several requests",
        )
    return ask


def _parse_json(body: bytes) -> Ask:
    try:
        request = EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or None
        message = "the body is not JSON" if first["type"] == "json_invalid" else explain(error, EmbeddingRequest)[:500]
        raise ApiError(400, "invalid_request", message, param=where) from None
    if request.dimensions is not None:
        raise ApiError(
            400,
            "dimensions_not_supported",
            "cutting vectors short would change the space: leave `dimensions` out",
            param="dimensions",
        )
    inputs = request.input if isinstance(request.input, list) else [request.input]
    images: list[Encoded] = [_from_text(item, f"input[{index}]") for index, item in enumerate(inputs)]
    return Ask(images, request.model, request.encoding_format)


def _from_text(item: object, where: str) -> bytes:
    if not isinstance(item, str):
        raise ApiError(
            400,
            "invalid_input",
            f"{where} is not a string: send a data URI or base64 of an image file",
            param=where,
        )
    if item[:8].lower().startswith(("http://", "https://")):
        raise ApiError(
            400,
            "url_not_supported",
            f"{where} is a URL, and this service fetches none: send the image itself",
            param=where,
        )
    text = item.partition(",")[2] if item.startswith("data:") else item
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400,
            "invalid_base64",
            f"{where} is neither a data URI nor base64 of an image (text cannot be embedded here)",
            param=where,
        ) from None


def _parse_multipart(body: bytes, boundary: bytes, max_images: int) -> Ask:
    """Parts with a file name are images; the field `model` names the model. Parsed in memory: no disk is touched."""
    parts: list[tuple[dict[bytes, bytes], bytearray]] = []
    header: list[bytearray] = [bytearray(), bytearray()]

    def begin() -> None:
        if len(parts) > max_images + 8:
            raise ApiError(
                413, "too_many_images", f"more than {max_images} images in one request: send several requests"
            )
        parts.append(({}, bytearray()))

    def end_header() -> None:
        parts[-1][0][bytes(header[0]).lower()] = bytes(header[1])
        header[:] = [bytearray(), bytearray()]

    try:
        parser = MultipartParser(boundary, {
            "on_part_begin": begin,
            "on_part_data": lambda data, start, end: parts[-1][1].extend(data[start:end]),
            "on_header_field": lambda data, start, end: header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: header[1].extend(data[start:end]),
            "on_header_end": end_header,
        })  # fmt: skip
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise ApiError(400, "invalid_multipart", "the multipart body is damaged or its boundary is missing") from None
    images: list[Encoded] = []
    model = None
    for headers, data in parts:
        _, options = parse_options_header(headers.get(b"content-disposition", b""))
        if b"filename" in options:
            images.append(bytes(data))
        elif options.get(b"name") == b"model":
            model = data.decode("utf-8", "replace")
    return Ask(images, model)


def _parse_npy(body: bytes, max_images: int) -> list[Encoded]:
    """[N, H, W, C], [H, W, C] or [H, W] as numpy saves it. The header is judged before any array is made."""
    wanted = (
        "send one little-endian array [N, H, W, C], [H, W, C] or [H, W] of the model's own kind as numpy.save writes it"
    )
    buffer = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(buffer)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(buffer)
    except (ValueError, SyntaxError, TypeError, KeyError):
        raise ApiError(400, "invalid_npy", f"the body is not an .npy file: {wanted}") from None
    data = body[buffer.tell() :]
    if (
        dtype.str not in _NPY_TYPES
        or fortran
        or len(shape) not in (2, 3, 4)
        or 0 in shape
        or int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data)
    ):
        raise ApiError(400, "invalid_npy", f"the array is {dtype} {list(shape)} with {len(data)} bytes: {wanted}")
    if len(shape) == 4 and shape[0] > max_images:
        raise ApiError(
            413,
            "too_many_images",
            f"{shape[0]} images in one request, the limit is {max_images}: send several requests",
        )
    pixels = np.frombuffer(data, dtype).reshape(shape)
    return list(pixels) if pixels.ndim == 4 else [pixels]


class Answer(NamedTuple):
    body: bytes
    content_type: str


def write_raw(vectors: Sequence[NDArray[np.float32]], accept: str) -> Answer | None:
    """The answer as raw little-endian float32 [N, D] or `.npy`, where `Accept` asks for one of them."""
    if "application/octet-stream" in accept:
        return Answer(np.stack(vectors).astype("<f4", copy=False).tobytes(), "application/octet-stream")
    if "application/x-npy" in accept:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(vectors).astype("<f4", copy=False), allow_pickle=False)
        return Answer(buffer.getvalue(), "application/x-npy")
    return None


def write_vector(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    """One vector for JSON: a list of floats, or base64 of little-endian float32 (what the openai client asks for)."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
