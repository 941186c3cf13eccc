"""`open_raster`: the one entry point to all readers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from jepakit.readers.encoded import Encoded, EncodedSource, open_encoded
from jepakit.readers.header import DEFAULT_LIMITS, ImageSource, Limits
from jepakit.readers.raster import Raster
from jepakit.readers.sniff import sniff


def open_raster(
    source: ImageSource, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS, voi: bool = False
) -> Raster:
    """Open an image by its first bytes, whatever its name; its header is known before a pixel is decoded.

    source  a path, the bytes of a file, a Pillow image, or an array [H, W] or [H, W, bands] of uint8, uint16,
            int16, uint32, int32, float32 or float64
    name    its name in messages; by default the path, or "image" or "array"
    limits  budgets, checked against headers; larger images are refused
    voi     DICOM: apply the file's own window (VOI LUT), which gives 0 to 1; a frame without one is refused

    Reads JPEG, PNG, WebP, BMP, TIFF (including slides), DICOM, .npy and .npz. Raises ImageError for everything else and
    for damage, MissingExtraError when a format's library is not installed, TypeError for an object that is no image.
    """
    if isinstance(source, np.ndarray):
        from jepakit.readers.npy import open_array

        return open_array(source, name or "array", limits)
    if isinstance(source, EncodedSource):
        return _open_encoded(open_encoded(source, name), limits, voi)
    # A Pillow image cannot exist without Pillow having been imported.
    pillow: Any = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(source, pillow.Image):
        from jepakit.readers.pillow import PillowImage

        return PillowImage(source, name or "image", limits)
    raise TypeError(f"an image is a path, bytes, a Pillow image or an array, not {type(source).__name__}")


def _open_encoded(encoded: Encoded, limits: Limits, voi: bool) -> Raster:
    try:
        family = sniff(encoded.head, encoded.name)
        if family == "pillow":
            from jepakit.readers.pillow import open_pillow

            return open_pillow(encoded, limits)
        if family == "tiff":
            from jepakit.readers.tiff import open_tiff

            return open_tiff(encoded, limits)
        if family == "dicom":
            from jepakit.readers.dicom import open_dicom

            return open_dicom(encoded, limits, voi=voi)
        from jepakit.readers.npy import open_npy, open_zip

        return open_npy(encoded, limits) if family == "npy" else open_zip(encoded, limits)
    except BaseException:
        encoded.file.close()
        raise
