"""Scenes and series cut into items: windows of a tile's size, and frames."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import counted, did_you_mean
from jepakit._threads import THREADS, in_threads
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.nodata import is_blank, valid_pixels
from jepakit.readers import Header, Raster, Window
from jepakit.sources.imagelist import ImageList, Pieces

MIN_TILE = 8
WHOLE = -1
"""In `Pieces.frame`: no frame was chosen."""
_WINDOWS_AT_ONCE = 64
_SLOW = 16
_LARGE_BYTES = 64 << 20
# Each thread holding a decoded scene would be the machine's memory: large ones come one after the other.
_one_large = threading.Lock()


@dataclass(frozen=True)
class Cut:
    """How to cut: see `list_images`. Raises ConfigError for what does not fit together."""

    tile: int | None
    overlap: int
    min_valid: float
    frame: int | Literal["each"] | None

    def __post_init__(self) -> None:
        self._make_whole("tile", "a number of pixels")
        self._make_whole("overlap", "a number of pixels")
        if not isinstance(self.frame, str):
            self._make_whole("frame", "a number or each")
        if self.tile is None and self.overlap:
            raise ConfigError(
                f"overlap = {self.overlap} without tile: an overlap needs tile, the pixels a side of the tiles"
            )
        if self.tile is not None and self.tile < MIN_TILE:
            raise ConfigError(f"tile = {self.tile}: the least is {MIN_TILE} pixels")
        if self.tile is not None and not 0 <= self.overlap < self.tile:
            raise ConfigError(f"overlap = {self.overlap}: wanted 0 or more, and less than tile = {self.tile}")
        if not isinstance(self.min_valid, int | float) or not 0 <= self.min_valid <= 1:
            raise ConfigError(f"min_valid = {self.min_valid}: wanted a share from 0 to 1")
        if isinstance(self.frame, str) and self.frame != "each":
            raise ConfigError(f"frame = {self.frame!r}: wanted a number or each{did_you_mean(self.frame, ['each'])}")
        if isinstance(self.frame, int) and self.frame < 0:
            raise ConfigError(f"frame = {self.frame}: frames are counted from 0")

    def _make_whole(self, name: str, wanted: str) -> None:
        """numpy's whole numbers become Python's; ConfigError for any other value, True and False too."""
        value = getattr(self, name)
        if value is None:
            return
        try:
            whole = operator.index(value)
        except TypeError:
            whole = None
        if whole is None or isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r}: wanted {wanted}")
        object.__setattr__(self, name, whole)


def cut(images: ImageList, how: Cut, *, most_unreadable: float) -> ImageList:
    """The list with every image cut into its tiles and frames; labels follow, and an image's pieces are one group.

    most_unreadable  the share of files that may be left out since they cannot be opened

    Headers are read only for tiles and "each"; the pixels of tiles are looked at once, and tiles that show nothing
    are left out. Raises DataError when nothing is left, or too many files cannot be opened; ImageError for the first
    of them where none may be left out.
    """
    if how.tile is None and how.frame is None:
        return images
    if how.tile is None and isinstance(how.frame, int):
        count = len(images)
        return replace(images, pieces=Pieces(np.arange(count), np.full(count, how.frame, np.int32), None))
    headers, unreadable = _headers(images, most_unreadable)
    pieces = _all_pieces(headers, how)
    if how.tile is None:
        return _select(images, pieces, how, _notes(images, headers, unreadable, pieces, how))
    left_out, pieces = _worthwhile(images, headers, pieces, how)
    return _select(images, pieces, how, _notes(images, headers, unreadable, pieces, how, left_out))


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


def _headers(images: ImageList, most_unreadable: float) -> tuple[dict[int, Header], list[ImageError]]:
    """The headers by place, and the errors of files that cannot be opened."""

    def header(place: int) -> Header | ImageError:
        try:
            with _open(images, place) as raster:
                return raster.header
        except ImageError as error:
            if not most_unreadable:
                raise
            return error

    answers = in_threads(header, range(len(images)), "headers", threads=images.threads(THREADS))
    unreadable = [answer for answer in answers if isinstance(answer, ImageError)]
    if len(unreadable) > most_unreadable * len(answers):
        raise DataError(
            f"{len(unreadable)} of {len(answers)} files cannot be opened; the first: {unreadable[0]}; "
            f"{100 * most_unreadable:g} % may be left out: mend or remove them (or, to train, allow a larger share: "
            "--set most_skipped=SHARE)"
        )
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


class _LeftOut(NamedTuple):
    """How many tiles were not worth keeping, and why."""

    invalid: int
    blank: int


def _worthwhile(images: ImageList, headers: dict[int, Header], pieces: Pieces, how: Cut) -> tuple[_LeftOut, Pieces]:
    """The tiles that have enough valid pixels and show anything; DataError when none does."""
    assert how.tile is not None
    assert pieces.window is not None
    total = len(pieces.image)
    full = pieces.window[:, 2].astype(float) * pieces.window[:, 3] / how.tile**2
    pieces = _only(pieces, full >= how.min_valid)
    if total and not len(pieces.image):
        wide, high = max(((header.width, header.height) for header in headers.values()), key=prod)
        raise DataError(
            f"tile = {how.tile} is larger than the images (the largest of {len(headers):,} is {wide} × {high}), which "
            f"fill less than {how.min_valid:.0%} of a tile: lower tile or min_valid"
        )
    share, blank = _look(images, headers, pieces, how.tile)
    enough = share >= how.min_valid
    left_out = _LeftOut(total - int(enough.sum()), int((enough & blank).sum()))
    pieces = _only(pieces, enough & ~blank)
    if not len(pieces.image):
        raise DataError(
            f"none of the {counted(total, 'tile')} of {how.tile} × {how.tile} in {counted(len(headers), 'image')} can "
            f"be used ({_describe_left_out(left_out, how)}): lower min_valid if they hold what you look for, or choose "
            "other images"
        )
    return left_out, pieces


def _look(
    images: ImageList, headers: dict[int, Header], pieces: Pieces, tile: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The share of a full tile that each piece's valid pixels fill, and whether the piece is blank.

    A piece that cannot be read passes: whoever reads it later reports it.
    """
    share, blank = np.ones(len(pieces.image)), np.zeros(len(pieces.image), np.bool_)
    jobs: list[tuple[Header, range]] = []
    for place, header in headers.items():
        first, end = (int(np.searchsorted(pieces.image, place, side)) for side in ("left", "right"))
        # A file that cannot be read by windows is decoded once for all of them.
        step = _WINDOWS_AT_ONCE if header.windowed else max(1, end - first)
        jobs += [(header, range(start, min(start + step, end))) for start in range(first, end, step)]
    looked = in_threads(
        lambda job: _measure(images, pieces, *job), jobs, "look for empty tiles", threads=images.threads(THREADS)
    )
    for (_, places), seen in zip(jobs, looked, strict=True):
        if seen is not None:
            share[places.start : places.stop] = np.array([valid for valid, _ in seen]) / tile**2
            blank[places.start : places.stop] = [nothing for _, nothing in seen]
    return share, blank


def _measure(images: ImageList, pieces: Pieces, header: Header, places: range) -> list[tuple[int, bool]] | None:
    """Of each of one image's pieces the number of valid pixels and whether it is blank; None if one cannot be read."""
    try:
        with _room_for(header), _open(images, int(pieces.image[places.start])) as raster:
            return [_judge(pixels_HWC, header.nodata) for pixels_HWC in _pixels(raster, pieces, header, places)]
    except ImageError:
        return None


def _room_for(header: Header) -> AbstractContextManager[Any]:
    size = header.height * header.width * header.bands * np.dtype(header.dtype).itemsize
    return _one_large if not header.windowed and size > _LARGE_BYTES else nullcontext()


def _pixels(raster: Raster, pieces: Pieces, header: Header, places: range) -> Iterator[NDArray[Any]]:
    """The pixels of each piece, [H, W, C]."""
    assert pieces.window is not None
    whole: tuple[int, NDArray[Any]] | None = None
    for place in places:
        x, y, wide, high = map(int, pieces.window[place])
        frame = max(0, int(pieces.frame[place]))
        if header.windowed:
            yield raster.read(Window(x, y, wide, high), frame=frame)
            continue
        if whole is None or whole[0] != frame:
            whole = frame, raster.read(frame=frame)
        yield whole[1][y : y + high, x : x + wide]


def _judge(pixels_HWC: NDArray[Any], nodata: float | None) -> tuple[int, bool]:
    valid = valid_pixels(pixels_HWC, nodata)
    count = pixels_HWC.shape[0] * pixels_HWC.shape[1] if valid is None else int(valid.sum())
    return count, is_blank(pixels_HWC, valid)


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
    images: ImageList, headers: dict[int, Header], unreadable: list[ImageError], pieces: Pieces, how: Cut,
    left_out: _LeftOut | None = None,
) -> str:  # fmt: skip
    count, of_images = len(pieces.image), counted(len(headers), "image")
    of_tiles = "" if how.tile is None else f" of {how.tile} × {how.tile}"
    notes = [images.note, f"{counted(count, 'frame' if how.tile is None else 'tile')}{of_tiles} of {of_images}"]
    if left_out is not None and any(left_out):
        notes.append(f"left out: {_describe_left_out(left_out, how)}")
    if images.groups is None and count > len(np.unique(pieces.image)):
        notes.append("the pieces of an image are one group")
    counts = np.bincount(pieces.image, minlength=len(images))
    slow = [images.ids[place] for place, header in headers.items() if not header.windowed and counts[place] > _SLOW]
    if how.tile is not None and slow:
        notes.append(
            f"{slow[0]} is decoded whole for each of its tiles ({counted(len(slow), 'such file')}): tiled TIFF is faster"
        )
    if unreadable:
        notes.append(f"{counted(len(unreadable), 'file')} that cannot be opened left out ({unreadable[0]})")
    return "; ".join(filter(None, notes))


def _describe_left_out(left_out: _LeftOut, how: Cut) -> str:
    invalid = f"{counted(left_out.invalid, 'tile')} with under {how.min_valid:.0%} valid pixels"
    blank = f"{counted(left_out.blank, 'blank tile')}, of one value everywhere"
    return " and ".join(words for words, number in ((invalid, left_out.invalid), (blank, left_out.blank)) if number)
