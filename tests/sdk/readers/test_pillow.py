"""JPEG, PNG, WebP, BMP and Pillow's own images: upright, as they are meant, and never squeezed into 8 bits."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile
from tests.files import encoded, png_chunk

from jepakit.errors import ImageError
from jepakit.readers import Limits, Window, libtiff, open_raster
from jepakit.readers.zeros import zeros_in_pixels

Refused = Callable[..., str]


def make(*shape: int, dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def read(source: Any, **options: Any) -> NDArray[Any]:
    with open_raster(source) as raster:
        pixels = raster.read(**options)
        assert pixels.dtype.name == raster.header.dtype
        if not options:
            assert pixels.shape == (raster.header.height, raster.header.width, raster.header.bands)
    return pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_cut_short_is_refused_whatever_the_process_wants_of_pillow(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut = encoded(Image.fromarray(make(64, 64, 3)), kind)[:-2000]
    assert Image.open(io.BytesIO(cut)).load() is not None, "Pillow makes up the rest"
    refused(cut, "unreadable")
    refused(Image.open(io.BytesIO(cut)), "unreadable")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def with_chunk(png: bytes, made: bytes, *, late: bool) -> bytes:
    """The PNG with one more chunk, before or after its pixels."""
    at = png.rindex(b"IEND") - 4 if late else 33
    return png[:at] + made + png[at:]


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


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
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_orientation_is_honoured_by_header_pixels_and_windows(
    format: str, options: dict[str, Any], orientation: int
) -> None:
    stored = Image.fromarray(make(20, 30, 3))
    upright = UPRIGHT[orientation](read(encoded(stored, format, **options)))
    data = encoded(stored, format, exif=oriented(orientation), **options)
    np.testing.assert_array_equal(read(data), upright)
    np.testing.assert_array_equal(read(data, window=Window(2, 5, 10, 9)), upright[5:14, 2:12])
    np.testing.assert_array_equal(read(Image.open(io.BytesIO(data))), upright)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind them"])
def test_a_png_may_say_its_orientation_anywhere(orientation: int, dtype: str, late: bool) -> None:
    pixels = make(20, 30, 3, dtype=dtype)
    exif = png_chunk(b"eXIf", oriented(orientation).tobytes()[6:])
    data = with_chunk(bytes(imagecodecs.png_encode(pixels)), exif, late=late)
    np.testing.assert_array_equal(read(data), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("bands", [1, 3])
def test_16_bit_pngs_keep_their_16_bits(bands: int) -> None:
    pixels = make(20, 30, bands, dtype="uint16")
    data = imagecodecs.png_encode(pixels.squeeze())
    np.testing.assert_array_equal(read(data), pixels)
    np.testing.assert_array_equal(read(data, window=Window(3, 4, 10, 9)), pixels[4:13, 3:13])
    with open_raster(data) as raster:
        assert (raster.header.dtype, raster.header.bands) == ("uint16", bands)


@pytest.mark.parametrize("bands", [2, 4], ids=["grey and alpha", "RGB and alpha"])
def test_16_bits_with_alpha_are_refused_with_the_remedy(bands: int, refused: Refused) -> None:
    message = refused(imagecodecs.png_encode(make(20, 30, bands, dtype="uint16")), "unsupported_mode")
    assert "without alpha" in message


@pytest.mark.parametrize(("bands", "key"), [(1, b"\0\7"), (3, b"\0\7" * 3)])
def test_16_bits_with_a_transparent_colour_are_refused(bands: int, key: bytes, refused: Refused) -> None:
    data = bytes(imagecodecs.png_encode(make(20, 30, bands, dtype="uint16").squeeze()))
    assert "transparency" in refused(with_chunk(data, png_chunk(b"tRNS", key), late=False), "unsupported_mode")


def test_significant_bits_change_no_value() -> None:
    pixels = make(20, 30, dtype="uint16")
    for array, bits in ((pixels, b"\x0c"), (np.repeat(pixels[..., None], 3, axis=2), b"\x0c\x0c\x0c")):
        data = with_chunk(bytes(imagecodecs.png_encode(array)), png_chunk(b"sBIT", bits), late=False)
        np.testing.assert_array_equal(read(data), array.reshape(20, 30, -1))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "uint16"), ("I", "int32"), ("F", "float32")])
def test_deep_pillow_images_keep_their_values(mode: str, dtype: str) -> None:
    values = make(20, 30).astype(dtype) * 100
    image = Image.fromarray(values)
    assert image.mode == mode
    got = read(image)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[..., 0], values)


def test_a_pillow_image_that_lost_its_16_bits_is_refused(refused: Refused) -> None:
    image = Image.open(io.BytesIO(imagecodecs.png_encode(make(20, 30, 3, dtype="uint16"))))
    assert image.mode == "RGB"
    assert "give the file" in refused(image, "unsupported_mode")


def test_a_bmp_of_16_bits_a_pixel_is_plain_rgb() -> None:
    colours = (
        np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2").repeat(4, 0).repeat(4, 1)
    )  # 5, 6 and 5 bits of red, green, blue
    rows = b"".join(row.tobytes() for row in colours[::-1])
    info = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, len(rows), 0, 0, 0, 0) + struct.pack(
        "<3I", 0xF800, 0x7E0, 0x1F
    )
    data = struct.pack("<2sIHHI", b"BM", 14 + len(info) + len(rows), 0, 0, 14 + len(info)) + info + rows
    with open_raster(data) as raster:
        assert raster.header.dtype == "uint8"
        expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]
        np.testing.assert_array_equal(raster.read()[::4, ::4], expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_grey_is_three_equal_bands(format: str) -> None:
    data = encoded(Image.fromarray(make(20, 30)), format)
    pixels = read(data)
    assert pixels.shape == (20, 30, 3)
    np.testing.assert_array_equal(pixels, np.repeat(pixels[..., :1], 3, axis=2))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_is_laid_on_white() -> None:
    pixels = make(20, 30, 4)
    pixels[:5, :, 3], pixels[5:10, :, 3] = 0, 255
    got = read(encoded(Image.fromarray(pixels), "PNG"))
    share = pixels[..., 3:] / 255
    np.testing.assert_allclose(got, pixels[..., :3] * share + 255 * (1 - share), atol=1)
    np.testing.assert_array_equal(read(Image.fromarray(pixels)), got)


def test_cmyk_palettes_and_one_bit_become_rgb() -> None:
    image = Image.fromarray(make(20, 30, 3))
    for kind, format in ((image.convert("CMYK"), "JPEG"), (image.quantize(9), "PNG"), (image.convert("1"), "BMP")):
        data = encoded(kind, format)
        np.testing.assert_array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_have_frames(format: str, refused: Refused) -> None:
    frames = [make(20, 30, 3, seed=seed) for seed in range(3)]
    images = [Image.fromarray(frame) for frame in frames]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(images[0], format, save_all=True, append_images=images[1:], **options)
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    for source in (data, opened):
        with open_raster(source) as raster:
            assert raster.header.frames == 3
            for place in (2, 0, 1):
                np.testing.assert_array_equal(raster.read(frame=place), frames[place])
    assert opened.tell() == 1


def test_the_previews_of_a_phones_photo_are_no_frames() -> None:
    images = [Image.fromarray(make(40, 50, 3, seed=seed)) for seed in range(2)]
    data = encoded(images[0], "MPO", save_all=True, append_images=images[1:])
    with open_raster(data) as raster:
        assert (raster.header.format, raster.header.frames) == ("JPEG", 1)
        np.testing.assert_array_equal(raster.read(), read(encoded(images[0], "JPEG")))


@pytest.mark.parametrize(
    ("at_least", "size"),
    [(None, (800, 600)), (601, (800, 600)), (300, (400, 300)), (151, (400, 300)), (75, (100, 75)), (0, (100, 75))],
)
def test_a_jpeg_is_reduced_as_far_as_asked_for(at_least: int | None, size: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(make(6, 8, 3)).resize((800, 600)), "JPEG")
    with open_raster(data) as raster:
        assert raster.read(at_least=at_least).shape == (size[1], size[0], 3)
        assert raster.read().shape == (600, 800, 3)
        assert raster.read(Window(0, 0, 50, 40), at_least=at_least).shape == (40, 50, 3)
    with open_raster(encoded(Image.fromarray(make(600, 80, 3)), "PNG")) as raster:
        assert raster.read(at_least=10).shape == (600, 80, 3)


def zeroed(jpeg: bytes, count: int = 600) -> bytes:
    """The file with zeros in place of some bytes in its middle."""
    half = len(jpeg) // 2
    return jpeg[:half] + bytes(count) + jpeg[half + count :]


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"optimize": True}, {"restart_marker_blocks": 8}], ids=str)
@pytest.mark.parametrize("shape", [(200, 200), (200, 200, 3)], ids=["grey", "colour"])
def test_a_jpeg_that_has_lost_a_block_of_its_file_is_refused(
    tmp_path: Path, refused: Refused, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    jpeg = encoded(Image.fromarray(make(*shape)), "JPEG", **options)
    assert "a.jpg: damaged: zeros stand where" in refused(zeroed(jpeg), "unreadable", name="a.jpg")
    (tmp_path / "a.jpg").write_bytes(zeroed(jpeg))
    with open_raster(tmp_path / "a.jpg") as raster, pytest.raises(ImageError, match="zeros stand where"):
        raster.read(at_least=50)
    assert read(zeroed(jpeg, 100)).any(), "a code or two"
    assert "image: damaged" in refused(jpeg[: len(jpeg) // 2] + bytes(100_000), "unreadable")


def test_zeros_that_belong_in_a_jpeg_are_read() -> None:
    some = Image.fromarray(make(200, 200, 3))
    flat = Image.new("RGB", (2000, 2000))
    flat.paste(some, (900, 900))
    kept = [
        encoded(flat, "JPEG", optimize=True),
        encoded(flat, "JPEG", progressive=True),
        encoded(some, "JPEG", exif=b"Exif\0\0" + bytes(2000)),
        encoded(some, "JPEG") + bytes(2000),
        encoded(some, "JPEG")[:-2] + bytes(2000),
        encoded(some, "JPEG")[:-2] + b"\xff\xfe\x07\xd2" + bytes(2000) + b"\xff\xd9",
    ]
    for jpeg in kept:
        assert bytes(512) in jpeg
        assert read(jpeg).any()


@pytest.mark.parametrize("at", range(2, 640, 29))
def test_a_damaged_header_of_a_jpeg_is_refused_or_read(at: int) -> None:
    jpeg = zeroed(encoded(Image.fromarray(make(200, 200, 3)), "JPEG"))
    place = zeros_in_pixels(jpeg)
    assert place is not None
    for byte in b"\x00\x03\xff":
        assert zeros_in_pixels(jpeg[:at] + bytes([byte]) + jpeg[at + 1 :]) in (None, place)
        assert zeros_in_pixels(jpeg[:at] + bytes(600)) is None


def test_the_callers_pillow_image_is_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(make(20, 30, 4)), "PNG", exif=oriented(6))))
    before = image.copy()
    assert read(image).shape == (30, 20, 3)
    assert (image.mode, image.size, image.getexif()[0x0112]) == (before.mode, before.size, 6)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(before))


def test_windows_of_one_frame_decode_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from jepakit.readers import pillow

    decoded = []
    to_pixels = pillow.to_pixels

    def counted(image: Image.Image, name: str) -> NDArray[Any]:
        decoded.append(name)
        return to_pixels(image, name)

    monkeypatch.setattr(pillow, "to_pixels", counted)
    with open_raster(encoded(Image.fromarray(make(64, 64, 3)), "PNG")) as raster:
        parts = [raster.read(Window(x, 0, 16, 64)) for x in range(0, 64, 16)]
        parts[0][:] = 0
        np.testing.assert_array_equal(raster.read(Window(0, 0, 16, 64)), make(64, 64, 3)[:, :16])
    assert len(decoded) == 1


def test_budgets_are_judged_on_the_header(refused: Refused) -> None:
    huge = with_size(encoded(Image.fromarray(make(20, 30, 3)), "PNG"), 65000, 65000)
    assert "limit is 89,000,000" in refused(huge, "too_large")
    refused(with_size(encoded(Image.fromarray(make(20, 30, 3)), "PNG"), 9300, 9300), "too_large")
    for source in (encoded(Image.fromarray(make(20, 30, 3)), "PNG"), Image.fromarray(make(20, 30, 3))):
        assert "30 × 20" in refused(source, "too_large", limits=Limits(max_pixels=599))
        assert "1,800 bytes" in refused(source, "too_large", limits=Limits(max_decoded_bytes=1799))
        named = Limits(max_decoded_bytes=1799, set_by="a setting")
        assert "the limit is 1,799 (by a setting): " in refused(source, "too_large", limits=named)
        refused(source, "too_large", limits=Limits(max_bands=2))
    refused(encoded(Image.fromarray(make(20, 30, 3)), "PNG"), "too_large", limits=Limits(max_encoded_bytes=100))
    refused(encoded(Image.new("L", (7, 100)), "PNG"), "too_small")


def with_size(png: bytes, width: int, height: int) -> bytes:
    """The PNG with a false size in its header."""
    header = struct.pack(">II", width, height) + png[24:29]
    return png[:8] + png_chunk(b"IHDR", header) + png[33:]


def test_a_picture_of_nothing_that_swells_is_refused_and_a_real_one_is_not(refused: Refused) -> None:
    blank = encoded(Image.new("RGB", (3000, 3000)), "PNG")
    assert "over 500 times" in refused(blank, "too_large")
    with open_raster(blank, limits=Limits(max_ratio=2000)) as raster:
        assert raster.read().shape == (3000, 3000, 3)
    assert read(encoded(Image.new("RGB", (2000, 2000)), "PNG")).shape == (2000, 2000, 3)


def test_real_16_bit_pngs_equal_pillow(shared: Path) -> None:
    files = sorted((shared / "tiff16").glob("*.png"))
    assert len(files) == 3
    for file in files:
        np.testing.assert_array_equal(read(file)[..., 0], np.asarray(Image.open(file)))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_lzw"])
def test_a_tiff_that_libtiff_finds_damaged_is_refused_without_a_line_on_standard_error(
    compression: str, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = encoded(Image.fromarray(make(400, 400)).convert("1"), "TIFF", compression=compression)
    assert read(whole).shape == (400, 400, 3)
    damaged = bytearray(whole)
    damaged[500:-500:7] = bytes(len(damaged[500:-500:7]))
    assert "damaged or cut short" in refused(bytes(damaged), "unreadable")
    assert capfd.readouterr().err == ""


def test_what_libtiff_reports_in_one_thread_is_no_error_in_another() -> None:
    with libtiff.refusing_damage():
        other = threading.Thread(target=libtiff._note, args=(b"", b"", 0))
        other.start()
        other.join()
    with pytest.raises(ValueError, match="not valid"), libtiff.refusing_damage():
        libtiff._note(b"", b"", 0)


def run_length_bmp(pixels_HW: NDArray[np.uint8]) -> bytes:
    """A BMP that holds each pixel as a run of one."""
    height, width = pixels_HW.shape
    rows = [b"".join(bytes((1, value)) for value in row) + b"\0\0" for row in pixels_HW[::-1].tolist()]
    data = b"".join(rows) + b"\0\1"
    palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    start = 14 + 40 + len(palette)
    head = struct.pack("<2sIII", b"BM", start + len(data), 0, start)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0) + palette + data


def test_a_bmp_of_many_runs_is_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8)
    with open_raster(run_length_bmp(pixels)) as raster:
        np.testing.assert_array_equal(raster.read()[..., 0], pixels)
