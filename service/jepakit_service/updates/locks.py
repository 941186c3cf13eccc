"""A lock on a folder, between processes of one machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Lock a folder against other callers of this function. No effect on network file systems that cannot lock folders.

    Raises BlockingIOError if somebody else holds the lock. Waiting for it in the kernel would keep a process from ending.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
