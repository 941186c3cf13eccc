"""What is decoded around a window, kept for the tiles that follow: PNG and JPEG cannot be decoded by windows at all,
and a TIFF in strips only by rows as wide as the image."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from jepakit.errors import ImageError
from jepakit.readers.header import Header, Pixels, Window

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
    """The scenes, or rows of them, used most recently: at most `KEPT_BYTES`, but always the last one, however large.

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

    def _forget(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
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
