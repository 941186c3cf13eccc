"""What this process may use of the machine: all of it, or its container's share if that is less."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import NamedTuple

in_command: ContextVar[bool] = ContextVar("in_command", default=False)
"""Whether this process runs one of our commands or workers, so that ending it loses nobody else's work."""
SHARED = Path("/dev/shm")
MORE_SHARED = "give the container more (docker run --shm-size 2g)"
_CGROUP, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Memory(NamedTuple):
    """Where a version of cgroups reports memory: its files, and the lines of memory.stat that count the page cache."""

    limit: str
    used: str
    kinds: str
    cached: tuple[str, str]


_V2 = _Memory("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file"))
_V1 = _Memory(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", ("total_inactive_file", "total_active_file")
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
    files, groups = _memory_groups()
    return min(filter(None, (_limit(group, files) for group in groups)), default=None)


def main_memory() -> int:
    """Bytes of main memory of the machine, or of this container if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit() or machine)


def memory_room() -> int | None:
    """Bytes left below `memory_limit`. Cached files count as free, a tmpfs does not."""
    files, groups = _memory_groups()
    return min((room for group in groups if (room := _room(group, files)) is not None), default=None)


def trim_heap() -> None:
    """Return free memory to the system; glibc would otherwise keep it. Without glibc, do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def end_with_parent(number: signal.Signals) -> None:
    """On Linux, have this process sent a signal when the thread that started it ends, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _limit(group: Path, files: _Memory) -> int | None:
    try:
        return int((group / files.limit).read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None


def _room(group: Path, files: _Memory) -> int | None:
    limit = _limit(group, files)
    try:
        used = int((group / files.used).read_text())
        kinds = dict(line.split() for line in (group / files.kinds).read_text().splitlines())
        return None if limit is None else limit - used + sum(int(kinds[name]) for name in files.cached)
    except (OSError, ValueError, KeyError):
        return None


def _memory_groups() -> tuple[_Memory, list[Path]]:
    """The files and the folders of the groups that limit this process's memory."""
    of_v2 = [group for group in _groups(_CGROUP, "") if os.access(group / _V2.limit, os.R_OK)]
    return (_V2, of_v2) if of_v2 else (_V1, _groups(_CGROUP / "memory", "memory"))


def _cpu_quota() -> float | None:
    """Cores that the control groups (version 2, else 1) grant; None for no limit."""
    of_v2 = [[group / "cpu.max"] for group in _groups(_CGROUP, "") if os.access(group / "cpu.max", os.R_OK)]
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas = of_v2 or [[group / name for name in names] for group in _groups(_CGROUP / "cpu", "cpu")]
    return min(filter(None, map(_cores, quotas)), default=None)


def _cores(files: list[Path]) -> float | None:
    """Cores that one group grants, from its file (version 2) or its two (version 1); None for no limit."""
    try:
        granted, period = " ".join(file.read_text() for file in files).split()
        cores = int(granted) / int(period) if granted != "max" else 0
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no limit


def _groups(root: Path, controller: str) -> list[Path]:
    """The folder of this process's control group, such as a systemd unit's, and of those it lies in: all their limits hold.
    A container often shows only its own, as `root`.

    controller  of version 1; empty for version 2
    """
    own = PurePosixPath()
    with suppress(OSError, ValueError):
        for line in _OWN_GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = PurePosixPath(path.lstrip("/"))
    return [root] if ".." in own.parts else [root / part for part in (own, *own.parents)]
