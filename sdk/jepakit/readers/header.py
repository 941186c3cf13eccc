"""Types that all readers share: header, window, limits. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from jepakit.readers.scenes import Scenes

    ImageSource = str | Path | bytes | bytearray | memoryview | Image | NDArray[Any]
else:
    ImageSource = Any

Pixels = NDArray[Any]
"""[height, width, bands]."""


class Window(NamedTuple):
    """A rectangle of pixels of an upright image: left and top edge, width and height."""

    x: int
    y: int
    width: int
    height: int

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        """Where it lies in an array [height, width, ...]."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


@dataclass(frozen=True)
class Limits:
    """Budgets, checked against headers before anything is decoded."""

    max_pixels: int = 89_000_000
    """Of one image, or of the window to read."""
    max_bands: int = 64
    max_decoded_bytes: int = 2 << 30
    max_encoded_bytes: int = 2 << 30
    """Of a file that must be read whole; a file read by windows may be larger."""
    max_ratio: int = 500
    """Decoded bytes per encoded byte, for files that decode to more than 16 MB: stops decompression bombs."""
    by_windows: bool = False
    """Whether only windows will be read, of a scene that may have more than `max_pixels` even if it must be decoded whole."""
    set_by: str = ""
    """The setting that `max_pixels` and `max_decoded_bytes` come from, for messages; may be empty."""


DEFAULT_LIMITS = Limits()
SCENE_LIMITS = Limits(by_windows=True)


@dataclass(frozen=True)
class Header:
    """What a file declares, in terms of what `Raster.read` returns: upright, one frame."""

    format: str
    """`JPEG`, `PNG`, `WEBP`, `BMP`, `TIFF`, `DICOM`, `NPY`, `NPZ`, `SLIDE`, `array` or `image` (Pillow's)."""
    height: int
    width: int
    bands: int
    """3 for colour (palettes, CMYK and YCbCr included), for 8-bit images of one band and for those with alpha; else as stored."""
    dtype: str
    """numpy's name: `uint8`, `uint16`, `int16`, `uint32`, `int32`, `float32`; float64 is read as float32, as are DICOM
    images of one band, whose modality LUT gives real units."""
    frames: int = 1
    nodata: float | None = None
    """The value that means "no data" (GDAL's tag, DICOM's padding); may be NaN."""
    windowed: bool = False
    """Whether a window can be read without decoding the rest of the file."""
    inverted: bool = False
    """Whether the lowest value is white (DICOM's MONOCHROME1). Values stay as stored; inverting them needs a range."""
    strip: int = 0
    """The rows of a strip if windows are read by decoding strips as wide as the image, else 0."""
    content: str = ""
    """DICOM: its modality, and whether it is a localizer or a secondary capture; empty for other formats."""

    def decoded_bytes(self, window: Window) -> int:
        """Bytes of a window once decoded."""
        return window.height * window.width * self.bands * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ImageRef:
    """One image of a source: where its bytes are, and which part of it to read.

    `name` is its name in messages; `window` and `frame` are None for the whole of a single-frame file. `scenes` keeps
    decoded scenes that windows are cut from.
    """

    data: ImageSource
    name: str
    window: Window | None = None
    frame: int | None = None
    scenes: Scenes | None = field(default=None, repr=False, compare=False)

    @property
    def limits(self) -> Limits:
        """The budgets for reading it."""
        return DEFAULT_LIMITS if self.window is None else SCENE_LIMITS
