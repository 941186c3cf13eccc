"""`jepakit inspect`: where the contact sheet may be written, and what any terminal can show."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont, ImageOps
from tests.training.full_disk import files_no_longer_than
from typer.testing import CliRunner

import jepakit
from jepakit.cli import app
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError, WriteError
from jepakit_training.inspecting import near_duplicates
from jepakit_training.pictures import rows as pictures
from jepakit_training.pictures.rows import _fitting
from jepakit_training.pictures.sheet_path import _is_among, is_sheet


@pytest.fixture
def images(image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`set`, a folder of four images and a manifest of them, below the working directory."""
    folder = tmp_path / "set"
    shutil.copytree(image_folder(classes=0, per_class=4), folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "man.csv").write_text("\n".join(["path", *names]))
    monkeypatch.chdir(tmp_path)
    return folder


def inspect(images: Any, sheet: str) -> Path:
    jepakit.inspect(images, sheet=sheet, image_size=64)
    return Path(sheet)


def test_an_earlier_sheet_is_drawn_anew_and_no_other_file(images: Path) -> None:
    sheet = inspect("set", "out/sheet.png")
    assert is_sheet(sheet)
    drawn = sheet.read_bytes()
    sheet.write_bytes(drawn[:-20])
    assert inspect("set", "out/sheet.png").read_bytes() == drawn
    Image.new("RGB", (9, 9)).save("theirs.png")
    for name, source in (("theirs.png", "set"), ("set/man.csv", "set/man.csv"), ("set/man.csv", "set/*.png")):
        before = Path(name).read_bytes()
        with pytest.raises(ConfigError, match=r"already exists, and is not an earlier|would lie among the images"):
            inspect(source, name)
        assert Path(name).read_bytes() == before


def test_scenes_that_cannot_be_opened_are_left_out_up_to_the_share_that_is_set(images: Path) -> None:
    (images / "torn.png").write_bytes(b"torn")
    tiles = jepakit.inspect("set", tile=32, image_size=32, most_skipped=0.2)
    assert tiles.n_images == 4 * 9
    with pytest.raises(DataError, match=r"^1 of 5 files cannot be opened; .+; 19 % may be left out: .+ most_skipped="):
        jepakit.inspect("set", tile=32, image_size=32, most_skipped=0.19)


def test_a_sheet_that_cannot_be_written_is_told_without_a_traceback(images: Path) -> None:
    with pytest.raises(WriteError, match=r"^/proc/sheet\.png cannot be written \(.+\): make room, or name another"):
        inspect("set", "/proc/sheet.png")


def test_where_there_is_no_room_for_a_sheet_the_earlier_one_stays_whole(images: Path) -> None:
    sheet = inspect("set", "out/sheet.png")
    drawn = sheet.read_bytes()
    with (
        files_no_longer_than(1000),
        pytest.raises(WriteError, match=r"sheet\.png cannot be written \(File too large\)"),
    ):
        inspect("set", "out/sheet.png")
    assert sheet.read_bytes() == drawn
    assert [file.name for file in sheet.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("source", ["set", "set/*.png", "**/*.png", "set/sheet.png", ["set/sheet.png"]], ids=str)
def test_a_sheet_among_the_images_is_refused_even_if_it_is_an_earlier_one(images: Path, source: Any) -> None:
    inspect("set", "elsewhere.png").rename("set/sheet.png")
    with pytest.raises(ConfigError, match=r"sheet = set/sheet\.png would lie among the images it shows"):
        inspect(source, "set/sheet.png")


@pytest.mark.parametrize(
    ("source", "among"),
    [
        ("*.png", True), ("c*.png", True), ("**/*.png", True), ("./*", True), ("*/*.png", False), ("b*.png", False),
        ("set/*.png", False), ("set/**/*.png", False), ("4 images in memory", False),
    ],
)  # fmt: skip
def test_what_a_glob_would_find_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, among: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _is_among(tmp_path.resolve() / "contact-sheet.png", source) == among


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_shows_any_name(images: Path, charset: str, options: list[str]) -> None:
    (images / os.fsdecode("größe→".encode() + b"\xfe.png")).write_bytes(b"rubbish")
    done = CliRunner(charset=charset).invoke(app, ["inspect", "set", "--image-size", "64", *options])
    assert done.exit_code == 0, done.exception
    assert "udcfe.png" in done.stdout
    if options:
        assert json.loads(done.stdout)["unreadable"][0]["id"] == r"größe→\udcfe.png"


def test_a_caption_holds_what_the_sheet_s_fonts_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pictures._fonts()[0]
    monkeypatch.setattr(pictures, "_fonts", lambda: (own,))
    assert _fitting("a b/im 1.jpg", 150) == ("a b/im 1.jpg", own)
    assert _fitting("Köln/目.tif", 150) == (r"K\xf6ln/\u76ee.tif", own)
    escaped, _ = _fitting("血小板（正常）", 160)
    assert re.fullmatch(r"(\\u[0-9a-f]{4})*\.\.\.(\\u[0-9a-f]{4})+", escaped), "no escape is cut"
    monkeypatch.setattr(pictures, "_has", lambda font, letter: font is not own or letter.isascii())
    other = ImageFont.load_default(15)
    monkeypatch.setattr(pictures, "_fonts", lambda: (own, other))
    assert _fitting("Köln/目.tif", 150) == ("Köln/目.tif", other)
    assert _fitting("Koln.tif", 150) == ("Koln.tif", own)


def test_names_that_are_too_long_keep_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pictures._fonts()[0]
    names = [f"{cells} carcinoma, poorly differentiated, stage II" for cells in ("Adeno", "Squamous cell")]
    cut = [_fitting(name, 160)[0] for name in names]
    assert len(set(cut)) == 2
    for name, short in zip(names, cut, strict=True):
        start, _, end = short.partition("...")
        assert name.startswith(start)
        assert name.endswith(end)
        assert min(len(start), len(end)) > 3
        assert 140 < own.getlength(short) <= 160


def test_what_is_said_of_grey_images_is_what_the_preset_of_radiographs_does(images: Path) -> None:
    for file in images.glob("*.png"):
        Image.open(file).convert("L").save(file)
    seen = jepakit.inspect("set", sheet=None, image_size=64)
    recipe = AdaptConfig(images="set", domain="radiology").resolved_views()
    assert (seen.domain, recipe.horizontal_flip, recipe.vertical_flip) == ("microscopy", 0, 0)
    assert f"`radiology`: no flips, turns of at most {recipe.rotation_degrees:g}°" in seen.domain_because
    assert "domain      microscopy? (grey images" in str(seen)
    assert "near-duplicate pair" in str(seen)
    assert "among those looked at" not in str(seen)
    assert " among those looked at" in str(seen.model_copy(update={"n_images": seen.n_images + 1}))
    asked = jepakit.inspect("set", sheet=None, image_size=64, domain="radiology")
    assert "domain      radiology (as requested)" in str(asked), "and no guess against it"


def test_of_a_set_that_is_labelled_in_part_the_labelled_images_are_counted(images: Path) -> None:
    (images / "man.csv").write_text("path,label\n000.png,a\n001.png,\n002.png,b\n003.png,a")
    seen = jepakit.inspect("set/man.csv", sheet=None, image_size=64)
    assert seen.labels == {"a": 2, "b": 1}
    assert seen.source == "labels: 2 classes from the manifest's column label; 3 of 4 images are labelled"
    assert not any("label" in words for words in seen.advice)


def test_images_whose_hash_says_nothing_are_no_near_duplicates() -> None:
    flat, noisy = np.ones(256, bool), np.arange(256) % 2 == 0
    seen = [SimpleNamespace(index=place, fingerprint=bits) for place, bits in enumerate([flat, flat, noisy, noisy])]
    assert near_duplicates(SimpleNamespace(seen=seen)) == [(2, 3)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backbone", "sees_the_rim"), [("vit_small_patch14_reg4_dinov2.lvd142m", True), ("mobilenetv2_100", False)]
)
def test_the_sheet_shows_as_much_of_an_image_as_the_backbone_sees(
    images: Path, backbone: str, sees_the_rim: bool
) -> None:
    for file in images.glob("*.png"):
        ImageOps.expand(Image.open(file).convert("RGB").resize((206, 206)), 9, "red").save(file)
    jepakit.inspect("set", sheet="sheet.png", image_size=224, backbone=backbone)
    with Image.open("sheet.png") as sheet:
        red, green, blue = sheet.convert("RGB").getpixel((8 + 1, 56 + 80))  # type: ignore[misc]
    assert (red > 200 and green < 60 and blue < 60) == sees_the_rim


def test_of_long_images_it_is_told_how_the_model_sees_them_whole(images: Path) -> None:
    before = jepakit.inspect("set", image_size=64)
    assert not any("are long" in line for line in before.advice)
    for file in images.glob("*.png"):
        Image.open(file).resize((160, 40)).save(file)
    told = (
        "images are long, such as 160 × 40, of which the model sees the middle 25%: resize=squash shows it all of them, "
        "distorted; or cut them into tiles, tile=40"
    )
    assert any(told in line for line in jepakit.inspect("set", image_size=64).advice)
    remedies: tuple[dict[str, Any], ...] = ({"tile": 40}, {"resize": "squash"})
    for remedy in remedies:
        assert not any("are long" in line for line in jepakit.inspect("set", image_size=64, **remedy).advice)
    fed_whole = jepakit.inspect("set", backbone="convnext_tiny.in12k_ft_in1k_384")
    assert not any("are long" in line for line in fed_whole.advice)


@pytest.mark.parametrize(("resize", "sees_the_ends"), [("auto", False), ("squash", True)])
def test_the_sheet_shows_long_images_as_they_are_resized(images: Path, resize: Any, sees_the_ends: bool) -> None:
    for file in images.glob("*.png"):
        ImageOps.expand(Image.open(file).convert("RGB").resize((200, 100)), (50, 0), "red").save(file)
    jepakit.inspect("set", sheet="sheet.png", image_size=224, resize=resize)
    with Image.open("sheet.png") as sheet:
        red, green, blue = sheet.convert("RGB").getpixel((8 + 8, 56 + 80))  # type: ignore[misc]
    assert (red > 200 and green < 60 and blue < 60) == sees_the_ends


def test_how_many_images_may_be_unreadable_is_the_users_choice(images: Path) -> None:
    (images / "000.png").write_bytes(b"no image")
    told = "of the images cannot be read, and adapt stops above"
    assert any(f"{told} 1 %" in line for line in jepakit.inspect("set", image_size=64).advice)
    assert any(f"{told} 5.5 %" in line for line in jepakit.inspect("set", image_size=64, most_skipped=0.055).advice)
    assert not any(told in line for line in jepakit.inspect("set", image_size=64, most_skipped=0.9).advice)


def test_a_title_says_which_of_many_bands_are_shown() -> None:
    assert [pictures.bands_shown(bands) for bands in (1, 3)] == ["", ""]
    assert pictures.bands_shown(2) == "; shown: band 1"
    assert pictures.bands_shown(4) == "; shown: bands 3, 2, 1 as red, green, blue"
