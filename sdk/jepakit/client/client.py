"""`Client`: a thin loop around `Job` and `Attempts`, with a thread for each request in flight."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError, Future
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from jepakit._progress import Steps
from jepakit.bundles.bundle import Bundle
from jepakit.client.attempts import MOST_AT_ONCE, Attempts, is_too_large
from jepakit.client.connection import Connection, check_open, no_copy
from jepakit.client.job import Chunk, Job, RequestLimits, in_flight
from jepakit.client.models import ModelInfo, check_asked, check_clear, id_of, path_of, read_model, read_models, spec_of
from jepakit.client.places import Call
from jepakit.client.verifying import golden_request, judge_golden
from jepakit.embedding.results import Results
from jepakit.embedding.skipped import OnSkipped, check_skipping
from jepakit.embeddings import Embeddings
from jepakit.errors import ClientError, ImageError
from jepakit.sources import gather

if TYPE_CHECKING:
    import httpx


class Client:
    """Client of one embedding service.

    url         e.g. http://127.0.0.1:8000
    api_key     defaults to the environment variable JEPAKIT_API_KEY
    timeout_s   seconds each step (connect, send, read) may go without progress. The default exceeds the service's own
                `request_timeout_s` (60), so that its error arrives first; below that, requests hold fewer images
    deadline_s  seconds for one request including its retries; no step waits beyond it. Connection errors, 408, 429,
                500, 502, 503 and 504 are retried until then, with growing, jittered pauses (or the service's own
                Retry-After). Failures that a retry cannot fix, such as an untrusted certificate, are raised at once

    Use it as a context manager: `with Client(url) as client: …`. Raises ClientError or one of its subclasses (see
    `jepakit.errors`), and InputError for bad arguments.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 75.0, deadline_s: float = 120.0
    ) -> None:
        self._connection = Connection(url, api_key=api_key, timeout_s=timeout_s, deadline_s=deadline_s)
        self._described: list[ModelInfo] | None = None
        self._connect()

    def _connect(self) -> None:
        """Start without connections; after a fork, sharing the parent's would mix up its answers and this process's."""
        import httpx

        self._http = self._connection.connect(httpx.Client)
        self._places = threading.Semaphore(MOST_AT_ONCE)
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"<Client of {self._connection.url}>"

    def __reduce__(self) -> NoReturn:
        raise no_copy(self)

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
        return read_models(self._send(self._http.build_request("GET", "/v1/models")))

    def model(self, name: str) -> ModelInfo:
        """One model that the service has loaded; NotFoundError when it has not."""
        return read_model(self._send(self._http.build_request("GET", path_of(name))))

    def embed(
        self,
        images: Any,
        *,
        model: str | None = None,
        labels: str | Path = "auto",
        tile: int | None = None,
        overlap: int = 0,
        min_valid: float = 0.5,
        frame: int | Literal["each"] | None = None,
        progress: bool = True,
        most_skipped: float = 0.0,
        on_skipped: OnSkipped | None = None,
        resume: str | Path | None = None,
    ) -> Embeddings:
        """Embed images, keeping their order.

        images     a folder (recursive), glob or path, a CSV, TSV or Parquet manifest, WebDataset shards, a ZIP, the
                   bytes of a file, an array [H, W, C] or [N, H, W, C], a Pillow image; or a list of image files,
                   bytes, arrays and Pillow images, or of shards
        model      NAME or NAME@MODEL_ID; optional when the service has one model
        labels     `auto` uses the labels that come with the source (a manifest's column, shards' .cls or .json, a
                   dataset's own), or the first-level folders of a folder or ZIP; `folder` uses such folders or raises
                   DataError; `none` uses no labels; or a CSV, TSV or Parquet file of paths and labels
        tile       side in pixels of the tiles that large images are cut into, on the client; ids are then
                   `path#x,y,w,h`. A model made for tiles only takes its own size. Needs `jepakit[images]`, as does `frame`
        overlap    pixels that neighbouring tiles share
        min_valid  tiles with a smaller share of valid area are left out
        frame      which frame of multi-frame files to use, from 0, or "each"; None: the model's own, else they are refused
        progress   show progress on standard error, also what was left out (blank tiles, files of other kinds, images
                   that cannot be embedded) and why there are no labels
        most_skipped
                   share of the images, 0 to 1, that may be left out because they cannot be read or the model does not
                   take them; the others keep their order. The same share of files may be left out that `tile` or
                   `frame="each"` cannot open
        on_skipped called at the end with the id and the reason of each image that was left out
        resume     a file that keeps what is done, written after each request: after an interruption, the same call
                   continues from it, up to the first image that has changed. Delete it in the end. Not for images in
                   memory

        Raises ImageError naming an image that cannot be embedded, once there are more of them than `most_skipped`
        allows; ConfigError for a wrong argument, DataError when there are no images, they do not exist or too many cannot be
        cut, ResponseError when the service refuses, ConnectionFailedError after the deadline, SpaceError when `resume`
        keeps vectors of another model, WriteError when it cannot be written.
        """
        check_asked(model)
        check_skipping(most_skipped, on_skipped)
        spec = None if tile is None and frame is None else spec_of(self.models(), model, tile)
        listed = gather(
            images,
            labels,
            tile=tile,
            overlap=overlap,
            min_valid=min_valid,
            frame=frame,
            chosen_range=None if spec is None else spec.chosen_range,
            progress=progress,
            most_skipped=most_skipped,
        )
        with Results(listed, most_skipped, resume, progress=progress) as results:
            results.take_kept()
            if results.done:
                self._described = self.models()
                results.check(id_of(self._described, model))
            job = Job(listed, model, self._limits_for(len(listed), model), results, spec)
            with Steps(len(job), first=results.done, what="embed", progress=progress and job.is_long) as bar:
                while True:
                    try:
                        self._embed_rest(job, bar)
                        break
                    except ClientError as error:
                        self._described = None
                        if not is_too_large(error) or not job.cut_after(error, self._limits_for(len(job), model)):
                            raise
        results.skipped.tell(on_skipped, progress=progress)
        return results.embeddings()

    def _embed_rest(self, job: Job, bar: Steps) -> None:
        """Send the images that have no vectors yet."""
        call = Call(self._places)

        def begin(chunk: Chunk) -> Future[httpx.Response]:
            return self._begin(chunk.request(self._http), call)

        try:
            with closing(job.parts()) as chunks:
                for chunk, answer in in_flight(chunks, begin):
                    try:
                        with job.naming(chunk):
                            job.accept(chunk, answer.result())
                    except ImageError as error:
                        if (rest := job.tolerate(chunk, error)) is not None:
                            job.accept(rest, begin(rest).result())
                    bar.update(chunk.places[-1] + 1)
        finally:
            call.end()

    def verify(self, bundle: Bundle | str | Path, *, model: str | None = None) -> float:
        """Send the bundle's golden inputs through the service; returns the relative error against torch's vectors.

        Raises BundleError when the service computes other vectors than the bundle promises.
        """
        images, model, expected = golden_request(bundle, model)
        results = Results(images, most_skipped=0)
        job = Job(images, model, self._limits_for(len(images), model), results)
        for chunk in job.parts():
            job.accept(chunk, self._send(chunk.request(self._http)))
        return judge_golden(results, job.computed, expected)

    def _limits_for(self, count: int, model: str | None) -> RequestLimits:
        """The service's limits, cached until an `embed` fails; not needed for a single image, which cannot be split."""
        if self._described is None and count > 1:
            self._described = check_clear(self.models(), model)
        return RequestLimits.of(self._described or [], model, self._connection.patience_s)

    def _own_connections(self) -> None:
        """In a forked process, replace the parent's connections, once and before any sending thread starts."""
        if self._process != os.getpid():
            self._connect()

    def _begin(self, request: httpx.Request, call: Call) -> Future[httpx.Response]:
        """`_send` in a daemon thread: neither Ctrl-C nor the end of the program waits for its answer."""
        self._own_connections()
        answer: Future[httpx.Response] = Future()

        def send() -> None:
            try:
                answer.set_result(self._send(request, call))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=send, name="jepakit-send", daemon=True).start()
        return answer

    def _send(self, request: httpx.Request, call: Call | None = None) -> httpx.Response:
        """Send one request, retrying until the deadline; CancelledError once its call has ended."""
        import httpx

        check_open(self._http)
        self._own_connections()
        call = call or Call(self._places)
        with call.place():  # waiting here for this client's other requests does not count against the deadline
            attempts = Attempts(self._connection)
            pause: float | None = 0.0
            while not call.ended.wait(pause):
                try:
                    response = self._http.send(attempts.begin(request))
                    pause = attempts.pause_after(response)
                except httpx.RequestError as error:
                    pause = attempts.pause_after_failure(error)
                except RuntimeError:  # raised by httpx if the client was closed meanwhile
                    check_open(self._http)
                    raise
                if pause is None:
                    return response
            raise CancelledError
