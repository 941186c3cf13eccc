"""Reading images: everything readable is read rightly, everything else is refused by name; and the ONE resize."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from jepakit.bundle import Preprocess
from jepakit.errors import ImageError, InputError
from jepakit.images import MAX_PIXELS, SUFFIXES, fit, preprocess, read_image

Pixels = NDArray[np.uint8]

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "multichannel"


def make_pixels(height: int = 20, width: int = 30, bands: int = 3, seed: int = 0) -> Pixels:
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_spec(size: int, resize_to: int, resize: str = "shorter", interpolation: str = "bicubic") -> Preprocess:
    values: dict[str, Any] = {"size": size, "resize_to": resize_to, "resize": resize, "interpolation": interpolation}
    return Preprocess(**values, bands=3, dtype="uint8", mean=(0.5,) * 3, std=(0.5,) * 3)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(source: Any) -> Pixels:
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(source: Any, code: str, name: str = "image", **options: Any) -> str:
    """The message of the ImageError that reading gives; its code and the name in it are checked."""
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    assert caught.value.code == code
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files made by hand, which Pillow cannot write


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(
    width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"", after: bytes = b""
) -> bytes:
    """colour: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + before + header + after + body


def make_deep_png(colour: int, before: bytes = b"") -> bytes:
    """A 16-bit PNG, 10 × 9; its values fill the lower bytes as a 12-bit camera's do."""
    bands = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = b"\0" + np.arange(10 * bands, dtype=">u2").tobytes()
    return make_png(10, 9, 16, colour, row * 9, before)


def make_deep_rgb_tiff(size: int = 10) -> bytes:
    """A 16-bit RGB TIFF, uncompressed, one strip."""
    pixels = np.arange(size * size * 3, dtype="<u2").tobytes()
    n_tags = 10
    after_tags = 8 + 2 + 12 * n_tags + 4
    entries = [
        (256, 3, 1, size), (257, 3, 1, size), (258, 3, 3, after_tags), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, after_tags + 6), (277, 3, 1, 3), (278, 3, 1, size), (279, 4, 1, len(pixels)), (284, 3, 1, 1),
    ]  # fmt: skip
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, n_tags) + tags + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + pixels


# What cannot be read rightly


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["gray", "rgb", "gray+alpha", "rgb+alpha"])
def test_a_16_bit_png_is_refused(tmp_path: Path, colour: int) -> None:
    file = tmp_path / "deep.png"
    file.write_bytes(make_deep_png(colour))
    message = refused(file, "unsupported_mode", str(file))
    assert "16-bit" in message
    assert "window" in message
    refused(file.read_bytes(), "unsupported_mode")


def test_a_16_bit_png_is_refused_even_when_its_header_is_not_the_first_chunk() -> None:
    refused(make_deep_png(2, before=png_chunk(b"prVt", b"\x08" * 32)), "unsupported_mode")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_deep_tiff_is_refused(tmp_path: Path, dtype: type[Any]) -> None:
    file = tmp_path / "scan.tif"
    Image.fromarray(np.arange(400).reshape(20, 20).astype(dtype)).save(file)
    refused(file, "unsupported_mode", str(file))


def test_a_16_bit_rgb_tiff_is_refused() -> None:
    data = make_deep_rgb_tiff()
    assert Image.open(io.BytesIO(data)).mode == "RGB", "Pillow squeezes it without a word"
    assert "16-bit" in refused(data, "unsupported_mode")


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_a_deep_pillow_image_is_refused(mode: str) -> None:
    refused(Image.new(mode, (20, 20)), "unsupported_mode")


@pytest.mark.parametrize("format", ["TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused(tmp_path: Path, format: str) -> None:
    frames = [Image.fromarray(make_pixels(seed=seed)) for seed in range(3)]
    file = tmp_path / f"frames.{format.lower()}"
    file.write_bytes(encode(frames[0], format, save_all=True, append_images=frames[1:]))
    assert "3 frames" in refused(file, "unsupported_mode", str(file))


@pytest.mark.parametrize("n_frames", [1, 3])
def test_a_gif_is_no_format_of_ours(n_frames: int) -> None:
    frames = [Image.fromarray(make_pixels(seed=seed)).convert("P") for seed in range(n_frames)]
    message = refused(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "unsupported_format")
    assert "JPEG, PNG" in message


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 100, b"hello", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"],
    ids=lambda data: repr(data[:6]),
)
def test_what_is_not_an_image_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "thing.jpg"
    file.write_bytes(data)
    refused(file, "unsupported_format", str(file))
    refused(data, "unsupported_format")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.png", "unreadable", "none.png")
    refused(str(tmp_path), "unreadable", str(tmp_path))


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}),
     ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
def test_a_file_cut_short_is_refused_or_nothing_was_lost(tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(make_pixels(40, 50)), format, **options)
    whole = read(data)
    file = tmp_path / "cut"
    refusals: list[ImageError] = []
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 3, len(data) - 1]:
        file.write_bytes(data[:length])
        try:
            np.testing.assert_array_equal(read(file), whole)
        except ImageError as error:
            refusals.append(error)
    assert {error.code for error in refusals} <= {"unreadable", "unsupported_format"}
    assert all(str(file) in str(error) for error in refusals)
    assert len(refusals) > 50


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_half_a_file_is_unreadable(tmp_path: Path, format: str) -> None:
    data = encode(Image.fromarray(make_pixels(100, 100)), format)
    file = tmp_path / "half"
    file.write_bytes(data[: len(data) // 2])
    assert "cut short" in refused(file, "unreadable", str(file))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_damaged_file_is_never_another_error(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format == "BMP" else {"exif": exif}
    data = encode(Image.fromarray(make_pixels(12, 10)), format, **options)
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow may warn of the damage: what counts is what the caller sees
        for position in range(min(len(data), 700)):
            damaged = bytearray(data)
            damaged[position] = (damaged[position] + random.integers(1, 256)) % 256
            with contextlib.suppress(ImageError):
                read_image(bytes(damaged))


def test_a_header_that_claims_65000_by_65000_is_refused_before_decoding(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(make_png(65000, 65000, 8, 2, b""))
    assert "limit is 89,000,000" in refused(file, "too_large", str(file))


@pytest.mark.parametrize("side", [9400, 9460, 10_000])
def test_the_pixel_budget_holds_below_and_above_pillows_own_limit(side: int) -> None:
    data = make_png(side, side, 1, 0, zlib.compress(b""))
    assert side * side > MAX_PIXELS or side == 9400
    if side > 9400:
        refused(data, "too_large")
    else:
        refused(data, "unreadable")


def test_the_pixel_budget_can_be_chosen() -> None:
    data = encode(Image.fromarray(make_pixels(20, 30)), "PNG")
    assert "30 × 20" in refused(data, "too_large", max_pixels=599)
    refused(Image.fromarray(make_pixels(20, 30)), "too_large", max_pixels=599)
    read_image(data, max_pixels=600)


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


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 20, 3), np.float32),
        np.zeros((20, 20, 3), np.uint16),
        np.zeros((20, 20), np.int64),
        np.zeros((20, 20), np.bool_),
        np.zeros((20, 20, 4), np.uint8),
        np.zeros((3, 20, 20), np.uint8),
        np.zeros((2, 20, 20, 3), np.uint8),
        np.zeros(400, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_of_another_type_or_shape_are_refused(array: NDArray[Any]) -> None:
    message = refused(array, "wrong_shape", "array")
    assert str(array.dtype) in message
    assert str(list(array.shape)) in message


def test_an_array_without_pixels_is_refused() -> None:
    refused(np.zeros((0, 20, 3), np.uint8), "too_small", "array")


def test_a_colour_space_that_pillow_cannot_turn_into_rgb_is_not_called_damage() -> None:
    refused(Image.new("La", (20, 20)), "unsupported_mode")


@pytest.mark.parametrize("source", [42, None, [[1, 2], [3, 4]], object()], ids=str)
def test_what_cannot_be_an_image_at_all_is_the_callers_error(source: Any) -> None:
    with pytest.raises((TypeError, InputError)):
        read_image(source)


def test_a_line_of_pixels_does_not_fill_the_memory() -> None:
    """8 × 2,000,000 pixels pass every check; resized to 224 on the shorter side they would be 38 GB."""
    program = """
import io, resource
from PIL import Image
from jepakit.bundle import Preprocess
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


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_exif_orientation_is_honoured(format: str, options: dict[str, Any], orientation: int) -> None:
    stored = Image.fromarray(make_pixels(20, 30))
    as_stored = read(encode(stored, format, **options))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, format, exif=exif, **options)
    upright = UPRIGHT[orientation](as_stored)
    np.testing.assert_array_equal(read(data), upright)
    np.testing.assert_array_equal(read(Image.open(io.BytesIO(data))), upright)


def on_white(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def test_transparency_is_laid_on_white() -> None:
    pixels = make_pixels(20, 30, bands=4)
    pixels[:5, :, 3] = 0
    pixels[5:10, :, 3] = 255
    got = read(encode(Image.fromarray(pixels), "PNG"))
    np.testing.assert_allclose(got, on_white(pixels[..., :3], pixels[..., 3]), atol=1)
    assert (got[:5] == 255).all()
    np.testing.assert_array_equal(got[5:10], pixels[5:10, :, :3])
    np.testing.assert_array_equal(read(Image.fromarray(pixels)), got)
    np.testing.assert_array_equal(read(encode(Image.fromarray(pixels), "TIFF")), got)


def test_gray_with_alpha_is_laid_on_white() -> None:
    pixels = make_pixels(20, 30, bands=2)
    bands = [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in (0, 1)]
    got = read(encode(Image.merge("LA", bands), "PNG"))
    expected = on_white(np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1])
    np.testing.assert_allclose(got, expected, atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_a_palette_gives_its_colours(format: str) -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30) % 3).convert("L")
    palette = Image.frombytes("P", image.size, image.tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    got = read(encode(palette, format))
    assert got[0, :3].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"], ids=["one colour", "alpha of each colour"])
def test_a_palette_with_transparency_is_laid_on_white(transparency: int | bytes) -> None:
    palette = Image.frombytes("P", (30, 20), bytes(range(3)) * 200)
    palette.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    got = read(encode(palette, "PNG", transparency=transparency)).astype(int)
    assert got[0, 0].tolist() == [255, 0, 0]
    assert got[0, 1].tolist() == [255, 255, 255]
    third = [10, 20, 30] if isinstance(transparency, int) else [132, 137, 142]
    np.testing.assert_allclose(got[0, 2], third, atol=1)


@pytest.mark.parametrize(("mode", "key", "seen"), [("L", 7, [7]), ("RGB", (7, 8, 9), [7, 8, 9]), ("1", 0, [0])])
def test_a_transparent_key_colour_is_laid_on_white(mode: str, key: Any, seen: list[int]) -> None:
    image = Image.new(mode, (20, 20), key)
    assert (read(encode(image, "PNG")) == seen).all()
    assert (read(encode(image, "PNG", transparency=key)) == 255).all()


def test_cmyk_jpegs_keep_their_colours() -> None:
    for colour in [(255, 255, 255), (0, 0, 0), (200, 40, 30), (20, 90, 180)]:
        cmyk = Image.new("RGB", (20, 20), colour).convert("CMYK")
        for data in (encode(cmyk, "JPEG", quality=95), encode(cmyk, "TIFF")):
            np.testing.assert_allclose(read(data).astype(int), np.broadcast_to(colour, (20, 20, 3)), atol=3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_gray_is_repeated_into_three_bands(format: str) -> None:
    gray = make_pixels(20, 30, bands=1)
    np.testing.assert_array_equal(read(encode(Image.fromarray(gray), format)), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(format: str) -> None:
    bits = make_pixels(20, 30, bands=1) > 127
    got = read(encode(Image.fromarray(bits), format))
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


def test_the_callers_pillow_image_is_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(Image.fromarray(make_pixels(20, 30, bands=4)), "PNG", exif=exif)))
    before = image.copy()
    read_image(image)
    assert (image.mode, image.size) == (before.mode, before.size)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(before))
    assert image.getexif()[0x0112] == 6


def test_suffixes_hold_both_spellings() -> None:
    assert {".jpg", ".jpeg", ".tif", ".tiff", ".png", ".webp", ".bmp"} == SUFFIXES


# fit


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
        got = fit(image, spec)
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, with_torchvision(image, spec), err_msg=f"{width} × {height}")


@pytest.mark.parametrize(("width", "height"), ROUNDING_SIZES)
def test_fit_equals_torchvision_where_the_longer_side_comes_out_whole(width: int, height: int) -> None:
    spec = make_spec(14, 16)
    image = Image.fromarray(make_pixels(height, width))
    np.testing.assert_array_equal(fit(image, spec), with_torchvision(image, spec))


@pytest.mark.parametrize("resize_to", [224, 248, 256])
def test_fit_equals_torchvision_at_the_sizes_people_use(resize_to: int) -> None:
    spec = make_spec(224, resize_to)
    for width, height in [(224, 224), (256, 256), (300, 248), (640, 427), (375, 500), (1023, 769)]:
        image = Image.fromarray(make_pixels(height, width, seed=width))
        np.testing.assert_array_equal(fit(image, spec), with_torchvision(image, spec), err_msg=f"{width} × {height}")


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    pixels = make_pixels(18, 18)
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), make_spec(16, 18)), pixels[1:17, 1:17])


# Real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data is not at hand")
def test_real_deep_and_multispectral_files_are_refused_by_name() -> None:
    files = sorted(
        file
        for file in SHARED.rglob("*")
        if file.is_file() and file.suffix.lower() in {".tif", ".tiff", ".png", ".dcm"}
    )
    assert len(files) > 20
    for file in files:
        with pytest.raises(ImageError, match=re.escape(file.name)) as caught:
            read_image(file)
        assert caught.value.code in ("unsupported_mode", "unsupported_format"), file
