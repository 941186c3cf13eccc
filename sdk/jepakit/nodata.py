"""Which pixels of an image count: one rule for "no data", shared by all code that cuts, measures or reads images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def missing(stored_HWC: NDArray[Any], nodata: float | None) -> NDArray[np.bool_] | None:
    """Which values of an image are "no data", bool [H, W, C]; None if none are."""
    if nodata is None:
        return None
    holes_HWC: NDArray[np.bool_] = np.isnan(stored_HWC) if np.isnan(nodata) else stored_HWC == nodata
    return holes_HWC if holes_HWC.any() else None


def valid_pixels(stored_HWC: NDArray[Any], nodata: float | None) -> NDArray[np.bool_] | None:
    """Where an image, or a window of one, has data: bool [H, W]; None if it has data everywhere.

    A pixel is valid if it has data in every band; bands with no data anywhere in the image are ignored.
    """
    holes_HWC = missing(stored_HWC, nodata)
    return None if holes_HWC is None else without_holes(holes_HWC, empty_bands(holes_HWC))


def empty_bands(holes_HWC: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The bands with no data anywhere in the image, bool [C]."""
    return np.asarray(holes_HWC.all(axis=(0, 1)))


def without_holes(holes_HWC: NDArray[np.bool_], empty_C: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The valid pixels, bool [H, W]; none if all bands are empty."""
    valid_HW = np.full(holes_HWC.shape[:2], not empty_C.all())
    for band in np.flatnonzero(~empty_C):
        valid_HW &= ~holes_HWC[:, :, band]
    return valid_HW


def valid_values(stored_HWC: NDArray[Any], valid_HW: NDArray[np.bool_] | None) -> NDArray[Any]:
    """The values of the valid pixels, [N, C]; a view of all of them if `valid_HW` is None."""
    stored_NC = stored_HWC.reshape(-1, stored_HWC.shape[2])
    # Flattened, as numpy would turn a mask with two axes into two arrays of indices.
    return stored_NC if valid_HW is None else stored_NC[valid_HW.ravel()]


def is_unseen(valid_NC: NDArray[Any], low: ArrayLike, high: ArrayLike) -> bool:
    """Whether every band lies entirely on one side of `low` … `high` (per band, or for all): it would show nothing."""
    lows_C, highs_C = np.fmin.reduce(valid_NC, axis=0), np.fmax.reduce(valid_NC, axis=0)
    return not bool(((highs_C > low) & (lows_C < high)).any())


def is_blank(valid_NC: NDArray[Any]) -> bool:
    """Whether all valid pixels are equal, or there are none: such an image shows nothing."""
    if not len(valid_NC):
        return True
    # Most images differ within their first pixels.
    return bool((valid_NC[:256] == valid_NC[0]).all() and (valid_NC == valid_NC[0]).all())
