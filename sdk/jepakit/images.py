"""Reading images rightly, and the ONE preprocess that training, export, service and client all call.

`read_image` turns a file's bytes (or an array) into RGB uint8, or refuses by name what it cannot read
rightly: nothing is ever silently white. `fit` resizes and crops. `preprocess` is both.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jepakit.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

    from jepakit.bundle import Preprocess

    ImageSource = str | Path | bytes | bytearray | memoryview | Image | NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 89_000_000
MIN_SIDE = 8

_TRANSPARENT_MODES = frozenset({"RGBA", "LA", "PA", "RGBa"})
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"})


def preprocess(source: ImageSource, spec: Preprocess, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """One image as the graph takes it: uint8 [size, size, 3], RGB, 0-255.

    The same file gives the same bytes wherever this runs. Raises ImageError (see `read_image`).
    """
    return fit(read_image(source, max_pixels=max_pixels), spec)


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode one image to an upright RGB Pillow image.

    source      a path, the bytes of a JPEG, PNG, WebP, BMP or 8-bit TIFF file, a Pillow image, or an array
                uint8 [H, W], [H, W, 1] or [H, W, 3]
    max_pixels  refused above, judged by the header before anything is decoded

    EXIF orientation is honoured, transparency is composited on white, palettes, grey and CMYK become RGB.
    16-bit, float, multi-band and multi-frame images raise ImageError: converting them to RGB bytes needs a
    value scaling that nobody has chosen.
    """
    try:
        from PIL import Image as pillow  # noqa: N813
    except ImportError:
        raise MissingExtraError("reading images needs Pillow: pip install 'jepakit[images]'") from None

    if isinstance(source, np.ndarray):
        return _to_rgb(pillow.fromarray(_checked_array(source)), name="array", max_pixels=max_pixels)
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, pillow.Image):
        if getattr(source, "format", None) is not None:
            _refuse_deep(source, "image")
        return _to_rgb(source, name="image", max_pixels=max_pixels)
    name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read_bytes(Path(source))
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise _too_large(name, "over 89 million", max_pixels) from None
    except Exception:
        raise ImageError(
            f"{name}: not an image this version reads ({', '.join(FORMATS)}), or its header is damaged",
            code="unsupported_format",
        ) from None
    _refuse_deep(image, name)
    return _to_rgb(image, name=name, max_pixels=max_pixels)


def fit(image: Image, spec: Preprocess) -> NDArray[np.uint8]:
    """Resize and centre-crop an RGB image to uint8 [size, size, 3], with Pillow's antialiased filters."""
    from PIL.Image import Resampling

    filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
    width, height = image.size
    if spec.resize == "squash":
        new_size = (spec.resize_to, spec.resize_to)
    else:
        # Multiply before dividing, as torchvision does: the other order falls one pixel short at whole results.
        short = min(width, height)
        new_size = (spec.resize_to * width // short, spec.resize_to * height // short)
    if new_size[0] * new_size[1] > MAX_PIXELS:
        raise ImageError(
            f"{width} × {height} pixels is so long and thin that resizing makes {new_size[0]} × {new_size[1]}: cut it into tiles",
            code="too_large",
        )
    if new_size != image.size:
        image = image.resize(new_size, filters[spec.interpolation])
    return centre_crop(np.asarray(image), spec.size)


def centre_crop(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle [size, size, C] of [H, W, C] (or of a stack of them)."""
    height, width = pixels.shape[-3:-1]
    # Python's round: half to even, as torchvision's centre crop does; one pixel off costs cosine 0.8 to 0.9.
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(pixels[..., top : top + size, left : left + size, :])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})", code="unreadable") from None


def _refuse_deep(image: Image, name: str) -> None:
    """Refuse what Pillow would silently squeeze into 8-bit RGB, and files of several frames."""
    try:
        depth, frames = _bit_depth(image), getattr(image, "n_frames", 1)
    except Exception:
        raise ImageError(f"{name}: damaged: its header does not say what it holds", code="unreadable") from None
    if depth > 8 or image.mode not in _PLAIN_MODES | _TRANSPARENT_MODES:
        kind = f"{depth}-bit" if depth > 8 else "16-bit, float or integer"
        raise ImageError(
            f"{name}: {kind} pixels (mode {image.mode}); this version reads 8-bit images only, and guessing a "
            "scaling would change what the values mean: convert it to 8 bits with a window of your choice",
            code="unsupported_mode",
        )
    # A phone's MPO file is a JPEG whose further frames are previews of the first.
    if frames > 1 and image.format != "MPO":
        raise ImageError(
            f"{name}: {frames} frames; save the frame you mean as a file of its own", code="unsupported_mode"
        )


def _bit_depth(image: Image) -> int:
    """Bits a band in the file: Pillow opens 16-bit RGB as 8-bit RGB without a word."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (1,))))  # type: ignore[attr-defined]
    raw_modes = [
        str(part)
        for tile in getattr(image, "tile", [])
        for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
    ]
    return 16 if any(";16" in mode for mode in raw_modes) else 8


def _to_rgb(image: Image, *, name: str, max_pixels: int) -> Image:
    from PIL import Image as pillow  # noqa: N813
    from PIL import ImageOps

    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} × {height}", max_pixels)
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: {width} × {height} pixels, the least is {MIN_SIDE} a side", code="too_small")
    if image.mode not in _PLAIN_MODES | _TRANSPARENT_MODES:
        raise ImageError(
            f"{name}: pixels of mode {image.mode}; this version reads 8-bit images only",
            code="unsupported_mode",
        )
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            white = pillow.new("RGBA", image.size, "white")
            image = pillow.alpha_composite(white, image)
        return image.convert("RGB")
    except Exception as error:
        raise ImageError(f"{name}: damaged or cut short ({error})", code="unreadable") from None


def _too_large(name: str, seen: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name}: {seen} pixels, the limit is {max_pixels:,}: cut it into tiles or downscale it",
        code="too_large",
    )


def _checked_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ImageError(
            f"array of {array.dtype} {list(array.shape)}: wanted uint8 [H, W], [H, W, 1] or [H, W, 3]",
            code="wrong_shape",
        )
    if min(array.shape[:2]) < MIN_SIDE:
        raise ImageError(f"array of {list(array.shape)}: the least is {MIN_SIDE} pixels a side", code="too_small")
    return np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
