"""How much memory this process uses and may still use: the machine's, or its container's limit where that is nearer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

from jepakit.bundle import DATA, GRAPH, Bundle

_CGROUP = Path("/sys/fs/cgroup")


def used_mb() -> float:
    """Resident memory of this process, MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def available_mb() -> float:
    """Memory that could still be taken, MiB. Cached files that nobody reads count as free: they make room."""
    available = float(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        return available / 2**20
    return min(available, limit - used + int(kinds["inactive_file"])) / 2**20


def give_back() -> None:
    """Hand memory that is free to the system: opening a session leaves as much of it as its graph is large (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def needed_mb(bundle: Bundle, sessions: int) -> float:
    """What opening a bundle takes at its peak: its bytes, a copy of them in each session, and room to run."""
    size = sum((bundle.path / name).stat().st_size for name in (GRAPH, DATA) if name in bundle.manifest.files)
    return (1 + 1.4 * sessions) * size / 2**20 + 100
