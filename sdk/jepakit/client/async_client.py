"""`AsyncClient`: the loop of `Client` on asyncio."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from jepakit._progress import Steps
from jepakit.bundles.bundle import Bundle
from jepakit.client.attempts import AT_ONCE, MOST_AT_ONCE, Attempts, is_too_large
from jepakit.client.connection import Connection, check_open, no_copy
from jepakit.client.job import Chunk, Job, RequestLimits
from jepakit.client.models import ModelInfo, check_asked, check_clear, id_of, path_of, read_model, read_models, spec_of
from jepakit.client.verifying import golden_request, judge_golden
from jepakit.embedding.results import Results
from jepakit.embedding.skipped import OnSkipped, check_skipping
from jepakit.embeddings import Embeddings
from jepakit.errors import ClientError, ImageError
from jepakit.sources import gather

if TYPE_CHECKING:
    import asyncio

    import httpx


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors, awaited."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 75.0, deadline_s: float = 120.0
    ) -> None:
        self._connection = Connection(url, api_key=api_key, timeout_s=timeout_s, deadline_s=deadline_s)
        self._described: list[ModelInfo] | None = None
        self._loop: asyncio.AbstractEventLoop | None
        self._connect()

    def _connect(self) -> None:
        """As `Client._connect`."""
        import asyncio

        import httpx

        self._http = self._connection.connect(httpx.AsyncClient)
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._process, self._loop = os.getpid(), None

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._connection.url}>"

    def __reduce__(self) -> NoReturn:
        raise no_copy(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections of this process; ClientError on an event loop other than that of the first request."""
        if self._process == os.getpid():
            self._check_loop()
            await self._http.aclose()

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        return read_models(await self._send(self._http.build_request("GET", "/v1/models")))

    async def model(self, name: str) -> ModelInfo:
        """As `Client.model`."""
        return read_model(await self._send(self._http.build_request("GET", path_of(name))))

    async def embed(
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
        """As `Client.embed`."""
        import asyncio

        check_asked(model)
        check_skipping(most_skipped, on_skipped)
        spec = None if tile is None and frame is None else spec_of(await self.models(), model, tile)
        listed = await asyncio.to_thread(
            gather,
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
            await asyncio.to_thread(results.take_kept)
            if results.done:
                self._described = await self.models()
                results.check(id_of(self._described, model))
            job = Job(listed, model, await self._limits_for(len(listed), model), results, spec)
            with Steps(len(job), first=results.done, what="embed", progress=progress and job.is_long) as bar:
                while True:
                    try:
                        await self._embed_rest(job, bar)
                        break
                    except ClientError as error:
                        self._described = None
                        if not is_too_large(error) or not job.cut_after(error, await self._limits_for(len(job), model)):
                            raise
        results.skipped.tell(on_skipped, progress=progress)
        return results.embeddings()

    async def _embed_rest(self, job: Job, bar: Steps) -> None:
        """As `Client._embed_rest`."""
        import asyncio

        chunks = job.parts()
        waiting: deque[tuple[Chunk, asyncio.Task[httpx.Response]]] = deque()

        async def take_oldest() -> None:
            chunk, answer = waiting[0]
            try:
                with job.naming(chunk):
                    await asyncio.to_thread(job.accept, chunk, await answer)
            except ImageError as error:
                if (rest := job.tolerate(chunk, error)) is not None:
                    await asyncio.to_thread(job.accept, rest, await self._send(rest.request(self._http)))
            waiting.popleft()
            bar.update(chunk.places[-1] + 1)

        try:
            # Files are read, decoded and written in threads, so as not to block the event loop.
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                waiting.append((chunk, asyncio.create_task(self._send(chunk.request(self._http)))))
                if len(waiting) == AT_ONCE:
                    await take_oldest()
            while waiting:
                await take_oldest()
        finally:
            # Cancel whatever is still in flight when one request fails or this call is cancelled.
            for _, answer in waiting:
                answer.cancel()
            await asyncio.gather(*(answer for _, answer in waiting), return_exceptions=True)
            with suppress(ValueError):  # cancelled while a thread runs this generator: it ends with that thread
                await asyncio.to_thread(chunks.close)

    async def verify(self, bundle: Bundle | str | Path, *, model: str | None = None) -> float:
        """As `Client.verify`."""
        images, model, expected = golden_request(bundle, model)
        results = Results(images, most_skipped=0)
        job = Job(images, model, await self._limits_for(len(images), model), results)
        for chunk in job.parts():
            job.accept(chunk, await self._send(chunk.request(self._http)))
        return judge_golden(results, job.computed, expected)

    async def _limits_for(self, count: int, model: str | None) -> RequestLimits:
        if self._described is None and count > 1:
            self._described = check_clear(await self.models(), model)
        return RequestLimits.of(self._described or [], model, self._connection.patience_s)

    def _check_loop(self) -> None:
        import asyncio

        if self._loop not in (None, asyncio.get_running_loop()):
            raise ClientError(
                "an AsyncClient belongs to the event loop of its first request: make one in each asyncio.run"
            )

    async def _send(self, request: httpx.Request) -> httpx.Response:
        import asyncio

        import httpx

        check_open(self._http)
        if self._process != os.getpid():
            self._connect()
        self._loop = self._loop or asyncio.get_running_loop()
        self._check_loop()
        async with self._places:
            attempts = Attempts(self._connection)
            while True:
                try:
                    response = await self._http.send(attempts.begin(request))
                    pause = attempts.pause_after(response)
                except httpx.RequestError as error:
                    pause = attempts.pause_after_failure(error)
                except RuntimeError:  # as in Client
                    check_open(self._http)
                    raise
                if pause is None:
                    return response
                await asyncio.sleep(pause)
