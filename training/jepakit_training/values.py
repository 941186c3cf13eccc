"""What the images' values mean for this run: a sample is scanned, and the findings are described in words."""

from __future__ import annotations

from collections.abc import Sequence

from jepakit.config import AdaptConfig
from jepakit.manifest import Preprocess
from jepakit.sources import ImageList
from jepakit_training.scan import Scan, fill_notes, outlier_notes, range_notes, refuse_mixed, scan


def look_at(images: ImageList, config: AdaptConfig, *, progress: bool) -> Scan:
    """Scan a sample; DataError if none can be read or they are of several kinds, ConfigError if views cannot fit."""
    found = scan(images, value_range=config.value_range, frame=chosen_frame(config), progress=progress)
    refuse_mixed(found, images.ids, config.most_skipped)
    config.resolved_views().check_bands(found.kind.bands)
    return found


def choose_preprocess(found: Scan, config: AdaptConfig, stock: Preprocess) -> Preprocess:
    """`stock` adjusted to these images: bands, value scaling, statistics, tile."""
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
    return [*lines, *outlier_notes(found, ids, spec.scaling), *fill_notes(found), *range_notes(found, spec.scaling)]


def chosen_frame(config: AdaptConfig) -> int | None:
    """The one frame to use; None if none was chosen, or every frame is an image of its own."""
    return config.frame if isinstance(config.frame, int) else None
