"""What this process may use of the machine: all of it, or its container's share if that is less."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

SHARED = Path("/dev/shm")
MORE_SHARED = "give the container more (docker run --shm-size 2g)"
_CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Memory(NamedTuple):
    """Where a version of cgroups reports memory: its files, and the lines of memory.stat that count the page cache."""

    limit: str
    used: str
    kinds: str
    cached: tuple[str, str]


_V2 = _Memory("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file"))
_V1 = _Memory(
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    ("total_inactive_file", "total_active_file"),
)


def usable_cpus() -> int:
    """How many threads to keep busy, at least 1: the CPU affinity, or the container's quota if that is less.

    A container with 1.5 of 64 cores gets 2 threads, not 64 that wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def memory_limit() -> int | None:
    """Memory limit of the control group (version 2, else 1) in bytes; None, or a huge number, if there is no limit."""
    try:
        return int((_CGROUP / _memory().limit).read_text())
    except (OSError, ValueError):  # no control groups here, or "max"
        return None


def main_memory() -> int:
    """Bytes of main memory of the machine, or of this container if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit() or machine)


def memory_room() -> int | None:
    """Bytes left below `memory_limit`. Cached files count as free, a tmpfs does not."""
    limit, files = memory_limit(), _memory()
    try:
        used = int((_CGROUP / files.used).read_text())
        kinds = dict(line.split() for line in (_CGROUP / files.kinds).read_text().splitlines())
        return None if limit is None else limit - used + sum(int(kinds[name]) for name in files.cached)
    except (OSError, ValueError, KeyError):
        return None


def trim_heap() -> None:
    """Return free memory to the system; glibc would otherwise keep it. Without glibc, do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def end_with_parent(number: signal.Signals) -> None:
    """On Linux, have this process sent a signal when the thread that started it ends, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _memory() -> _Memory:
    return _V2 if (_CGROUP / _V2.limit).is_file() else _V1


def _cpu_quota() -> float | None:
    """Cores that the control group (version 2, else 1) grants; None for no limit."""
    v2, v1 = _CGROUP / "cpu.max", _CGROUP / "cpu"
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()
        else:
            quota, period = ((v1 / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        cores = int(quota) / int(period) if quota != "max" else 0
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no limit
