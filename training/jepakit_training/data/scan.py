"""How the values of a user's images are scaled: a sample is measured once, and the numbers are used everywhere.

`scan` reads an evenly spread sample of the images and reports their kind, their values, and what is wrong with
some of them. `Scan.preprocess` turns it into the model's `Preprocess`, which is stored in the bundle: training,
evaluation, export and service all use the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._checks import exceeds
from jepakit._progress import shown
from jepakit._threads import in_threads
from jepakit._vectors import float32_tuple
from jepakit.bundles.manifest import Preprocess, Scaling
from jepakit.config import ValueRange, chosen_range
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.images import choose_frame, describe_kind, usable
from jepakit.readers import Header, Window, open_raster
from jepakit.readers.room import room_for
from jepakit.readers.scenes import decoded_around
from jepakit.sources import ImageList, evenly_spread

SAMPLE = 256
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 99.9
_PIXELS_KEPT = 4096
_PIXELS_JUDGED = 1 << 20
_SIDE_JUDGED = 1024
_THREADS = 4
_MARGIN, _FENCE, _LEAST_SPREAD, _MOST_OUTSIDE = 0.25, 10, 0.2, 0.99


class Kind(NamedTuple):
    """Bands, and numpy's name of the files' dtype."""

    bands: int
    stored_as: str

    def __str__(self) -> str:
        return describe_kind(self.bands, self.stored_as)


@dataclass(frozen=True)
class Seen:
    """One image of the sample. `size` is its width and height, or the tile's if it is one.

    `values` [n, C] are some of its valid pixels, `low` and `high` [C] their percentiles, `fingerprint` bool [256]
    whether it gets brighter from each of 16 × 17 patches to the next (the perceptual "difference hash").
    """

    index: int
    header: Header
    size: tuple[int, int]
    values: NDArray[Any]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    fingerprint: NDArray[np.bool_]
    doubt: str = ""
    """Why its pixels may not be what is meant; may be empty."""

    @property
    def kind(self) -> Kind:
        """What the file holds."""
        return Kind(self.header.bands, self.header.dtype)

    def shown(self, scaling: Scaling | None) -> NDArray[np.float64]:
        """The sampled values from 0 (black) to 1 (white)."""
        scaled = self.values / 255 if scaling is None else scaling.to_unit(self.values.astype(np.float64))
        return 1 - scaled if self.header.inverted else scaled


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

    def only(self, places: NDArray[np.intp]) -> Scan:
        """The result of a scan of only these places."""
        chosen = set(places.tolist())
        return replace(
            self,
            seen=tuple(one for one in self.seen if one.index in chosen),
            odd=tuple(one for one in self.odd if one.index in chosen),
            unreadable=tuple((index, why) for index, why in self.unreadable if index in chosen),
        )

    def scaling(self, value_range: ValueRange) -> Scaling | None:
        """Low and high per band: measured, or a window for all bands; None for 8-bit data.

        Raises ConfigError for a window that does not fit, DataError for a band of one value or without any data.
        """
        if value_range == "file" and not any(one.header.format == "DICOM" for one in self.seen):
            raise ConfigError("value_range = 'file' applies each DICOM file's own window, and these are not DICOM")
        if self.is_8_bit:
            if value_range not in ("auto", "file"):
                raise ConfigError(f"value_range = {value_range!r}: 8-bit images are used as they are, leave it out")
            return None
        self._check_bands()
        if value_range == "file":
            # The output range of the files' windows. Marked as measured, so that images in other units are refused.
            return Scaling(low=(0.0,) * self.kind.bands, high=(1.0,) * self.kind.bands, measured=True)
        chosen = chosen_range(value_range)
        return self._measured() if chosen is None else self._asked(*chosen)

    def _asked(self, low: float, high: float) -> Scaling:
        """This range for all bands; ConfigError if nearly all values lie outside it."""
        lows_NC, highs_NC = self._ends()
        if (outside := self.outside(low, high)) > _MOST_OUTSIDE:
            raise ConfigError(
                f"value_range = [{low:g}, {high:g}]: {outside:.1%} of the values lie outside it (they are "
                f"{np.nanmin(lows_NC):g} … {np.nanmax(highs_NC):g}): nothing would be seen"
            )
        return Scaling(low=(low,) * self.kind.bands, high=(high,) * self.kind.bands, measured=False)

    def _measured(self) -> Scaling:
        """The widest range of 0.1 to 99.9 percentiles over the sampled images, plus a quarter on either side.

        Outliers are left out (`outliers`). The margin is for images that were not sampled: mean and std compensate for
        a range that is too wide, but nothing does for one that clips. Raises DataError for a band of a single value.
        """
        lows_NC, highs_NC = self._ends()
        usual_NC = ~_far_out(lows_NC, highs_NC)
        usual_NC &= ~np.isnan(lows_NC)
        low_C = np.min(lows_NC, axis=0, where=usual_NC, initial=np.inf)
        high_C = np.max(highs_NC, axis=0, where=usual_NC, initial=-np.inf)
        flat = np.flatnonzero(low_C >= high_C)
        if len(flat):
            raise DataError(
                f"band {flat[0] + 1} is {low_C[flat[0]]:g} in every sampled image: remove it, or give value_range"
            )
        margin_C = _MARGIN * (high_C - low_C)
        # Unsigned values cannot be below zero.
        least = 0.0 if self.kind.stored_as.startswith("uint") else -np.inf
        return Scaling(
            low=float32_tuple((low_C - margin_C).clip(least)), high=float32_tuple(high_C + margin_C), measured=True
        )

    def _ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high percentiles of each image and band, [N, C] each; NaN for a band without data in an image."""
        return np.array([one.low for one in self.seen]), np.array([one.high for one in self.seen])

    def _check_bands(self) -> None:
        """DataError for a band that has no data in any image, as it cannot be measured."""
        empty = np.flatnonzero(np.isnan(self._ends()[0]).all(axis=0))
        if len(empty):
            raise DataError(
                f"band {empty[0] + 1} holds no data in any sampled image: write the files without it (`gdal_translate -b` "
                "with each of the others), or without the no-data value if that is what it holds (`gdal_edit.py -unsetnodata`)"
            )

    def outliers(self) -> tuple[int, ...]:
        """Indices of sampled images with values far beyond the others': they would squeeze all others together."""
        lows_NC, highs_NC = self._ends()
        far = np.flatnonzero(_far_out(lows_NC, highs_NC).any(axis=1))
        return tuple(self.seen[place].index for place in far)

    def outside(self, low: float, high: float) -> float:
        """The share of the sampled values that a window would clip."""
        values = np.concatenate([one.values for one in self.seen])
        values = values[~np.isnan(values)]
        return float(((values < low) | (values > high)).mean())

    def statistics(self, scaling: Scaling | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std per band of the sampled pixels, once scaled to 0..1. Raises DataError for a band without any data."""
        self._check_bands()
        scaled = np.concatenate([one.shown(scaling) for one in self.seen])
        # A band of a single value must not be divided by 0; it then carries no information, as it should.
        return float32_tuple(np.nanmean(scaled, axis=0)), float32_tuple(np.nanstd(scaled, axis=0).clip(1e-3))

    def preprocess(
        self, stock: Preprocess, *, value_range: ValueRange = "auto", frame: int | None = None, tile: int | None = None
    ) -> Preprocess:
        """`stock` (sizes, and the start weights' own statistics) adjusted to these images.

        Its statistics are kept if they apply (8-bit RGB, or the kind that a bundle was made for), else measured. Tiles
        are used whole: cropping their middle would leave strips between them that no vector covers.
        """
        if tile is not None:
            stock = stock.model_copy(update={"resize_to": stock.size})
        if (stock.bands, stock.stored_as) == self.kind and value_range == "auto":
            return stock.model_copy(update={"frame": frame, "tile": tile})
        scaling = self.scaling(value_range)
        mean, std = (
            (stock.mean, stock.std) if scaling is None and stock.bands == self.kind.bands else self.statistics(scaling)
        )
        return Preprocess(
            size=stock.size,
            resize_to=stock.resize_to,
            resize=stock.resize,
            interpolation=stock.interpolation,
            bands=self.kind.bands,
            dtype="uint8" if self.is_8_bit else "float32",
            stored_as=self.kind.stored_as,
            scaling=scaling,
            voi=value_range == "file",
            frame=frame,
            tile=tile,
            mean=mean,
            std=std,
        )


def sampled(images: ImageList) -> NDArray[np.intp]:
    """Indices of the images that training looks at to learn their values: at most 256, evenly spread."""
    return evenly_spread(len(images), SAMPLE)


def scan(
    images: ImageList,
    *,
    value_range: ValueRange = "auto",
    frame: int | None = None,
    places: NDArray[np.intp] | None = None,
    progress: bool = True,
) -> Scan:
    """Measure the images at `places` (None: those that training looks at). Raises DataError if none can be read."""
    chosen = (sampled(images) if places is None else places).tolist()
    with shown(progress):
        looked = in_threads(
            lambda index: _look(images, index, value_range, frame),
            chosen,
            "look at values",
            threads=images.threads(_THREADS),
        )
    seen = [one for one in looked if isinstance(one, Seen)]
    unreadable = [one for one in looked if not isinstance(one, Seen)]
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
    """DataError if more than a share `most` of the sample is of another kind: only the user knows which is wanted."""
    if exceeds(len(found.odd), len(found.seen) + len(found.odd), most):
        odd = found.odd[0]
        raise DataError(
            f"the images are of several kinds: most hold {found.kind}, but {ids[odd.index]} holds {odd.kind} "
            f"({len(found.odd)} of {len(found.seen) + len(found.odd)} sampled): keep one kind, or convert the others"
        )


def _look(images: ImageList, index: int, value_range: ValueRange, frame: int | None) -> Seen | tuple[int, str]:
    try:
        ref = images[index]
        with open_raster(ref.data, name=ref.name, limits=ref.limits, voi=value_range == "file") as raster:
            header = raster.header
            window = Window(0, 0, header.width, header.height) if ref.window is None else ref.window
            chosen = choose_frame(header, ref.frame if ref.frame is not None else frame, ref.name)
            with room_for(header.decoded_bytes(decoded_around(window, header))):
                seen = _seen(raster.read(ref.window, frame=chosen), index, header, ref.name)
                return replace(seen, doubt=raster.doubt)
    except ImageError as error:
        return index, str(error)


def _seen(stored: NDArray[Any], index: int, header: Header, name: str) -> Seen:
    """What is kept of an image; ImageError if it shows nothing."""
    valid = usable(stored, header.nodata, name)
    low, high = _percentiles(_thinned(valid, _PIXELS_JUDGED))
    size = (stored.shape[1], stored.shape[0])
    return Seen(index, header, size, _thinned(valid, _PIXELS_KEPT).copy(), low, high, _fingerprint(stored, header))


def _percentiles(valid_NC: NDArray[Any]) -> NDArray[Any]:
    """Low and high percentile of each band, [2, C]; NaN, which later steps ignore, for a band without any data."""
    has_data_C = ~np.isnan(valid_NC).all(axis=0)
    of_those = np.percentile(valid_NC[:, has_data_C], [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0, overwrite_input=True)
    ends = np.full((2, len(has_data_C)), np.nan, of_those.dtype)
    ends[:, has_data_C] = of_those
    return ends


def _fingerprint(stored: NDArray[Any], header: Header) -> NDArray[np.bool_]:
    """The difference hash (`Seen.fingerprint`), bool [256]; along a side of over 2,047 pixels only every second, third … one is used."""
    from PIL import Image

    down, across = (max(1, side // _SIDE_JUDGED) for side in stored.shape[:2])
    some = stored[::down, ::across]
    grey = np.zeros(some.shape[:2], np.float32)
    for band in range(some.shape[2]):
        grey += some[:, :, band]
    picture = Image.fromarray(np.nan_to_num(-grey if header.inverted else grey))
    patches = np.asarray(picture.resize((17, 16), Image.Resampling.BOX))
    brighter: NDArray[np.bool_] = (patches[:, 1:] > patches[:, :-1]).ravel()
    return brighter


def _thinned(values: NDArray[Any], most: int) -> NDArray[Any]:
    """At most `most` rows, drawn at random: evenly spread ones could be just a few columns of a square image."""
    if len(values) <= most:
        return values
    return values.take(np.random.default_rng(0).integers(0, len(values), most), axis=0)


def _far_out(lows_NC: NDArray[np.float64], highs_NC: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which images' percentiles lie far outside the interquartile range of all images', bool [N, C].

    Far means by ten times that range, or by twice the usual range of an image's values if that is more (images may be
    alike): heavy tails are accepted, a file in other units is not.
    """
    spread_C = _LEAST_SPREAD * np.nanmedian(highs_NC - lows_NC, axis=0)
    far = np.zeros(lows_NC.shape, bool)
    for ends_NC in (lows_NC, highs_NC):
        first_C, third_C = np.nanpercentile(ends_NC, [25, 75], axis=0)
        fence_C = _FENCE * np.maximum(third_C - first_C, spread_C)
        far |= (ends_NC < first_C - fence_C) | (ends_NC > third_C + fence_C)
    return far
