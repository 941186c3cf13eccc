"""8-bit images of every colour mode come out as RGB; and the ONE resize."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.files import encoded, png_chunk
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from jepakit.bundles.manifest import Preprocess
from jepakit.errors import ImageError, NoMemoryError
from jepakit.images import fit, preprocess, read_image
from jepakit.readers import DEFAULT_LIMITS, Limits, open_raster, room
from jepakit.readers.pillow import PillowFile
from jepakit.readers.room import room_for
from jepakit.sources import list_images

Pixels = NDArray[np.uint8]

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "multichannel"


def make_pixels(height: int = 20, width: int = 30, bands: int = 3, seed: int = 0) -> Pixels:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_spec(size: int, resize_to: int, resize: str = "shorter", interpolation: str = "bicubic") -> Preprocess:
    values: dict[str, Any] = {"size": size, "resize_to": resize_to, "resize": resize, "interpolation": interpolation}
    return Preprocess(**values, bands=3, dtype="uint8", mean=(0.5,) * 3, std=(0.5,) * 3)


def read(source: Any, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    with open_raster(source, limits=limits) as raster:
        assert (raster.header.bands, raster.header.dtype) == (3, "uint8")
        return raster.read()


def refused(source: Any, code: str, name: str = "image", **options: Any) -> str:
    """The message of the ImageError raised by reading; checks its code and the name in it."""
    with pytest.raises(ImageError) as caught:
        read(source, **options)
    assert caught.value.code == code
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files made by hand, which Pillow cannot write


def make_png(
    width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"", after: bytes = b""
) -> bytes:
    """colour: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + before + header + after + body


# What cannot be read correctly


def test_a_header_that_claims_65000_by_65000_is_refused_before_decoding(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(make_png(65000, 65000, 8, 2, b""))
    assert "limit is 89,000,000" in refused(file, "too_large", str(file))


@pytest.mark.parametrize("side", [9400, 9460, 10_000])
def test_the_pixel_budget_holds_below_and_above_pillows_own_limit(side: int) -> None:
    data = make_png(side, side, 1, 0, zlib.compress(b""))
    refusal = refused(data, "too_large")
    assert ("limit is 89,000,000" in refusal) == (side * side > DEFAULT_LIMITS.max_pixels)


def test_the_pixel_budget_can_be_chosen() -> None:
    data = encoded(Image.fromarray(make_pixels(20, 30)), "PNG")
    assert "30 × 20" in refused(data, "too_large", limits=Limits(max_pixels=599))
    refused(Image.fromarray(make_pixels(20, 30)), "too_large", limits=Limits(max_pixels=599))
    read(data, limits=Limits(max_pixels=600))


def test_a_scene_that_tiles_are_cut_from_may_have_more_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that is decoded whole: a PNG."""
    pixels = make_pixels(40, 60)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    monkeypatch.setattr("jepakit.readers.header.DEFAULT_LIMITS", Limits(max_pixels=2399))
    spec = make_spec(20, 20)
    tiles = list_images(tmp_path, tile=20)
    assert len(tiles) == 6
    found = [read_image(tiles[place], spec) for place in range(6)]
    expected = [pixels[y : y + 20, x : x + 20] for y in (0, 20) for x in (0, 20, 40)]
    assert all(map(np.array_equal, found, expected))
    with pytest.raises(ImageError, match="60 × 40 pixels, the limit is 2,399: cut it into tiles"):
        read_image(tmp_path / "scene.png", spec)


def test_pillows_own_limit_is_neither_heeded_nor_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(make_pixels()), "PNG")
    tiff = encoded(Image.fromarray(make_pixels()), "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for each in (data, tiff):
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(each))
        read(each)
    read(Image.fromarray(make_pixels()))
    assert Image.MAX_IMAGE_PIXELS == 100


def test_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lock, decoding, most = PillowFile._decode, threading.Lock(), 0, 0

    def slow(*args: Any) -> Any:
        nonlocal decoding, most
        with lock:
            decoding += 1
            most = max(most, decoding)
        time.sleep(0.01)
        with lock:
            decoding -= 1
        return decode(*args)

    monkeypatch.setattr(PillowFile, "_decode", slow)
    data = encoded(Image.fromarray(make_pixels()), "PNG")
    for size, at_once in ((2 * 3 * 600, 2), (2 * 3 * 600 - 1, 1)):
        monkeypatch.setattr("jepakit.readers.room.AT_ONCE_BYTES", size)
        most = 0
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(read_image, [data] * 12, [make_spec(20, 20)] * 12))
        assert most == at_once


def test_small_images_do_not_keep_out_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepakit.readers.room.AT_ONCE_BYTES", 100)
    entered, first, second = threading.Event(), room_for(60), room_for(60)
    first.__enter__()
    large = threading.Thread(target=lambda: _hold(90, entered), daemon=True)
    large.start()
    while not room._room.waiting:
        time.sleep(0.001)
    small = threading.Thread(target=lambda: _hold(10, threading.Event()), daemon=True)
    small.start()  # there is room, but it came later
    while len(room._room.waiting) < 2:
        time.sleep(0.001)
    first.__exit__(None, None, None)
    assert entered.wait(60)
    large.join(60)
    small.join(60)
    with second:
        assert room._room.taken == 60
    assert not room._room.waiting


def _hold(size: int, entered: threading.Event) -> None:
    with room_for(size):
        entered.set()


@pytest.mark.parametrize("where", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(where, MagicMock(side_effect=MemoryError))
    with pytest.raises(NoMemoryError, match="image: out of memory while it was read: end other programs") as told:
        read_image(encoded(Image.fromarray(make_pixels()), "PNG"), make_spec(20, 20))
    assert isinstance(told.value, MemoryError)
    assert not isinstance(told.value, ImageError)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small_an_image_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    file = tmp_path / "dot.png"
    Image.new("RGB", size).save(file)
    refused(file, "too_small", str(file))
    refused(Image.new("RGB", size), "too_small")
    refused(np.zeros((size[1], size[0], 3), np.uint8), "too_small", "array")


def test_the_smallest_image_is_8_by_8() -> None:
    assert read(Image.new("L", (8, 8), 9)).tolist() == np.full((8, 8, 3), 9).tolist()
    assert read(np.full((8, 8), 9, np.uint8)).shape == (8, 8, 3)


def test_an_array_without_pixels_is_refused() -> None:
    refused(np.zeros((0, 20, 3), np.uint8), "too_small", "array")


def test_a_colour_space_that_pillow_cannot_turn_into_rgb_is_not_called_damage() -> None:
    refused(Image.new("La", (20, 20)), "unsupported_mode")


def test_a_line_of_pixels_does_not_fill_the_memory() -> None:
    """8 × 2,000,000 pixels pass every check; resized to 224 on the shorter side they would be 38 GB."""
    program = """
import io, resource
from PIL import Image
from jepakit.bundles.manifest import Preprocess
from jepakit.errors import ImageError
from jepakit.images import preprocess
spec = Preprocess(size=224, resize_to=224, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8",
                  mean=(0.5,) * 3, std=(0.5,) * 3)
buffer = io.BytesIO()
Image.new("L", (2_000_000, 8)).save(buffer, "PNG", compress_level=1)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    assert preprocess(buffer.getvalue(), spec).shape == (224, 224, 3)
except ImageError as error:
    assert error.code == "too_large", error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


# What is read, and how


def on_white(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def test_gray_with_alpha_is_laid_on_white() -> None:
    pixels = make_pixels(20, 30, bands=2)
    bands = [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in (0, 1)]
    got = read(encoded(Image.merge("LA", bands), "PNG"))
    expected = on_white(np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1])
    np.testing.assert_allclose(got, expected, atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_a_palette_gives_its_colours(format: str) -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30) % 3).convert("L")
    palette = Image.frombytes("P", image.size, image.tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    got = read(encoded(palette, format))
    assert got[0, :3].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"], ids=["one colour", "alpha of each colour"])
def test_a_palette_with_transparency_is_laid_on_white(transparency: int | bytes) -> None:
    palette = Image.frombytes("P", (30, 20), bytes(range(3)) * 200)
    palette.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    got = read(encoded(palette, "PNG", transparency=transparency)).astype(int)
    assert got[0, 0].tolist() == [255, 0, 0]
    assert got[0, 1].tolist() == [255, 255, 255]
    third = [10, 20, 30] if isinstance(transparency, int) else [132, 137, 142]
    np.testing.assert_allclose(got[0, 2], third, atol=1)


@pytest.mark.parametrize(("mode", "key", "seen"), [("L", 7, [7]), ("RGB", (7, 8, 9), [7, 8, 9]), ("1", 0, [0])])
def test_a_transparent_key_colour_is_laid_on_white(mode: str, key: Any, seen: list[int]) -> None:
    image = Image.new(mode, (20, 20), key)
    assert (read(encoded(image, "PNG")) == seen).all()
    assert (read(encoded(image, "PNG", transparency=key)) == 255).all()


def test_cmyk_jpegs_keep_their_colours() -> None:
    for colour in [(255, 255, 255), (0, 0, 0), (200, 40, 30), (20, 90, 180)]:
        cmyk = Image.new("RGB", (20, 20), colour).convert("CMYK")
        for data in (encoded(cmyk, "JPEG", quality=95), encoded(cmyk, "TIFF")):
            np.testing.assert_allclose(read(data).astype(int), np.broadcast_to(colour, (20, 20, 3)), atol=3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_gray_is_repeated_into_three_bands(format: str) -> None:
    gray = make_pixels(20, 30, bands=1)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(gray), format)), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(format: str) -> None:
    bits = make_pixels(20, 30, bands=1) > 127
    got = read(encoded(Image.fromarray(bits), format))
    np.testing.assert_array_equal(got, np.repeat(bits[..., None], 3, axis=2) * 255)


@pytest.mark.parametrize("depth", [2, 4])
def test_gray_pngs_of_2_and_4_bits_fill_the_whole_range(depth: int) -> None:
    per_byte = 8 // depth
    row = bytes([0xFF] * (10 // per_byte)) + bytes([0x00] * (10 // per_byte))
    width = per_byte * len(row)
    got = read(make_png(width, 8, depth, 0, (b"\0" + row) * 8))
    assert (got[:, : width // 2] == 255).all()
    assert (got[:, width // 2 :] == 0).all()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBa", "PA", "CMYK"])
def test_pillow_images_in_other_colour_spaces_come_out_as_rgb(mode: str) -> None:
    intermediate = Image.new("RGB", (20, 20), (200, 40, 30)).convert("RGBA" if mode in ("RGBa", "PA") else "RGB")
    image = intermediate.convert("P").convert("PA") if mode == "PA" else intermediate.convert(mode)
    np.testing.assert_allclose(read(image).astype(int), np.broadcast_to((200, 40, 30), (20, 20, 3)), atol=6)


def test_path_bytes_pillow_and_array_give_the_same_bytes(tmp_path: Path) -> None:
    pixels = make_pixels(45, 61)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    spec = make_spec(16, 18)
    expected = preprocess(file, spec)
    assert expected.dtype == np.uint8
    assert expected.shape == (16, 16, 3)
    for source in (
        str(file),
        file.read_bytes(),
        Image.open(file),
        Image.fromarray(pixels),
        pixels,
        np.asfortranarray(pixels),
    ):
        np.testing.assert_array_equal(preprocess(source, spec), expected)


def test_gray_arrays_with_and_without_a_band_axis_are_one() -> None:
    gray = make_pixels(20, 30, bands=1)
    np.testing.assert_array_equal(read(gray), read(gray[..., None]))
    np.testing.assert_array_equal(read(gray), read(Image.fromarray(gray)))


SIZES = [
    (8, 8), (9, 8), (17, 23), (23, 17), (30, 30), (31, 64), (45, 46), (64, 31), (99, 100), (101, 57), (57, 101), (200, 33),
    (33, 200), (224, 224), (225, 224), (256, 341), (341, 256), (500, 375), (427, 640), (300, 8),
]  # fmt: skip
# Where size · long / short is whole, but long · (size / short) falls just below it in floating point.
ROUNDING_SIZES = [(98, 49), (49, 98), (147, 98), (206, 103), (322, 161), (294, 196), (343, 196)]


def with_torchvision(image: Image.Image, spec: Preprocess) -> Pixels:
    mode = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}[spec.interpolation]
    to: Any = spec.resize_to if spec.resize == "shorter" else (spec.resize_to, spec.resize_to)
    steps = [transforms.Resize(to, interpolation=mode, antialias=True), transforms.CenterCrop(spec.size)]
    return np.asarray(transforms.Compose(steps)(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shorter", "squash"])
@pytest.mark.parametrize(("size", "resize_to"), [(16, 16), (16, 18), (15, 18), (14, 17), (17, 22), (32, 37), (98, 112)])
def test_fit_equals_torchvision_pixel_for_pixel(size: int, resize_to: int, resize: str, interpolation: str) -> None:
    spec = make_spec(size, resize_to, resize, interpolation)
    for width, height in SIZES:
        image = Image.fromarray(make_pixels(height, width, seed=width))
        got = fit(np.asarray(image), spec)
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, with_torchvision(image, spec), err_msg=f"{width} × {height}")


@pytest.mark.parametrize(("width", "height"), ROUNDING_SIZES)
def test_fit_equals_torchvision_where_the_longer_side_comes_out_whole(width: int, height: int) -> None:
    spec = make_spec(14, 16)
    image = Image.fromarray(make_pixels(height, width))
    np.testing.assert_array_equal(fit(np.asarray(image), spec), with_torchvision(image, spec))


@pytest.mark.parametrize("resize_to", [224, 248, 256])
def test_fit_equals_torchvision_at_the_sizes_people_use(resize_to: int) -> None:
    spec = make_spec(224, resize_to)
    for width, height in [(224, 224), (256, 256), (300, 248), (640, 427), (375, 500), (1023, 769)]:
        image = Image.fromarray(make_pixels(height, width, seed=width))
        np.testing.assert_array_equal(
            fit(np.asarray(image), spec), with_torchvision(image, spec), err_msg=f"{width} × {height}"
        )


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    pixels = make_pixels(18, 18)
    np.testing.assert_array_equal(fit(pixels, make_spec(16, 18)), pixels[1:17, 1:17])
