"""A work-conserving micro-batcher: starts at once when idle, and lets what piles up meanwhile fill the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepakit.images import Pixels

_Run = Callable[[Pixels], NDArray[np.float32]]


class MicroBatcher:
    """Packs single images of any requests into batches of at most `max_batch` for `run`.

    run        [B, H, W, C] → [B, D]; called on a thread of its own, one batch at a time
    max_batch  the largest batch

    Used from one event loop. No timer: with one client a batch starts the moment its image arrives.
    """

    def __init__(self, run: _Run, max_batch: int) -> None:
        self._run, self._max_batch = run, max_batch
        self._waiting: deque[tuple[Pixels, asyncio.Future[NDArray[np.float32]]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._busy = False

    async def embed(self, image: Pixels) -> NDArray[np.float32]:
        """The vector [D] of one preprocessed image [H, W, C]."""
        future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, future))
        self._start_if_idle()
        return await future

    def close(self) -> None:
        """Stop the thread; what runs finishes, what waits is cancelled."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=False)

    def _start_if_idle(self) -> None:
        if self._busy:
            return
        batch: list[tuple[Pixels, asyncio.Future[NDArray[np.float32]]]] = []
        while self._waiting and len(batch) < self._max_batch:
            image, future = self._waiting.popleft()
            if not future.done():  # its client has left
                batch.append((image, future))
        if not batch:
            return
        self._busy = True
        images = [image for image, _ in batch]
        running = asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._run(np.stack(images)))
        running.add_done_callback(lambda done: self._finish(done, [future for _, future in batch]))

    def _finish(self, done: asyncio.Future[Any], futures: list[asyncio.Future[NDArray[np.float32]]]) -> None:
        self._busy = False
        error = done.exception()
        for row, future in enumerate(futures):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result()[row])
        self._start_if_idle()
