"""A 2-D map of embeddings before and after adaptation, drawn with the images themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import jepakit

_THUMB_PX = 44
_PANEL_INCHES = 9.0


def draw_map(path: Path, folder: Path, before: jepakit.Embeddings, after: jepakit.Embeddings) -> None:
    """Draw the images of `folder` at their t-SNE positions, before and after side by side; frames mark the classes."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    assert before.labels is not None
    names = sorted(set(before.labels))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(2 * _PANEL_INCHES, _PANEL_INCHES + 1.0))
    for panel, embeddings, title in zip(
        panels, (before, after), ("before adaptation", "after adaptation"), strict=True
    ):
        _draw_panel(panel, folder, embeddings, colours)
        panel.set_title(
            f"{title}: {_neighbours_of_same_class(embeddings):.0%} of 10 nearest neighbours share the class",
            fontsize=15,
        )
    marks = [Line2D([], [], marker="s", linestyle="", markersize=12, color=colours[name], label=name) for name in names]
    figure.legend(handles=marks, loc="lower center", ncols=len(names), frameon=False, fontsize=13)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_panel(panel: Any, folder: Path, embeddings: jepakit.Embeddings, colours: dict[str, Any]) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    assert embeddings.labels is not None
    places = _tsne(embeddings.vectors)
    for place, name, label in zip(places, embeddings.ids, embeddings.labels, strict=True):
        with Image.open(folder / name) as image:
            thumb = np.asarray(image.convert("RGB").resize((_THUMB_PX, _THUMB_PX)))
        frame = {"edgecolor": colours[label], "linewidth": 2.0, "boxstyle": "square,pad=0"}
        panel.add_artist(AnnotationBbox(OffsetImage(thumb, zoom=0.55), tuple(place), pad=0, bboxprops=frame))
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.04 * (high - low)
    panel.set(
        xlim=(low[0] - margin[0], high[0] + margin[0]),
        ylim=(low[1] - margin[1], high[1] + margin[1]),
        xticks=[],
        yticks=[],
    )


def _tsne(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE

    places: NDArray[np.float32] = TSNE(metric="cosine", init="random", perplexity=20, random_state=0).fit_transform(
        vectors
    )
    return places


def _neighbours_of_same_class(embeddings: jepakit.Embeddings) -> float:
    labels, (nearest, _) = np.asarray(embeddings.labels), embeddings.nearest(k=10)
    return float((labels[nearest] == labels[:, None]).mean())
