"""Rows of small pictures with captions, as one PNG, for the contact sheet and the sheet of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jepakit._files import written
from jepakit.bundle import Preprocess
from jepakit.inspection import printable

_CELL, _GAP, _HEAD, _CAPTION = 160, 8, 34, 18
_LETTER = 8
"""Maximum width of a caption's letter in pixels."""


class Cell(NamedTuple):
    """A picture, uint8 [H, W, 3], and its caption; an empty caption leaves its space to the one before it."""

    picture: NDArray[np.uint8]
    caption: str = ""
    colour: str = "black"


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
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.text((_GAP, 6), title, "black", ImageFont.load_default(17))
    for at, words in zip(lefts, heads, strict=True):
        pen.text((at, _HEAD), words, "#555555", font)
    for place, row in enumerate(rows):
        top = _HEAD + 22 + place * row_height
        room = left
        for at, cell in reversed([*zip(lefts, row, strict=False)]):
            if cell is None:
                continue
            sheet.paste(Image.fromarray(cell.picture).resize((_CELL, _CELL), Image.Resampling.BICUBIC), (at, top))
            if cell.caption:
                pen.text((at, top + _CELL + 1), _fitting(cell.caption, (room - at) // _LETTER), cell.colour, font)
                room = at
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


def _fitting(name: str, letters: int) -> str:
    """The end of a name. Pillow's own font only has ASCII letters: others are written as escapes."""
    text = printable(name).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= letters else f"...{text[3 - letters :]}"
