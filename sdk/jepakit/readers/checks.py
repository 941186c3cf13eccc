"""Checks and messages that all readers share: sizes over the limits, windows outside the image, failures of libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np

from jepakit.errors import ImageError, InputError, NoMemoryError
from jepakit.readers.header import Header, Limits, Window
from jepakit.readers.quiet import quiet

MIN_SIDE = 8
RATIO_MATTERS_ABOVE = 16 << 20
CUT = "cut it into tiles or downscale it"

READ_AS = {
    "uint8": "uint8",
    "uint16": "uint16",
    "int16": "int16",
    "uint32": "uint32",
    "int32": "int32",
    "float32": "float32",
    "float64": "float32",
}
"""numpy's names of the dtypes that a file may hold, and the dtype that each is read as."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever a library raises into an ImageError naming the file.

    The library's own message is left out: it may quote a path, or a patient's name from a tag.
    """
    try:
        with quiet():
            yield
    except InputError:
        raise
    except MemoryError:
        raise no_memory(name) from None
    except Exception as error:
        raise ImageError(
            f"{name}: damaged or cut short ({type(error).__name__}): copy it again, or leave it out", code="unreadable"
        ) from None


def no_memory(name: str) -> NoMemoryError:
    """The error where an image cannot be read for lack of memory."""
    return NoMemoryError(
        f"{name}: out of memory while it was read: end other programs, read fewer images at once (fewer workers), or {CUT}"
    )


def check_header(header: Header, name: str, limits: Limits) -> None:
    """Refuse more bands than the limit, and an image too small to hold anything."""
    if header.bands > limits.max_bands:
        raise ImageError(
            f"{name}: {header.bands} bands, the limit is {limits.max_bands}: keep the bands you need",
            code="too_large",
        )
    if min(header.width, header.height) < MIN_SIDE:
        raise ImageError(
            f"{name}: {header.width} × {header.height} pixels, but each side needs at least {MIN_SIDE}: leave it out",
            code="too_small",
        )


def check_pixels(name: str, shape: tuple[int, ...], dtype: str, limits: Limits, remedy: str) -> int:
    """Refuse [height, width, bands] over the limits; returns its size in bytes once decoded."""
    height, width = shape[:2]
    if height * width > limits.max_pixels:
        raise ImageError(
            f"{name}: {width} × {height} pixels, the limit is {limits.max_pixels:,}{_set_by(limits)}: {remedy}",
            code="too_large",
        )
    return check_decoded(name, shape, dtype, limits, remedy)


def check_decoded(name: str, shape: tuple[int, ...], dtype: str, limits: Limits, remedy: str) -> int:
    """Refuse [height, width, bands] of too many bytes once decoded; returns how many there are."""
    size = prod(shape) * np.dtype(dtype).itemsize
    if size > limits.max_decoded_bytes:
        raise ImageError(
            f"{name}: {size:,} bytes once decoded, the limit is {limits.max_decoded_bytes:,}{_set_by(limits)}: {remedy}",
            code="too_large",
        )
    return size


def _set_by(limits: Limits) -> str:
    return f" (by {limits.set_by})" if limits.set_by else ""


def check_encoded(name: str, encoded: int, limits: Limits) -> None:
    """Refuse a file that must be read whole and is over the limit."""
    if encoded > limits.max_encoded_bytes:
        raise ImageError(
            f"{name}: a file of {encoded:,} bytes, the limit is {limits.max_encoded_bytes:,}: cut it into tiles",
            code="too_large",
        )


def check_ratio(name: str, decoded: int, encoded: int, limits: Limits) -> None:
    """Refuse a file that grows beyond the limit when decoded: a bomb, or an empty picture."""
    if decoded > RATIO_MATTERS_ABOVE and decoded > limits.max_ratio * encoded:
        raise ImageError(
            f"{name}: {encoded:,} bytes would decode to {decoded:,}, over {limits.max_ratio} times as many: "
            "it is empty, or made to fill the memory; downscale it if you trust it",
            code="too_large",
        )


def check_window(window: Window | None, header: Header, name: str) -> Window:
    """The window to read, checked to lie in the image; None means all of it."""
    if window is None:
        return Window(0, 0, header.width, header.height)
    x, y, width, height = window
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > header.width or y + height > header.height:
        raise ImageError(
            f"{name}: window {width} × {height} at ({x}, {y}) is not inside its {header.width} × {header.height} pixels",
            code="wrong_shape",
        )
    return Window(x, y, width, height)


def check_frame(frame: int, header: Header, name: str) -> None:
    """Refuse a frame that does not exist."""
    if not 0 <= frame < header.frames:
        raise ImageError(
            f"{name}: no frame {frame}, it has {header.frames} (counted from 0): name one of them",
            code="wrong_shape",
        )
