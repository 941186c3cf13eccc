"""A work-conserving batcher: decodes many requests' images and packs them into full batches, fair to each request.

All threads are alike and do whatever is most useful next: run a batch if one is ready and a lane (a slot for one inference
beside others) is free, else decode another image. No batch waits for requests that have not come yet. A lone image is
decoded and run at once by the same thread, with all cores; a backlog fills the batches of all lanes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jepakit._machine import trim_heap
from jepakit.errors import ImageError
from jepakit.images import Pixels

ImageData = bytes | NDArray[Any]
"""An image file's bytes, or its pixels [H, W] or [H, W, C]."""
Result = NDArray[np.float32] | ImageError


class Decoded(NamedTuple):
    """A preprocessed image: the graph's input, and how many pixels the image had before."""

    pixels: Pixels
    area: int


class Answer(NamedTuple):
    """A vector [D] for each image, or why it cannot be read, in order; and the total pixels of the decoded images."""

    results: list[Result]
    pixels: int


class Observer(Protocol):
    """Receives the seconds each stage took, including failed decodings; called from the batcher's threads."""

    def decoded(self, seconds: float) -> None: ...

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None: ...


class _Request:
    """One request: its images still to be decoded, and its results so far. Guarded by the batcher's lock."""

    def __init__(self, images: Sequence[ImageData]) -> None:
        self.todo = deque(enumerate(images))
        self.results: list[Result | None] = [None] * len(images)
        self.left = len(images)
        self.area = 0
        self.gone = False
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.since = time.perf_counter()

    def expire(self) -> None:
        """Fail with TimeoutError. Called on the loop."""
        self._settle(TimeoutError())

    def settle(self, error: BaseException | None = None) -> None:
        """Wake the waiter, from any thread. Once the request is gone, its loop may have ended."""
        if not self.gone:
            with contextlib.suppress(RuntimeError):  # the loop was closed with this request pending
                self.loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


_Ready = tuple[_Request, int, Pixels, float]
"""The request, the image's index in it, the graph's input, and when the image was decoded."""
_Model = Callable[[Pixels], NDArray[np.float32]]


class State(NamedTuple):
    """What there is to do, and what is being done."""

    requests: int
    """Requests with images still to be decoded."""
    decoding: int
    """Images being decoded."""
    ready: int
    """Images decoded and not run yet."""
    running: int
    """Lanes in use."""
    at_work: int
    """Images in those lanes."""
    waited_s: float
    """Seconds since the first of the ready images was decoded."""
    closed: bool


class Capacity(NamedTuple):
    """How much a batcher can do at a time."""

    max_batch: int
    """Images in the largest batch."""
    lanes: int
    """Batches that run at the same time."""
    few: int
    """Up to this many images run on all cores together if there is nothing else to do."""
    cores: int
    """CPU cores for decoding, and for lanes that run on the CPU."""
    lane_cores: int
    """CPU cores that a running lane keeps busy; 0 if it waits for a GPU."""
    batch_s: float
    """Seconds that a full batch takes."""


class RunBatch(NamedTuple):
    """Run a batch of at most `size` images, which occupies `lanes` lanes; `whole`: on all cores."""

    size: int
    lanes: int
    whole: bool


def decide(now: State, capacity: Capacity) -> RunBatch | Literal["decode", "wait", "stop"]:
    """The most useful next step for an idle thread.

    A full batch runs once a lane is free. A partial one runs if, besides, no image waits to be decoded and a core is
    idle: on busy cores it would slow down all other work, and another batch would soon follow. But a decoded image waits no
    longer than a batch takes for others to be decoded: while it waits, one thread is kept from decoding, to run it in time.
    """
    max_batch, lanes, few, cores, lane_cores, batch_s = capacity
    all_busy = now.running * lane_cores + now.decoding >= cores
    due = now.ready >= max_batch or now.waited_s > batch_s or not (now.requests or all_busy)
    if now.ready and now.running < lanes and due:
        if now.ready <= few and not (now.running or now.decoding or now.requests):
            return RunBatch(few, lanes, whole=True)  # a few images, and nothing else to do
        # Full batches in a backlog; otherwise all lanes, including the running ones, share the images equally.
        share = math.ceil((now.ready + now.at_work) / lanes)
        return RunBatch(max_batch if now.requests else min(share, max_batch), 1, whole=False)
    kept_back = 1 if now.ready and now.running < lanes else 0
    if (
        now.requests
        and now.ready + now.decoding < 2 * lanes * max_batch
        and now.decoding < threads_of(capacity) - kept_back
    ):
        return "decode"
    if now.closed and not (now.requests or now.decoding or now.ready):
        return "stop"
    return "wait"


def threads_of(capacity: Capacity) -> int:
    """How many threads decode and run: one more than cores or lanes, for the next batch while all are busy."""
    return max(capacity.cores, capacity.lanes) + 1


class Batcher:
    """Turns encoded images into vectors.

    decode  one encoded image → `Decoded`; ImageError for one that cannot be read
    run     [B, H, W, C] → [B, D]; called by at most `capacity.lanes` threads at a time
    whole   like `run`, but on all cores; occupies all lanes

    Requests take turns, one image at a time: a request with hundreds of images does not hold up a request with one.
    """

    def __init__(
        self, decode: Callable[[ImageData], Decoded], run: _Model, whole: _Model, capacity: Capacity, observer: Observer
    ) -> None:
        self._decode, self._observer = decode, observer
        self._run, self._whole = run, whole
        self._capacity = capacity
        self._requests: deque[_Request] = deque()
        self._ready: deque[_Ready] = deque()
        self._running = 0  # lanes
        self._at_work = 0  # images
        self._decoding = 0
        self._closed = False
        self._lock = threading.Condition()
        count = threads_of(capacity)
        self._threads = [threading.Thread(target=self._work, name=f"batcher-{n}", daemon=True) for n in range(count)]
        self._at_hand = count  # threads
        for thread in self._threads:
            thread.start()

    async def embed(self, images: Sequence[ImageData], timeout_s: float) -> Answer:
        """The vectors of a request's images.

        If cancelled or too late, images not yet decoded or run are dropped. Raises what `run` raised, or TimeoutError.
        """
        request = _Request(images)
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._requests.append(request)
            self._lock.notify(len(images))
        # Cheaper than asyncio.timeout, which matters when requests are answered within a few milliseconds.
        timer = request.loop.call_later(timeout_s, request.expire)
        try:
            await request.future
        except BaseException:
            self._drop(request)
            raise
        finally:
            timer.cancel()
        return Answer([result for result in request.results if result is not None], request.area)

    def close(self) -> None:
        """Answer the requests already accepted, then stop the threads."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task()
            del task  # and what it holds, before waiting for the next
        with self._lock:
            self._at_hand -= 1
            if self._at_hand:
                return
        # The model does not run any more, and a reference to this object must not keep the model's memory alive.
        del self._run, self._whole
        trim_heap()

    def _drop(self, request: _Request) -> None:
        """Drop the images not decoded or run yet of a request that nobody waits for, and free their memory."""
        with self._lock:
            request.gone = True
            request.todo.clear()
            self._requests = deque(other for other in self._requests if other is not request)
            self._ready = deque(image for image in self._ready if image[0] is not request)
            self._lock.notify_all()  # many more images may be decoded now

    def _next(self) -> Callable[[], None] | None:
        """Wait for the most useful next task and return it; None once closed and empty."""
        with self._lock:
            while True:
                todo = decide(self._state(), self._capacity)
                if todo == "stop":
                    self._lock.notify_all()  # the others may stop too
                    return None
                if todo == "wait":
                    self._lock.wait(self._patience_s())
                elif todo == "decode":
                    return partial(self._decode_one, *self._take_image())
                else:
                    return partial(self._run_batch, self._take_batch(todo), todo)

    def _patience_s(self) -> float | None:
        """Seconds until the ready images run as a partial batch; None if nothing is ready, or no lane is free."""
        if not self._ready or self._running >= self._capacity.lanes:
            return None
        return max(0.0, self._capacity.batch_s - self._state().waited_s)

    def _state(self) -> State:
        waited_s = time.perf_counter() - self._ready[0][3] if self._ready else 0.0
        return State(
            len(self._requests), self._decoding, len(self._ready), self._running, self._at_work, waited_s, self._closed
        )

    def _take_batch(self, way: RunBatch) -> list[_Ready]:
        """Take the images of the next batch."""
        batch = [self._ready.popleft() for _ in range(min(way.size, len(self._ready)))]
        self._running += way.lanes
        self._at_work += len(batch)
        self._lock.notify(len(batch))  # as many more images may be decoded now
        return batch

    def _take_image(self) -> tuple[_Request, int, ImageData]:
        """Take one image of the request whose turn it is."""
        request = self._requests.popleft()
        place, image = request.todo.popleft()
        if request.todo:
            self._requests.append(request)
        self._decoding += 1
        return request, place, image

    def _decode_one(self, request: _Request, place: int, image: ImageData) -> None:
        start = time.perf_counter()
        outcome: Decoded | BaseException
        try:
            outcome = self._decode(image)
        except BaseException as error:  # whatever it is, the request must be answered and the thread must live on
            outcome = error
        self._observer.decoded(time.perf_counter() - start)
        with self._lock:
            self._decoding -= 1
            if request.gone:
                pass
            elif isinstance(outcome, Decoded):
                request.area += outcome.area
                self._ready.append((request, place, outcome.pixels, time.perf_counter()))
            elif isinstance(outcome, ImageError):
                self._finish(request, place, outcome)
            else:
                request.settle(outcome)
            self._lock.notify()

    def _run_batch(self, batch: list[_Ready], way: RunBatch) -> None:
        run = self._whole if way.whole else self._run
        start = time.perf_counter()
        outcome: NDArray[np.float32] | BaseException
        try:
            outcome = run(np.stack([pixels for _, _, pixels, _ in batch]))
        except BaseException as error:  # as above
            outcome = error
        else:
            seconds = time.perf_counter() - start
            self._observer.ran(len(batch), [start - request.since for request, *_ in batch], seconds)
        with self._lock:
            self._running -= way.lanes
            self._at_work -= len(batch)
            for row, (request, place, *_) in enumerate(batch):
                if isinstance(outcome, BaseException):
                    request.settle(outcome)
                else:
                    self._finish(request, place, outcome[row])
            self._lock.notify()

    def _finish(self, request: _Request, place: int, result: Result) -> None:
        request.results[place] = result
        request.left -= 1
        if request.left == 0:
            request.settle()
