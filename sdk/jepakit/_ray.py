"""A Ray of our own, for the service and for training: where its files lie, and that it tells nobody anything."""

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

from jepakit._files import reason_of
from jepakit.errors import WriteError

SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A cluster that `ray start` made reports that its usage statistics are off: to nobody, at a port for what is discarded.
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",
}
"""Ray reads these when it is imported."""
OWN: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
"""Options of a cluster of our own."""
_LONGEST_PLACE = (103 if sys.platform == "darwin" else 107) - 89
"""Bytes of the path of a folder for temporary files: Ray makes sockets up to 89 bytes below it, whose paths are so short."""


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder that goes at the end: in /tmp where the usual place has too long a name for Ray's sockets in it.

    Raises WriteError where none can be made.
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
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def init(**options: Any) -> None:
    """`ray.init` with these options, telling of errors alone, and without a dashboard."""
    import ray

    with _without_dashboard():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """While inside, `ray.init` starts no dashboard.

    Ray starts one for its usage statistics though both are off, and it then asks the metadata services of three clouds,
    one of them by its name in the DNS, where it runs. The function replaced is private: a Ray without it starts as it likes.
    """
    from ray._private import services

    start = getattr(services, "start_api_server", None)
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = start
