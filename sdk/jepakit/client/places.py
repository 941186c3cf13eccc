"""Places for requests under way: a client has so many for all its calls together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Call:
    """One call of a client: its requests take places, and give them back with their answers, or at once when the call ends.

    A request that is under way then goes on for as long as the service takes, with nobody waiting for it.
    """

    def __init__(self, free: threading.Semaphore) -> None:
        self._free, self._held, self._lock = free, 0, threading.Lock()
        self.ended = threading.Event()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request, waited for."""
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
        """The call is over, with or without its answers."""
        self.ended.set()
        with self._lock:
            while self._held:
                self._give_back()

    def _give_back(self) -> None:
        self._held -= 1
        self._free.release()
