"""The contact sheet of `jepakit inspect`: a few images as the model sees them, and the views it would learn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jepakit.bundles.manifest import Preprocess
from jepakit.config import ViewsConfig
from jepakit.errors import ImageError, NoMemoryError
from jepakit.images import fit, read_image
from jepakit.sources import ImageList, evenly_spread
from jepakit_training.data.views import ViewMaker, collate, finish
from jepakit_training.pictures.rows import Cell, as_picture, draw, three_bands
from jepakit_training.pictures.sheet_path import MARK
from jepakit_training.randomness import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

ROWS, N_GLOBAL, N_LOCAL = 8, 2, 4


def write_sheet(
    path: Path, images: ImageList, spec: Preprocess, recipe: ViewsConfig, sizes: tuple[int, int], title: str
) -> None:
    """Draw 8 evenly spread images and their global and local views, at the sizes of training, to a PNG.

    WriteError if it cannot be written; an earlier file is kept then.
    """
    recipe = recipe.model_copy(update={"n_global": N_GLOBAL, "n_local": N_LOCAL})
    make_views = ViewMaker(recipe, *sizes, spec.scaling, resize=spec.resize)
    rows = []
    for index in evenly_spread(len(images), ROWS).tolist():
        try:
            pixels = read_image(images[index], spec)
        except (ImageError, NoMemoryError):
            continue  # the report says so
        views = finish(collate([make_views(pixels, derive_seed(0, "views", 0, index))]))
        cells = [Cell(as_picture(fit(pixels, spec), spec), images.ids[index])]
        cells += [Cell(_of_tensor(view)) for group in views for view in group[:, 0]]
        rows.append(cells)
    draw(path, title, (["as the model sees it"], [*["global view"] * N_GLOBAL, *["local view"] * N_LOCAL]), rows, MARK)


def _of_tensor(view: Tensor) -> NDArray[np.uint8]:
    """A view [C, H, W], uint8 or 0..1, as a picture."""
    pixels = view.permute(1, 2, 0).numpy()
    return three_bands(pixels if pixels.dtype == np.uint8 else (255 * pixels).round().astype(np.uint8))
