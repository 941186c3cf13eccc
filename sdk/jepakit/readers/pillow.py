"""JPEG, PNG, WebP, BMP and common 8-bit TIFF through Pillow, and Pillow's own images in memory."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jepakit.errors import ImageError, MissingExtraError
from jepakit.readers.checks import no_memory, reading
from jepakit.readers.codestream import refuse_scans
from jepakit.readers.encoded import Counted, Encoded, of_few_pieces
from jepakit.readers.forks import in_each_child
from jepakit.readers.header import Header, Limits, Pixels, Window
from jepakit.readers.libtiff import refusing_damage
from jepakit.readers.orientation import ORIENTATION, SWAPPED, upright, valid_orientation
from jepakit.readers.png import decode_deep, has_late_chunks
from jepakit.readers.quiet import quiet
from jepakit.readers.raster import Raster
from jepakit.readers.sniff import not_an_image
from jepakit.readers.zeros import zeros_in_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

_TRANSPARENT_MODES = frozenset({"RGBA", "LA", "PA", "RGBa"})
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"})
_DEEP_MODES = {"I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I": "int32", "F": "float32"}
_MOST_HALF_TRANSPARENT = 0.05
"""Share of the pixels: the soft edges of a cut-out are a few per cent."""
_lifting = threading.Lock()
_READ_AHEAD = 8
"""Bytes that libjpeg may read beyond those of the last pixel: of so few zeros it makes up at most one block."""
_FALSE_ALPHA = (
    f"over {_MOST_HALF_TRANSPARENT:.0%} is half transparent, and is laid on white: if the last band is no transparency but a band like "
    "the others (near infrared), write it as a TIFF of plain bands"
)


class PillowFile(Raster):
    """A file that Pillow decodes; reopened for each read, since Pillow closes a file once decoded."""

    def __init__(self, encoded: Encoded, limits: Limits, formats: tuple[str, ...], pages: list[int] | None) -> None:
        """`pages`: indices of a TIFF's frames among its pages; None: Pillow's own frames."""
        self._encoded, self._formats, self._pages = encoded, formats, pages
        image = _open(encoded, formats)
        with reading(encoded.name):
            image.seek(pages[0] if pages else 0)
            late = image.format == "PNG" and has_late_chunks(encoded)
            header = _header(image, encoded.name, len(pages) if pages else _frames(image))
            self._orientation = 1 if late or image.format == "TIFF" else _orientation(image)
        super().__init__(_turned(header, self._orientation), encoded.name, limits, encoded.file, encoded.size)
        # The first read of a single-frame file uses the open image: most files are read once.
        self._opened: Image | None = image if header.frames == 1 and pages is None and not late else None
        if late:
            # The orientation may be stored after the pixels; they are within the limits, so decode them to find it.
            with reading(encoded.name):
                image.load()
                self._orientation = _orientation(image)
                self.header = _turned(header, self._orientation)

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        image, self._opened = self._opened, None
        if image is None:
            image = _open(self._encoded, self._formats)
            image.seek(self._pages[frame] if self._pages else frame)
        if _is_deep_colour(image):
            return upright(decode_deep(self._encoded), self._orientation)
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (max(1, at_least),) * 2)
        jpeg = self._bytes() if image.format in ("JPEG", "MPO") else None
        if jpeg is not None:
            refuse_scans(jpeg, self.name)
        pixels = to_pixels(image, self.name)
        self.doubt = _FALSE_ALPHA if _half_transparent(image) > _MOST_HALF_TRANSPARENT else ""
        if jpeg is not None:
            self._refuse_lost_pixels(jpeg)
        return pixels

    def _bytes(self) -> bytes:
        if self._encoded.data is not None:
            return self._encoded.data
        self._encoded.file.seek(0)
        return self._encoded.file.read()

    def _refuse_lost_pixels(self, data: bytes) -> None:
        """Refuse a JPEG with a run of zeros in its pixels: libjpeg only warns of it, and Pillow hides the warning."""
        place = zeros_in_pixels(data)
        if place is not None and not _is_padded(data, place):
            raise ImageError(
                f"{self.name}: damaged: zeros stand where part of its pixels were, as after a broken copy: copy it again, or leave "
                "it out",
                code="unreadable",
            )


def _is_padded(jpeg: bytes, end: int) -> bool:
    """Whether all pixels come before `end` and only zeros after it: the end marker is missing, but no pixel is."""
    if jpeg[end:].strip(b"\0"):
        return False
    try:
        with quiet():
            import_pillow().open(io.BytesIO(jpeg[: end + _READ_AHEAD]), formats=("JPEG",)).load()
    except OSError:
        return False
    return True


class PillowImage(Raster):
    """An image that belongs to the caller; it is not modified."""

    def __init__(self, image: Image, name: str, limits: Limits) -> None:
        self._image = image
        with reading(name):
            if _is_deep_colour(image):
                raise ImageError(
                    f"{name}: 16-bit pixels that Pillow has reduced to 8 bits (mode {image.mode}): give the file itself",
                    code="unsupported_mode",
                )
            header = _header(image, name, _frames(image))
        super().__init__(header, name, limits)
        with reading(name):
            if image.format != "TIFF":
                image.load()
                self.header = _turned(header, _orientation(image))

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        if self.header.frames == 1:
            return to_pixels(self._image, self.name)
        before = self._image.tell()
        self._image.seek(frame)
        try:
            return to_pixels(self._image, self.name)
        finally:
            self._image.seek(before)


def open_pillow(encoded: Encoded, limits: Limits) -> PillowFile:
    """A JPEG, PNG, WebP or BMP file as a raster."""
    return PillowFile(encoded, limits, FORMATS, None)


def to_pixels(image: Image, name: str) -> Pixels:
    """Upright pixels: RGB uint8 with alpha on white, or a single deep band unchanged."""
    from PIL import Image as pillow  # noqa: N813
    from PIL import ImageOps

    try:
        with refusing_damage() if image.format == "TIFF" else nullcontext(), _any_number_of_pixels(image):
            image.load()
        _refuse_false_alpha(image, name)
        if _orientation(image) != 1:  # it would copy an upright image
            image = ImageOps.exif_transpose(image)
        if image.mode in _DEEP_MODES:
            return np.asarray(image)
        if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            white = pillow.new("RGBA", image.size, "white")
            image = pillow.alpha_composite(white, image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Pillow was given no path, so its message quotes none.
        raise ImageError(f"{name}: damaged or cut short ({error})", code="unreadable") from None


def _refuse_false_alpha(image: Image, name: str) -> None:
    """Refuse a TIFF whose last band is an ordinary band that is only marked as transparency."""
    if image.format == "TIFF" and (between := _half_transparent(image)) > _MOST_HALF_TRANSPARENT:
        raise ImageError(
            f"{name}: its band {len(image.getbands())} is marked as transparency, as GDAL and tifffile mark the fourth of "
            f"any four 8-bit bands, but {between:.0%} of it is half transparent: write it as a plain band (GDAL: "
            "-co ALPHA=NO, tifffile: photometric='minisblack'), or leave it out",
            code="unsupported_mode",
        )


def _half_transparent(image: Image) -> float:
    """The share of pixels that are neither opaque nor fully transparent."""
    if image.mode not in _TRANSPARENT_MODES:
        return 0.0
    alpha = image.getchannel(len(image.getbands()) - 1)
    return sum(alpha.histogram()[1:255]) / (image.width * image.height)


def import_pillow() -> Any:
    """Pillow's Image module; MissingExtraError when it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("reading images needs Pillow: pip install 'jepakit[images]'") from None
    return Image


def _open(encoded: Encoded, formats: tuple[str, ...]) -> Image:
    pillow = import_pillow()
    encoded.file.seek(0)
    # libtiff wants the file itself.
    file = encoded.file if "TIFF" in formats else of_few_pieces(encoded)
    image: Image
    try:
        with quiet():
            try:
                image = pillow.open(file, formats=formats)
            except pillow.DecompressionBombError:
                file.seek(0)
                with _any_number_of_pixels():
                    image = pillow.open(file, formats=formats)
    except ImageError:
        raise
    except MemoryError:
        raise no_memory(encoded.name) from None
    except Exception:
        raise not_an_image(encoded.name) from None
    if isinstance(file, Counted):
        file.left = sys.maxsize  # what decoding reads is bounded by the pixels
    return image


@contextmanager
def _any_number_of_pixels(image: Image | None = None) -> Iterator[None]:
    """A block in which Pillow takes what is over its own limit, which is the whole process's: here, `Limits` decide. With an
    image, only if that one is over it."""
    pillow = import_pillow()
    most = pillow.MAX_IMAGE_PIXELS
    if image is not None and (most is None or image.width * image.height <= 2 * most):
        yield
        return
    with _lifting:
        before, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            pillow.MAX_IMAGE_PIXELS = before


def _header(image: Image, name: str, frames: int) -> Header:
    """The header of the image as Pillow has it stored, not yet turned upright."""
    mode = image.mode
    if mode not in _PLAIN_MODES | _TRANSPARENT_MODES | set(_DEEP_MODES):
        raise ImageError(
            f"{name}: pixels of mode {mode}, which can be converted to RGB in more than one way: convert them first",
            code="unsupported_mode",
        )
    deep_colour = _is_deep_colour(image)
    deep = "uint16" if deep_colour else _DEEP_MODES.get(mode)
    if deep is not None and ("transparency" in image.info or mode in _TRANSPARENT_MODES):
        raise ImageError(
            f"{name}: 16-bit pixels with transparency, which cannot be laid on white without scaling them: "
            "save it without alpha",
            code="unsupported_mode",
        )
    if deep_colour and frames > 1:
        raise ImageError(
            f"{name}: an animation of 16-bit colour: save the frame you need by itself", code="unsupported_mode"
        )
    format = {"MPO": "JPEG", None: "image"}.get(image.format, image.format)
    bands = 1 if mode in _DEEP_MODES else 3
    return Header(str(format), image.height, image.width, bands, deep or "uint8", frames)


def _frames(image: Image) -> int:
    # A phone's MPO file is a JPEG whose other frames are previews of the first.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _turned(header: Header, orientation: int) -> Header:
    if orientation not in SWAPPED:
        return header
    return replace(header, height=header.width, width=header.height)


def _orientation(image: Image) -> int:
    # Not `image.getexif()`: for PNG it decodes all pixels to look behind them.
    return valid_orientation(import_pillow().Image.getexif(image).get(ORIENTATION))


def _is_deep_colour(image: Image) -> bool:
    """Whether the file has 16 bits per band, of which Pillow silently keeps 8."""
    if image.mode in _DEEP_MODES or image.format == "BMP":  # its 16 bits are for all three bands together
        return False
    if image.format == "TIFF":
        return bool(max(image.tag_v2.get(258, (1,))) > 8)  # type: ignore[attr-defined]
    raw_modes = [
        str(part)
        for tile in getattr(image, "tile", [])
        for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
    ]
    return any(";16" in mode for mode in raw_modes)


def _renew() -> None:
    global _lifting
    _lifting = threading.Lock()


in_each_child(_renew)
