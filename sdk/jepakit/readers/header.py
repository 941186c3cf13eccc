"""What every reader speaks: a header, a window, the limits. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


@dataclass(frozen=True)
class Limits:
    """Budgets, judged on headers before anything is decoded."""

    max_pixels: int = 89_000_000
    """Of one image, or of the window that is read."""
    max_bands: int = 64
    max_decoded_bytes: int = 2 << 30
    max_encoded_bytes: int = 2 << 30
    """Of a file that has to be read whole; a file read by windows may be larger."""
    max_ratio: int = 500
    """Decoded bytes over encoded ones, for what decodes to more than 16 MB: a bomb is not an image."""
    set_by: str = ""
    """The setting that `max_pixels` and `max_decoded_bytes` come from, for messages; empty: none."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Header:
    """What a file says of itself, as `Raster.read` will return it: upright, one frame."""

    format: str
    """`JPEG`, `PNG`, `WEBP`, `BMP`, `TIFF`, `DICOM`, `NPY`, `NPZ`, `SLIDE`, `array` or `image` (Pillow's)."""
    height: int
    width: int
    bands: int
    """3 for colour (palettes, CMYK and YCbCr included) and for 8-bit alpha composited; else as stored."""
    dtype: str
    """numpy's name: `uint8`, `uint16`, `int16`, `uint32`, `int32`, `float32`; float64 is read as float32, and
    so is a DICOM image of one band, whose modality LUT gives real units."""
    frames: int = 1
    nodata: float | None = None
    """The value that stands for "no data" (GDAL's tag, DICOM's padding); NaN allowed."""
    windowed: bool = False
    """Whether a window is read without decoding the rest of the file."""
    inverted: bool = False
    """Whether the lowest value is white (DICOM's MONOCHROME1). Values are as stored: only a range tells what black is."""


@dataclass(frozen=True)
class ImageRef:
    """One image of a source: where its bytes are, and which part of it is meant.

    `name` is what messages call it; `window` and `frame` are None for the whole of a single-frame file. `scenes` keeps
    what the windows of a file are cut from.
    """

    data: ImageSource
    name: str
    window: Window | None = None
    frame: int | None = None
    scenes: Scenes | None = field(default=None, repr=False, compare=False)
