"""What every reader speaks: a header, a window, the limits, and the raster itself. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

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


class Raster(Protocol):
    """One open image file. A context manager; raises ImageError, or MissingExtraError where a decoder is not installed."""

    header: Header

    def read(self, window: Window | None = None, *, frame: int = 0, at_least: int | None = None) -> NDArray[Any]:
        """Pixels [height, width, bands] of `header.dtype`, C-contiguous, the caller's to keep.

        window    what to read; None: all of it
        frame     0-based
        at_least  the image may come back reduced by 2, 4 or 8 if its shorter side stays at least this long
                  (JPEG's scaled decoding; other readers ignore it). For views only, never for measuring
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class ImageRef:
    """One image of a source: where its bytes are, and which part of it is meant.

    `name` is what messages call it; `window` and `frame` are None for the whole of a single-frame file.
    """

    data: ImageSource
    name: str
    window: Window | None = None
    frame: int | None = None
