"""The sheet of neighbours: which are whose, and how it shows images with labels, groups or missing files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jepakit.bundles.manifest import Preprocess
from jepakit.sources import list_images
from jepakit_training.holdout import MeasuringSet
from jepakit_training.pictures import neighbours
from jepakit_training.pictures.neighbours import nearest, write_neighbours
from jepakit_training.pictures.rows import Cell, draw

SPEC = Preprocess(
    size=32, resize_to=32, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
    std=(0.5,) * 3,
)  # fmt: skip
N = 12


def measured(labels: list[str] | None = None, groups: list[str] | None = None) -> MeasuringSet:
    """Twelve images, the last two held out."""
    return MeasuringSet(
        np.arange(N), np.arange(N) < N - 2, np.ones(N, bool),
        None if labels is None else np.array(labels), None if groups is None else np.array(groups),
    )  # fmt: skip


def on_a_circle(turn: int = 0) -> NDArray[np.float32]:
    """Vectors a twentieth of a circle apart, so that the nearest of each are the adjacent ones."""
    angles = (np.arange(N) + turn) % N * np.pi / 20
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_the_nearest_are_by_cosine_never_oneself_and_none_of_ones_group() -> None:
    vectors = on_a_circle() * np.arange(1, N + 1, dtype=np.float32)[:, None]  # lengths mean nothing
    assert nearest(11, vectors, measured()) == [10, 9, 8, 7]
    groups = ["p", "q", "r"] + ["s"] * 9
    assert nearest(11, vectors, measured(groups=groups)) == [2, 1, 0, None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is drawn, in addition to the file itself."""
    seen: dict[str, Any] = {}

    def noting(path: Path, title: str, blocks: Any, rows: list[list[Cell | None]]) -> None:
        seen.update(title=title, captions=[[cell and (cell.caption, cell.mark) for cell in row] for row in rows])
        draw(path, title, blocks, rows)

    monkeypatch.setattr(neighbours, "draw", noting)
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for place in range(N):
        image = Image.new("RGB", (40, 32), (20 * place, 0, 255))
        image.paste("black", (0, 0, 40, 4))  # an image of one colour is refused
        image.save(tmp_path / f"images/{place:02}.png")
    return tmp_path / "images"


def test_without_labels_each_picture_has_its_name(folder: Path, tmp_path: Path, drawn: dict[str, Any]) -> None:
    sheet = tmp_path / "neighbours.png"
    images = list_images(folder)
    write_neighbours(sheet, images, measured(), on_a_circle(), on_a_circle(1), SPEC)
    assert drawn["title"] == "The nearest of 12 images, by cosine"
    names = [
        [f"{place:02}.png" for place in row] for row in ((10, 9, 11, 8, 7, 9, 8, 7, 6), (11, 10, 9, 8, 7, 0, 1, 2, 3))
    ]
    assert drawn["captions"] == [[(name, "") for name in row] for row in names]
    with Image.open(sheet) as picture:
        assert picture.getpixel((80, 56 + 80)) == (200, 0, 255), "the query, image 10"
        assert picture.getpixel((8 + 8 + 168 + 80, 56 + 80)) == (180, 0, 255), "its nearest before, image 9"
        assert picture.getpixel((8 + 16 + 5 * 168 + 80, 56 + 186 + 80)) == (0, 0, 255), "image 11's after, image 0"


def test_other_labels_are_framed_in_red_and_a_file_that_is_gone_costs_its_row(
    folder: Path, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    images = list_images(folder)
    (folder / "06.png").unlink()
    labels, groups = ["cat"] * 9 + ["dog"] * 3, ["a"] * 6 + [f"b{place}" for place in range(6)]
    which = measured(labels, groups)
    which.is_labelled[7] = False
    write_neighbours(tmp_path / "neighbours.png", images, which, on_a_circle(), on_a_circle(1), SPEC)
    assert drawn["title"] == "The nearest of 12 images, by cosine; none of the same group; framed in red: another label"
    dog, cat = ("dog", ""), ("cat", "#c00000")
    assert drawn["captions"] == [[dog, dog, dog, cat, ("07.png", ""), cat, cat, cat, cat]]
    with Image.open(tmp_path / "neighbours.png") as picture:
        corners = [
            picture.getpixel((8 + 8 * (place > 0) + 8 * (place > 4) + place * 168 + 1, 56 + 1)) for place in range(9)
        ]
    assert [corner == (0xC0, 0, 0) for corner in corners] == [label == cat for label in drawn["captions"][0]]
