"""What the values of a user's images are worth: a sample is measured once, and the numbers are used everywhere.

`scan` reads an evenly spread sample of the images and says of what kind they are, which values they hold, and
what is wrong with some of them. `Scan.preprocess` turns it into the model's `Preprocess`, which travels in the
bundle: training, evaluation, export and service all use the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._progress import Steps
from jepakit.bundle import Preprocess, Scaling
from jepakit.config import CT_WINDOWS, ValueRange
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.images import choose_frame, describe_kind, missing, refuse_unusable
from jepakit.readers import DEFAULT_LIMITS, Header, open_raster
from jepakit.sources import ImageList

SAMPLE = 256
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 99.9
_PIXELS_KEPT = 4096
_PIXELS_JUDGED = 1 << 20
_THREADS = 4


class Kind(NamedTuple):
    """Bands and numpy's name of what the files hold."""

    bands: int
    stored_as: str

    def __str__(self) -> str:
        return describe_kind(self.bands, self.stored_as)


@dataclass(frozen=True)
class Seen:
    """One image of the sample.

    `values` [n, C] are some of its valid pixels, `low` and `high` [C] their percentiles, `fingerprint` bool [256]
    whether it gets brighter from each of 16 × 17 patches to the next (the perceptual "difference hash").
    """

    index: int
    header: Header
    values: NDArray[Any]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    fingerprint: NDArray[np.bool_]

    @property
    def kind(self) -> Kind:
        """What the file holds."""
        return Kind(self.header.bands, self.header.dtype)


@dataclass(frozen=True)
class Scan:
    """A sample of the images, measured. `odd` are readable images of another kind than most."""

    kind: Kind
    seen: tuple[Seen, ...]
    odd: tuple[Seen, ...]
    unreadable: tuple[tuple[int, str], ...]
    n_images: int

    @property
    def is_8_bit(self) -> bool:
        """Whether pixels stay uint8 up to the graph."""
        return self.kind.stored_as == "uint8"

    def scaling(self, value_range: ValueRange) -> Scaling | None:
        """Low and high per band: measured, or the user's window for all bands; None for 8-bit data.

        Measured is the widest range between the 0.1 and the 99.9 percentile of any sampled image: hot pixels
        do not stretch it, and no sampled image is clipped by more than 0.2 %.
        """
        window = CT_WINDOWS.get(value_range) if isinstance(value_range, str) else value_range
        if self.is_8_bit:
            if value_range not in ("auto", "file"):
                raise ConfigError(f"value_range = {value_range!r}: 8-bit images are used as they are, leave it out")
            return None
        if window is not None:
            low, high = window
            return Scaling(low=(low,) * self.kind.bands, high=(high,) * self.kind.bands, measured=False)
        low_C = np.min([one.low for one in self.seen], axis=0)
        high_C = np.max([one.high for one in self.seen], axis=0)
        flat = np.flatnonzero(low_C >= high_C)
        if len(flat):
            raise DataError(
                f"band {flat[0] + 1} is {low_C[flat[0]]:g} in every sampled image: remove it, or give value_range"
            )
        return Scaling(low=_floats(low_C), high=_floats(high_C), measured=True)

    def statistics(self, scaling: Scaling | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std per band of the sampled pixels, once scaled to 0..1."""
        values = np.concatenate([one.values for one in self.seen]).astype(np.float64)
        if scaling is None:
            scaled = values / 255
        else:
            low, high = np.asarray(scaling.low), np.asarray(scaling.high)
            scaled = ((values - low) / (high - low)).clip(0, 1)
        # A band of one value must not be divided by 0; it then carries nothing, as it should.
        return _floats(scaled.mean(axis=0)), _floats(scaled.std(axis=0).clip(1e-3))

    def preprocess(
        self, stock: Preprocess, *, value_range: ValueRange = "auto", frame: int | None = None, tile: int | None = None
    ) -> Preprocess:
        """`stock` (sizes, and the start weights' own statistics) made for these images.

        Its statistics stay where they apply, 8-bit RGB or what a bundle was made for; elsewhere they are measured.
        """
        if (stock.bands, stock.stored_as) == self.kind and value_range == "auto":
            return stock.model_copy(update={"frame": frame, "tile": tile})
        scaling = self.scaling(value_range)
        mean, std = (
            (stock.mean, stock.std) if scaling is None and stock.bands == self.kind.bands else self.statistics(scaling)
        )
        return Preprocess(
            size=stock.size, resize_to=stock.resize_to, resize=stock.resize, interpolation=stock.interpolation,
            bands=self.kind.bands, dtype="uint8" if self.is_8_bit else "float32", stored_as=self.kind.stored_as,
            scaling=scaling, voi=value_range == "file", frame=frame, tile=tile, mean=mean, std=std,
        )  # fmt: skip


def scan(
    images: ImageList, *, value_range: ValueRange = "auto", frame: int | None = None, sample: int = SAMPLE,
    progress: bool = True,
) -> Scan:  # fmt: skip
    """Measure an evenly spread sample of `images`. Raises DataError when none of them can be read."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).astype(np.intp)).tolist()
    seen: list[Seen] = []
    unreadable: list[tuple[int, str]] = []
    show = Steps(len(chosen), 0, what="look at values", enabled=progress)
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done, result in enumerate(pool.map(lambda index: _look(images, index, value_range, frame), chosen), 1):
                if isinstance(result, Seen):
                    seen.append(result)
                else:
                    unreadable.append(result)
                show.update(done)
        finally:
            show.close()
    if not seen:
        raise DataError(f"none of {len(chosen)} sampled images can be read; the first: {unreadable[0][1]}")
    kind = Counter(one.kind for one in seen).most_common(1)[0][0]
    return Scan(
        kind,
        tuple(one for one in seen if one.kind == kind),
        tuple(one for one in seen if one.kind != kind),
        tuple(unreadable),
        len(images),
    )


def refuse_mixed(found: Scan, ids: Sequence[str], most: float) -> None:
    """DataError when more than a share `most` of the sample is of another kind: which one is meant is the user's to say."""
    if len(found.odd) > most * (len(found.seen) + len(found.odd)):
        odd = found.odd[0]
        raise DataError(
            f"the images are of several kinds: most hold {found.kind}, but {ids[odd.index]} holds {odd.kind} "
            f"({len(found.odd)} of {len(found.seen) + len(found.odd)} sampled): keep one kind, or convert the others"
        )


def _look(images: ImageList, index: int, value_range: ValueRange, frame: int | None) -> Seen | tuple[int, str]:
    try:
        ref = images[index]
        with open_raster(ref.data, name=ref.name, limits=DEFAULT_LIMITS, voi=value_range == "file") as raster:
            header = raster.header
            stored = raster.read(
                ref.window, frame=choose_frame(header, ref.frame if ref.frame is not None else frame, ref.name)
            )
        valid = refuse_unusable(stored, missing(stored, header.nodata), ref.name)
    except ImageError as error:
        return index, str(error)
    low, high = np.percentile(_thinned(valid, _PIXELS_JUDGED), [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    return Seen(index, header, _thinned(valid, _PIXELS_KEPT).copy(), low, high, _fingerprint(stored))


def _fingerprint(stored: NDArray[Any]) -> NDArray[np.bool_]:
    from PIL import Image

    grey = Image.fromarray(np.nan_to_num(stored.mean(axis=2, dtype=np.float32)))
    patches = np.asarray(grey.resize((17, 16), Image.Resampling.BOX))
    brighter: NDArray[np.bool_] = (patches[:, 1:] > patches[:, :-1]).ravel()
    return brighter


def _thinned(values: NDArray[Any], most: int) -> NDArray[Any]:
    """At most about `most` rows, evenly spread."""
    return values[:: max(1, len(values) // most)]


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(map(float, np.asarray(values).astype(np.float32)))
