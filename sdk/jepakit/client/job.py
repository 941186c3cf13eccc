"""One call of `embed`: what to send, and what the answers mean."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jepakit._files import reason_of
from jepakit._threads import work_ahead
from jepakit.client.attempts import AT_ONCE
from jepakit.client.models import ModelInfo, named
from jepakit.embedding.results import Results
from jepakit.errors import DECODER_MISSING, ImageError, ModelChangedError, ProtocolError, ResponseError
from jepakit.readers import DEFAULT_LIMITS
from jepakit.sources import ImageList

if TYPE_CHECKING:
    import httpx

    from jepakit.bundles.manifest import Preprocess
    from jepakit.readers import ImageRef

IMAGES_PER_REQUEST, _BYTES_PER_REQUEST = 32, 16 << 20
_OF_TIME = 0.75
"""The share of `max_images_in_time` that is used: it falls once the service has seen how long these images take to decode."""
# The most that a multipart part adds to its file; also more than the header of a `.npy`.
_BYTES_BESIDE = 256
_SERVICE = "the service take more (max_body_mb)"
_BAD_IMAGE = re.compile(r"input\[(\d{1,9})\]")
_SERVICES_NAME = re.compile(r"^(?:input\[\d+\]: )?(?:(?:image|array): )?")


@dataclass(frozen=True)
class RequestLimits:
    """The most that one request may hold."""

    images: int = IMAGES_PER_REQUEST
    bytes: int = _BYTES_PER_REQUEST
    """Of several images together; a larger image is sent alone."""
    largest: int = DEFAULT_LIMITS.max_encoded_bytes
    """Bytes of one image."""

    @classmethod
    def of(cls, models: list[ModelInfo], asked: str | None, patience_s: float) -> RequestLimits:
        """At most what the service takes for the model asked for, and few enough images that it can admit all requests
        at once, and answer them within `patience_s` if that is shorter than its own timeout."""
        try:
            told = named(models, asked)[0].raw["limits"]
            body = told["max_body_mb"] << 20
            share = min(1.0, patience_s / told.get("request_timeout_s", patience_s))
            in_time = int(_OF_TIME * share * told["max_images_in_time"]) // AT_ONCE
            images = min(cls.images, told["max_images"], max(1, in_time))
            return cls(images, min(cls.bytes, body), body)
        except (IndexError, KeyError, TypeError, ZeroDivisionError):
            return cls()


@dataclass(frozen=True)
class Chunk:
    """The images of one request and their places in the job; with `partial`, bad images do not fail the others."""

    places: list[int]
    items: list[Any]
    model: str | None
    partial: bool = False

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        params = {"model": self.model} if self.model else {}
        if self.partial:
            params["partial"] = "true"
        options: dict[str, Any] = {"params": params, "headers": {"Accept": "application/octet-stream"}}
        if isinstance(self.items[0], np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, np.stack(self.items), allow_pickle=False)
            options["headers"]["Content-Type"] = "application/x-npy"
            return http.build_request("POST", "/v1/embeddings", content=buffer.getvalue(), **options)
        # Names are not sent: the service does not learn where an image came from.
        files = [("files", (str(place), data)) for place, data in enumerate(self.items)]
        return http.build_request("POST", "/v1/embeddings", files=files, **options)


class Job:
    """One call of `embed`: splits the images without `results` into requests, and adds the answers to them in order."""

    def __init__(
        self,
        images: ImageList,
        model: str | None,
        limits: RequestLimits,
        results: Results,
        spec: Preprocess | None = None,
    ) -> None:
        self._images, self._model, self._results, self._spec = images, model, results, spec
        self._told = self._limits = limits
        self._model_id: str | None = None
        """The model_id of the last answer."""
        self.computed = ("fp32", "cpu")
        """Precision and provider of the last answer."""

    def __len__(self) -> int:
        return len(self._images)

    @property
    def is_long(self) -> bool:
        """Whether it takes more than one request."""
        return len(self) > IMAGES_PER_REQUEST

    def cut_after(self, refusal: ResponseError, limits: RequestLimits) -> bool:
        """Split what is left by the service's current limits; if these are unchanged and the refusal has no code, it
        came from something in front of the service: then halve the requests. Returns whether anything has changed."""
        if limits != self._told:
            self._told = self._limits = limits
            return True
        if refusal.code is not None or self._limits.images == 1:
            return False
        self._limits = replace(limits, images=self._limits.images // 2, bytes=self._limits.bytes // 2)
        return True

    def parts(self) -> Generator[Chunk, None, None]:
        """Requests for the images that have no vectors yet, of up to 32 images or 16 MB, or less if the service takes
        less; files are read a few ahead."""
        places, items, size = list[int](), list[Any](), 0
        for place, item in self._read_rest():
            weight = _BYTES_BESIDE + _bytes_of(item)
            full = len(items) >= self._limits.images or size + weight > self._limits.bytes
            if items and (full or not _alike(items[0], item)):
                yield Chunk(places, items, self._model)
                places, items, size = [], [], 0
            places.append(place)
            items.append(item)
            size += weight
        if items:
            yield Chunk(places, items, self._model)

    def _read_rest(self) -> Generator[tuple[int, bytes | NDArray[Any]], None, None]:
        """The places and data of the images to send, in order; those that cannot be read are left out."""
        results = self._results
        rest = (place for place in range(results.done, len(self._images)) if place not in results.skipped)
        with closing(work_ahead(self._read, rest, threads=self._images.threads(AT_ONCE), ahead=AT_ONCE)) as reading:
            for place, item in reading:
                try:
                    yield place, item.result()
                except ImageError as error:
                    results.skipped.add(place, error)

    def _read(self, place: int) -> bytes | NDArray[Any]:
        """The data to send for an image."""
        self._results.will_read(place)
        item = _encode(self._images[place], self._spec, self._limits.largest)
        _refuse_larger(self._images.ids[place], _bytes_of(item), self._limits.largest)
        return item

    def accept(self, chunk: Chunk, response: httpx.Response) -> None:
        """Take one answer: vectors for all images of a chunk or, if it is `partial`, for the good ones."""
        model_id = response.headers.get("x-model-id")
        shape = response.headers.get("x-embedding-shape", "")
        rows, _, dim = shape.partition(",")
        read = _rows_in_part if chunk.partial else _rows_of_all
        fits = model_id and rows == str(len(chunk.items)) and dim.isdecimal()
        found = read(response, len(chunk.items), int(dim)) if fits else None
        if found is None:
            raise ProtocolError(
                f"the answer for {len(chunk.items)} images has shape {shape!r} and {len(response.content)} bytes: "
                "is this a jepakit service?"
            )
        if self._model_id not in (None, model_id):
            raise ModelChangedError(
                f"the service switched from model {self._model_id} to {model_id} in the middle: vectors of two spaces "
                "are never mixed; run it again, or pin one with model='NAME@MODEL_ID'"
            )
        self._model_id = model_id
        self.computed = (response.headers.get("x-precision", "fp32"), response.headers.get("x-provider", "cpu"))
        vectors, refused = found
        for place, message, code in refused:
            self._leave_out(chunk.places[place], self._named(chunk.places[place], message, code))
        self._results.add(chunk.places[-1] + 1, vectors, model_id)

    def tolerate(self, chunk: Chunk, error: ImageError) -> Chunk | None:
        """The chunk to send next after one image was refused; None if it was the only one, which is then left out.

        Raises `error` if nothing may be left out, or the image is not at fault.
        """
        if len(chunk.items) > 1 and self._results.skipped.allowed and error.code != DECODER_MISSING:
            return replace(chunk, partial=True)
        self._leave_out(chunk.places[0], error)
        return None

    def _leave_out(self, place: int, error: ImageError) -> None:
        if error.code == DECODER_MISSING:
            raise error
        self._results.skipped.add(place, error)

    @contextmanager
    def naming(self, chunk: Chunk) -> Iterator[None]:
        """Within the block, report a bad image by the caller's name for it: the service only knows its place in the request."""
        try:
            yield
        except ResponseError as error:
            if error.status == 413 and error.code in (None, "body_too_large") and len(chunk.items) == 1:
                limit, taker = str(error).partition(":")[0], _SERVICE
                if error.code is None:
                    limit = "something in front of the service takes less (it answered 413)"
                    taker = "it take more (nginx: client_max_body_size)"
                raise _too_large(self._images.ids[chunk.places[0]], _bytes_of(chunk.items[0]), limit, taker) from None
            place = _BAD_IMAGE.fullmatch(error.param or "")
            if place is None or int(place[1]) >= len(chunk.items) or error.status not in (413, 415, 422):
                raise
            raise self._named(chunk.places[int(place[1])], str(error), error.code) from None

    def _named(self, place: int, message: str, code: str | None) -> ImageError:
        """The service's refusal of one image, with the caller's name for it."""
        return ImageError(f"{self._images.ids[place]}: {_SERVICES_NAME.sub('', message)}", code=code or "unreadable")


Rows = tuple[NDArray[np.float32], list[tuple[int, str, str]]]
"""Vectors float32 [N, D], and (place in the request, message, code) of each image that has none."""


def _rows_of_all(response: httpx.Response, count: int, dim: int) -> Rows | None:
    """Read a raw answer; None if its length does not match its shape."""
    if len(response.content) != 4 * count * dim:
        return None
    return np.frombuffer(response.content, "<f4").reshape(count, dim), []


def _rows_in_part(response: httpx.Response, count: int, dim: int) -> Rows | None:
    """Read an answer to `?partial=true`, which is JSON; None unless it has one row for each image, in order."""
    try:
        rows = response.json()["data"]
        good = [row["embedding"] for row in rows if "error" not in row]
        refused = [
            (row["index"], str(row["error"]["message"]), str(row["error"]["code"])) for row in rows if "error" in row
        ]
        vectors = np.array(good, np.float32).reshape(len(good), dim)
    except (ValueError, KeyError, TypeError):
        return None
    return (vectors, refused) if [row["index"] for row in rows] == list(range(count)) else None


def in_flight(
    chunks: Iterable[Chunk], begin: Callable[[Chunk], Future[httpx.Response]]
) -> Iterator[tuple[Chunk, Future[httpx.Response]]]:
    """Begin a request for each chunk, keeping up to `AT_ONCE` in flight; yields them oldest first. The next chunk is read when the
    caller asks for the next answer."""
    waiting: deque[tuple[Chunk, Future[httpx.Response]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, begin(chunk)))
        if len(waiting) == AT_ONCE:
            yield waiting.popleft()
    yield from waiting


def _encode(ref: ImageRef, spec: Preprocess | None, largest: int) -> bytes | NDArray[Any]:
    """A file is sent as it is, or refused unread if it is larger than `largest` bytes; parts of files and images in
    memory are decoded here, by the same reader as in the service."""
    if ref.window is not None or ref.frame is not None:
        from jepakit.images import read_image

        assert spec is not None
        return read_image(ref, spec)
    image = ref.data
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | Path):
        try:
            _refuse_larger(ref.name, Path(image).stat().st_size, largest)
            return Path(image).read_bytes()
        except ImageError:  # too large; it is a ValueError, too
            raise
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
            raise ImageError(f"{image}: cannot be read ({reason_of(error)})", code="unreadable") from None
    return _read_here(ref)


def _read_here(ref: ImageRef) -> NDArray[Any]:
    """An array or a Pillow image as [H, W, C]: upright, and with several frames refused, as in process."""
    from jepakit.images import choose_frame
    from jepakit.readers import open_raster
    from jepakit.readers.quiet import quiet

    with quiet(), open_raster(ref.data, name=ref.name) as raster:
        return raster.read(frame=choose_frame(raster.header, None, ref.name))


def _bytes_of(item: bytes | NDArray[Any]) -> int:
    return item.nbytes if isinstance(item, np.ndarray) else len(item)


def _refuse_larger(name: str, size: int, largest: int) -> None:
    """Raise ImageError for an image too large for any request, by name: the service could only say that the body was."""
    if size > largest:
        raise _too_large(name, size, f"a request holds at most {largest:,}")


def _too_large(name: str, size: int, limit: str, taker: str = _SERVICE) -> ImageError:
    return ImageError(
        f"{name}: {size:,} bytes, but {limit}: save it smaller, cut it into tiles (tile=…), or let {taker}",
        code="too_large",
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether two images can share a request: files with files, arrays with arrays of the same shape and dtype."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    return isinstance(a, bytes) and isinstance(b, bytes)
