"""Clients of the embedding service: `Client`, and `AsyncClient` with the same methods.

Images travel as their own bytes, many in one request, and vectors come back as raw float32. Both clients
are thin loops round `_Job`, which knows the protocol: what to send, what an answer means, when to try again.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from jepakit._loopback import is_loopback
from jepakit._progress import Steps
from jepakit.embeddings import Embeddings
from jepakit.errors import (
    AuthenticationError,
    BundleError,
    ClientError,
    ConfigError,
    ConnectionFailedError,
    ImageError,
    ModelChangedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ResponseError,
)
from jepakit.readers import DEFAULT_LIMITS
from jepakit.sources import ImageList, gather

if TYPE_CHECKING:
    import httpx

    from jepakit.bundle import Preprocess
    from jepakit.readers import ImageRef

# httpx itself is imported by the first client: it brings its own command line along, 0.2 s.
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LEAST_WAIT_S = 0.25, 8.0, 0.01
_IMAGES_PER_REQUEST, _BYTES_PER_REQUEST = 32, 16 << 20
_AT_ONCE = 4
_MOST_AT_ONCE = 2 * _AT_ONCE
"""Of all calls of one client together."""
_LONGEST_S = 1e6
# What a part of multipart adds to its file, at most; also more than the header of `.npy`.
_BYTES_BESIDE = 256
_NEVER = threading.Event()
_KEY = re.compile(r"[!-~]+")
_BAD_IMAGE = re.compile(r"input\[(\d{1,9})\]")
_SERVICES_NAME = re.compile(r"^input\[\d+\]: (?:(?:image|array): )?")


@dataclass(frozen=True)
class ModelInfo:
    """What the service says of one model. `raw` holds all of it."""

    name: str
    model_id: str
    digest: str
    dim: int
    precision: str
    provider: str
    raw: dict[str, Any] = field(repr=False)


class _Settings:
    """What both clients are told, and how they speak."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, deadline_s: float) -> None:
        import httpx

        if isinstance(url, str) and "@" in url:  # whatever it is, it is not repeated: it may hold a password
            raise ConfigError(
                "the url holds an @: give the service's address without a user and a password (the key is api_key=…, or "
                "JEPAKIT_API_KEY; an @ in a path is written %40)"
            )
        if not isinstance(url, str) or not _is_address(url):
            raise ConfigError(f"url = {url!r}: give the service's address, e.g. http://127.0.0.1:8000")
        if url.rstrip("/").endswith("/v1"):
            raise ConfigError(f"url = {url!r}: give the service's address without /v1, which belongs to its routes")
        for name, seconds in (("timeout_s", timeout_s), ("deadline_s", deadline_s)):
            if not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST_S:
                raise ConfigError(f"{name} = {seconds!r}: give seconds, more than 0 and at most {_LONGEST_S:g}")
        key = api_key or os.environ.get("JEPAKIT_API_KEY")
        if key and not _KEY.fullmatch(key):
            raise ConfigError(
                "the API key (api_key, or JEPAKIT_API_KEY) holds a space, a line break or a letter that is not ASCII: "
                "give it as it was made, without the end of the line it was read from"
            )
        self.url, self.deadline_s = url.rstrip("/"), deadline_s
        self.patience_s = min(timeout_s, deadline_s)
        """For the answer to one attempt."""
        self.http: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": timeout_s,
            "follow_redirects": False,
            # No proxy stands between this machine and itself. SSL_CERT_FILE holds there too, so it is read here.
            "trust_env": not is_loopback(httpx.URL(url).host),
            "verify": httpx.create_ssl_context(),
            "limits": httpx.Limits(max_connections=_MOST_AT_ONCE),
        }


def _path_of(name: str) -> str:
    """Where the service tells of one model, whatever letters its name has."""
    return f"/v1/models/{quote(name, safe='')}"


def _is_address(url: str) -> bool:
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 1 << 16


@dataclass(frozen=True)
class _Limits:
    """What one request holds at most."""

    images: int = _IMAGES_PER_REQUEST
    bytes: int = _BYTES_PER_REQUEST
    """Of several images together; a larger one rides alone."""
    largest: int = DEFAULT_LIMITS.max_encoded_bytes
    """Of one image."""

    @classmethod
    def of(cls, models: list[ModelInfo], asked: str | None, patience_s: float) -> _Limits:
        """No more than the service takes of the model asked for, and so few that it lets all requests at once in and
        answers them in `patience_s`, where that is less than it gives itself."""
        try:
            told = _named(models, asked)[0].raw["limits"]
            body = told["max_body_mb"] << 20
            share = min(1.0, patience_s / told.get("request_timeout_s", patience_s))
            in_time = int(share * told["max_images_in_time"]) // _AT_ONCE
            images = min(cls.images, told["max_images"], max(1, in_time))
            return cls(images, min(cls.bytes, body), body)
        except (IndexError, KeyError, TypeError, ZeroDivisionError):
            return cls()


class Client:
    """Talks to one service.

    url         e.g. http://127.0.0.1:8000
    api_key     or the environment's JEPAKIT_API_KEY
    timeout_s   seconds each step (connect, send, read) may go without progress. By default longer than the service's
                own `request_timeout_s` (60), so that its reason arrives; with less than that, requests hold fewer images
    deadline_s  seconds for one request with all its attempts; no step waits longer than what is left of them.
                Connection errors, 408, 429 and 5xx are tried again until then, with growing, jittered pauses (or the
                service's own Retry-After); what a second attempt cannot mend, such as a certificate that is not
                trusted, fails at once

    with Client(url) as client: …   Raises the errors of `jepakit.errors` below ClientError.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 75.0, deadline_s: float = 120.0
    ) -> None:
        self._settings = _Settings(url, api_key=api_key, timeout_s=timeout_s, deadline_s=deadline_s)
        self._described: list[ModelInfo] | None = None
        self._connect()

    def _connect(self) -> None:
        """Begin without connections. What a process inherits from its parent may be in use there: on one connection,
        each would read the other's answers."""
        import httpx

        self._http = httpx.Client(**self._settings.http)
        self._places = threading.Semaphore(_MOST_AT_ONCE)
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of this process."""
        if self._process == os.getpid():
            self._http.close()

    def models(self) -> list[ModelInfo]:
        """The models that the service has loaded."""
        return _read_models(self._send(self._http.build_request("GET", "/v1/models")))

    def model(self, name: str) -> ModelInfo:
        """One model that the service has loaded; NotFoundError when it has not."""
        return _read_model(self._send(self._http.build_request("GET", _path_of(name))))

    def embed(
        self, images: Any, *, model: str | None = None, labels: str = "auto", tile: int | None = None,
        overlap: int = 0, min_valid: float = 0.5, frame: int | Literal["each"] | None = None, progress: bool = True,
    ) -> Embeddings:  # fmt: skip
        """Embed images; order kept.

        images     a folder (recursive), glob or path, a CSV or Parquet manifest, WebDataset shards, a ZIP, the
                   bytes of a file, an array [H, W, C] or [N, H, W, C], a Pillow image; or a list of image files,
                   bytes, arrays and Pillow images, or of shards
        model      NAME or NAME@MODEL_ID; may be left out when the service has one model
        labels     `auto` takes what the source brings (a manifest's column, shards' .cls or .json, a dataset's),
                   for a folder or ZIP its first-level folders; `folder` takes those or raises DataError, `none` takes
                   none; or a CSV file of paths and labels
        tile       pixels a side of the tiles that large images are cut into, here; ids are then `path#x,y,w,h`. A
                   model of tiles takes its own size alone. Needs `jepakit[images]`, as `frame` does
        overlap    pixels that neighbouring tiles share
        min_valid  tiles with less valid area are left out
        frame      of multi-frame files: which, or "each"
        progress   show on standard error how far it is, what was left out (blank tiles, files of other kinds) and
                   why there are no labels

        Raises ImageError naming the first image that cannot be read, ConfigError for tiles of another size than the
        model's, ResponseError when the service refuses, ConnectionFailedError after the deadline.
        """
        spec = None if tile is None and frame is None else _spec_of(self.models(), model, tile)
        listed = gather(images, labels, tile=tile, overlap=overlap, min_valid=min_valid, frame=frame, progress=progress)
        job = _Job(listed, model, self._limits_for(len(listed), model), spec)
        with Steps(len(job), what="embed", progress=progress and len(job) > _IMAGES_PER_REQUEST) as show:
            try:
                self._embed_rest(job, show)
            except ClientError as error:
                self._described = None
                if not _too_much(error) or not job.cut_by(self._limits_for(len(job), model)):
                    raise
                self._embed_rest(job, show)
        return job.result()

    def _embed_rest(self, job: _Job, show: Steps) -> None:
        """Send what has no vectors yet."""
        stop = threading.Event()
        try:
            for part in _windows(job.parts(), _AT_ONCE):
                answers = [(chunk, self._begin(chunk.request(self._http), stop)) for chunk in part]
                for chunk, answer in answers:
                    with job.naming(chunk):
                        job.accept(chunk, answer.result())
                    show.update(job.done)
        finally:
            stop.set()

    def verify(self, bundle: str | Path, *, model: str | None = None) -> float:
        """Send the bundle's golden inputs through the service; returns the relative error to torch's vectors.

        Raises BundleError when the service computes other vectors than the bundle promises.
        """
        images, model, expected = _golden(bundle, model)
        job = _Job(images, model, self._limits_for(len(images), model))
        for chunk in job.parts():
            job.accept(chunk, self._send(chunk.request(self._http)))
        return _judge_golden(job, expected)

    def _limits_for(self, count: int, model: str | None) -> _Limits:
        """Asked of the service until an `embed` fails, and not for a single image, which no limit can cut."""
        if self._described is None and count > 1:
            self._described = self.models()
        return _Limits.of(self._described or [], model, self._settings.patience_s)

    def _begin(self, request: httpx.Request, stop: threading.Event) -> Future[httpx.Response]:
        """`_send` in a daemon thread: neither Ctrl-C nor the end of the program waits for its answer."""
        answer: Future[httpx.Response] = Future()

        def send() -> None:
            try:
                answer.set_result(self._send(request, stop))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=send, name="jepakit-send", daemon=True).start()
        return answer

    def _send(self, request: httpx.Request, stop: threading.Event = _NEVER) -> httpx.Response:
        """One request, tried again against the deadline; CancelledError after `stop`."""
        import httpx

        if self._process != os.getpid():
            self._connect()
        with self._places:  # the deadline is the service's: what waits for this client's own requests has not begun
            attempts = _Attempts(self._settings)
            pause: float | None = 0.0
            while not stop.wait(pause):
                try:
                    response = self._http.send(attempts.begin(request))
                    pause = attempts.pause_after(response)
                except httpx.RequestError as error:
                    pause = attempts.pause_after_failure(error)
                if pause is None:
                    return response
            raise CancelledError


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors, awaited."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 75.0, deadline_s: float = 120.0
    ) -> None:
        self._settings = _Settings(url, api_key=api_key, timeout_s=timeout_s, deadline_s=deadline_s)
        self._described: list[ModelInfo] | None = None
        self._connect()

    def _connect(self) -> None:
        """As `Client._connect`."""
        import asyncio

        import httpx

        self._http = httpx.AsyncClient(**self._settings.http)
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._process = os.getpid()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections of this process."""
        if self._process == os.getpid():
            await self._http.aclose()

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        return _read_models(await self._send(self._http.build_request("GET", "/v1/models")))

    async def model(self, name: str) -> ModelInfo:
        """As `Client.model`."""
        return _read_model(await self._send(self._http.build_request("GET", _path_of(name))))

    async def embed(
        self, images: Any, *, model: str | None = None, labels: str = "auto", tile: int | None = None,
        overlap: int = 0, min_valid: float = 0.5, frame: int | Literal["each"] | None = None, progress: bool = True,
    ) -> Embeddings:  # fmt: skip
        """As `Client.embed`."""
        import asyncio

        spec = None if tile is None and frame is None else _spec_of(await self.models(), model, tile)
        listed = await asyncio.to_thread(
            gather, images, labels, tile=tile, overlap=overlap, min_valid=min_valid, frame=frame, progress=progress
        )
        job = _Job(listed, model, await self._limits_for(len(listed), model), spec)
        with Steps(len(job), what="embed", progress=progress and len(job) > _IMAGES_PER_REQUEST) as show:
            try:
                await self._embed_rest(job, show)
            except ClientError as error:
                self._described = None
                if not _too_much(error) or not job.cut_by(await self._limits_for(len(job), model)):
                    raise
                await self._embed_rest(job, show)
        return job.result()

    async def _embed_rest(self, job: _Job, show: Steps) -> None:
        """As `Client._embed_rest`."""
        import asyncio

        windows = _windows(job.parts(), _AT_ONCE)
        answers: list[tuple[_Chunk, asyncio.Task[httpx.Response]]] = []
        try:
            # Files are read and decoded in a thread: whatever else the event loop does goes on meanwhile.
            while part := await asyncio.to_thread(lambda: next(windows, None)):
                answers = [(chunk, asyncio.create_task(self._send(chunk.request(self._http)))) for chunk in part]
                for chunk, answer in answers:
                    with job.naming(chunk):
                        job.accept(chunk, await answer)
                    show.update(job.done)
        finally:
            # What is still on its way when one request fails, or this call is cancelled, ends with it.
            for _, answer in answers:
                answer.cancel()
            await asyncio.gather(*(answer for _, answer in answers), return_exceptions=True)

    async def verify(self, bundle: str | Path, *, model: str | None = None) -> float:
        """As `Client.verify`."""
        images, model, expected = _golden(bundle, model)
        job = _Job(images, model, await self._limits_for(len(images), model))
        for chunk in job.parts():
            job.accept(chunk, await self._send(chunk.request(self._http)))
        return _judge_golden(job, expected)

    async def _limits_for(self, count: int, model: str | None) -> _Limits:
        if self._described is None and count > 1:
            self._described = await self.models()
        return _Limits.of(self._described or [], model, self._settings.patience_s)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        import asyncio

        import httpx

        if self._process != os.getpid():
            self._connect()
        async with self._places:
            attempts = _Attempts(self._settings)
            while True:
                try:
                    response = await self._http.send(attempts.begin(request))
                    pause = attempts.pause_after(response)
                except httpx.RequestError as error:
                    pause = attempts.pause_after_failure(error)
                if pause is None:
                    return response
                await asyncio.sleep(pause)


class _Attempts:
    """When to try again: embedding is pure, so every attempt is safe to repeat."""

    def __init__(self, settings: _Settings) -> None:
        self._url, self._deadline_s = settings.url, settings.deadline_s
        self._timeout_s: float = settings.http["timeout"]
        self._refusal: ResponseError | None = None
        self._deadline = time.monotonic() + settings.deadline_s
        self._pause = _FIRST_PAUSE_S

    def begin(self, request: httpx.Request) -> httpx.Request:
        """The request, not to wait for anything beyond the deadline."""
        import httpx

        left = max(_LEAST_WAIT_S, self._deadline - time.monotonic())
        request.extensions["timeout"] = httpx.Timeout(min(self._timeout_s, left)).as_dict()
        return request

    def pause_after(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next attempt, None for a good answer; raises what the answer means otherwise."""
        if response.status_code == 200:
            return None
        self._refusal = _meaning(response, f" (deadline_s = {self._deadline_s:g})" if _may_pass(response) else "")
        if not _may_pass(response) or (pause := self._next(response.headers.get("retry-after"))) is None:
            raise self._refusal
        return pause

    def pause_after_failure(self, error: httpx.RequestError) -> float:
        """Seconds to wait before the next attempt; raises what the failure means when none is left, or none can help."""
        import httpx

        _raise_if_lasting(error, self._url)
        pause = self._next(None)
        if pause is None:
            if self._refusal is not None and isinstance(error, httpx.TimeoutException):
                raise self._refusal  # the deadline cut the last attempt short: it tells nothing new
            cause = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ConnectionFailedError(
                f"{self._url} gave no answer within {self._deadline_s:g} s ({cause}): is the service running, and is "
                "this its address, http or https?"
            ) from error
        return pause

    def _next(self, retry_after: str | None) -> float | None:
        try:
            pause = max(_FIRST_PAUSE_S, min(float(retry_after or ""), 60.0))
        except ValueError:
            pause = random.uniform(0.5, 1.0) * self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        return pause if time.monotonic() + pause < self._deadline else None


def _may_pass(response: httpx.Response) -> bool:
    """Whether the same request may be answered in a moment. Ray's proxy knows no routes while it starts anew."""
    return response.status_code in _RETRYABLE or (response.status_code == 404 and b"/-/routes" in response.content)


def _raise_if_lasting(error: httpx.RequestError, url: str) -> None:
    """Raise what a failure means that every further attempt would meet again."""
    import ssl

    import httpx

    if isinstance(error, httpx.LocalProtocolError):
        raise ConnectionFailedError(f"the request to {url} cannot be sent: {error}") from error
    if not isinstance(error, httpx.TransportError):
        raise ProtocolError(
            f"{url} sent an answer that cannot be read ({error}): is this a jepakit service?"
        ) from error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise ConnectionFailedError(
            f"the certificate of {url} is not trusted ({cause.verify_message}): set SSL_CERT_FILE to the file of the "
            "certificate, or of the authority that signed it"
        ) from error
    # Its subclasses tell of connections that broke, as they do while a service starts anew.
    if type(cause) is ssl.SSLError:
        raise ConnectionFailedError(f"{url} does not speak https ({cause.reason}): is it http://…?") from error


@dataclass(frozen=True)
class _Chunk:
    """The images of one request; `first` is the place of its first image in the job."""

    first: int
    items: list[Any]
    model: str | None

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        params = {"model": self.model} if self.model else {}
        options: dict[str, Any] = {"params": params, "headers": {"Accept": "application/octet-stream"}}
        if isinstance(self.items[0], np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, np.stack(self.items), allow_pickle=False)
            options["headers"]["Content-Type"] = "application/x-npy"
            return http.build_request("POST", "/v1/embeddings", content=buffer.getvalue(), **options)
        # Names stay here: the service learns nothing of where an image came from.
        files = [("files", (str(place), data)) for place, data in enumerate(self.items)]
        return http.build_request("POST", "/v1/embeddings", files=files, **options)


class _Job:
    """One call of `embed`: cuts the images into requests, puts the answers together in order."""

    def __init__(self, images: ImageList, model: str | None, limits: _Limits, spec: Preprocess | None = None) -> None:
        self._images, self._model, self._limits, self._spec = images, model, limits, spec
        self._vectors: list[NDArray[np.float32]] = []
        self._model_id: str | None = None
        self.computed = ("fp32", "cpu")
        """Precision and provider of the last answer."""
        self.done = 0

    def __len__(self) -> int:
        return len(self._images)

    def cut_by(self, limits: _Limits) -> bool:
        """Cut what is left by these limits; returns whether they are others than before."""
        before, self._limits = self._limits, limits
        return limits != before

    def parts(self) -> Iterator[_Chunk]:
        """Requests of up to 32 images or 16 MB, or as many as the service takes, for what has no vectors yet; files are
        read when their turn comes."""
        first, items, size = self.done, list[Any](), 0
        for place in range(self.done, len(self._images)):
            item = _encode(self._images[place], self._spec, self._limits.largest)
            _refuse_larger(self._images.ids[place], _bytes_of(item), self._limits.largest)
            weight = _BYTES_BESIDE + _bytes_of(item)
            full = len(items) >= self._limits.images or size + weight > self._limits.bytes
            if items and (full or not _alike(items[0], item)):
                yield _Chunk(first, items, self._model)
                first, items, size = place, [], 0
            items.append(item)
            size += weight
        yield _Chunk(first, items, self._model)

    def accept(self, chunk: _Chunk, response: httpx.Response) -> None:
        """Take one answer; the service names a bad image by its place, which becomes the image's name here."""
        model_id = response.headers.get("x-model-id")
        shape = response.headers.get("x-embedding-shape", "")
        rows, _, dim = shape.partition(",")
        if (
            not model_id
            or rows != str(len(chunk.items))
            or not dim.isdecimal()
            or len(response.content) != 4 * len(chunk.items) * int(dim)
        ):
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
        self._vectors.append(np.frombuffer(response.content, "<f4").reshape(len(chunk.items), int(dim)))
        self.done += len(chunk.items)

    @contextmanager
    def naming(self, chunk: _Chunk) -> Iterator[None]:
        """The service names a bad image by its place in the request; tell it by the caller's own name for it."""
        try:
            yield
        except ResponseError as error:
            if error.status == 413 and error.code in (None, "body_too_large") and len(chunk.items) == 1:
                limit = str(error).partition(":")[0]
                raise _too_large(self._images.ids[chunk.first], _bytes_of(chunk.items[0]), limit) from None
            place = _BAD_IMAGE.fullmatch(error.param or "")
            if place is None or int(place[1]) >= len(chunk.items) or error.status not in (413, 415, 422):
                raise
            name = self._images.ids[chunk.first + int(place[1])]
            reason = _SERVICES_NAME.sub("", str(error))
            raise ImageError(f"{name}: {reason}", code=error.code or "unreadable") from None

    def result(self) -> Embeddings:
        assert self._model_id is not None
        vectors = np.concatenate(self._vectors).astype(np.float32, copy=False)
        return Embeddings(vectors, self._model_id, tuple(self._images.ids), self._images.labels)


def _encode(ref: ImageRef, spec: Preprocess | None, largest: int) -> bytes | NDArray[Any]:
    """A file travels as it is, and is not read if it is larger than `largest` bytes; a part of one, and what is in
    memory, is read here, by the same reader as there."""
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
        except OSError as error:
            raise ImageError(f"{image}: cannot be read ({error.strerror})", code="unreadable") from None
    return _read_here(ref)


def _bytes_of(item: bytes | NDArray[Any]) -> int:
    return item.nbytes if isinstance(item, np.ndarray) else len(item)


def _refuse_larger(name: str, size: int, largest: int) -> None:
    """An image that no request can hold is named here; the service knows only that a body was too large."""
    if size > largest:
        raise _too_large(name, size, f"a request holds at most {largest:,}")


def _too_large(name: str, size: int, limit: str) -> ImageError:
    return ImageError(
        f"{name}: {size:,} bytes, and {limit}: save it smaller, cut it into tiles (tile=…), or let the service take more "
        "(max_body_mb)",
        code="too_large",
    )


def _read_here(ref: ImageRef) -> NDArray[Any]:
    """An array or a Pillow image as [H, W, C]: upright, and several frames refused, as in process."""
    from jepakit.images import choose_frame
    from jepakit.readers import open_raster
    from jepakit.readers.quiet import quiet

    with quiet(), open_raster(ref.data, name=ref.name) as raster:
        return raster.read(frame=choose_frame(raster.header, None, ref.name))


def _alike(a: Any, b: Any) -> bool:
    """Whether two images can ride in one request: files with files, arrays with arrays of the same shape."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    return isinstance(a, bytes) and isinstance(b, bytes)


def _windows(chunks: Iterator[_Chunk], size: int) -> Iterator[list[_Chunk]]:
    """A few chunks at a time, so that memory does not grow with the job."""
    window: list[_Chunk] = []
    for chunk in chunks:
        window.append(chunk)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _read_models(response: httpx.Response) -> list[ModelInfo]:
    try:
        return [_model_info(row) for row in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise ProtocolError("the answer to /v1/models is not a list of models: is this a jepakit service?") from None


def _read_model(response: httpx.Response) -> ModelInfo:
    try:
        return _model_info(response.json())
    except (ValueError, KeyError, TypeError):
        raise ProtocolError("the answer to /v1/models/… is not a model: is this a jepakit service?") from None


def _model_info(row: dict[str, Any]) -> ModelInfo:
    return ModelInfo(row["id"], row["model_id"], row["digest"], row["dim"], row["precision"], row["provider"], row)


def _named(models: list[ModelInfo], asked: str | None) -> list[ModelInfo]:
    """The models that NAME or NAME@MODEL_ID may mean; all of them where none is named."""
    return [one for one in models if asked is None or one.name == asked.partition("@")[0]]


def _spec_of(models: list[ModelInfo], asked: str | None, tile: int | None) -> Preprocess:
    """How the model that is meant wants its images, from the service's own description; `tile` must be its own."""
    from jepakit.bundle import Preprocess
    from jepakit.session import check_tile

    named = _named(models, asked)
    if len(named) != 1:
        known = ", ".join(one.name for one in models)
        raise ConfigError(f"model = {asked!r}: name one of the service's models ({known})")
    spec = Preprocess.model_validate(named[0].raw["preprocess"])
    check_tile(tile, spec)
    return spec


def _too_much(error: ClientError) -> bool:
    """Whether a request of several images was more than the service takes: it may take less than it did once."""
    return isinstance(error, ResponseError) and error.status == 413


def _meaning(response: httpx.Response, note: str) -> ResponseError:
    """The service's own words where it sent them, and `note`; a bare 5xx comes from something in front of it."""
    message, told = f"the service answered {response.status_code} without a reason", dict[str, Any]()
    with suppress(ValueError, KeyError, TypeError):
        error = response.json()["error"]
        message, told = str(error["message"]), error
    code, param, request_id = (
        told[name] if isinstance(told.get(name), str) else None for name in ("code", "param", "request_id")
    )
    kind = {
        401: AuthenticationError,
        403: AuthenticationError,
        404: NotFoundError,
        429: OverloadedError,
        503: OverloadedError,
    }
    return kind.get(response.status_code, ResponseError)(
        message + note, status=response.status_code, code=code, param=param, request_id=request_id
    )


def _golden(bundle: str | Path, model: str | None) -> tuple[ImageList, str, NDArray[np.float32]]:
    """The bundle's golden inputs, the model to ask for (the bundle's own, unless `model` pins one), torch's vectors."""
    from jepakit import golden
    from jepakit.bundle import GOLDEN, open_bundle

    opened = open_bundle(bundle)
    inputs = golden.unpack(opened.read(GOLDEN))
    inputs.check(opened.manifest.preprocess, opened.manifest.embedding.dim)
    name = model or opened.manifest.name
    pinned = name if "@" in name else f"{name}@{opened.manifest.model_id}"
    return gather(inputs.images, "none"), pinned, inputs.vectors


def _judge_golden(job: _Job, expected: NDArray[np.float32]) -> float:
    from jepakit import golden

    found = golden.agreement(job.result().vectors, expected)
    if missed := found.misses(golden.TOLERANCES.get(job.computed, golden.Tolerance(relative=1e-4))):
        raise BundleError(f"the service computes other vectors than the bundle promises: {missed}")
    return found.relative_error
