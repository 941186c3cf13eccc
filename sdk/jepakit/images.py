"""The ONE way from a file to pixels, for training, export, service and client.

`read_image` turns a file (or bytes, or an array) into the kind of pixels that a model takes, uint8 or raw
float32, and refuses by name what it cannot read correctly: no image silently becomes white. `fit` resizes and
crops. `preprocess` does both. Value scaling, mean and std come later, inside the graph.

Shapes: H × W pixels, C bands.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import counted, first_few
from jepakit.errors import ConfigError, ImageError
from jepakit.nodata import empty_bands, is_blank, is_unseen, missing, valid_values, without_holes
from jepakit.readers import (
    DEFAULT_LIMITS,
    EncodedSource,
    Header,
    ImageRef,
    ImageSource,
    Limits,
    Raster,
    Window,
    open_raster,
)
from jepakit.readers.checks import check_window
from jepakit.readers.header import Pixels as Pixels
from jepakit.readers.quiet import quiet
from jepakit.readers.raster import crop
from jepakit.readers.room import room_for
from jepakit.readers.scenes import decoded_around

if TYPE_CHECKING:
    from jepakit.bundles.manifest import Preprocess, Scaling

MOST_CLIPPED = 0.01


def preprocess(source: ImageSource | ImageRef, spec: Preprocess) -> Pixels:
    """One image as the graph takes it, [size, size, C]: uint8 0-255, or float32 in the files' own units.

    The same file gives the same bytes wherever this runs. Raises the errors of `read_image`.
    """
    return fit(read_image(source, spec), spec)


def read_image(
    source: ImageSource | ImageRef, spec: Preprocess, *, limits: Limits | None = None, at_least: int | None = None
) -> Pixels:
    """Decode one image to [H, W, C] of the model's kind: uint8, or float32 in the files' own units.

    source    a path, the bytes of a file, a Pillow image, an array [H, W] or [H, W, C], or an `ImageRef`
    limits    budgets, checked against the header before anything is decoded; None: those of the `ImageRef`
    at_least  for views only: the image may be reduced, but its shorter side keeps at least this many pixels

    From a file with several frames, the model's own frame is read unless the `ImageRef` names another; an array, or a
    Pillow image of one frame, is taken to be that frame. "No data" is filled with the domain's mean.

    Raises ImageError for another depth or number of bands than the model's, NaN or infinite pixels, an image of a
    single value, more than 1 % of a band clipped by measured scaling, all values outside a chosen range, several frames
    without a choice, a missing frame, a scene where tiles are expected, and anything that cannot be read; TypeError for an
    object that is no image.
    """
    ref = source if isinstance(source, ImageRef) else ImageRef(source, name_of(source))
    with quiet(), _opened(ref, limits or ref.limits, spec.voi) as raster:
        header = raster.header
        _check_kind(header, spec, ref.name)
        _check_scale(header, ref, spec)
        frame = choose_frame(header, _frame_meant(header, ref, spec), ref.name)
        stored = _read(raster, ref, frame, spec.voi, at_least)
    return _padded(_checked(stored, header, spec, ref.name), ref, spec)


def _opened(ref: ImageRef, limits: Limits, voi: bool) -> AbstractContextManager[Raster]:
    """The image's raster. That of a file of several tiles or frames stays open for those that follow."""

    def opened() -> Raster:
        return open_raster(ref.data, name=ref.name, limits=limits, voi=voi)

    if ref.scenes is None or not isinstance(ref.data, str | Path):
        return opened()
    return ref.scenes.raster(ref.data, ref.name, (limits, voi), opened)


def _read(raster: Raster, ref: ImageRef, frame: int, voi: bool, at_least: int | None) -> Pixels:
    """Read a frame, or a window of it. If more than the window has to be decoded, it is kept for the windows that follow."""
    header, stamp = raster.header, raster.stamp()
    window = check_window(ref.window, header, ref.name)
    around = decoded_around(window, header)

    def decode(part: Window | None, at_least: int | None = None) -> Pixels:
        with room_for(header.decoded_bytes(around)):
            return raster.read(part, frame=frame, at_least=at_least)

    if ref.window is None or ref.scenes is None or stamp is None:
        return decode(ref.window, at_least)
    if header.windowed and around == window:
        return decode(window)
    whole = ref.scenes.whole((stamp, frame, voi, around), lambda: decode(around if header.windowed else None))
    return crop(whole, window, around).copy()


def fit(pixels: Pixels, spec: Preprocess, *, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Resize and centre-crop [H, W, C] to [size, size, C], with Pillow's antialiased filters.

    Raises ImageError for an image so long and thin that resizing it would exceed the pixels that `limits` allows.
    """
    height, width = pixels.shape[:2]
    if spec.resize == "squash":
        new_size = (spec.resize_to, spec.resize_to)
    else:
        # Multiply before dividing, as torchvision does: the other order can be one pixel short of a whole result.
        short = min(width, height)
        new_size = (spec.resize_to * width // short, spec.resize_to * height // short)
    if new_size[0] * new_size[1] > limits.max_pixels:
        raise ImageError(
            f"{width} × {height} pixels is so long and thin that resizing would make it {new_size[0]} × {new_size[1]}: cut it into tiles",
            code="too_large",
        )
    if new_size != (width, height):
        pixels = resize(pixels, new_size, spec.interpolation)
    return center_crop(pixels, spec.size)


def resize(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Resize [H, W, C] to `size` (width, height); float32, and any number of bands but three, band by band."""
    from PIL import Image
    from PIL.Image import Resampling

    filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, filters[interpolation]))
    bands = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, band])).resize(size, filters[interpolation]))
        for band in range(pixels.shape[2])
    ]
    return np.stack(bands, axis=2)


def center_crop(pixels: Pixels, size: int) -> Pixels:
    """The middle [size, size, C] of [H, W, C] (or of a stack of them)."""
    height, width = pixels.shape[-3:-1]
    # Python's round: half to even, as torchvision's centre crop does; one pixel off costs cosine 0.8 to 0.9.
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(pixels[..., top : top + size, left : left + size, :])


def name_of(source: ImageSource) -> str:
    """What messages call an image that is not an `ImageRef`."""
    if isinstance(source, str | Path):
        return str(source)
    return "array" if isinstance(source, np.ndarray) else "image"


def _check_kind(header: Header, spec: Preprocess, name: str) -> None:
    """Refuse an image of another depth or number of bands than the model was made for."""
    # Callers may pass integer pixels as float32 arrays.
    same_depth = header.dtype == spec.stored_as or (header.format in ("array", "image") and header.dtype == spec.dtype)
    if same_depth and header.bands == spec.bands:
        return
    seen, wanted = describe_kind(header.bands, header.dtype), describe_kind(spec.bands, spec.stored_as)
    raise ImageError(
        f"{name}: holds {seen}, but the model was made for {wanted}: give it images of that kind, or adapt a model on these",
        code="unsupported_mode",
    )


def check_tile(tile: int | None, spec: Preprocess) -> None:
    """Refuse tiles of another size than the model's: padded or squeezed, they would have another scale."""
    if tile is not None and spec.tile is not None and tile != spec.tile:
        raise ConfigError(
            f"tile = {tile}: the model was made for tiles of {spec.tile} × {spec.tile} pixels: give tile={spec.tile}"
        )


def describe_kind(bands: int, stored_as: str) -> str:
    """Depth and bands in words: `8-bit RGB or grey pixels`, `uint16 pixels of 1 band`."""
    if stored_as == "uint8" and bands == 3:
        return "8-bit RGB or grey pixels"
    return f"{stored_as} pixels of {counted(bands, 'band')}"


def choose_frame(header: Header, frame: int | None, name: str) -> int:
    """The frame to read; several frames without a choice are refused."""
    if frame is None:
        if header.frames > 1:
            raise ImageError(
                f"{name}: {header.frames} frames: choose one of them (frame=0 … {header.frames - 1}), or every one (frame='each'); "
                "over HTTP, send one frame as a file or an array; if they are channels, save them as bands",
                code="unsupported_mode",
            )
        return 0
    if frame >= header.frames:
        raise ImageError(
            f"{name}: has {counted(header.frames, 'frame')}, so there is no frame {frame} (counted from 0): give a file that "
            "has that frame, or the frame's pixels as an array",
            code="unsupported_mode",
        )
    return frame


def _frame_meant(header: Header, ref: ImageRef, spec: Preprocess) -> int | None:
    """The frame that was asked for, else the model's. A single image in memory is taken to be that frame already."""
    if ref.frame is not None:
        return ref.frame
    return spec.frame if isinstance(ref.data, EncodedSource) or header.frames > 1 else None


def usable(stored: NDArray[Any], nodata: float | None, name: str) -> NDArray[Any]:
    """The valid pixels [N, C], NaN (as float32) where a band has no data in the whole image.

    Raises ImageError when there are none, for NaN or infinite values, and when all are equal.
    """
    holes = missing(stored, nodata)
    if stored.dtype == np.float32:
        bad = ~np.isfinite(stored) if holes is None else ~np.isfinite(stored) & ~holes
        if bad.any():
            raise ImageError(
                f"{name}: {int(bad.sum())} of {stored.size} values are NaN or infinite: replace them, or declare them as "
                "no data in the file",
                code="not_finite",
            )
    empty_C = None if holes is None else empty_bands(holes)
    valid = valid_values(stored, None if holes is None or empty_C is None else without_holes(holes, empty_C))
    if not len(valid):
        raise ImageError(f"{name}: holds no valid pixel, only the file's no-data value", code="constant")
    if is_blank(valid):
        raise ImageError(
            f"{name}: every pixel has the value {_format_values(valid[0])}: it shows nothing", code="constant"
        )
    # A valid pixel has data in every band that has any.
    return valid if empty_C is None or not empty_C.any() else np.where(empty_C, np.float32(np.nan), valid)


def neutral(spec: Preprocess) -> NDArray[Any]:
    """The value that replaces missing pixels, [C] in the files' own units; mean and std turn it into 0."""
    mean = np.asarray(spec.mean)
    if spec.scaling is None:
        return (255 * mean).round().astype(np.uint8)
    return spec.scaling.from_unit(mean)


def _checked(stored: NDArray[Any], header: Header, spec: Preprocess, name: str) -> Pixels:
    """Stored values in the graph's dtype: refused if they would be wrong, filled in where they are missing."""
    valid = usable(stored, header.nodata, name)
    if header.dtype != spec.stored_as:
        _refuse_other_units(valid, spec, name)
    if spec.scaling is not None and spec.scaling.measured:
        _refuse_saturated(valid, header, spec, name)
    elif spec.scaling is not None:
        _refuse_unseen(valid, spec.scaling, name)
    pixels: Pixels = stored.astype(spec.dtype, copy=False)
    if header.inverted:
        assert spec.scaling is not None
        pixels = np.asarray(spec.scaling.low, np.float32) + np.asarray(spec.scaling.high, np.float32) - pixels
    holes = missing(stored, header.nodata)
    return pixels if holes is None else np.where(holes, neutral(spec), pixels)


def _refuse_saturated(valid: NDArray[Any], header: Header, spec: Preprocess, name: str) -> None:
    assert spec.scaling is not None
    outside = (
        (valid < np.asarray(spec.scaling.low, np.float32)) | (valid > np.asarray(spec.scaling.high, np.float32))
    ).mean(axis=0)
    band = int(outside.argmax())
    if outside[band] > MOST_CLIPPED:
        values, low, high = valid[:, band], spec.scaling.low[band], spec.scaling.high[band]
        end = values.min() if values.min() < low else values.max()
        remedy = "is it in the same units? If so, adapt with a wider value_range"
        if header.format == "TIFF" and (values == end).mean() > outside[band] / 2:
            remedy = (
                f"most of it is exactly {end:g}: if that means no data, declare it in the file (gdal_edit.py -a_nodata {end:g}), "
                "else adapt with a wider value_range"
            )
        raise ImageError(
            f"{name}: {outside[band]:.1%} of band {band + 1} lies outside {low:g} … {high:g}, the range the model was made for "
            f"(seen: {values.min():g} … {values.max():g}): {remedy}",
            code="saturated",
        )


def _refuse_unseen(valid: NDArray[Any], scaling: Scaling, name: str) -> None:
    """Refuse an image that a chosen range leaves all black or all white, which cannot be on purpose."""
    if is_unseen(valid, scaling.low, scaling.high):
        raise ImageError(
            f"{name}: every value lies outside {scaling.low[0]:g} … {scaling.high[0]:g}, the range that was chosen (seen: "
            f"{np.nanmin(valid):g} … {np.nanmax(valid):g}): it shows nothing. Is it in the same units? If so, choose a wider value_range",
            code="saturated",
        )


def _refuse_other_units(valid: NDArray[Any], spec: Preprocess, name: str) -> None:
    """Refuse float values that all round to one integer when the model was made for integer files: wrong units."""
    if np.dtype(spec.stored_as).kind in "iu" and is_blank(valid.round()):
        raise ImageError(
            f"{name}: the values ({np.nanmin(valid):g} … {np.nanmax(valid):g}) all round to one whole number, but the model was made "
            f"for {spec.stored_as}: give them in the files' own units",
            code="saturated",
        )


def _check_scale(header: Header, ref: ImageRef, spec: Preprocess) -> None:
    """Refuse a scene given to a model of tiles: squeezed into its input, it would have another scale."""
    if spec.tile is None:
        return
    width, height = (header.width, header.height) if ref.window is None else (ref.window.width, ref.window.height)
    if ref.window is None:  # a tile as cut, or already downscaled to what the model resizes it to
        fits = width == height and width in (spec.tile, spec.resize_to)
    else:
        fits = max(width, height) <= spec.tile
    if not fits:
        raise ImageError(
            f"{ref.name}: {width} × {height} pixels, but the model was made for tiles of {spec.tile} × {spec.tile}: "
            f"cut it with tile={spec.tile} (`jepakit embed --tile {spec.tile}`)",
            code="wrong_scale",
        )


def _padded(pixels: Pixels, ref: ImageRef, spec: Preprocess) -> Pixels:
    """Pad a tile of a scene that is smaller than a tile to the full size."""
    height, width = pixels.shape[:2]
    if ref.window is None or spec.tile is None or (height == spec.tile and width == spec.tile):
        return pixels
    full = np.empty((spec.tile, spec.tile, spec.bands), pixels.dtype)
    full[:] = neutral(spec)
    full[:height, :width] = pixels
    return full


def _format_values(values: NDArray[Any]) -> str:
    return first_few([f"{value:g}" for value in values.tolist()], 6)
