"""Our own Ray, for the service and for training: where its files lie, and that it sends nothing to anyone."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jepakit._files import holding, reason_of
from jepakit.errors import WriteError

SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A cluster started by `ray start` even reports that its usage statistics are off: send that to the discard port.
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
}
"""Ray reads these when it is imported."""
OWN: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
"""Options of our own cluster."""
_MEMORY = Path("/dev/shm")
_LONGEST_PLACE = 103 - 89 if sys.platform == "darwin" else min(107 - 89, 97 - 80)
"""Longest path of a temporary folder in bytes. The paths of sockets are limited, those of HAProxy's (Linux) even more: Ray
adds up to 89 bytes for its own, and 80 for HAProxy's (`ray_environment`)."""


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new temporary folder, in /tmp if the usual path is too long for Ray's sockets; removed at the end.

    Raises WriteError if none can be made.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _LONGEST_PLACE:
        place = "/tmp"
    try:
        folder = Path(tempfile.mkdtemp(prefix="jepakit-ray-", dir=place))
    except OSError as error:
        raise WriteError(
            f"Ray's sockets cannot be made in {place} ({reason_of(error)}): "
            f"set TMPDIR to a folder whose path has at most {_LONGEST_PLACE} bytes"
        ) from None
    try:
        # systemd-tmpfiles, which removes from /tmp what is ten days old, leaves alone what is locked.
        with holding(folder, shared=True):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def memory_folder() -> Iterator[Path | None]:
    """A new folder in memory (/dev/shm) for objects that do not fit into Ray's store; removed at the end. None on macOS.

    Raises WriteError if it cannot be made, or if there is too little room for the store, which Ray would put on a disk.
    """
    if not _MEMORY.is_dir():
        yield None
        return
    remedy = "give it more (docker run --shm-size 1g), or choose --proxy haproxy or --no-ray"
    free, needed = shutil.disk_usage(_MEMORY).free, OWN["object_store_memory"]
    if free < 2 * needed:
        raise WriteError(
            f"{_MEMORY} has {free >> 20} MB free, and Ray's Python proxy needs {2 * needed >> 20} for what it passes on: {remedy}"
        )
    try:
        folder = Path(tempfile.mkdtemp(prefix="jepakit-ray-", dir=_MEMORY))
    except OSError as error:
        raise WriteError(f"{_MEMORY} cannot be written to ({reason_of(error)}): {remedy}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def init(**options: Any) -> None:
    """`ray.init` with these options, logging only errors, and without a dashboard."""
    import ray

    with _without_dashboard():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """Within the block, `ray.init` starts no dashboard.

    Ray starts one for its usage statistics even if both are off, and it asks three clouds' metadata services (one of
    them by DNS name) where it runs. The function replaced is private; a Ray without it starts as usual.
    """
    from ray._private import services

    start = getattr(services, "start_api_server", None)
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = start
