"""Scenes and series cut into items: windows of a tile's size, and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import did_you_mean
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.readers import Header, Raster, Window
from jepakit.sources._threads import in_threads
from jepakit.sources.imagelist import ImageList, Pieces

MIN_TILE = 8
WHOLE = -1
"""In `Pieces.frame`: no frame was chosen."""
_MAX_UNREADABLE = 0.01
_WINDOWS_AT_ONCE = 64
_SLOW = 16


@dataclass(frozen=True)
class Cut:
    """How to cut: see `list_images`. Raises ConfigError for what does not fit together."""

    tile: int | None
    overlap: int
    min_valid: float
    frame: int | Literal["each"] | None

    def __post_init__(self) -> None:
        if self.tile is None and self.overlap:
            raise ConfigError(f"overlap = {self.overlap} without tile: overlap is of tiles, give tile too")
        if self.tile is not None and self.tile < MIN_TILE:
            raise ConfigError(f"tile = {self.tile}: the least is {MIN_TILE} pixels")
        if self.tile is not None and not 0 <= self.overlap < self.tile:
            raise ConfigError(f"overlap = {self.overlap}: wanted 0 or more, and less than tile = {self.tile}")
        if not 0 <= self.min_valid <= 1:
            raise ConfigError(f"min_valid = {self.min_valid}: wanted a share from 0 to 1")
        if isinstance(self.frame, str) and self.frame != "each":
            raise ConfigError(f"frame = {self.frame!r}: wanted a number or each{did_you_mean(self.frame, ['each'])}")
        if isinstance(self.frame, int) and self.frame < 0:
            raise ConfigError(f"frame = {self.frame}: frames are counted from 0")


def cut(images: ImageList, how: Cut) -> ImageList:
    """The list with every image cut into its tiles and frames; labels follow, and an image's pieces are one group.

    Headers are read only for tiles and "each"; pixels only where the header knows a value for "no data".
    Raises DataError when nothing is left, or over 1 % of the files cannot be opened.
    """
    if how.tile is None and how.frame is None:
        return images
    if how.tile is None and isinstance(how.frame, int):
        count = len(images)
        return replace(images, pieces=Pieces(np.arange(count), np.full(count, how.frame, np.int32), None))
    headers, unreadable = _headers(images)
    pieces = _all_pieces(headers, how)
    total = len(pieces.image)
    if how.tile is not None:
        pieces = _only(pieces, _valid_shares(images, headers, pieces, how.tile) >= how.min_valid)
    if not len(pieces.image):
        raise DataError(
            f"none of the {total} tiles of {how.tile} × {how.tile} in {len(headers)} images has {how.min_valid:.0%} "
            "valid pixels: lower tile or min_valid"
        )
    return _select(images, pieces, how, _notes(images, headers, unreadable, pieces, total, how))


def grid(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """The windows that cover an image, row by row; the last of a row or column is shifted inwards to be full.

    An image smaller than the tile in a dimension is taken as it is there.
    """
    high, wide = min(tile, height), min(tile, width)
    return [
        Window(x, y, wide, high)
        for y in _starts(height, tile, tile - overlap)
        for x in _starts(width, tile, tile - overlap)
    ]


def _starts(length: int, tile: int, stride: int) -> list[int]:
    return [*range(0, length - tile, stride), max(0, length - tile)]


def _headers(images: ImageList) -> tuple[dict[int, Header], list[ImageError]]:
    """The headers by place, and what was said of the files that have none."""

    def header(place: int) -> Header | ImageError:
        try:
            with _open(images, place) as raster:
                return raster.header
        except ImageError as error:
            return error

    answers = in_threads(header, range(len(images)), "headers")
    unreadable = [answer for answer in answers if isinstance(answer, ImageError)]
    if len(unreadable) > _MAX_UNREADABLE * len(answers):
        raise DataError(f"{len(unreadable)} of {len(answers)} files cannot be opened; the first: {unreadable[0]}")
    return {place: answer for place, answer in enumerate(answers) if isinstance(answer, Header)}, unreadable


def _open(images: ImageList, place: int) -> Raster:
    from jepakit.readers import open_raster

    ref = images[place]
    return open_raster(ref.data, name=ref.name)


def _all_pieces(headers: dict[int, Header], how: Cut) -> Pieces:
    image: list[int] = []
    frame: list[int] = []
    windows: list[Window] = []
    for place, header in headers.items():
        cells = None if how.tile is None else grid(header.height, header.width, how.tile, how.overlap)
        for number in _frames(header, how):
            windows += cells or []
            image += [place] * (1 if cells is None else len(cells))
            frame += [number] * (1 if cells is None else len(cells))
    windows_N4 = None if how.tile is None else np.array(windows, np.int32).reshape(-1, 4)
    return Pieces(np.array(image, np.int64), np.array(frame, np.int32), windows_N4)


def _frames(header: Header, how: Cut) -> Sequence[int]:
    if how.frame == "each":
        return range(header.frames) if header.frames > 1 else [WHOLE]
    return [WHOLE if how.frame is None else how.frame]


def _valid_shares(images: ImageList, headers: dict[int, Header], pieces: Pieces, tile: int) -> NDArray[np.float64]:
    """How much of a full tile each piece's valid pixels are; without a "no data" value all pixels are valid."""
    assert pieces.window is not None
    shares = pieces.window[:, 2].astype(float) * pieces.window[:, 3] / tile**2
    jobs: list[tuple[Header, range]] = []
    for place, header in headers.items():
        if header.nodata is not None:
            first, end = (int(np.searchsorted(pieces.image, place, side)) for side in ("left", "right"))
            # A file that cannot be read by windows is decoded once for all of them.
            step = _WINDOWS_AT_ONCE if header.windowed else end - first
            jobs += [(header, range(start, min(start + step, end))) for start in range(first, end, step)]
    measured = in_threads(lambda job: _measure(images, pieces, *job, tile), jobs, "tiles without data")
    for (_, places), values in zip(jobs, measured, strict=True):
        if values is not None:
            shares[places.start : places.stop] = values
    return shares


def _measure(images: ImageList, pieces: Pieces, header: Header, places: range, tile: int) -> list[float] | None:
    """The valid shares of one image's pieces; None when the image cannot be read, which is for its reader to say."""
    assert pieces.window is not None
    assert header.nodata is not None
    shares = []
    whole: tuple[int, NDArray[Any]] | None = None
    try:
        with _open(images, int(pieces.image[places.start])) as raster:
            for place in places:
                x, y, wide, high = map(int, pieces.window[place])
                frame = max(0, int(pieces.frame[place]))
                if header.windowed:
                    pixels_HWC = raster.read(Window(x, y, wide, high), frame=frame)
                else:
                    if whole is None or whole[0] != frame:
                        whole = frame, raster.read(frame=frame)
                    pixels_HWC = whole[1][y : y + high, x : x + wide]
                shares.append(_count_valid(pixels_HWC, header.nodata) / tile**2)
    except ImageError:
        return None
    return shares


def _count_valid(pixels_HWC: NDArray[Any], nodata: float) -> int:
    """Pixels of which at least one band has a value."""
    has_value = ~np.isnan(pixels_HWC) if np.isnan(nodata) else pixels_HWC != nodata
    return int(has_value.any(axis=-1).sum())


def _only(pieces: Pieces, keep: NDArray[np.bool_]) -> Pieces:
    window = None if pieces.window is None else pieces.window[keep]
    return Pieces(pieces.image[keep], pieces.frame[keep], window)


def _select(images: ImageList, pieces: Pieces, how: Cut, note: str) -> ImageList:
    """The list whose items are the pieces: names, labels, groups and split follow the image."""
    cut_up = len(np.unique(pieces.image)) < len(pieces.image)
    groups = images.groups if images.groups is not None or not cut_up else tuple(images.ids)
    return replace(
        images,
        ids=_names(images.ids, pieces, how),
        labels=_follow(images.labels, pieces),
        groups=_follow(groups, pieces),
        held_out=None if images.held_out is None else images.held_out[pieces.image],
        note=note,
        pieces=pieces,
    )


def _follow(values: tuple[str, ...] | None, pieces: Pieces) -> tuple[str, ...] | None:
    return None if values is None else tuple(values[place] for place in pieces.image.tolist())


def _names(ids: Sequence[str], pieces: Pieces, how: Cut) -> tuple[str, ...]:
    names = [ids[place] for place in pieces.image.tolist()]
    if how.frame == "each":
        frames = pieces.frame.tolist()
        names = [name if frame == WHOLE else f"{name}#frame={frame}" for name, frame in zip(names, frames, strict=True)]
    if pieces.window is not None:
        windows = pieces.window.tolist()
        names = [f"{name}#{','.join(map(str, window))}" for name, window in zip(names, windows, strict=True)]
    return tuple(names)


def _notes(
    images: ImageList, headers: dict[int, Header], unreadable: list[ImageError], pieces: Pieces, total: int, how: Cut
) -> str:
    count = len(pieces.image)
    what = "frames" if how.tile is None else f"tiles of {how.tile} × {how.tile}"
    notes = [images.note, f"{count} {what} of {len(headers)} images"]
    if total > count:
        notes.append(f"{total - count} tiles with under {how.min_valid:.0%} valid pixels left out")
    if images.groups is None and count > len(np.unique(pieces.image)):
        notes.append("the pieces of an image are one group")
    counts = np.bincount(pieces.image, minlength=len(images))
    slow = [images.ids[place] for place, header in headers.items() if not header.windowed and counts[place] > _SLOW]
    if how.tile is not None and slow:
        notes.append(f"{slow[0]} is decoded whole for each of its tiles ({len(slow)} such files): tiled TIFF is faster")
    if unreadable:
        notes.append(f"{len(unreadable)} files that cannot be opened left out ({unreadable[0]})")
    return "; ".join(filter(None, notes))
