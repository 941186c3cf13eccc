"""EXIF orientation applied to arrays: turns stored pixels upright, and finds where an upright window is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepakit.readers.header import Window

ORIENTATION = 274
"""The tag's number, the same in EXIF and TIFF."""
SWAPPED = frozenset({5, 6, 7, 8})
"""Orientations whose rows are the upright image's columns."""

# From stored to upright: whether to swap rows and columns, then to reverse the rows, then the columns.
_STEPS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def valid_orientation(value: Any) -> int:
    """An orientation as a file gives it; 1 (upright) for an invalid one."""
    return int(value) if value in range(1, 9) else 1


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored pixels [height, width, ...] turned upright."""
    swap, flip_rows, flip_columns = _STEPS[orientation]
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return np.asarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def stored_window(window: Window, orientation: int, height: int, width: int) -> Window:
    """Where a window of the upright image (height × width pixels) lies in the stored image."""
    swap, flip_rows, flip_columns = _STEPS[orientation]
    x = width - window.x - window.width if flip_columns else window.x
    y = height - window.y - window.height if flip_rows else window.y
    return Window(y, x, window.height, window.width) if swap else Window(x, y, window.width, window.height)
