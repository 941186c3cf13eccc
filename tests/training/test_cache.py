"""The cache of decoded images: shared, bounded, never stale, and never the cause of an error."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig, ViewsConfig
from jepakit.errors import ConfigError
from jepakit.sources import ImageList, list_images
from jepakit_training.data.cache import ImageCache, downscale, open_cache
from jepakit_training.data.views import ViewMaker

MB = 1 << 20
DAY_S = 24 * 3600


def pixels_of(seed: int, side: int = 64, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(dtype)


def opened(folder: Path, limit: int = MB, least_side: int = 64) -> ImageCache:
    return ImageCache(folder, limit, least_side, "")


def stored(folder: Path) -> int:
    """Bytes of all images in the folder."""
    return sum(file.stat().st_size for file in folder.glob("*.npy"))


def kept(folder: Path) -> set[str]:
    """The keys of all images in the folder."""
    return {file.name.removesuffix(".jepakit.npy") for file in folder.glob("*.jepakit.npy")}


def image_file(folder: Path, content: bytes = b"an image") -> Path:
    path = folder / "image.png"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_was_put_in_comes_out(tmp_path: Path, dtype: Any) -> None:
    pixels = pixels_of(0, dtype=dtype)
    opened(tmp_path).put("a", pixels)
    found = opened(tmp_path).get("a")
    assert found is not None
    assert found.dtype == dtype
    assert np.array_equal(found, pixels)
    assert opened(tmp_path).get("b") is None


def test_views_of_a_cached_image_are_the_images_own(tmp_path: Path) -> None:
    pixels, maker = pixels_of(0), ViewMaker(ViewsConfig(), 32, 16)
    cache = opened(tmp_path)
    cache.put("a", pixels)
    found = cache.get("a")
    assert found is not None
    for one, other in zip(maker(pixels, 5).views, maker(found, 5).views, strict=True):
        assert torch.equal(one, other)


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    opened(tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    cache, path = opened(tmp_path / "cache"), image_file(tmp_path)

    def key() -> str:
        stamp = list_images([path], "none").stamp(0)
        assert stamp is not None
        return cache.key(stamp)

    before = key()
    assert before == key()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    touched = key()
    path.write_bytes(b"another size")
    os.utime(path, ns=(0, 0))
    changed = key()
    path.write_bytes(b"as long, too")
    os.utime(path, ns=(0, 0))  # as `cp -p` and `rsync -t` do
    assert len({before, touched, changed, key()}) == 4


def test_what_else_decides_the_pixels_is_part_of_the_key(tmp_path: Path) -> None:
    caches = [
        ImageCache(tmp_path / "cache", MB, 64, ""), ImageCache(tmp_path / "cache", MB, 65, ""),
        ImageCache(tmp_path / "cache", MB, 64, "voi"),
    ]  # fmt: skip
    assert len({cache.key(stamp) for cache in caches for stamp in ("a.png", "a.png frame 1")}) == 6


def test_what_a_model_takes_is_part_of_the_key(tmp_path: Path) -> None:
    """Its mean fills "no data", and its DICOM window decides what is seen."""
    config = AdaptConfig(images="x", cache=str(tmp_path / "cache"))
    spec = Preprocess(
        size=64, resize_to=64, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )  # fmt: skip
    caches = [open_cache(config, 64, one) for one in (spec, spec.model_copy(update={"mean": (0.4,) * 3}))]
    assert len({cache.key("a.png") for cache in caches if cache is not None}) == 2


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.png", data)
    return path


def keys_of(cache: ImageCache, images: ImageList) -> list[str | None]:
    stamps = [images.stamp(place) for place in range(len(images))]
    return [None if stamp is None else cache.key(stamp) for stamp in stamps]


def test_members_of_an_archive_have_keys_that_change_with_the_archive(tmp_path: Path) -> None:
    cache, archive = opened(tmp_path / "cache"), zipped(tmp_path / "a.zip", a=b"one", b=b"two")
    listed = list_images(archive)
    before = keys_of(cache, listed)
    assert before == keys_of(cache, pickle.loads(pickle.dumps(listed)))
    os.utime(archive, ns=(0, 0))
    keys = {*before, *keys_of(cache, listed), *keys_of(opened(tmp_path / "cache", least_side=65), listed)}
    assert len(keys) == 6
    assert None not in keys


def test_a_stamp_tells_pieces_of_a_file_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "scene.npy", pixels_of(0, side=32))
    cache = opened(tmp_path / "cache")
    listings = [list_images(tmp_path / "scene.npy", tile=16), list_images(tmp_path / "scene.npy", frame=0)]
    assert len({key for listed in listings for key in keys_of(cache, listed)}) == 5


def test_a_stamp_reads_no_image(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", a=b"one")
    listed = list_images(archive)
    archive.write_bytes(b"no longer a ZIP")
    assert listed.stamp(0) is not None
    archive.unlink()
    assert listed.stamp(0) is None
    assert list_images([pixels_of(0)]).stamp(0) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "rubbish", "archive", "object", "shape", "dtype"])
def test_a_damaged_file_is_a_miss_and_can_be_replaced(tmp_path: Path, damage: str) -> None:
    cache, file = opened(tmp_path), tmp_path / "a.jepakit.npy"
    cache.put("a", pixels_of(0))
    whole = file.read_bytes()
    with file.open("wb") as out:
        if damage == "archive":
            np.savez(out, pixels_of(0))
        elif damage in ("object", "shape", "dtype"):
            wrong = {"object": np.array([{}, {}]), "shape": np.zeros(5, "u1"), "dtype": np.zeros((4, 4, 3), "i8")}
            np.save(out, wrong[damage], allow_pickle=True)
        else:
            out.write({"empty": b"", "cut": whole[:-50], "rubbish": b"rubbish" * 500}[damage])
    assert cache.get("a") is None
    cache.put("a", pixels_of(0))
    found = cache.get("a")
    assert found is not None
    assert np.array_equal(found, pixels_of(0))


def test_what_comes_after_the_limit_is_not_stored_and_what_came_before_stays(tmp_path: Path) -> None:
    cache = opened(tmp_path, limit=5 * 12500)
    for number in range(10):
        cache.put(str(number), pixels_of(number))
    assert [cache.get(str(number)) is not None for number in range(10)] == [True] * 5 + [False] * 5
    assert stored(tmp_path) <= 5 * 12500


def put_many(cache: ImageCache, first: int, barrier: Any) -> None:
    barrier.wait()
    for number in range(first, first + 150):
        cache.put(str(number), pixels_of(number, side=8))


def test_processes_share_the_folder_and_its_limit_to_the_byte(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(opened(tmp_path, limit=300 * (8 * 8 * 3 + 128))))
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    workers = [fork.Process(target=put_many, args=(cache, first, barrier)) for first in (0, 150, 300, 450)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    found = {number: cache.get(str(number)) for number in range(600)}
    assert sum(pixels is not None for pixels in found.values()) == 300
    assert all(pixels is None or np.array_equal(pixels, pixels_of(key, side=8)) for key, pixels in found.items())
    assert not list(tmp_path.glob(".tmp-*"))


def fill(folder: Path, ages_days: dict[str, float]) -> None:
    cache = opened(folder)
    for key, age in ages_days.items():
        cache.put(key, pixels_of(0))
        when = time.time() - age * DAY_S
        os.utime(folder / f"{key}.jepakit.npy", (when, when))


def test_opening_over_the_limit_removes_the_longest_unused(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 9, "c": 1, "d": 5})
    opened(tmp_path, limit=2 * 12500)
    assert kept(tmp_path) == {"a", "c"}


def test_opening_a_nearly_full_folder_removes_what_nobody_has_used_for_a_month(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 40, "b": 29, "c": 1})
    opened(tmp_path, limit=10 * 12500)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    opened(tmp_path, limit=3 * 12500)
    assert kept(tmp_path) == {"b", "c"}


def test_a_folder_that_stays_nearly_full_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, {"a": 1})
    used = stored(tmp_path)
    opened(tmp_path, limit=2 * used)
    assert capsys.readouterr().err == ""
    opened(tmp_path, limit=used)
    warned = capsys.readouterr().err
    assert "is 100% full, with images of this run or of others" in warned
    assert "Raise cache_gb" in warned


def test_opening_counts_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 0, "b": 0})
    cache = opened(tmp_path, limit=3 * 12500)
    for key in "cde":
        cache.put(key, pixels_of(1))
    assert kept(tmp_path) == {"a", "b", "c"}


def test_opening_removes_what_a_crash_left_half_written_and_no_strangers_array(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1})
    for name in (".tmp-1-b.jepakit.npy", "mine.npy", "notes.txt"):
        (tmp_path / name).write_bytes(b"mine" * 9000)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".used_bytes").write_text(str(12_416 + 36_000))  # room had been reserved for b
    opened(tmp_path, limit=2 * 12500)
    assert {file.name for file in tmp_path.iterdir()} == {"a.jepakit.npy", "mine.npy", "notes.txt", ".used_bytes"}


def test_files_are_counted_at_the_start_only_where_the_folder_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at each of a million files takes an hour on a network."""
    fill(tmp_path, {"a": 0, "b": 0})
    listed, real = [], Path.iterdir

    def noted(folder: Path) -> Iterator[Path]:
        listed.append(folder)
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", noted)
    cache = opened(tmp_path, limit=3 * 12500)
    for key in "cd":
        cache.put(key, pixels_of(1))
    assert kept(tmp_path) == {"a", "b", "c"}
    assert listed == []
    opened(tmp_path, limit=3 * 12500)
    assert listed == [tmp_path]


def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = opened(tmp_path)
    for key in "ab":
        cache.put(key, pixels_of(0))
    assert kept(tmp_path) == {"a", "b"}
    assert capsys.readouterr().err.count(f"warning: {tmp_path} lies where files cannot be locked") == 1


def test_a_folder_that_goes_away_while_in_use_is_no_error(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.put("a", pixels_of(0))
    shutil.rmtree(tmp_path / "cache")
    cache.put("b", pixels_of(0))
    assert cache.get("a") is None
    assert cache.get("b") is None


def test_a_damaged_ledger_is_written_anew(tmp_path: Path) -> None:
    cache = opened(tmp_path, limit=3 * 12500)
    cache.put("a", pixels_of(0))
    (tmp_path / ".used_bytes").write_bytes(b"")
    for key in "bcd":
        cache.put(key, pixels_of(1))
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file.* cannot hold the image cache .*: name another folder"):
        opened(tmp_path / "file" / "cache")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_downscaling_makes_the_shorter_side_so_long_and_keeps_the_picture(dtype: Any) -> None:
    ramp = np.broadcast_to(np.linspace(20, 230, 300)[None, :, None], (200, 300, 5)).astype(dtype)
    small = downscale(ramp, 50)
    assert small.shape == (50, 75, 5)
    assert small.dtype == dtype
    assert small.flags.c_contiguous
    expected = ramp.reshape(50, 4, 75, 4, 5).mean((1, 3))
    assert np.abs(small.astype(float) - expected)[:, 2:-2].max() < 1.5
    assert downscale(ramp[:, :299], 50).shape == (50, 75, 5), "rounded, or the picture would be squeezed"


@pytest.mark.parametrize("side", [200, 500])
def test_what_is_small_already_is_not_touched(side: int) -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    assert downscale(pixels, side) is pixels


def test_a_stamp_tells_the_frames_of_a_file_apart(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([pixels_of(0, side=32)[..., 0], pixels_of(1, side=32)[..., 0]]))
    listings = [list_images(tmp_path / "stack.tif", frame=frame) for frame in (0, 1, "each")]
    keys = [keys_of(opened(tmp_path / "cache"), listed) for listed in listings]
    assert keys[0] + keys[1] == keys[2]
    assert len(set(keys[2])) == 2
