"""One adaptation at a time in a process: torch's generators, its precision and Python's warnings belong to all threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jepakit.errors import ConfigError

_running = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """A block that runs in one thread at a time; ConfigError if another thread is in it."""
    running = _running
    if not running.acquire(blocking=False):
        raise ConfigError(
            "another adaptation runs in this process: wait for it, or start this one in a process of its own"
        )
    try:
        yield
    finally:
        running.release()


def _forget() -> None:
    """In a forked child: the thread that holds the lock is in the parent."""
    global _running
    _running = threading.Lock()


os.register_at_fork(after_in_child=_forget)
