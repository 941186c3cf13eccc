"""A lock on a folder, between processes of one machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def holding(folder: Path, *, wait: bool) -> Iterator[None]:
    """Lock a folder against other callers of this function. No effect on network file systems that cannot lock folders.

    Raises BlockingIOError if another process holds the lock and `wait` is false.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
