"""The contact sheet of `jepakit inspect`: a few images as the model sees them, and the views it would learn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jepakit._files import written
from jepakit.bundle import Preprocess
from jepakit.config import ViewsConfig
from jepakit.errors import ImageError
from jepakit.images import fit, read_image
from jepakit.inspection import printable
from jepakit.sources import ImageList, evenly_spread
from jepakit_training.place import MARK
from jepakit_training.randomness import derive_seed
from jepakit_training.views import ViewMaker, collate, finish

if TYPE_CHECKING:
    from torch import Tensor

ROWS, N_GLOBAL, N_LOCAL = 8, 2, 4
_CELL, _GAP, _HEAD, _CAPTION = 160, 8, 34, 18
_LONGEST_CAPTION = 150


def write_sheet(
    path: Path, images: ImageList, spec: Preprocess, recipe: ViewsConfig, sizes: tuple[int, int], title: str
) -> None:
    """Draw 8 evenly spread images and their views, global and local ones at the sizes of training, to a PNG.

    WriteError where it cannot be written; an earlier one stays then.
    """
    recipe = recipe.model_copy(update={"n_global": N_GLOBAL, "n_local": N_LOCAL})
    make_views = ViewMaker(recipe, *sizes, spec.scaling)
    rows = []
    for index in evenly_spread(len(images), ROWS).tolist():
        try:
            pixels = read_image(images[index], spec)
        except ImageError:
            continue  # the report says so
        views = finish(collate([make_views(pixels, derive_seed(0, "views", 0, index))]))
        cells = [_as_picture(fit(pixels, spec), spec)]
        cells += [_of_tensor(view) for group in views for view in group[:, 0]]
        rows.append((images.ids[index], cells))
    _draw(path, rows, title)


def _draw(path: Path, rows: list[tuple[str, list[NDArray[np.uint8]]]], title: str) -> None:
    width = (1 + N_GLOBAL + N_LOCAL) * (_CELL + _GAP) + 2 * _GAP
    row_height = _CELL + _CAPTION + _GAP
    sheet = Image.new("RGB", (width, _HEAD + 24 + len(rows) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((_GAP, 6), title, "black", ImageFont.load_default(17))
    for column, words in enumerate(("as the model sees it", *["global view"] * N_GLOBAL, *["local view"] * N_LOCAL)):
        draw.text((_left(column), _HEAD), words, "#555555", font)
    for place, (name, cells) in enumerate(rows):
        top = _HEAD + 22 + place * row_height
        for column, cell in enumerate(cells):
            sheet.paste(Image.fromarray(cell).resize((_CELL, _CELL), Image.Resampling.BICUBIC), (_left(column), top))
        draw.text((_GAP, top + _CELL + 1), _caption(name), "black", font)
    mark = PngInfo()
    mark.add_text(*MARK)
    with written(path) as file:
        sheet.save(file, "PNG", pnginfo=mark)


def _left(column: int) -> int:
    # The original stands a little apart from its views.
    return _GAP + column * (_CELL + _GAP) + (_GAP if column else 0)


def _caption(name: str) -> str:
    """The end of an image's name. Pillow's own font knows no letters beyond ASCII: they are written as escapes."""
    text = printable(name).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_CAPTION else f"...{text[3 - _LONGEST_CAPTION :]}"


def _of_tensor(view: Tensor) -> NDArray[np.uint8]:
    """A view [C, H, W], uint8 or 0..1, as a picture."""
    pixels = view.permute(1, 2, 0).numpy()
    return _three_bands(pixels if pixels.dtype == np.uint8 else (255 * pixels).round().astype(np.uint8))


def _as_picture(pixels: NDArray[np.uint8] | NDArray[np.float32], spec: Preprocess) -> NDArray[np.uint8]:
    if spec.scaling is not None:
        return _three_bands((255 * spec.scaling.to_unit(pixels)).round().astype(np.uint8))
    return _three_bands(pixels.astype(np.uint8, copy=False))


def _three_bands(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey for one band or two; the first three bands, last first (blue, green, red), for many."""
    bands = pixels.shape[2]
    chosen = [0, 0, 0] if bands < 3 else [0, 1, 2] if bands == 3 else [2, 1, 0]
    return np.ascontiguousarray(pixels[:, :, chosen])
