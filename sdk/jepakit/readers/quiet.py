"""Keeps libraries that warn and log about a file quiet, as their messages may quote a path or a patient's name, and strict."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jepakit.readers.forks import in_each_child

# numpy warns of a .npy header in the name of `readers.npy`; `<unknown>` is the header itself, parsed.
_MODULES = r"(PIL|tifffile|imagecodecs|pydicom|numpy|jepakit\.readers|<unknown>)(\.|$)"
# Pillow logs nothing above DEBUG while it reads.
_LOGGERS = ("tifffile", "pydicom")
_SILENT = logging.CRITICAL + 1

_lock = threading.Lock()
_inside = 0
_restore: list[tuple[Any, ...]] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, silence warnings and log lines of the image libraries, and let Pillow refuse what is cut short, even
    where the process has set its `LOAD_TRUNCATED_IMAGES`, with which it would make up the rest.

    Warning filters belong to the process, so threads share one change of them: the first thread in sets it, the last
    one out undoes it. (Two overlapping `catch_warnings` would leave each other's filters behind.)
    """
    global _inside
    process = os.getpid()
    with _lock:
        _inside += 1
        if _inside == 1:
            _enter()
    try:
        yield
    finally:
        with _lock:
            if process == os.getpid():  # a process forked within the block has left it already
                _inside -= 1
                if _inside == 0:
                    _leave()


def silence_loggers() -> None:
    """Silence the libraries' loggers for good, in a process that only reads images."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(_SILENT)


def _enter() -> None:
    filters = warnings.catch_warnings()
    filters.__enter__()
    warnings.filterwarnings("ignore", module=_MODULES)
    # Only if needed: setting a level clears the caches of all loggers, which can take longer than the image.
    loggers = [logging.getLogger(name) for name in _LOGGERS if name in sys.modules]
    loggers = [logger for logger in loggers if logger.level != _SILENT]
    files = sys.modules.get("PIL.ImageFile")  # if it has not been imported, nobody has set it
    lenient = getattr(files, "LOAD_TRUNCATED_IMAGES", False)
    _restore.append((filters, [(logger, logger.level) for logger in loggers], files, lenient))
    if lenient:
        setattr(files, "LOAD_TRUNCATED_IMAGES", False)  # noqa: B010 (a module that may be None)
    for logger in loggers:
        logger.setLevel(_SILENT)


def _leave() -> None:
    filters, levels, files, lenient = _restore.pop()
    if lenient:
        files.LOAD_TRUNCATED_IMAGES = True
    filters.__exit__(None, None, None)
    for logger, level in levels:
        logger.setLevel(level)


def _leave_all() -> None:
    """Leave the block in a forked process, where the threads that are inside do not go on."""
    global _inside
    if _inside:
        _leave()
    _inside = 0


in_each_child(_leave_all, _lock)
