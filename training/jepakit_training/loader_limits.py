"""System limits of the DataLoader's processes: free space in /dev/shm, through which they hand over batches, and open files."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.data import get_worker_info

from jepakit._machine import MORE_SHARED, SHARED, end_with_parent
from jepakit.errors import TrainingError

PATIENCE_S = 600
"""Seconds that a batch may take to be delivered."""
_ENOUGH_FILES = 65_536


def start_method(workers: int) -> str | None:
    """How loader processes start; None for torch's default. On Linux always by fork, unlike Python 3.14's default: scripts need
    no main guard, and datasets need not be picklable."""
    return "fork" if workers and sys.platform == "linux" else None


def end_with_trainer(_: int = 0) -> None:
    """In a loader's process: have the system kill it when the trainer dies. As it holds both ends of its pipe to the trainer, it
    would otherwise wait forever to hand over a batch that nobody reads."""
    end_with_parent(signal.SIGKILL)


def can_share() -> bool:
    """Whether loader processes can run at all: even their locks are files in /dev/shm."""
    return sys.platform != "linux" or os.access(SHARED, os.W_OK)


def shared_bytes() -> float:
    """Bytes that are free in /dev/shm; infinite where the system has none."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else math.inf


def hand_over(tensors: Iterable[Tensor]) -> None:
    """In a loader's process, move the tensors to shared memory; TrainingError if they cannot be moved.

    Left to torch's queue, that would happen in a thread that drops the batch, and the trainer would wait for it in vain.
    """
    if get_worker_info() is None:
        return
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise TrainingError(many_files() if is_of_files(error) else no_room()) from error


def no_room() -> str:
    """The error message when a batch does not fit into /dev/shm."""
    return (
        f"a loader's process found no room in {SHARED} ({shared_bytes() / 1e6:,.1f} MB are free); the last checkpoint is "
        f"intact. In a container, {MORE_SHARED}; or take fewer workers (0 needs none), then run the same command again"
    )


def is_of_files(error: BaseException) -> bool:
    """Whether an error means too many open files; when descriptors are lost between processes, only `ancdata` says so."""
    return any(part in str(error) for part in ("Too many open files", "received 0 items of ancdata"))


def many_files() -> str:
    """The error message when a process may open no more files."""
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"the loader's processes need more open files than this process may have ({now}); the last checkpoint is intact. "
        "Raise the limit (ulimit -n), or take fewer workers (0 needs none), then run the same command again"
    )


@contextmanager
def more_open_files() -> Iterator[None]:
    """Raise this process's limit of open files during the block, to at most 65,536: each batch being handed over takes a few."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if most == resource.RLIM_INFINITY else min(most, _ENOUGH_FILES)
    if before == resource.RLIM_INFINITY or before >= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
