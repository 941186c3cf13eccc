"""Keeps what is decoded around a window for the tiles that follow: PNG and JPEG cannot be decoded by windows at all,
and a TIFF in strips only by rows as wide as the image."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jepakit.errors import ImageError
from jepakit.readers.header import Header, Pixels, Window

if TYPE_CHECKING:
    from jepakit.readers.raster import Raster

KEPT_BYTES = 128 << 20
"""The most that is kept in addition to the scene used last."""


def decoded_around(window: Window, header: Header) -> Window:
    """What is decoded to read a window: all of the image, all rows of the strips that it lies in, or only the window.

    Rows of over `KEPT_BYTES` are never decoded together, and so not for several windows.
    """
    if not header.windowed:
        return Window(0, 0, header.width, header.height)
    if not header.strip:
        return window
    top = window.y // header.strip * header.strip
    end = -(-(window.y + window.height) // header.strip) * header.strip
    rows = Window(0, top, header.width, min(end, header.height) - top)
    return rows if header.decoded_bytes(rows) <= KEPT_BYTES else window


class Scenes:
    """The scenes, or rows of them, used most recently: at most `KEPT_BYTES`, but always the last one, however large. Also
    the file that each thread read from last, still open: opening a TIFF takes longer the more tiles or frames it has.

    Safe in threads and forked processes; a copy sent to another process is empty.
    """

    def __init__(self) -> None:
        self._forget()

    def __reduce__(self) -> tuple[type[Scenes], tuple[()]]:
        return Scenes, ()

    def whole(self, key: Hashable, decode: Callable[[], Pixels]) -> Pixels:
        """The result of `decode`, read-only: from memory if `key` is kept, else decoded once for all waiting threads.

        Raises the errors of `decode`, and then keeps nothing.
        """
        if self._process != os.getpid():
            self._forget()  # a result pending in a thread of the parent would never arrive
        with self._lock:
            found = self._kept.pop(key, None)
            future = self._kept[key] = found or Future()
        if found is not None:
            try:
                return found.result()
            except ImageError:
                return decode()  # so that the message names this caller's image
        try:
            pixels = decode()
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(pixels)
        self._make_room()
        return pixels

    @contextmanager
    def raster(self, path: str | Path, name: str, how: Hashable, opened: Callable[[], Raster]) -> Iterator[Raster]:
        """The raster of a file, called `name` in messages: the one that this thread has open, if it is of this file in its
        present state and was opened the same way, else a newly `opened` one. After an error it is not used again.
        """
        if self._process != os.getpid():
            self._forget()  # the parent's files share their position with it
        held: _Held | None = getattr(self._held, "raster", None)
        self._held.raster = None
        if held is None or held.key != (path, how, state_of(path)):
            del held
            raster = opened()
            held = _Held(raster, (path, how, raster.stamp()))
        held.raster.name = name
        yield held.raster
        self._held.raster = held

    def _forget(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._held = threading.local()
        self._kept: dict[Hashable, Future[Pixels]] = {}

    def _make_room(self) -> None:
        with self._lock:
            decoded = {key: future.result().nbytes for key, future in self._kept.items() if future.done()}
            held = sum(decoded.values())
            for key in list(decoded)[:-1]:
                if held <= KEPT_BYTES:
                    break
                del self._kept[key]
                held -= decoded[key]


class _Held:
    """An open raster, closed with the last reference to it: when its thread ends, reads another file, or fails."""

    def __init__(self, raster: Raster, key: Hashable) -> None:
        self.raster, self.key = raster, key

    def __del__(self) -> None:
        self.raster.close()


def state_of(file: int | str | Path) -> tuple[int, ...] | None:
    """Identifies a file, open or by its path, in its present state; None if it is gone."""
    try:
        status = os.stat(file)  # noqa: PTH116 (it may be a descriptor)
    except (OSError, ValueError):  # a name with a NUL byte is no file's
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
