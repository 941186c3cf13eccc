"""Tiles and frames: windows cover each scene, empty ones are left out; names, labels and groups follow the file."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.readers import DEFAULT_LIMITS, Header, ImageRef, Limits, Window
from jepakit.readers.raster import Raster, crop
from jepakit.sources import ImageList, gather, list_images


class Scene(Raster):
    """An in-memory raster in place of a file; `decoded` lists the windows and frames decoded from it."""

    def __init__(self, pixels: Any, header: Header) -> None:
        super().__init__(header, "scene", DEFAULT_LIMITS)
        self.pixels = pixels
        self.decoded: list[tuple[Window, int]] = []

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Any:
        self.decoded.append((window, frame))
        return crop(self.pixels[frame], window)


def scene(height: int, width: int, frames: int = 1, **header: Any) -> Scene:
    return Scene(*parts(height, width, frames, **header))


def parts(height: int, width: int, frames: int = 1, **header: Any) -> tuple[Any, Header]:
    """Pixels of ones and twos in turn, [frames, height, width, 2], and their header."""
    pixels = np.ones((frames, height, width, 2), header.pop("dtype", "int16"))
    pixels[:, :, 1::2] = 2
    return pixels, Header("TIFF", height, width, 2, str(pixels.dtype), frames, **header)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(**{"a": scene(…)})`: a folder of files a.tif, … that open as these scenes; other files are damaged."""
    scenes: dict[str, Scene] = {}

    def open_raster(source: Any, *, name: str, limits: Limits) -> Scene:
        if Path(source).name not in scenes:
            raise ImageError(f"{name}: damaged", code="unreadable")
        return scenes[Path(source).name]

    monkeypatch.setattr("jepakit.sources.tiles.open_raster", open_raster)

    def folder(**named: Scene | None) -> Path:
        for name, each in named.items():
            file = tmp_path / f"{name.replace('__', '/')}.tif"
            file.parent.mkdir(exist_ok=True)
            file.touch()
            if each is not None:
                scenes[file.name] = each
        return tmp_path

    return folder


def windows(images: ImageList) -> list[Window]:
    return [ref.window for ref in images if ref.window is not None]


def test_tiles_cover_a_scene_and_the_last_ones_are_shifted_inwards(make: Make) -> None:
    listed = list_images(make(a=scene(20, 30)), tile=12)
    assert windows(listed) == [(x, y, 12, 12) for y in (0, 8) for x in (0, 12, 18)]
    assert listed.ids == tuple(f"a.tif#{x},{y},12,12" for y in (0, 8) for x in (0, 12, 18))
    assert "6 tiles of 12 × 12 of 1 image" in listed.note


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (16, 24), (17, 23), (100, 31), (40, 9)])
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_every_pixel_is_in_a_tile_every_tile_is_full_and_none_comes_twice(
    make: Make, height: int, width: int, overlap: int
) -> None:
    cut = windows(list_images(make(a=scene(height, width)), tile=8, overlap=overlap))
    seen = np.zeros((height, width), int)
    for x, y, wide, high in cut:
        assert (wide, high) == (8, 8)
        assert 0 <= x <= width - 8
        assert 0 <= y <= height - 8
        seen[y : y + high, x : x + wide] += 1
    assert seen.min() >= 1
    assert len(set(cut)) == len(cut)
    steps = np.diff(sorted({x for x, *_ in cut}))
    assert steps.max(initial=0) <= 8 - overlap, "neighbours share at least the overlap"


def test_tiles_of_a_size_that_fits_do_not_repeat_the_last(make: Make) -> None:
    assert len(list_images(make(a=scene(32, 64)), tile=16)) == 8


def test_an_image_smaller_than_the_tile_is_taken_as_it_is_if_large_enough(make: Make) -> None:
    folder = make(narrow=scene(40, 12), small=scene(12, 12), tiny=scene(8, 9))
    listed = list_images(folder, tile=16, min_valid=0.5)
    assert listed.ids == (
        "narrow.tif#0,0,12,16", "narrow.tif#0,16,12,16", "narrow.tif#0,24,12,16", "small.tif#0,0,12,12",
    )  # fmt: skip
    assert "left out: 1 tile with under 50% valid pixels" in listed.note
    assert len(list_images(folder, tile=16, min_valid=0)) == 5


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize(("nodata", "dtype"), [(-9999.0, "int16"), (float("nan"), "float32"), (0.0, "uint8")])
def test_tiles_without_enough_data_are_left_out(make: Make, nodata: float, dtype: str, windowed: bool) -> None:
    each = scene(16, 32, nodata=nodata, windowed=windowed, dtype=dtype)
    each.pixels[0, :, 3:16] = nodata
    each.pixels[0, :8, 16:24, 0] = nodata
    listed = list_images(make(a=each), tile=8, min_valid=0.3)
    kept = [(0, 0), (16, 0), (24, 0), (0, 8), (16, 8), (24, 8)]
    assert windows(listed) == [(x, y, 8, 8) for x, y in kept], "a band without any data in a tile is not asked"
    assert "left out: 2 tiles with under 30% valid pixels" in listed.note
    assert len(list_images(make(a=each), tile=8, min_valid=0.4)) == 4
    assert len(list_images(make(a=each), tile=8, min_valid=0)) == 6, "tiles without any data are left out anyway"


def test_a_pixel_without_data_in_one_band_is_not_valid(make: Make) -> None:
    each = scene(8, 16, nodata=0, windowed=True)
    each.pixels[0, :, :5, 0] = 0
    assert windows(list_images(make(a=each), tile=8)) == [(8, 0, 8, 8)]
    assert len(list_images(make(a=each), tile=8, min_valid=0.3)) == 2


@pytest.mark.parametrize("windowed", [True, False])
def test_blank_tiles_are_left_out_and_counted(make: Make, windowed: bool) -> None:
    slide = scene(8, 40, windowed=windowed, dtype="uint8")
    slide.pixels[0, :, :16] = 255
    slide.pixels[0, :, 24:32] = (7, 9)
    listed = list_images(make(a=slide), tile=8)
    assert windows(listed) == [(16, 0, 8, 8), (32, 0, 8, 8)]
    assert "left out: 3 blank tiles, of one value everywhere" in listed.note


def test_a_tile_whose_valid_pixels_are_all_alike_is_blank(make: Make) -> None:
    each = scene(8, 16, nodata=0, windowed=True)
    each.pixels[0, :, 2:8] = 3
    each.pixels[0, :, :2] = 0
    listed = list_images(make(a=each), tile=8)
    assert windows(listed) == [(8, 0, 8, 8)]
    assert "left out: 1 blank tile, of" in listed.note


def test_large_files_are_decoded_one_after_the_other(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepakit.readers.room.AT_ONCE_BYTES", 100)
    reading, most = 0, 0

    class Slow(Scene):
        def _decode(self, *args: Any) -> Any:
            nonlocal reading, most
            reading += 1
            most = max(most, reading)
            time.sleep(0.01)
            reading -= 1
            return super()._decode(*args)

    list_images(make(**{f"s{place}": Slow(*parts(8, 8)) for place in range(6)}), tile=8)
    assert most == 1


def test_a_file_is_read_by_windows_where_it_can_be_and_once_where_it_cannot(make: Make) -> None:
    by_windows, whole = scene(32, 32, nodata=0, windowed=True), scene(32, 32, nodata=0)
    list_images(make(a=by_windows, b=whole), tile=8)
    assert sorted(window for window, _ in by_windows.decoded) == sorted(
        Window(x, y, 8, 8) for x in range(0, 32, 8) for y in range(0, 32, 8)
    )
    assert whole.decoded == [(Window(0, 0, 32, 32), 0)]


def test_tiles_of_which_a_chosen_range_shows_nothing_are_left_out(make: Make) -> None:
    body = scene(8, 32)
    body.pixels[0, :, :8] -= 1000  # air: not blank, and below the range
    body.pixels[0, :, 8:16, 0] -= 1000  # of one band something is seen
    body.pixels[0, :, 16:24] += 1000
    listed = list_images(folder := make(a=body), tile=8, chosen_range=(-160, 240))
    assert listed.ids == ("a.tif#8,0,8,8", "a.tif#24,0,8,8")
    told = "left out: 2 blank tiles, of one value everywhere or wholly on one side of -160 … 240"
    assert told in listed.note
    assert len(list_images(folder, tile=8)) == 4
    assert gather(folder, tile=8, chosen_range=(-160, 240)).ids == listed.ids
    with pytest.raises(DataError, match=r"none of the 4 tiles .* wholly on one side of 5000 … 6000"):
        list_images(folder, tile=8, chosen_range=(5000, 6000))


def test_pixels_are_read_only_of_tiles_that_are_full_enough(make: Make) -> None:
    small = scene(8, 8, windowed=True)
    list_images(make(a=small, b=scene(16, 16)), tile=16)
    assert small.decoded == []


def test_files_of_many_tiles_that_must_be_decoded_whole_are_pointed_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepakit.sources.tiles.KEPT_BYTES", 0)
    folder = make(a=scene(80, 80), b=scene(80, 80, windowed=True))
    assert "1 file is decoded whole (a.tif first)" in list_images(folder, tile=8).note
    assert "decoded whole" not in list_images(folder, tile=40).note


def test_labels_follow_the_file_and_its_tiles_are_one_group(make: Make) -> None:
    folder = make(cat__a=scene(16, 8), dog__b=scene(16, 8))
    listed = list_images(folder, "folder", tile=8)
    assert listed.labels == ("cat", "cat", "dog", "dog")
    assert listed.groups == ("cat/a.tif", "cat/a.tif", "dog/b.tif", "dog/b.tif")
    assert listed.strata() == listed.labels
    assert "the pieces of an image are one group" in listed.note


def test_groups_and_split_that_were_given_are_kept(make: Make) -> None:
    folder = make(a=scene(16, 8), b=scene(16, 8), c=scene(8, 8))
    (folder / "m.csv").write_text("path,scene,split\na.tif,s,train\nb.tif,s,train\nc.tif,t,test\n")
    listed = list_images(folder / "m.csv", tile=8)
    assert listed.groups == ("s", "s", "s", "s", "t")
    assert listed.held_out is not None
    assert listed.held_out.tolist() == [False, False, False, False, True]


def test_an_item_is_a_window_of_its_file(make: Make) -> None:
    folder = make(a=scene(8, 8), b=scene(8, 16))
    listed = list_images(folder, tile=8)
    assert listed[2] == ImageRef(folder / "b.tif", "b.tif#8,0,8,8", Window(8, 0, 8, 8), None)
    again = pickle.loads(pickle.dumps(listed))
    assert [again[place] for place in range(3)] == [listed[place] for place in range(3)]


def test_the_digest_knows_how_scenes_are_cut(make: Make) -> None:
    folder = make(a=scene(32, 32, frames=2))
    settings: list[dict[str, Any]] = [{}, {"tile": 8}, {"tile": 16}, {"tile": 16, "overlap": 8}, {"frame": "each"}]
    assert len({list_images(folder, **each).digest() for each in settings}) == 5


# Frames


def test_tiles_can_have_labels_of_their_own(make: Make, tmp_path: Path) -> None:
    """Of a part with one scratch most tiles are whole."""
    folder, table = make(a=scene(8, 16), b=scene(8, 16)), tmp_path / "tiles.csv"
    ids = [f"{name}.tif#{left},0,8,8" for name in "ab" for left in (0, 8)]
    rows = [f'"{name}",{label}' for name, label in zip(ids, ("good", "scratch", "good", "good"), strict=True)]
    table.write_text("\n".join(["path,label", *rows, '"c.tif#0,0,8,8",good']))
    for listed in (list_images(folder, table, tile=8), gather(folder, table, tile=8)):
        assert list(listed.ids) == ids
        assert listed.labels == ("good", "scratch", "good", "good")
        assert "2 classes from" in listed.note
        assert "1 row of no image here, c.tif#0,0,8,8 first" in listed.note
    assert list_images(folder, table, tile=8).groups == ("a.tif", "a.tif", "b.tif", "b.tif")
    table.write_text("\n".join(["path,label", *rows[:2]]))
    assert list_images(folder, table, tile=8).labels == ("good", "scratch", None, None)
    with pytest.raises(DataError, match=r"b.tif#0,0,8,8 has no label \(2 of 4 images have none\)"):
        gather(folder, table, tile=8)
    with pytest.raises(
        DataError, match=r"gives none of 2 images a label: its first path is a.tif#0,0,8,8, .* so cut the images"
    ):
        gather(folder, table)


def test_tables_of_tiles_spell_paths_as_tables_of_images_do(make: Make, tmp_path: Path) -> None:
    folder, table = make(a=scene(8, 16), b=scene(8, 16)), tmp_path / "tiles.csv"
    for prefix in (f"{folder}/", f"{folder.relative_to(tmp_path)}/" if folder != tmp_path else "./"):
        table.write_text(f'path,label\n"{prefix}a.tif#0,0,8,8",good\n{prefix}a.tif,scratch\n{prefix}b.tif,good\n')
        # What is said of an image holds for those of its tiles of which nothing else is said.
        assert list_images(folder, table, tile=8).labels == ("good", "scratch", "good", "good")
    table.write_text('path,label\n"c/a.tif#0,0,8,8",good\n')
    with pytest.raises(
        DataError, match=r"its first path is c/a.tif#0,0,8,8, and that of the first image is a.tif#0,0,8,8: write"
    ):
        list_images(folder, table, tile=8)


def test_each_frame_becomes_an_image_of_its_files_group(make: Make) -> None:
    listed = list_images(make(a=scene(8, 8, frames=3), b=scene(8, 8)), frame="each")
    assert listed.ids == ("a.tif#frame=0", "a.tif#frame=1", "a.tif#frame=2", "b.tif")
    assert [ref.frame for ref in listed] == [0, 1, 2, None]
    assert windows(listed) == []
    assert listed.groups == ("a.tif", "a.tif", "a.tif", "b.tif")
    assert "4 frames of 2 images" in listed.note


def test_files_of_one_frame_each_are_not_grouped(make: Make) -> None:
    assert list_images(make(a=scene(8, 8), b=scene(8, 8)), frame="each").groups is None


def test_a_frame_that_is_named_is_meant_in_every_file_and_no_header_is_read(make: Make) -> None:
    listed = list_images(make(a=None, b=None), frame=3)
    assert listed.ids == ("a.tif", "b.tif")
    assert [ref.frame for ref in listed] == [3, 3]
    assert listed.groups is None


def test_frames_are_cut_into_tiles_and_judged_one_by_one(make: Make) -> None:
    each = scene(8, 16, frames=2, nodata=0)
    each.pixels[1, :, 8:] = 0
    listed = list_images(make(a=each), frame="each", tile=8)
    assert listed.ids == ("a.tif#frame=0#0,0,8,8", "a.tif#frame=0#8,0,8,8", "a.tif#frame=1#0,0,8,8")
    assert [ref.frame for ref in listed] == [0, 0, 1]
    chosen = list_images(make(a=each), frame=1, tile=8)
    assert [(ref.name, ref.frame) for ref in chosen] == [("a.tif#0,0,8,8", 1)]


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 7}, "tile = 7: the least is 8"),
        ({"tile": 16, "overlap": 16}, "overlap = 16: give 0 or more, and less than tile = 16"),
        ({"tile": 16, "overlap": -1}, "overlap = -1"),
        ({"overlap": 4}, "overlap = 4 without tile"),
        ({"tile": 16, "min_valid": 1.5}, r"min_valid = 1\.5: give a share from 0 to 1"),
        ({"tile": 16.0}, r"tile = 16\.0: give a number of pixels"),
        ({"tile": "each"}, "tile = 'each': give a number of pixels"),
        ({"tile": 16, "overlap": True}, "overlap = True: give a number of pixels"),
        ({"frame": 1.5}, r"frame = 1\.5: give a number or each"),
        ({"frame": False}, "frame = False: give a number or each"),
        ({"frame": -1}, "frame = -1: frames are counted from 0"),
        ({"frame": "eech"}, r"frame = 'eech': give a number or each; did you mean each\?"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_images(make(a=scene(32, 32)), **settings)


def test_numpys_whole_numbers_are_numbers(make: Make) -> None:
    folder = make(a=scene(32, 32, frames=2))
    kinds: list[Any] = [int, np.int64]
    listed, same = (list_images(folder, tile=kind(16), overlap=kind(4), frame=kind(1)) for kind in kinds)
    assert listed.ids == same.ids
    assert [ref.frame for ref in listed] == [ref.frame for ref in same] == [1] * 9
    assert listed.note == same.note


def test_nothing_left_is_an_error_with_the_numbers(make: Make) -> None:
    empty = scene(16, 16, nodata=1)
    empty.pixels[:] = 1
    with pytest.raises(
        DataError, match=r"none of the 4 tiles of 8 × 8 in 1 image can be used \(4 tiles with under 50%"
    ):
        list_images(make(a=empty), tile=8)


def test_a_tile_larger_than_every_image_is_said_to_be_so(make: Make) -> None:
    with pytest.raises(DataError, match=r"tile = 64 is larger than the images \(the largest of 2 is 20 × 16\)"):
        list_images(make(a=scene(16, 20), b=scene(8, 8)), tile=64)


def test_files_that_cannot_be_opened_are_counted_and_few_are_left_out(make: Make) -> None:
    good = {f"good{place:03}": scene(8, 8) for place in range(99)}
    listed = list_images(make(**good, bad=None), tile=8, most_skipped=0.01)
    assert len(listed) == 99
    assert "1 file that cannot be opened left out (bad.tif: damaged)" in listed.note
    with pytest.raises(DataError, match=r"2 of 101 files cannot be opened; the first: bad\.tif: damaged"):
        list_images(make(worse=None), tile=8, most_skipped=0.01)


def test_the_very_share_that_may_be_left_out_is(make: Make) -> None:
    good, bad = {f"good{place:02}": scene(8, 8) for place in range(71)}, {f"bad{place:02}": None for place in range(29)}
    assert len(gather(make(**good, **bad), tile=8, most_skipped=0.29)) == 71
    with pytest.raises(DataError, match=r"29 of 100 .* 28 % may be left out: .*a larger share, most_skipped=SHARE"):
        gather(make(), tile=8, most_skipped=0.28)


@pytest.mark.parametrize("how", [{"tile": 8}, {"frame": "each"}])
def test_of_what_is_embedded_no_file_is_left_out(make: Make, how: dict[str, Any]) -> None:
    folder = make(**{f"good{place:03}": scene(8, 8) for place in range(198)}, bad=None, worse=None)
    with pytest.raises(ImageError, match=r"^bad\.tif: damaged$"):
        gather(folder, **how)
    assert len(list_images(folder, **how, most_skipped=0.01)) == 198


def test_listing_says_how_far_it_is_only_where_that_is_wanted(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jepakit._progress._PLAIN_EVERY_S", -1.0)
    folder = make(a=scene(16, 8), b=scene(8, 8))
    gather(folder, tile=8)
    assert capsys.readouterr().err == ""
    list_images(folder, tile=8)
    assert capsys.readouterr().err.startswith("headers 1/2")
    gather(folder, tile=8, progress=True)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("headers 1/2")
    assert "look for empty tiles 2/2" in told[-2]
    assert "3 tiles of 8 × 8 of 2 images" in told[-1]


def test_a_file_that_opens_but_cannot_be_read_keeps_its_tiles_for_the_reader_to_judge(make: Make) -> None:
    class Torn(Scene):
        def _decode(self, *_: Any) -> Any:
            raise ImageError("torn", code="unreadable")

    torn = Torn(*parts(16, 8, nodata=0))
    assert len(list_images(make(a=torn), tile=8)) == 2


@pytest.mark.parametrize(("share", "tiles"), [(1.0, 1), (0.5, 2)])
def test_a_tile_of_just_as_much_valid_area_as_asked_for_is_taken(make: Make, share: float, tiles: int) -> None:
    each = scene(8, 16, nodata=-1)
    each.pixels[:, :4, 8:] = -1  # half of the second tile
    assert len(list_images(make(a=each), tile=8, min_valid=share)) == tiles
