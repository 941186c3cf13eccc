"""Scenes that are decoded whole: once for all their tiles, whoever asks, and no more scenes than there is room for."""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from tests.files import tiff

from jepakit.bundles.manifest import Preprocess
from jepakit.errors import ImageError
from jepakit.images import read_image
from jepakit.readers import Scenes, Window, open_raster
from jepakit.readers import tiff as tiff_reader
from jepakit.readers.pillow import PillowFile
from jepakit.readers.raster import crop
from jepakit.readers.tiff import TiffRaster
from jepakit.sources import ImageList, list_images

SPEC = Preprocess(
    size=32,
    resize_to=32,
    resize="shorter",
    interpolation="bicubic",
    bands=3,
    dtype="uint8",
    stored_as="uint8",
    scaling=None,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    tile=32,
)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that Pillow decoded, in order."""
    names: list[str] = []
    decode = PillowFile._decode

    def noted(self: PillowFile, *how: Any) -> Any:
        names.append(self.name.partition("#")[0])
        return decode(self, *how)

    monkeypatch.setattr(PillowFile, "_decode", noted)
    return names


def tiles_of(folder: Path, count: int = 2) -> ImageList:
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 128, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return list_images(folder, tile=32)


def test_a_scene_is_decoded_once_for_all_its_tiles_in_any_number_of_threads(tmp_path: Path, decoded: list[str]) -> None:
    listed = tiles_of(tmp_path)
    decoded.clear()
    with ThreadPoolExecutor(4) as pool:
        tiles = list(pool.map(lambda place: read_image(listed[place], SPEC), range(len(listed))))
    assert sorted(decoded) == ["0.png", "1.png"]
    for ref, tile in zip(listed, tiles, strict=True):
        np.testing.assert_array_equal(tile, read_image(replace(ref, scenes=None), SPEC))
        tile[:] = 0
    assert read_image(listed[0], SPEC).any(), "a tile is the caller's own"


def test_a_file_that_was_written_again_is_decoded_again(tmp_path: Path) -> None:
    listed = tiles_of(tmp_path)
    read_image(listed[0], SPEC)
    pixels = np.full((96, 128, 3), 7, np.uint8)
    pixels[::2] = 8
    Image.fromarray(pixels).save(tmp_path / "new.png")
    (tmp_path / "new.png").replace(tmp_path / "0.png")
    np.testing.assert_array_equal(read_image(listed[0], SPEC), pixels[:32, :32])


def test_what_is_kept_has_a_limit(tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tiles_of(tmp_path, 3)
    monkeypatch.setattr("jepakit.readers.scenes.KEPT_BYTES", 2 * 96 * 128 * 3)
    decoded.clear()
    of_scene = [listed.ids.index(f"{number}.png#0,0,32,32") for number in range(3)]
    for number in (0, 1, 0, 2, 0, 1):
        read_image(listed[of_scene[number]], SPEC)
    assert decoded == ["0.png", "1.png", "2.png", "1.png"], "the one asked for longest ago made room"
    monkeypatch.setattr("jepakit.readers.scenes.KEPT_BYTES", 0)
    listed = pickle.loads(pickle.dumps(listed))
    decoded.clear()
    for number in (0, 0, 1, 1, 0):
        read_image(listed[of_scene[number]], SPEC)
    assert decoded == ["0.png", "1.png", "0.png"], "the last one is kept however large"


def test_of_a_scene_that_fails_each_caller_gets_an_error_of_its_own(tmp_path: Path, decoded: list[str]) -> None:
    listed = tiles_of(tmp_path, 1)
    file = tmp_path / "0.png"
    file.write_bytes(file.read_bytes()[:4000])

    def refused(place: int) -> str:
        with pytest.raises(ImageError) as caught:
            read_image(listed[place], SPEC)
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(refused, range(len(listed))))
    assert [message.partition(":")[0] for message in messages] == list(listed.ids)


def test_whoever_waits_for_a_scene_that_fails_is_told_by_its_own_name() -> None:
    scenes, begun, go_on = Scenes(), threading.Event(), threading.Event()

    def fail() -> Any:
        begun.set()
        go_on.wait(10)
        raise ImageError("first: damaged", code="unreadable")

    def fail_too() -> Any:
        raise ImageError("second: damaged", code="unreadable")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(scenes.whole, "key", fail)
        assert begun.wait(10)
        second = pool.submit(scenes.whole, "key", fail_too)
        go_on.set()
        assert str(first.exception(10)) == "first: damaged"
        assert str(second.exception(10)) == "second: damaged"
    assert scenes.whole("key", lambda: np.ones(3)).sum() == 3


def test_another_process_begins_with_none(tmp_path: Path) -> None:
    scenes, never = Scenes(), threading.Event()
    threading.Thread(target=scenes.whole, args=("key", lambda: np.full(3, never.wait())), daemon=True).start()
    assert pickle.loads(pickle.dumps(scenes)).whole("key", lambda: np.ones(3)).sum() == 3
    child = os.fork()
    if child == 0:  # whatever happens, the tests go on in the parent alone
        code = 1
        signal.alarm(10)  # instead of waiting for the parent's result for ever
        try:
            code = int(scenes.whole("key", lambda: np.zeros(3)).sum())
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    never.set()


# Strips, each as wide as the image


def striped(file: Path, rows: int, **options: Any) -> Any:
    """Write a TIFF in strips of so many rows; its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 300, 3), np.uint8)
    stored = np.moveaxis(pixels, 2, 0) if options.get("planarconfig") == "separate" else pixels
    tifffile.imwrite(file, stored, photometric="rgb", rowsperstrip=rows, **{"compression": "zlib"} | options)
    return pixels


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each strip was decoded, by its offset."""
    read: Counter[int] = Counter()
    segment = TiffRaster._segment

    def noted(self: TiffRaster, offset: int, count: int) -> bytes:
        read[offset] += 1
        return segment(self, offset, count)

    monkeypatch.setattr(TiffRaster, "_segment", noted)
    return read


@pytest.mark.parametrize(("rows", "most"), [(4, 1), (5, 2), (33, 2), (80, 2)])
def test_strips_are_decoded_once_for_a_row_of_tiles_not_for_each(
    tmp_path: Path, strips: Counter[int], rows: int, most: int
) -> None:
    pixels = striped(tmp_path / "a.tif", rows)
    listed = list_images(tmp_path, tile=32)
    assert max(strips.values()) <= most
    strips.clear()
    for ref in listed:
        assert ref.window is not None
        x, y, width, height = ref.window
        np.testing.assert_array_equal(read_image(ref, SPEC), pixels[y : y + height, x : x + width])
    assert max(strips.values()) <= most


@pytest.mark.parametrize(
    "options",
    [{"planarconfig": "separate"}, {"extratags": [(274, 3, 1, 3, True)]}, {"extratags": [(274, 3, 1, 6, True)]}],
    ids=["planar", "turned by 180 degrees", "by 90"],
)
def test_tiles_of_strips_are_the_same_whatever_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    striped(tmp_path / "a.tif", 8, **options)
    kept = [read_image(ref, SPEC) for ref in list_images(tmp_path, tile=32)]
    monkeypatch.setattr("jepakit.readers.scenes.KEPT_BYTES", 0)
    alone = [read_image(replace(ref, scenes=None), SPEC) for ref in list_images(tmp_path, tile=32)]
    np.testing.assert_array_equal(kept, alone)
    with open_raster(tmp_path / "a.tif") as raster:
        whole = raster.read()
    for ref, tile in zip(list_images(tmp_path, tile=32), kept, strict=True):
        assert ref.window is not None
        np.testing.assert_array_equal(tile, crop(whole, ref.window))


def test_rows_too_large_to_keep_are_not_decoded_together(
    tmp_path: Path, strips: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = striped(tmp_path / "a.tif", 4)
    monkeypatch.setattr("jepakit.readers.scenes.KEPT_BYTES", 32 * 300 * 3 - 1)
    with open_raster(tmp_path / "a.tif") as raster:
        for x in (0, 32, 64):
            np.testing.assert_array_equal(raster.read(Window(x, 32, 32, 32)), pixels[32:64, x : x + 32])
    assert set(strips.values()) == {3}


def test_the_note_names_scenes_in_wide_strips_that_do_not_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    striped(tmp_path / "a.tif", 4)
    striped(tmp_path / "b.tif", 16, tile=(16, 16))
    monkeypatch.setattr("jepakit.sources.tiles.KEPT_BYTES", 96 * 300 * 3)
    assert "decoded" not in list_images(tmp_path, tile=32).note
    monkeypatch.setattr("jepakit.sources.tiles.KEPT_BYTES", 96 * 300 * 3 - 1)
    told = "1 file is decoded by whole rows (a.tif first), in training for nearly every tile: tiled TIFF is faster"
    assert told in list_images(tmp_path, tile=32).note
    assert "decoded" not in list_images(tmp_path, tile=80).note, "strips not much wider than a tile"


def test_the_note_names_scenes_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert "decoded" not in list_images(tmp_path, tile=32).note
    monkeypatch.setattr("jepakit.sources.tiles.KEPT_BYTES", 160 * 160 * 3)
    told = "2 files are decoded whole (0.png first), in training for nearly every tile: tiled TIFF is faster"
    assert told in list_images(tmp_path, tile=32).note


def test_each_frame_of_a_file_is_a_scene_of_its_own(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128), np.uint8)
    tifffile.imwrite(tmp_path / "0.tif", frames, photometric="minisblack", compression="zlib", rowsperstrip=96)
    listed = list_images(tmp_path, tile=32, frame="each")
    for ref in listed:
        assert ref.window is not None
        x, y, width, height = ref.window
        expected = frames[ref.frame, y : y + height, x : x + width]
        np.testing.assert_array_equal(read_image(ref, SPEC)[..., 0], expected)


def test_a_scene_through_its_own_window_is_another(tmp_path: Path, decoded: list[str]) -> None:
    listed = tiles_of(tmp_path, 1)
    decoded.clear()
    for spec in (SPEC, SPEC.model_copy(update={"voi": True}), SPEC):
        read_image(listed[0], spec)
    assert decoded == ["0.png", "0.png"]


def test_a_scene_that_failed_spoils_no_other_and_may_be_whole_later() -> None:
    def fail() -> Any:
        raise ImageError("damaged", code="unreadable")

    def once() -> Any:
        times.append(1)
        return np.ones(5)

    scenes, times = Scenes(), list[int]()
    with pytest.raises(ImageError):
        scenes.whole("bad", fail)
    assert scenes.whole("good", lambda: np.ones(3)).sum() == 3
    for _ in range(2):
        assert scenes.whole("bad", once).sum() == 5
    assert times == [1]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the TIFF files that are opened, in order."""
    names: list[str] = []
    real = tiff_reader.open_tiff

    def noted(encoded: Any, limits: Any) -> Any:
        names.append(encoded.name.partition("#")[0])
        return real(encoded, limits)

    monkeypatch.setattr(tiff_reader, "open_tiff", noted)
    return names


def tiff_tiles(folder: Path, count: int = 2) -> ImageList:
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 128, 3), np.uint8)
        (folder / f"{number}.tif").write_bytes(tiff(pixels, photometric="rgb", tile=(32, 32)))
    return list_images(folder, tile=32)


def test_a_thread_opens_a_tiff_once_for_all_its_tiles(tmp_path: Path, opened: list[str]) -> None:
    listed = tiff_tiles(tmp_path)
    opened.clear()
    tiles = [read_image(ref, SPEC) for ref in listed]
    assert opened == ["0.tif", "1.tif"]
    for ref, tile in zip(listed, tiles, strict=True):
        np.testing.assert_array_equal(tile, read_image(replace(ref, scenes=None), SPEC))
    with ThreadPoolExecutor(3) as pool:
        for tile, again in zip(tiles, pool.map(lambda ref: read_image(ref, SPEC), listed), strict=True):
            np.testing.assert_array_equal(tile, again)


def test_a_thread_opens_a_tiff_once_for_all_its_frames(tmp_path: Path, opened: list[str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), np.uint8)
    (tmp_path / "stack.tif").write_bytes(tiff(frames, photometric="rgb"))
    listed = list_images(tmp_path, frame="each")
    opened.clear()
    spec = SPEC.model_copy(update={"tile": None})
    np.testing.assert_array_equal([read_image(ref, spec) for ref in listed], frames)
    assert opened == ["stack.tif"]


def test_a_damaged_tile_is_named_and_costs_the_others_nothing(tmp_path: Path) -> None:
    listed = tiff_tiles(tmp_path, 1)
    file = tmp_path / "0.tif"
    with tifffile.TiffFile(file) as tif:
        page = tif.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        last = page.dataoffsets[-1]
    whole = [read_image(ref, SPEC) for ref in listed]
    with file.open("r+b") as cut:
        cut.truncate(last + 9)
    for place, ref in enumerate(listed):
        if place < len(listed) - 1:
            np.testing.assert_array_equal(read_image(ref, SPEC), whole[place])
        else:
            with pytest.raises(ImageError, match=f"^{re.escape(ref.name)}: "):
                read_image(ref, SPEC)


def test_a_tiff_that_was_written_again_is_opened_again(tmp_path: Path) -> None:
    listed = tiff_tiles(tmp_path, 1)
    read_image(listed[0], SPEC)
    pixels = np.random.default_rng(7).integers(0, 256, (96, 128, 3), np.uint8)
    (tmp_path / "new").write_bytes(tiff(pixels, photometric="rgb", tile=(32, 32)))
    (tmp_path / "new").replace(tmp_path / "0.tif")
    np.testing.assert_array_equal(read_image(listed[1], SPEC), pixels[:32, 32:64])
    (tmp_path / "0.tif").unlink()
    with pytest.raises(ImageError, match="No such file"):
        read_image(listed[0], SPEC)


def test_a_file_written_again_with_its_size_and_time_kept_is_decoded_again(tmp_path: Path) -> None:
    """As `cp -p` does with another file of the same size and time."""
    listed = tiff_tiles(tmp_path, 1)
    read_image(listed[0], SPEC)
    before = (tmp_path / "0.tif").stat()
    pixels = np.random.default_rng(7).integers(0, 256, (96, 128, 3), np.uint8)
    time.sleep(0.05)  # the clock of the file system ticks
    (tmp_path / "0.tif").write_bytes(tiff(pixels, photometric="rgb", tile=(32, 32)))
    os.utime(tmp_path / "0.tif", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "0.tif").stat().st_size == before.st_size
    np.testing.assert_array_equal(read_image(listed[1], SPEC), pixels[:32, 32:64])


def test_a_forked_process_opens_files_of_its_own(tmp_path: Path) -> None:
    listed = tiff_tiles(tmp_path, 1)
    whole = [read_image(ref, SPEC) for ref in listed]
    child = os.fork()
    if child == 0:
        same = all(
            np.array_equal(read_image(ref, SPEC), tile)
            for _ in range(50)
            for ref, tile in zip(listed, whole, strict=True)
        )
        os._exit(0 if same else 1)
    for _ in range(50):
        for ref, tile in zip(listed, whole, strict=True):
            np.testing.assert_array_equal(read_image(ref, SPEC), tile)
    assert os.waitpid(child, 0)[1] == 0


def test_no_file_stays_open_longer_than_its_list(tmp_path: Path) -> None:
    listed = tiff_tiles(tmp_path, 1)
    read_image(listed[0], SPEC)

    def held() -> bool:
        descriptors = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(each) == str(tmp_path / "0.tif") for each in descriptors)

    assert held()
    del listed
    gc.collect()
    assert not held()
