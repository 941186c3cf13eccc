"""How much memory this process uses and may still use: the machine's, or its container's limit where that is nearer."""

from __future__ import annotations

import psutil

from jepakit._machine import memory_room
from jepakit.bundle import DATA, GRAPH, Bundle


def used_mb() -> float:
    """Resident memory of this process, MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def available_mb() -> float:
    """Memory that could still be taken, MiB. Cached files count as free: they make room."""
    available, room = psutil.virtual_memory().available, memory_room()
    return float(available if room is None else min(available, room)) / 2**20


def needed_mb(bundle: Bundle, sessions: int) -> float:
    """What opening a bundle takes at its peak: its bytes, a copy of them in each session, and room to run."""
    size = sum((bundle.path / name).stat().st_size for name in (GRAPH, DATA) if name in bundle.manifest.files)
    return (1 + 1.4 * sessions) * size / 2**20 + 100
