"""What all dialects share: the content of a request, bytes to images, vectors to bytes.

Nothing here decodes an image, touches a disk, or fetches a URL.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeAliasType

from jepakit.bundles.manifest import Manifest
from jepakit.errors import ImageError
from jepakit.readers.checks import READ_AS
from jepakit.readers.npy import read_npy_header
from jepakit.readers.quiet import quiet
from jepakit_service.faults import ApiError
from jepakit_service.http.forms import read_form
from jepakit_service.http.media import JSON, NPY, OCTETS, is_image, media_type
from jepakit_service.models.batcher import ImageData, Result

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# As a named alias it is a component of the OpenAPI document, so generated clients have one type for it.
Encoding = TypeAliasType("Encoding", Literal["float", "base64"])
_Model = TypeVar("_Model", bound=BaseModel)

EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAE0lEQVR42mNgQAOM/GgCLCNKAACUmgEbS4ZzXgAAAABJRU5ErkJggg=="
"""A grey PNG of 16 × 16 pixels in base64, for the document's examples."""

VALUES_AN_IMAGE, VALUES_BESIDE = 16, 1024
_NPY_TYPES = frozenset(np.dtype(name).newbyteorder("<").str for name in READ_AS.values())
_SERVED = (JSON, OCTETS, NPY, "application/*", "*/*")


class Dimensions(NamedTuple):
    """The vector length asked for, and the name of the field that asked."""

    field: str
    value: int


class Ask(NamedTuple):
    """One request's images, the model asked for, and how the answer's vectors are to be written."""

    images: list[ImageData]
    model: str | None = None
    field: str = "input"
    """What the list of images is called in the request: errors name `field[index]`."""
    encodings: tuple[Encoding, ...] = ("float",)
    dimensions: Dimensions | None = None
    normalized: bool | None = None


class Computed(NamedTuple):
    """Vectors, and what computed them: everything that an answer is written from."""

    manifest: Manifest
    precision: str
    provider: str
    results: Sequence[Result]
    pixels: int
    request_id: str

    @property
    def vectors(self) -> list[NDArray[np.float32]]:
        """Those of the images that could be read, in order."""
        return [result for result in self.results if not isinstance(result, ImageError)]


def check_number(count: int, max_images: int, field: str) -> None:
    """Refuse a request without images (400), or with more than the limit (413)."""
    if count == 0:
        raise ApiError(400, "no_images", "the request holds no image", param=field)
    if count > max_images:
        raise ApiError(
            413,
            "too_many_images",
            f"{count} images in one request, the limit is {max_images}: send several requests",
            param=field,
        )


def check_json_size(body: bytes, most: int) -> None:
    """Refuse JSON of more than `most` values, or of more than `most` lists and objects, before it is parsed.

    A megabyte of `[],[],…` parses into sixty megabytes of values. Base64 contains no commas or brackets, so honest
    requests count only a handful for each image.
    """
    if (count := body.count(b",")) > most:
        raise ApiError(
            413,
            "too_many_values",
            f"the JSON holds about {count} values, at most {most} are read: send fewer, or send images as files or arrays",
        )
    if (count := body.count(b"[") + body.count(b"{")) > most:
        raise ApiError(400, "invalid_request", f"the JSON holds {count} lists and objects, at most {most} are read")


def validate(model: type[_Model], body: bytes) -> _Model:
    """Validate JSON as `model`. Raises ApiError 400 for the first error."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(detail: ErrorDetails) -> ApiError:
    if detail["type"] == "json_invalid":
        told = detail["msg"].removeprefix("Invalid JSON: ")  # a place and a kind, nothing of the body
        return ApiError(400, "invalid_request", f"the body is not JSON: {told}")
    where = _place(detail["loc"])
    if detail["type"] == "missing":
        return ApiError(400, "invalid_request", f"`{where}` is missing", param=where)
    seen = repr(detail["input"])
    message = f"{where or 'the body'}: {detail['msg'][0].lower() + detail['msg'][1:]} (seen: {seen[:60]}{'…' * (len(seen) > 60)})"
    code = "invalid_input" if where.partition("[")[0] in ("input", "inputs", "images") else "invalid_request"
    return ApiError(400, code, message, param=where or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """pydantic's location of an error, written as `inputs[0].content[1].image`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if not str(part).startswith("(")]
    return "".join(parts).removeprefix(".")


def read_binary(content_type: str, body: bytes, max_images: int) -> Ask:
    """Read a body that is not JSON: one image file, several in a form, or an array. Raises ApiError 400, 413 or 415."""
    media, options = media_type(content_type)
    if media == "multipart/form-data":
        ask = Ask(*read_form(body, options.get(b"boundary", b""), max_images))
    elif media == NPY:
        ask = Ask(_read_npy(body, max_images))
    elif is_image(media):
        ask = Ask([body])
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"content type {media[:100] or 'none'} is not read here: send application/json, image/*, application/dicom, application/octet-stream, multipart/form-data or application/x-npy",
        )
    check_number(len(ask.images), max_images, ask.field)
    return ask


def read_text(text: str, where: str) -> bytes:
    """The bytes of an image file in a data URI or plain base64; white space is ignored."""
    text = text.lstrip()
    start = text[:8].lower()
    if start.startswith(("http://", "https://")):
        raise ApiError(
            400,
            "url_not_supported",
            f"{where} is a URL, and this service fetches none: send the image itself",
            param=where,
        )
    if start.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ApiError(
                400, "invalid_base64", f"{where} is a data URI without base64: send data:…;base64,…", param=where
            )
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return _read_broken_lines(text, where)


def _read_broken_lines(text: str, where: str) -> bytes:
    """Decode base64 that is broken into lines, as `base64 FILE` prints it."""
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n\f\v"), validate=True)
    except ValueError:
        raise ApiError(
            400,
            "invalid_base64",
            f"{where} is neither a data URI nor base64 of an image: send the standard alphabet (+ and /), padded with = (text cannot be embedded here)",
            param=where,
        ) from None


def _read_npy(body: bytes, max_images: int) -> list[ImageData]:
    """The images of a saved array [N, H, W, C], [H, W, C] or [H, W]. Its header is checked before any array is made."""
    wanted = (
        "send one little-endian array [N, H, W, C], [H, W, C] or [H, W] of the model's own kind as numpy.save writes it"
    )
    file = io.BytesIO(body)
    try:
        with quiet():
            header = read_npy_header(file)
    except Exception:  # numpy's parser fails on damage in many ways
        raise ApiError(400, "invalid_npy", f"the body is not an .npy file: {wanted}") from None
    size = len(body) - file.tell()
    if (
        header.dtype.str not in _NPY_TYPES
        or header.fortran
        or len(header.shape) not in (2, 3, 4)
        or min(header.shape) < 1
        or math.prod(header.shape) * header.dtype.itemsize != size
    ):
        raise ApiError(
            400,
            "invalid_npy",
            f"the array is {header.dtype.str} {str(list(header.shape))[:100]} with {size} bytes: {wanted}",
        )
    if len(header.shape) == 4:
        check_number(header.shape[0], max_images, "input")
    pixels = np.frombuffer(body, header.dtype, offset=file.tell()).reshape(header.shape)
    return list(pixels) if pixels.ndim == 4 else [pixels]


class Raw(NamedTuple):
    """Vectors as raw bytes, and their content type."""

    body: bytes
    content_type: str


def write_raw(vectors: Sequence[NDArray[np.float32]], accept: str) -> Raw | None:
    """The answer as raw little-endian float32 [N, D] or `.npy`, where `Accept` asks for one of them."""
    wanted = _most_wanted(accept)
    if wanted == OCTETS:
        return Raw(write_tensor(vectors), wanted)
    if wanted == NPY:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(vectors).astype("<f4", copy=False), allow_pickle=False)
        return Raw(buffer.getvalue(), wanted)
    return None


def _most_wanted(accept: str) -> str:
    """Of the media types that are served, the one with the highest `q` in `Accept`, the first of equals; empty if none
    is above zero."""
    wanted, most = "", 0.0
    for entry in accept.split(","):
        media, options = media_type(entry)
        try:
            quality = float(options.get(b"q", b"1"))
        except ValueError:
            continue
        if media in _SERVED and quality > most:
            wanted, most = media, quality
    return wanted


def write_tensor(vectors: Sequence[NDArray[np.float32]]) -> bytes:
    """Little-endian float32 [N, D], row by row."""
    return np.stack(vectors).astype("<f4", copy=False).tobytes()


def write_vector(vector: NDArray[np.float32], encoding: Encoding) -> str | list[float]:
    """One vector for JSON: a list of floats, or base64 of little-endian float32 (what the openai client asks for)."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
