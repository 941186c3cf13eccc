"""One adaptation at a time per process. Process-wide state is set for it and restored afterwards: torch's generators and
precision, Python's warnings, how freed memory is kept, the limit of open files."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from jepakit.errors import ConfigError
from jepakit_training.learning.precision import own_precision
from jepakit_training.loader_limits import more_open_files
from jepakit_training.memory import forget_peaks, freed_memory_kept, full_gpu_explained
from jepakit_training.randomness import own_generators

_running = threading.Lock()


@contextmanager
def own_process() -> Iterator[None]:
    """The block in which a run adapts; restores process-wide state at its end. ConfigError if another thread is in such a block."""
    with (
        alone(),
        warnings.catch_warnings(),
        freed_memory_kept(),
        more_open_files(),
        own_precision(),
        own_generators(),
        full_gpu_explained(),
    ):
        forget_peaks()
        warnings.filterwarnings("ignore", module=r"(torch|accelerate|timm|peft)\b")  # not actionable for users
        yield


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
    """In a forked child: replace the lock, as the thread that may hold it exists only in the parent."""
    global _running
    _running = threading.Lock()


os.register_at_fork(after_in_child=_forget)
