"""`Raster`: `read` with its checks, so that each reader only has to decode its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import BinaryIO, Self

import numpy as np

from jepakit.readers.checks import (
    CUT,
    check_decoded,
    check_encoded,
    check_frame,
    check_header,
    check_pixels,
    check_ratio,
    check_window,
    reading,
)
from jepakit.readers.header import Header, Limits, Pixels, Window
from jepakit.readers.scenes import decoded_around, state_of

_BY_TILES = "read it in tiles (tile=512)"


class Raster(ABC):
    """One open image file. A context manager; raises ImageError, or MissingExtraError if a decoder is not installed.

    Checks, then decodes; subclasses implement `_decode`.
    """

    header: Header
    doubt = ""
    """Why the pixels read last, though valid, may not show what was meant; empty if there is no doubt."""
    _decodes_anew = False
    """Whether `_decode` returns a new array, which `read` may hand out without a copy if it is writable."""

    def __init__(
        self, header: Header, name: str, limits: Limits, file: BinaryIO | None = None, encoded: int | None = None
    ) -> None:
        """`encoded`: size of the file in bytes if it must be read whole, else None."""
        self.header = header
        self.name = name  # in messages
        self._limits = limits
        self._file = file
        self._kept: tuple[int, Window, Pixels] | None = None
        check_header(header, name, limits)
        if not header.windowed:
            shape = (header.height, header.width, header.bands)
            check = check_decoded if limits.by_windows else check_pixels
            size = check(name, shape, header.dtype, limits, CUT)
            if encoded is not None:
                check_encoded(name, encoded, limits)
                check_ratio(name, size, encoded, limits)

    def read(self, window: Window | None = None, *, frame: int = 0, at_least: int | None = None) -> Pixels:
        """Pixels [height, width, bands] of `header.dtype`, C-contiguous, owned by the caller.

        window    what to read; None: all of it
        frame     0-based
        at_least  the image may be reduced by 2, 4 or 8 if its shorter side stays at least this long (JPEG's scaled
                  decoding; other readers ignore it). For views only, never for measuring
        """
        check_frame(frame, self.header, self.name)
        area = check_window(window, self.header, self.name)
        with reading(self.name):
            if self.header.windowed:
                shape = (area.height, area.width, self.header.bands)
                check_pixels(self.name, shape, self.header.dtype, self._limits, _BY_TILES)
            around = decoded_around(area, self.header)
            if window is None or around == area:
                pixels = self._decode(area, frame, at_least) if window is None else self._decode_part(area, frame)
                pixels = self._finished(pixels, own=self._decodes_anew and pixels.flags.writeable)
            else:
                pixels = self._finished(crop(self._decoded(around, frame), area, around))
            if at_least is None and pixels.shape != (area.height, area.width, self.header.bands):
                raise ValueError("the pixels are not what the header says")
        return pixels

    def _decoded(self, around: Window, frame: int) -> Pixels:
        """A frame or rows of it, decoded once for all windows in them that follow."""
        if self._kept is None or self._kept[:2] != (frame, around):
            self._kept = None
            self._kept = (frame, around, self._decode_part(around, frame))
        return self._kept[2]

    def _finished(self, pixels: Pixels, own: bool = False) -> Pixels:
        """Pixels in the header's dtype and native byte order; one 8-bit band becomes three. A copy, unless they are the
        caller's `own` already."""
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.header.dtype == "uint8" and self.header.bands == 3 and pixels.shape[2] == 1:
            pixels = np.repeat(pixels, 3, axis=2)
        with np.errstate(over="ignore", invalid="ignore"):
            return (np.asarray if own else np.array)(pixels, self.header.dtype, order="C")

    def _decode_part(self, window: Window, frame: int) -> Pixels:
        """As `_decode`, for what `decoded_around` says has to be decoded: a window, whole strips, or the whole frame."""
        return self._decode(window, frame, None)

    @abstractmethod
    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        """A window of one frame, [height, width, bands]; always the whole frame unless the header says `windowed`."""

    def stamp(self) -> tuple[int, ...] | None:
        """Identifies a file on disk in its present state; None for images in memory."""
        try:
            return None if self._file is None else state_of(self._file.fileno())
        except OSError:  # bytes in memory have no descriptor
            return None

    def close(self) -> None:
        """Close the file."""
        self._kept = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def crop(pixels: Pixels, window: Window, around: Window | None = None) -> Pixels:
    """The part of [height, width] or [height, width, bands] inside the window; the pixels are those of `around`."""
    x, y = (window.x, window.y) if around is None else (window.x - around.x, window.y - around.y)
    return pixels[y : y + window.height, x : x + window.width]
