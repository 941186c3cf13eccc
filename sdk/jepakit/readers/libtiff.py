"""libtiff, which decodes some TIFFs inside Pillow: what it reports of a damaged file is an error here.

By itself it prints its reports on standard error, hundreds for one file, and mostly goes on with whatever it made of it.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_here = threading.local()


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Raise ValueError at the end of the block if libtiff has reported an error in this thread.

    From the first block on, Pillow's libtiff prints nothing in this process. Without effect where it is not a library of
    its own that can be found (other systems than Linux).
    """
    _take_over()
    _here.reports = 0
    yield
    if _here.reports:
        raise ValueError("its compressed data are not valid")


def _note(module: bytes, words: bytes, values: int) -> None:
    _here.reports = getattr(_here, "reports", 0) + 1


_noting = _HANDLER(_note)


@cache
def _take_over() -> None:
    if (path := _path()) is None:
        return
    library = ctypes.CDLL(path)
    for setter, handler in (("TIFFSetErrorHandler", _noting), ("TIFFSetWarningHandler", None)):
        function = getattr(library, setter)
        function.restype, function.argtypes = ctypes.c_void_p, [_HANDLER if handler else ctypes.c_void_p]
        function(handler)


def _path() -> str | None:
    """The libtiff that this process has loaded, Pillow's own if there are several."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    found = set(re.findall(r"/\S.*/libtiff[-.\w]*$", maps, re.MULTILINE))
    return min(found, key=lambda path: ("pillow" not in path.lower(), path), default=None)
