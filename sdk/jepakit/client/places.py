"""The limit on concurrent requests: a client has a fixed number of places, shared by all its calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Call:
    """One call of a client, such as `embed`: each of its requests holds a place until it is answered, or the call ends.

    A request still in flight then runs on until the service answers it, with nobody waiting for the answer.
    """

    def __init__(self, free: threading.Semaphore) -> None:
        self._free, self._held, self._lock = free, 0, threading.Lock()
        self.ended = threading.Event()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Wait for a place, and hold it for one request."""
        self._free.acquire()
        with self._lock:
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                if self._held:
                    self._give_back()

    def end(self) -> None:
        """End the call: give back its places, even those of requests still in flight."""
        self.ended.set()
        with self._lock:
            while self._held:
                self._give_back()

    def _give_back(self) -> None:
        self._held -= 1
        self._free.release()
