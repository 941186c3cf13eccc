"""What is told before training about images that may not be what is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.files import touch

import jepakit
from jepakit.config import AdaptConfig
from jepakit.sources import list_images
from jepakit_training.data.doubts import doubts
from jepakit_training.data.scan import Kind, Scan
from jepakit_training.setup import prepare


def of_names(images: Any, labels: str = "auto", **options: Any) -> str:
    """The doubts about images by their names alone."""
    listed = list_images(images, labels, **options)
    return "\n".join(doubts(listed, Scan(Kind(3, "uint8"), (), (), (), len(listed))))


# Folders


def test_folders_within_class_folders_may_be_patients(tmp_path: Path) -> None:
    patients = [(f"{kind}/p{patient}", 4 + patient) for kind in ("ill", "well") for patient in range(3)]
    touch(tmp_path, *(f"{folder}/{i}.png" for folder, count in patients for i in range(count)))
    assert of_names(tmp_path).startswith(
        "the images lie in 6 folders, e.g. ill/p2 (6 images): if a folder holds one patient"
    )
    assert of_names(tmp_path, group="folder") == ""
    assert of_names(tmp_path, "none") == "", "nothing is judged"


def test_flat_class_folders_and_folders_of_one_image_are_no_patients(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/{i}.png" for kind in ("a/flat", "b/flat") for i in range(12)))
    touch(tmp_path / "alone", *(f"{kind}/{i}/1.png" for kind in "ab" for i in range(12)))
    assert of_names(tmp_path) == of_names(tmp_path / "alone") == ""


# Names


@pytest.mark.parametrize(
    ("names", "counts", "example"),
    [
        (("g ({}).jpg", "g ({})_mask.png"), "12 of 24", "g (0)_mask.png beside g (0).jpg"),
        (("a/{}.tif", "a/{}-GT.tif", "a/{}.thumb.jpg"), "24 of 36", "a/0-GT.tif beside a/0.tif"),
        (("f{}_w1.tif", "f{}_w2.tif", "f{}_w3.tif"), "24 of 36", "f0_w2.tif beside f0_w1.tif"),
        (("T{}_B02.jpg", "T{}_B8A.jpg"), "12 of 24", "T0_B8A.jpg beside T0_B02.jpg"),
    ],
    ids=["masks", "several", "channels", "bands"],
)  # fmt: skip
def test_masks_and_channels_beside_the_images_are_told(
    tmp_path: Path, names: tuple[str, ...], counts: str, example: str
) -> None:
    touch(tmp_path, *(name.format(number) for number in range(12) for name in names))
    told = of_names(tmp_path, "none")
    assert told.startswith(f"{counts} images are named as companions of others, e.g. {example}: ")


@pytest.mark.parametrize("names", [("{}.png", "x{}.png"), ("{}_mask.png",), ("{}_w1.tif",), ("{}.jpg", "{}.png")])
def test_other_names_and_a_few_companions_are_not_told(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *(name.format(number) for number in range(12) for name in names))
    touch(tmp_path, "few.png", "few_mask.png")
    assert of_names(tmp_path, "none") == ""


# Both commands


def test_inspect_and_adapt_tell_their_doubts(
    image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder()
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        (file.parent / f"p{number % 3}").mkdir(exist_ok=True)
        file.rename(file.parent / f"p{number % 3}" / file.name)
    told = "the images lie in 6 folders, e.g. "
    assert any(told in words for words in jepakit.inspect(folder, sheet=None).advice)
    config = AdaptConfig(images=str(folder), backbone="test_vit", weights="random", image_size=64, workers=0)
    prepare(config, list_images(folder), None)
    assert told in capsys.readouterr().err
