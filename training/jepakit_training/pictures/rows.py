"""Rows of small pictures with captions, as one PNG, for the contact sheet and the sheet of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jepakit._files import written
from jepakit.bundles.manifest import Preprocess
from jepakit.inspection import printable

_CELL, _GAP, _HEAD, _CAPTION, _FRAME = 160, 8, 34, 18, 4
_LETTERS_PX = 14
_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msgothic.ttc",
    "malgun.ttf", "simsun.ttc",
)  # fmt: skip
"""Fonts that systems have, in the order in which they are tried for letters that Pillow's own lacks (all but ASCII)."""
_NO_LETTER = "\U0010fffe"


class Cell(NamedTuple):
    """A picture, uint8 [H, W, 3], and its caption; an empty caption leaves its space to the one before it.

    mark  the colour of a frame and of the caption; empty: no frame, and black
    """

    picture: NDArray[np.uint8]
    caption: str = ""
    mark: str = ""


def draw(
    path: Path,
    title: str,
    blocks: Sequence[Sequence[str]],
    rows: Sequence[Sequence[Cell | None]],
    mark: tuple[str, str] | None = None,
) -> None:
    """Write a PNG of `rows`, in blocks of columns headed by the words of `blocks`, with a small gap between blocks.

    rows  None leaves a place empty
    mark  a key and a text to store in the file, to recognise it later

    WriteError if it cannot be written; an earlier file is kept then.
    """
    lefts, heads, left = [], [], _GAP
    for block in blocks:
        for words in block:
            lefts.append(left)
            heads.append(words)
            left += _CELL + _GAP
        left += _GAP
    row_height = _CELL + _CAPTION + _GAP
    sheet = Image.new("RGB", (left, _HEAD + 24 + len(rows) * row_height), "white")
    pen, font = ImageDraw.Draw(sheet), _fonts()[0]
    pen.text((_GAP, 6), title, "black", ImageFont.load_default(17))
    for at, words in zip(lefts, heads, strict=True):
        pen.text((at, _HEAD), words, "#555555", font)
    for place, row in enumerate(rows):
        top = _HEAD + 22 + place * row_height
        columns = 0
        for at, cell in reversed([*zip(lefts, row, strict=False)]):
            columns += 1
            if cell is None:
                continue
            sheet.paste(Image.fromarray(cell.picture).resize((_CELL, _CELL), Image.Resampling.BICUBIC), (at, top))
            if cell.mark:
                pen.rectangle((at, top, at + _CELL - 1, top + _CELL - 1), outline=cell.mark, width=_FRAME)
            if cell.caption:
                caption, its_font = _fitting(cell.caption, columns * _CELL)
                pen.text((at, top + _CELL + 1), caption, cell.mark or "black", its_font)
                columns = 0
    info = PngInfo()
    if mark is not None:
        info.add_text(*mark)
    with written(path) as file:
        sheet.save(file, "PNG", pnginfo=info)


def as_picture(pixels: NDArray[np.uint8] | NDArray[np.float32], spec: Preprocess) -> NDArray[np.uint8]:
    """Pixels [H, W, C], as read by `spec`, as a picture [H, W, 3]."""
    if spec.scaling is not None:
        return three_bands((255 * spec.scaling.to_unit(pixels)).round().astype(np.uint8))
    return three_bands(pixels.astype(np.uint8, copy=False))


def three_bands(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey for one band or two; the first three bands, last first (blue, green, red), for many."""
    bands = pixels.shape[2]
    chosen = [0, 0, 0] if bands < 3 else [0, 1, 2] if bands == 3 else [2, 1, 0]
    return np.ascontiguousarray(pixels[:, :, chosen])


def bands_shown(bands: int) -> str:
    """Which bands `three_bands` shows, for a title; empty where it is as expected."""
    return "; shown: bands 3, 2, 1 as red, green, blue" if bands > 3 else "; shown: band 1" if bands == 2 else ""


def _fitting(name: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A name, cut in its middle to a width in pixels, and a font for it; letters that no font here has are escaped."""
    text = printable(name)
    font = next((font for font in _fonts() if all(_has(font, letter) for letter in set(text))), None)
    if font is None:
        font = _fonts()[0]
        letters = [each.encode("ascii", "backslashreplace").decode() for each in text]
    else:
        letters = list(text)
    if font.getlength("".join(letters)) <= width:
        return "".join(letters), font
    fitting = (short for count in range(len(letters), -1, -1) if font.getlength(short := _cut(letters, count)) <= width)
    return next(fitting, ""), font


def _cut(letters: Sequence[str], count: int) -> str:
    """`count` of the letters around an ellipsis, two thirds of them from the end, where the names of files and classes often differ."""
    start = count // 3
    return "".join([*letters[:start], "...", *letters[len(letters) - count + start :]])


@cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """Pillow's own font, and those of `_FONTS` that there are."""
    own = ImageFont.load_default(_LETTERS_PX)
    assert isinstance(own, ImageFont.FreeTypeFont), "a wheel of Pillow has FreeType"
    found = [own]
    for name in _FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, _LETTERS_PX))
    return tuple(found)


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a letter: whether it draws it differently from its placeholder for missing ones."""
    return letter.isascii() or bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))
