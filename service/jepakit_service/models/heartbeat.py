"""Health check of a model: by its batcher's recent work, or by a golden image sent through it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jepakit.bundles import golden
from jepakit.errors import ImageError
from jepakit_service.models.batcher import Observer, Result
from jepakit_service.models.sharing import Shared

_FRESH_S, _RIGHT_S = 5.0, 60.0
_TIMEOUT_S = 10.0
_BATCHES = 3
"""How many batches of a slow model may run before a lone image's: its time limits allow for this many."""
_PATIENCE_S = 0.5
"""How long a caller waits for a heartbeat: probes give up after a few seconds."""


class Heartbeat:
    """Checks a model's health when called. Observes the batcher, and passes its events on to `observer`.

    name      the model's name, for messages
    embed     gives the first golden image's vector [D], or why there is none; TimeoutError after the given seconds
    expected  the golden vector [D]
    limit     the largest relative error that passes
    batch_s   seconds that a full batch takes: a slow model is given longer
    observer  receives the events of the batcher too
    """

    def __init__(
        self,
        name: str,
        embed: Callable[[float], Awaitable[Result]],
        expected: NDArray[np.float32],
        limit: float,
        batch_s: float,
        observer: Observer,
    ) -> None:
        self._name, self._embed, self._expected, self._limit = name, embed, expected, limit
        self._slow_s = _BATCHES * batch_s
        self._observer = observer
        self._ran = self._right = self._decoded = time.monotonic()
        """When a batch last ran, when the golden vector was last reproduced, and when an image was last decoded."""
        self._fault: str | None = None
        """What the last heartbeat found."""
        self._beat = Shared(self._take)

    async def __call__(self) -> str | None:
        """Why the model does not answer correctly; None if it does. Takes half a second at most.

        A batch that ran within the last 5 s (or the time of three batches) and a golden vector reproduced within the last
        minute suffice. Otherwise a golden image goes through the same queue as all others, one at a time, however many
        callers ask. If it takes longer than half a second, the result of the previous check is returned.
        """
        if not self._is_proven():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._beat()
        return self._fault

    def decoded(self, seconds: float) -> None:
        """Called by the batcher."""
        self._decoded = time.monotonic()
        self._observer.decoded(seconds)

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        """Called by the batcher: a sign of life."""
        self._ran = time.monotonic()
        self._observer.ran(size, queued, seconds)

    def _is_proven(self) -> bool:
        now = time.monotonic()
        return self._fault is None and now - self._ran < self._fresh_s() and now - self._right < _RIGHT_S

    def _fresh_s(self) -> float:
        return max(_FRESH_S, self._slow_s)

    async def _take(self) -> None:
        try:
            vector = await self._embed(max(_TIMEOUT_S, 2 * self._slow_s))
        except TimeoutError:
            # The image still waits behind others: large ones may take longer to decode than a batch of them to run.
            # Behind a batch that hangs, decoding soon stops too.
            now = time.monotonic()
            busy = now - max(self._ran, self._decoded) < self._fresh_s()
            self._fault = None if busy else f"{self._name} has run no batch for {now - self._ran:.0f} s"
        except Exception as error:
            self._fault = f"{self._name} fails ({type(error).__name__})"
        else:
            self._fault, self._right = self._judge(vector), time.monotonic()

    def _judge(self, vector: Result) -> str | None:
        """What is wrong with the golden image's vector."""
        if isinstance(vector, ImageError):
            return f"{self._name} cannot read its own golden image"
        error = golden.relative_error(vector, self._expected)
        if not error <= self._limit:
            return f"{self._name} no longer gives its golden vectors (relative error {error:.2g})"
        return None
