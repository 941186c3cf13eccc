"""Files of slide scanners: TIFF pyramids whose first level is read by windows, as tifffile understands them.

Aperio .svs, Hamamatsu .ndpi, Philips .tiff and Leica .scn hold whole tiles, so no slide library is needed.
Ventana .bif has overlapping tiles that would have to be stitched; it is refused.
"""

from __future__ import annotations

from math import prod
from typing import Any

from jepakit.errors import ImageError

_READ = ("is_svs", "is_ndpi", "is_philips", "is_scn")


def slide_series(tif: Any, name: str) -> Any | None:
    """The slide's own series, which has the most pixels (label, macro and thumbnail are others); None if no slide."""
    if tif.is_bif:
        raise ImageError(
            f"{name}: a Ventana BIF slide, whose overlapping tiles have to be stitched: convert it to .svs or .tiff",
            code="unsupported_format",
        )
    if not any(getattr(tif, flag) for flag in _READ):
        return None
    return max(tif.series, key=lambda series: prod(series.shape))
