"""A run's sheet of neighbours: held-out images beside those most similar to them, before and after adaptation.

Without labels it cannot be computed which embeddings are better, but people who know the images can see it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jepakit._vectors import most_similar
from jepakit.bundles.manifest import Preprocess
from jepakit.errors import ImageError, NoMemoryError
from jepakit.images import fit, read_image
from jepakit.sources import ImageList, evenly_spread
from jepakit_training.holdout import MeasuringSet
from jepakit_training.pictures.rows import Cell, as_picture, bands_shown, draw

ROWS, NEIGHBOURS = 10, 4
_OTHER_CLASS = "#c00000"


def write_neighbours(
    path: Path,
    images: ImageList,
    measured: MeasuringSet,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    spec: Preprocess,
) -> None:
    """Draw 10 evenly spread held-out images, each with its 4 nearest by cosine, before and after, to a PNG.

    before, after  the vectors [N, D] of the N images of `measured`; neighbours are searched among all of them
    """

    @cache  # an image is often a neighbour of several, before and after
    def picture(place: int) -> NDArray[np.uint8]:
        return as_picture(fit(read_image(images[int(measured.indices[place])], spec), spec), spec)

    rows = []
    held_out = np.flatnonzero(~measured.is_fit)
    for query in held_out[evenly_spread(len(held_out), ROWS)].tolist():
        shown = [query, *nearest(query, before, measured), *nearest(query, after, measured)]
        try:
            rows.append(
                [None if place is None else _cell(picture(place), place, query, images, measured) for place in shown]
            )
        except (ImageError, NoMemoryError):
            continue  # it was measured, but is gone or damaged since, or finds no memory now
    title = f"The nearest of {len(measured.indices):,} images, by cosine{bands_shown(spec.bands)}"
    if measured.groups is not None:
        title += "; none of the same group"
    if measured.labels is not None:
        title += "; framed in red: another label"
    blocks = [["held out"], *([f"nearest {when}", *[""] * (NEIGHBOURS - 1)] for when in ("before", "after"))]
    draw(path, title, blocks, rows)


def nearest(query: int, vectors: NDArray[np.float32], measured: MeasuringSet) -> list[int | None]:
    """Indices of the 4 vectors most similar to one of N [N, D], outside its own group; None if there are fewer."""
    others = np.arange(len(vectors)) != query
    if measured.groups is not None:
        others &= measured.groups != measured.groups[query]
    places = np.flatnonzero(others)
    found, _ = most_similar(vectors[[query]], vectors[places], min(NEIGHBOURS, len(places)))
    return [*places[found[0]].tolist(), *[None] * (NEIGHBOURS - found.shape[1])]


def _cell(picture: NDArray[np.uint8], place: int, query: int, images: ImageList, measured: MeasuringSet) -> Cell:
    """An image with its label (in a red frame if it differs from the query's) or its name."""
    labels = measured.labels
    if labels is None or not measured.is_labelled[place]:
        return Cell(picture, images.ids[int(measured.indices[place])])
    other = bool(measured.is_labelled[query]) and labels[place] != labels[query]
    return Cell(picture, str(labels[place]), _OTHER_CLASS if other else "")
