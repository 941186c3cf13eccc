"""What the images' values mean for this run: a sample is scanned, and the findings are described in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepakit.bundles.manifest import Preprocess, Scaling
from jepakit.config import AdaptConfig
from jepakit.images import MOST_CLIPPED
from jepakit.sources import ImageList
from jepakit_training.data.scan import Scan, refuse_mixed, scan

_GAP = 0.5
"""Least distance of a fill value from all other values, as a share of their range."""


def look_at(images: ImageList, config: AdaptConfig, *, progress: bool) -> Scan:
    """Scan a sample; DataError if none can be read or they are of several kinds, ConfigError if views cannot fit."""
    found = scan(images, value_range=config.value_range, frame=chosen_frame(config), progress=progress)
    refuse_mixed(found, images.ids, config.most_skipped)
    config.resolved_views().check_bands(found.kind.bands)
    return found


def choose_preprocess(found: Scan, config: AdaptConfig, stock: Preprocess) -> Preprocess:
    """`stock` adjusted to the settings and to these images: resizing, bands, value scaling, statistics, tile."""
    if config.resize != "auto":
        stock = stock.resized_by(config.resize)
    return found.preprocess(stock, value_range=config.value_range, frame=chosen_frame(config), tile=config.tile)


def describe_values(found: Scan, spec: Preprocess, ids: Sequence[str]) -> list[str]:
    """What the images hold, and how it will be used."""
    sizes = sorted({one.size for one in found.seen}, key=lambda size: size[0] * size[1])
    (w0, h0), (w1, h1) = sizes[0], sizes[-1]
    between = f"{w0} × {h0}" if len(sizes) == 1 else f"{w0} × {h0} to {w1} × {h1}"
    lines = [f"{found.kind}, {between} pixels ({len(found.seen)} of {found.n_images} images looked at)"]
    if spec.scaling is not None:
        bands = ", ".join(f"{low:g} … {high:g}" for low, high in zip(spec.scaling.low, spec.scaling.high, strict=True))
        lines.append(f"values {bands} become 0 … 1 ({'measured' if spec.scaling.measured else 'as requested'})")
    return [*lines, *value_notes(found, ids, spec.scaling)]


def value_notes(found: Scan, ids: Sequence[str], scaling: Scaling | None) -> list[str]:
    """What may be wrong with the values, or with the range chosen for them."""
    return [*outlier_notes(found, ids, scaling), *fill_notes(found), *range_notes(found, scaling)]


def outlier_notes(found: Scan, ids: Sequence[str], scaling: Scaling | None) -> list[str]:
    """A warning that names an image far outside the others' range, if there is one."""
    if scaling is None or not (far := found.outliers()):
        return []
    then = (
        "they do not set the range, and are refused where it clips them"
        if scaling.measured
        else "are they in the same units? Refused are those of which the chosen range leaves nothing"
    )
    return [
        f"warning: {len(far)} of {len(found.seen)} images have values far beyond the others', e.g. {ids[far[0]]}: {then}"
    ]


def fill_notes(found: Scan) -> list[str]:
    """A remark on a value that looks like undeclared "no data": an end of a band, common and far from all others."""
    if found.is_8_bit:
        return []
    for band, values in enumerate(np.concatenate([one.values for one in found.seen]).T, 1):
        known = values[~np.isnan(values)].astype(np.float64)
        for end in {known.min(), known.max()} if len(known) else ():
            rest = known[known != end]
            share = 1 - len(rest) / len(known)
            if len(rest) and share > MOST_CLIPPED and np.abs(rest - end).min() > _GAP * np.ptp(rest):
                return [
                    f"{share:.0%} of band {band} is exactly {end:g}, and all else {rest.min():g} … {rest.max():g}: if it means no "
                    f"data, declare it in the files (gdal_edit.py -a_nodata {end:g}), or it widens the value range"
                ]
    return []


def range_notes(found: Scan, scaling: Scaling | None) -> list[str]:
    """How much a window chosen by the user clips, if over 1 %."""
    if scaling is None or scaling.measured:
        return []
    outside = found.outside(scaling.low[0], scaling.high[0])
    return (
        [f"{outside:.0%} of the values lie outside the chosen range and become black or white"]
        if outside > MOST_CLIPPED
        else []
    )


def chosen_frame(config: AdaptConfig) -> int | None:
    """The one frame to use; None if none was chosen, or every frame is an image of its own."""
    return config.frame if isinstance(config.frame, int) else None
