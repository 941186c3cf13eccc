"""One run of some work for all callers that ask for it at the same time."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """Runs `work` when asked; whoever asks while it runs gets what that run returns or raises."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._work = work
        self._run: asyncio.Task[_T] | None = None

    async def __call__(self) -> _T:
        if self._run is None or self._run.done():
            # Outside any request's context: Ray cancels what a request has started when its client leaves.
            self._run = asyncio.get_running_loop().create_task(self._work(), context=contextvars.Context())
        return await asyncio.shield(self._run)
