"""Scenes and series cut into items: tile-sized windows, and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jepakit._checks import exceeds, is_share, is_whole
from jepakit._messages import counted, did_you_mean, joined
from jepakit._threads import THREADS, in_threads
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.nodata import is_blank, is_unseen, valid_pixels, valid_values
from jepakit.readers import DEFAULT_LIMITS, SCENE_LIMITS, Header, Limits, Raster, Window, open_raster
from jepakit.readers.room import room_for
from jepakit.readers.scenes import KEPT_BYTES, decoded_around
from jepakit.sources.imagelist import ImageList, Pieces
from jepakit.sources.spread import evenly_spread

_Name = TypeVar("_Name")

MIN_TILE = 8
WHOLE = -1
"""In `Pieces.frame`: no frame was chosen."""
_WINDOWS_AT_ONCE = 64
_SLOW = 16
_WIDE = 4


@dataclass(frozen=True)
class Cut:
    """How to cut: see `list_images`. Raises ConfigError for settings that do not fit together."""

    tile: int | None
    overlap: int
    min_valid: float
    frame: int | Literal["each"] | None
    chosen_range: tuple[float, float] | None = None
    """The chosen range of values, if any: a tile with no values in it is blank, like one of a single value."""

    def __post_init__(self) -> None:
        self._make_whole("tile", "a number of pixels")
        self._make_whole("overlap", "a number of pixels")
        if not isinstance(self.frame, str):
            self._make_whole("frame", "a number or each")
        if self.tile is None and self.overlap:
            raise ConfigError(f"overlap = {self.overlap} without tile: give tile too, the side of the tiles in pixels")
        if self.tile is not None and self.tile < MIN_TILE:
            raise ConfigError(f"tile = {self.tile}: the least is {MIN_TILE} pixels")
        if self.tile is not None and not 0 <= self.overlap < self.tile:
            raise ConfigError(f"overlap = {self.overlap}: give 0 or more, and less than tile = {self.tile}")
        if not is_share(self.min_valid):
            raise ConfigError(f"min_valid = {self.min_valid}: give a share from 0 to 1")
        if isinstance(self.frame, str) and self.frame != "each":
            raise ConfigError(f"frame = {self.frame!r}: give a number or each{did_you_mean(self.frame, ['each'])}")
        if isinstance(self.frame, int) and self.frame < 0:
            raise ConfigError(f"frame = {self.frame}: frames are counted from 0")

    @property
    def cuts(self) -> bool:
        """Whether an image becomes several."""
        return self.tile is not None or self.frame == "each"

    def _make_whole(self, name: str, wanted: str) -> None:
        """Convert a numpy integer to Python's; ConfigError for any other type, including bool."""
        value = getattr(self, name)
        if value is None:
            return
        if not is_whole(value):
            raise ConfigError(f"{name} = {value!r}: give {wanted}")
        object.__setattr__(self, name, int(value))


def cut_into_pieces(images: ImageList, cut: Cut, *, most_skipped: float, most_cut: int | None = None) -> ImageList:
    """The list with every image cut into tiles and frames; labels follow, and the pieces of an image form a group.

    most_skipped  share of the files that may be left out because they cannot be opened
    most_cut      how many of the images, spread over the list, are cut; None: all, otherwise the others are left out

    Headers are read only for tiles and "each"; the pixels of tiles are read once, and tiles that show nothing are
    left out. Raises DataError when nothing is left, or too many files cannot be opened; ImageError for the first
    of them if none may be left out.
    """
    if cut.tile is None and cut.frame is None:
        return images
    if cut.tile is None and isinstance(cut.frame, int):
        count = len(images)
        return replace(images, pieces=Pieces(np.arange(count), np.full(count, cut.frame, np.int32), None))
    indices = evenly_spread(len(images), most_cut or len(images)).tolist()
    opened = _open_all(images, indices, DEFAULT_LIMITS if cut.tile is None else SCENE_LIMITS, most_skipped)
    pieces, left_out = _all_pieces(opened, cut), _LeftOut(0, 0)
    if cut.tile is not None:
        pieces, left_out = _keep_valid_tiles(opened, pieces, cut)
    return _list_pieces(images, pieces, cut, _note(opened, pieces, cut, left_out))


def grid(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """The windows that cover an image, row by row; the last of a row or column is shifted inwards to full size.

    In a dimension in which the image is smaller than a tile, the window has the image's size.
    """
    high, wide = min(tile, height), min(tile, width)
    return [
        Window(x, y, wide, high)
        for y in _starts(height, tile, tile - overlap)
        for x in _starts(width, tile, tile - overlap)
    ]


def _starts(length: int, tile: int, stride: int) -> list[int]:
    return [*range(0, length - tile, stride), max(0, length - tile)]


@dataclass(frozen=True)
class _Opened:
    """The images, the headers of those that can be opened, by index, and the errors of the others."""

    images: ImageList
    headers: dict[int, Header]
    unreadable: list[ImageError]


def _open_all(images: ImageList, indices: list[int], limits: Limits, most_skipped: float) -> _Opened:
    def read_header(index: int) -> Header | ImageError:
        try:
            with _open(images, index, limits) as raster:
                return raster.header
        except ImageError as error:
            if not most_skipped:
                raise
            return error

    answers = in_threads(read_header, indices, "headers", threads=images.threads(THREADS))
    unreadable = [answer for answer in answers if isinstance(answer, ImageError)]
    if exceeds(len(unreadable), len(answers), most_skipped):
        raise DataError(
            f"{len(unreadable)} of {len(answers)} files cannot be opened; the first: {unreadable[0]}; "
            f"{100 * most_skipped:g} % may be left out: repair or remove them, or allow a larger share, most_skipped=SHARE"
        )
    headers = {index: answer for index, answer in zip(indices, answers, strict=True) if isinstance(answer, Header)}
    return _Opened(images, headers, unreadable)


def _open(images: ImageList, index: int, limits: Limits) -> Raster:
    ref = images[index]
    return open_raster(ref.data, name=ref.name, limits=limits)


def _all_pieces(opened: _Opened, cut: Cut) -> Pieces:
    image: list[int] = []
    frame: list[int] = []
    windows: list[Window] = []
    for index, header in opened.headers.items():
        tiles = [] if cut.tile is None else grid(header.height, header.width, cut.tile, cut.overlap)
        for number in _frames(header, cut):
            count = 1 if cut.tile is None else len(tiles)
            image += [index] * count
            frame += [number] * count
            windows += tiles
    windows_N4 = None if cut.tile is None else np.array(windows, np.int32).reshape(-1, 4)
    return Pieces(np.array(image, np.int64), np.array(frame, np.int32), windows_N4)


def _frames(header: Header, cut: Cut) -> Sequence[int]:
    if cut.frame == "each":
        return range(header.frames) if header.frames > 1 else [WHOLE]
    return [WHOLE if cut.frame is None else cut.frame]


class _LeftOut(NamedTuple):
    """How many tiles were left out for too few valid pixels, and how many as blank."""

    invalid: int
    blank: int


def _keep_valid_tiles(opened: _Opened, tiles: Pieces, cut: Cut) -> tuple[Pieces, _LeftOut]:
    """The tiles that have enough valid pixels and are not blank; DataError if none is left."""
    assert tiles.window is not None
    assert cut.tile is not None
    tile, min_valid = cut.tile, cut.min_valid
    count = len(tiles)
    tiles = tiles.where(tiles.window[:, 2:].prod(axis=1, dtype=np.int64) / tile**2 >= min_valid)
    if count and not len(tiles):
        wide, high = max(((header.width, header.height) for header in opened.headers.values()), key=prod)
        raise DataError(
            f"tile = {tile} is larger than the images (the largest of {len(opened.headers):,} is {wide} × {high}), "
            f"which fill less than {min_valid:.0%} of a tile: lower tile or min_valid"
        )
    n_valid_N, blank_N = _measure_tiles(opened, tiles, cut.chosen_range)
    enough_N = n_valid_N / tile**2 >= min_valid
    left_out = _LeftOut(count - int(enough_N.sum()), int((enough_N & blank_N).sum()))
    tiles = tiles.where(enough_N & ~blank_N)
    if not len(tiles):
        raise DataError(
            f"none of the {counted(count, 'tile')} of {tile} × {tile} in {counted(len(opened.headers), 'image')} can "
            f"be used ({_describe_left_out(left_out, cut)}): lower min_valid if they hold what you look for, or "
            "choose other images"
        )
    return tiles, left_out


def _measure_tiles(
    opened: _Opened, tiles: Pieces, chosen_range: tuple[float, float] | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each tile's number of valid pixels, and whether it is blank.

    A tile that cannot be read counts as having infinitely many: it is kept, and reading it later reports the error.
    """
    n_valid_N, blank_N = np.full(len(tiles), np.inf), np.zeros(len(tiles), np.bool_)
    jobs: list[tuple[Header, slice]] = []
    for index, header in opened.headers.items():
        first, end = (int(np.searchsorted(tiles.image, index, side)) for side in ("left", "right"))
        step = _windows_at_once(header, tiles.where(slice(first, end)))
        jobs += [(header, slice(start, min(start + step, end))) for start in range(first, end, step)]
    measured = in_threads(
        lambda job: _measure_tiles_of_one(opened.images, job[0], tiles.where(job[1]), chosen_range),
        jobs,
        "look for empty tiles",
        threads=opened.images.threads(THREADS),
    )
    for (_, part), numbers in zip(jobs, measured, strict=True):
        if numbers is not None:
            n_valid_N[part], blank_N[part] = zip(*numbers, strict=True)
    return n_valid_N, blank_N


def _windows_at_once(header: Header, tiles: Pieces) -> int:
    """How many tiles of one image to measure together, so that hardly anything is decoded twice."""
    assert tiles.window is not None
    if not header.windowed or not len(tiles):
        return max(1, len(tiles))
    if not header.strip:
        return _WINDOWS_AT_ONCE
    height = int(tiles.window[0, 3])
    in_a_row = int(np.count_nonzero((tiles.window[:, 1] == tiles.window[0, 1]) & (tiles.frame == tiles.frame[0])))
    return in_a_row * max(ceil(_WINDOWS_AT_ONCE / in_a_row), ceil(header.strip / height))


def _measure_tiles_of_one(
    images: ImageList, header: Header, tiles: Pieces, chosen_range: tuple[float, float] | None
) -> list[tuple[int, bool]] | None:
    """As `_measure_tiles`, for tiles of one image; None if one of them cannot be read."""
    assert tiles.window is not None
    numbers = []
    try:
        decoded = decoded_around(Window(*tiles.window[0].tolist()), header)
        size = header.decoded_bytes(decoded)
        with room_for(size), _open(images, int(tiles.image[0]), SCENE_LIMITS) as raster:
            for window, frame in zip(tiles.window.tolist(), tiles.frame.tolist(), strict=True):
                pixels_HWC = raster.read(Window(*window), frame=max(0, frame))
                valid_NC = valid_values(pixels_HWC, valid_pixels(pixels_HWC, header.nodata))
                blank = is_blank(valid_NC) or (chosen_range is not None and is_unseen(valid_NC, *chosen_range))
                numbers.append((len(valid_NC), blank))
    except ImageError:
        return None
    return numbers


def _list_pieces(images: ImageList, pieces: Pieces, cut: Cut, note: str) -> ImageList:
    """The list whose items are the pieces: names, labels, groups and split follow the image."""
    cut_up = len(np.unique(pieces.image)) < len(pieces)
    groups = images.groups if images.groups is not None or not cut_up else tuple(images.ids)
    return replace(
        images,
        ids=_piece_ids(images.ids, pieces, cut),
        labels=_of_each_piece(images.labels, pieces),
        groups=_of_each_piece(groups, pieces),
        held_out=None if images.held_out is None else images.held_out[pieces.image],
        note=note,
        pieces=pieces,
    )


def _of_each_piece(values: tuple[_Name, ...] | None, pieces: Pieces) -> tuple[_Name, ...] | None:
    return None if values is None else tuple(values[index] for index in pieces.image.tolist())


def _piece_ids(ids: Sequence[str], pieces: Pieces, cut: Cut) -> tuple[str, ...]:
    names = [ids[index] for index in pieces.image.tolist()]
    if cut.frame == "each":
        frames = pieces.frame.tolist()
        names = [name if frame == WHOLE else f"{name}#frame={frame}" for name, frame in zip(names, frames, strict=True)]
    if pieces.window is not None:
        windows = pieces.window.tolist()
        names = [f"{name}#{','.join(map(str, window))}" for name, window in zip(names, windows, strict=True)]
    return tuple(names)


def _note(opened: _Opened, pieces: Pieces, cut: Cut, left_out: _LeftOut) -> str:
    images, headers, unreadable = opened.images, opened.headers, opened.unreadable
    what, of_size = ("frame", "") if cut.tile is None else ("tile", f" of {cut.tile} × {cut.tile}")
    notes = [images.note, f"{counted(len(pieces), what)}{of_size} of {counted(len(headers), 'image')}"]
    if any(left_out):
        notes.append(f"left out: {_describe_left_out(left_out, cut)}")
    if images.groups is None and len(pieces) > len(np.unique(pieces.image)):
        notes.append("the pieces of an image are one group")
    counts = np.bincount(pieces.image, minlength=len(images))
    if cut.tile is not None:
        many = {index: header for index, header in headers.items() if counts[index] > _SLOW}
        whole = {index: header for index, header in many.items() if not header.windowed}
        by_rows = {index: header for index, header in many.items() if header.strip and header.width >= _WIDE * cut.tile}
        notes += [_slow_note(images, whole, "decoded whole"), _slow_note(images, by_rows, "decoded by whole rows")]
    if unreadable:
        notes.append(f"{counted(len(unreadable), 'file')} that cannot be opened left out ({unreadable[0]})")
    return joined(*notes)


def _slow_note(images: ImageList, slow: dict[int, Header], how: str) -> str:
    """A remark on scenes that are slow to read because they exceed `KEPT_BYTES` once decoded; empty if they do not."""
    if sum(header.decoded_bytes(Window(0, 0, header.width, header.height)) for header in slow.values()) <= KEPT_BYTES:
        return ""
    return (
        f"{counted(len(slow), 'file')} {'is' if len(slow) == 1 else 'are'} {how} ({images.ids[next(iter(slow))]} first), "
        "in training for nearly every tile: tiled TIFF is faster"
    )


def _describe_left_out(left_out: _LeftOut, cut: Cut) -> str:
    invalid = f"{counted(left_out.invalid, 'tile')} with under {cut.min_valid:.0%} valid pixels"
    outside = (
        ""
        if cut.chosen_range is None
        else f" or wholly on one side of {cut.chosen_range[0]:g} … {cut.chosen_range[1]:g}"
    )
    blank = f"{counted(left_out.blank, 'blank tile')}, of one value everywhere{outside}"
    return " and ".join(words for words, number in ((invalid, left_out.invalid), (blank, left_out.blank)) if number)
