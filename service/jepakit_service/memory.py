"""How much memory this process uses, and how much more it may use on this machine and in its container."""

from __future__ import annotations

import psutil

from jepakit._machine import memory_room
from jepakit.bundles.bundle import DATA, GRAPH, Bundle


def used_mb() -> float:
    """Resident memory of this process, MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def available_mb() -> float:
    """Memory that can still be allocated, MiB. Cached files count as free: they make room."""
    available, room = psutil.virtual_memory().available, memory_room()
    return float(available if room is None else min(available, room)) / 2**20


def needed_mb(bundle: Bundle, sessions: int) -> float:
    """Peak memory for opening a bundle, MiB: its bytes, a copy of them in each session, and room to run."""
    size = sum((bundle.path / name).stat().st_size for name in (GRAPH, DATA) if name in bundle.manifest.files)
    return (1 + 1.4 * sessions) * size / 2**20 + 100
