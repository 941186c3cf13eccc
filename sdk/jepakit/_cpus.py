"""How many threads this process may keep busy: its affinity, or its container's quota where that is less."""

from __future__ import annotations

import math
import os
from pathlib import Path

_V2, _V1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")


def usable_cpus(v2: Path = _V2, v1: Path = _V1) -> int:
    """At least 1. A container given 1.5 cores of 64 gets 2 threads, not 64 that wait for each other."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota(v2, v1)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(v2: Path, v1: Path) -> float | None:
    """Cores that the control group (version 2, else 1) grants; None for no limit."""
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()
        else:
            quota, period = ((v1 / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        cores = int(quota) / int(period) if quota != "max" else 0
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for no limit
