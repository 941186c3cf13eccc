"""TIFF: every depth, layout and byte order equals tifffile's own reading; windows read nothing else."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from tests.files import tiff

from jepakit.errors import ImageError
from jepakit.readers import Limits, Window, open_raster, tiffguard

Refused = Callable[..., str]


def make(*shape: int, dtype: str = "uint16", seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).integers(0, 250, shape)
    return (values - (100 if dtype.startswith(("int", "float")) else 0)).astype(dtype)


def read(data: bytes | Path, window: Window | None = None, frame: int = 0) -> NDArray[Any]:
    with open_raster(data) as raster:
        pixels = raster.read(window, frame=frame)
        assert pixels.dtype.name == raster.header.dtype
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        assert pixels.dtype.isnative
        if window is None:
            assert pixels.shape == (raster.header.height, raster.header.width, raster.header.bands)
    return pixels


LAYOUTS: dict[str, dict[str, Any]] = {
    "bare": {},
    "strips": {"rowsperstrip": 8},
    "tiles": {"tile": (16, 16)},
    "deflate": {"compression": "zlib", "predictor": True, "rowsperstrip": 8},
    "zstd tiles": {"compression": "zstd", "tile": (32, 16)},
    "lzw": {"compression": "lzw", "tile": (16, 32)},
    "packbits": {"compression": "packbits", "rowsperstrip": 7},
    "big endian": {"writer": {"byteorder": ">"}},
    "big endian tiles": {"writer": {"byteorder": ">"}, "tile": (16, 16), "compression": "zlib"},
    "BigTIFF": {"writer": {"bigtiff": True}, "tile": (16, 16)},
}
WINDOWS = [Window(0, 0, 50, 70), Window(0, 0, 8, 8), Window(13, 21, 20, 30), Window(42, 62, 8, 8), Window(49, 0, 1, 70)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_every_depth_and_layout_is_read_whole_and_by_windows(layout: str, dtype: str, tmp_path: Path) -> None:
    options = dict(LAYOUTS[layout])
    if dtype.startswith("float") and "predictor" in options:
        options["predictor"] = 3
    pixels = make(70, 50, dtype=dtype)
    expected = np.repeat(pixels[..., None], 3, axis=2) if dtype == "uint8" else pixels[..., None]
    data = tiff(pixels, photometric="minisblack", **options)
    file = tmp_path / "a.tif"
    file.write_bytes(data)
    for source in (data, file):
        np.testing.assert_array_equal(read(source), expected)
        for x, y, width, height in WINDOWS:
            np.testing.assert_array_equal(
                read(source, Window(x, y, width, height)), expected[y : y + height, x : x + width]
            )


@pytest.mark.parametrize("bands", [2, 3, 6, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=["bare", "tiles"])
def test_bands_interleaved_or_planar_come_out_last(bands: int, dtype: str, options: dict[str, Any]) -> None:
    pixels = make(40, 30, bands, dtype=dtype)
    together = tiff(pixels, photometric="minisblack", planarconfig="contig", **options)
    planar = tiff(np.moveaxis(pixels, 2, 0).copy(), photometric="minisblack", planarconfig="separate", **options)
    for data in (together, planar):
        np.testing.assert_array_equal(read(data), pixels)
        np.testing.assert_array_equal(read(data, Window(5, 17, 20, 16)), pixels[17:33, 5:25])


def test_pages_saved_one_after_the_other_are_frames() -> None:
    stack = make(5, 20, 30)
    for data in (
        tiff(stack, photometric="minisblack"),
        tiff(stack, photometric="minisblack", metadata=None),
        tiff(stack, photometric="minisblack", compression="zlib"),
    ):
        with open_raster(data) as raster:
            assert (raster.header.frames, raster.header.bands) == (5, 1)
        for frame in range(5):
            np.testing.assert_array_equal(read(data, frame=frame)[..., 0], stack[frame])
            np.testing.assert_array_equal(read(data, Window(3, 4, 9, 8), frame=frame)[..., 0], stack[frame, 4:12, 3:12])


@pytest.mark.parametrize(
    ("writer", "options"),
    [({"imagej": True}, {}), ({"ome": True}, {}), ({"ome": True}, {"compression": "zlib"})],
    ids=["ImageJ", "OME", "OME compressed"],
)
def test_channels_of_a_hyperstack_are_bands_and_its_times_are_frames(
    writer: dict[str, Any], options: dict[str, Any]
) -> None:
    stack = make(4, 3, 20, 30)
    data = tiff(stack, writer=writer, metadata={"axes": "TCYX"}, photometric="minisblack", **options)
    with open_raster(data) as raster:
        assert (raster.header.frames, raster.header.bands) == (4, 3)
        for frame in range(4):
            np.testing.assert_array_equal(raster.read(frame=frame), np.moveaxis(stack[frame], 0, 2))


def test_of_an_ome_series_over_several_files_only_the_named_file_is_read(tmp_path: Path) -> None:
    planes = make(2, 20, 30)
    parts = "".join(
        f'<TiffData IFD="0" FirstT="{place}" PlaneCount="1"><UUID FileName="{place}.ome.tif">urn:uuid:{place}</UUID></TiffData>'
        for place in range(2)
    )
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
        'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="30" SizeY="20" SizeZ="1" SizeC="1" SizeT="2">'
        f"{parts}</Pixels></Image></OME>"
    )
    for place, plane in enumerate(planes):
        (tmp_path / f"{place}.ome.tif").write_bytes(tiff(plane, description=description, metadata=None))
    for place, plane in enumerate(planes):
        with open_raster(tmp_path / f"{place}.ome.tif") as raster:
            assert raster.header.frames == 1
            np.testing.assert_array_equal(raster.read()[..., 0], plane)


def test_an_ome_description_with_declarations_is_refused(refused: Refused) -> None:
    pixels = make(2, 20, 30)
    with tifffile.TiffFile(io.BytesIO(tiff(pixels, writer={"ome": True}, photometric="minisblack"))) as file:
        described = file.pages.first.description
    declared = described.replace("?><OME ", '?><!DOCTYPE OME [<!ENTITY a "a">]><OME ')
    plain, data = (
        tiff(pixels, photometric="minisblack", description=text, metadata=None) for text in (described, declared)
    )
    np.testing.assert_array_equal(read(plain, frame=0)[..., 0], pixels[0])
    assert "damaged or cut short" in refused(data, "unreadable")


def test_a_cameras_raw_file_is_refused_by_name(refused: Refused) -> None:
    data = tiff(make(20, 30), extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])
    assert "a camera's raw file: develop it to TIFF" in refused(data, "unsupported_mode")


def test_bands_that_were_saved_as_pages_are_refused_with_the_remedy(refused: Refused) -> None:
    data = tiff(make(40, 50, 6), photometric="minisblack")
    assert 'planarconfig="contig"' in refused(data, "wrong_shape")


def test_a_stack_of_eight_bit_colour_has_colour_frames() -> None:
    stack = make(4, 20, 30, 3, dtype="uint8")
    data = tiff(stack, photometric="rgb", compression="zlib")
    for frame in range(4):
        np.testing.assert_array_equal(read(data, frame=frame), stack[frame])


def test_reduced_copies_and_thumbnails_are_no_frames() -> None:
    pixels = make(64, 64)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(pixels, subifds=1, tile=(16, 16))
        file.write(pixels[::2, ::2].copy(), subfiletype=1, tile=(16, 16))
        file.write(make(16, 16), subfiletype=1)
    with open_raster(buffer.getvalue()) as raster:
        assert raster.header.frames == 1
        np.testing.assert_array_equal(raster.read()[..., 0], pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("below", [True, False], ids=["image below it", "image after it"])
def test_a_file_that_begins_with_a_reduced_copy_is_refused(dtype: str, below: bool, refused: Refused) -> None:
    """As in cameras' raw files and scanners' previews: the image itself is another page, or one below the first."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(make(16, 24, 3, dtype=dtype), photometric="rgb", subfiletype=1, subifds=int(below), metadata=None)
        file.write(make(64, 96, 3, dtype=dtype), photometric="rgb", metadata=None)
    message = refused(buffer.getvalue(), "unsupported_mode")
    assert "begins with a reduced copy (24 × 16 pixels)" in message
    assert "save the image itself" in message


def test_a_reduced_copy_that_is_all_there_is_is_read() -> None:
    pixels = make(16, 24)
    np.testing.assert_array_equal(read(tiff(pixels, subfiletype=1))[..., 0], pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_as_zero_is_turned_round(dtype: str) -> None:
    pixels = make(40, 30, dtype=dtype)
    data = tiff(pixels, photometric="miniswhite", tile=(16, 16))
    expected = np.iinfo(dtype).max - pixels
    np.testing.assert_array_equal(read(data)[..., 0], expected)
    np.testing.assert_array_equal(read(data, Window(9, 9, 10, 10))[..., 0], expected[9:19, 9:19])


def test_white_as_zero_without_a_highest_value_is_refused(refused: Refused) -> None:
    assert "black as zero" in refused(tiff(make(20, 20, dtype="float32"), photometric="miniswhite"), "unsupported_mode")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_orientation_turns_the_whole_and_its_windows(orientation: int, dtype: str) -> None:
    stored = make(20, 30, 3, dtype=dtype)
    data = tiff(
        stored, photometric="rgb", compression="zlib", rowsperstrip=8, extratags=[(274, 3, 1, orientation, True)]
    )
    exif = Image.Exif()
    exif[274] = orientation
    small = Image.fromarray(stored.astype(np.uint8))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", exif=exif)
    upright = read(buffer.getvalue())
    np.testing.assert_array_equal(read(data), upright)
    np.testing.assert_array_equal(read(data, Window(2, 5, 9, 11)), upright[5:16, 2:11])


@pytest.mark.parametrize("text", ["none", "n/a", "0 0 0", "1.#QNAN", " "])
def test_a_nodata_value_that_is_no_number_is_refused_by_what_it_is(text: str) -> None:
    data = tiff(make(20, 20, dtype="float32"), extratags=[(42113, 2, 0, text, True)])
    with pytest.raises(
        ImageError, match=rf"GDAL_NODATA\) is '{re.escape(text.strip())}', not a number: .*-unsetnodata"
    ):
        open_raster(data)


def test_nodata_is_the_value_that_pixels_hold() -> None:
    for text, dtype, expected in [
        ("-9999", "int16", -9999),
        ("-3.4028234663852886e+38", "float32", np.finfo("f4").min),
    ]:
        pixels = make(20, 20, dtype=dtype)
        pixels[3, 3] = expected
        data = tiff(pixels, extratags=[(42113, 2, 0, text, True)])
        with open_raster(data) as raster:
            assert raster.header.nodata == expected
            assert (raster.read() == raster.header.nodata).sum() == 1
    inverted = np.full((20, 20), 30, np.uint16)
    inverted[3, 3] = 7
    with open_raster(tiff(inverted, photometric="miniswhite", extratags=[(42113, 2, 0, "7", True)])) as raster:
        assert raster.header.nodata == 65535 - 7
        assert (raster.read() == raster.header.nodata).sum() == 1
    with open_raster(tiff(make(20, 20, dtype="float32"), extratags=[(42113, 2, 0, "nan", True)])) as raster:
        assert np.isnan(raster.header.nodata or 0)
    with open_raster(tiff(make(20, 20))) as raster:
        assert raster.header.nodata is None


@pytest.mark.parametrize("options", [{"photometric": "palette", "colormap": np.zeros((3, 256), "u2")}, {"photometric": "separated"},
    {"extrasamples": ["unassalpha"]}, {"photometric": "rgb", "compression": "webp"}], ids=["palette", "CMYK", "alpha", "WebP"])  # fmt: skip
def test_nodata_that_would_be_passed_over_is_refused(options: dict[str, Any], refused: Refused) -> None:
    bands = {"palette": (), "rgb": (3,)}.get(str(options.get("photometric")), (4,))
    data = tiff(make(20, 20, *bands, dtype="uint8"), extratags=[(42113, 2, 0, "0", True)], **options)
    message = refused(data, "unsupported_mode")
    assert "no-data" in message
    assert "-unsetnodata" in message


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"subifds": 1}], ids=["strips", "tiles", "pyramid"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_mask_that_would_be_passed_over_is_refused(dtype: str, options: dict[str, Any], refused: Refused) -> None:
    """GDAL's internal mask: a page of one bit a pixel behind the image."""
    pixels, mask = make(64, 64, 3, dtype=dtype), np.ones((64, 64), bool)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(pixels, photometric="rgb", metadata=None, **options)
        if "subifds" in options:
            file.write(pixels[::2, ::2].copy(), photometric="rgb", subfiletype=1, metadata=None)
        file.write(mask, photometric="mask", subfiletype=4, metadata=None)
    message = refused(buffer.getvalue(), "unsupported_mode")
    assert "a mask" in message
    assert "gdal_translate -mask none -a_nodata" in message


def test_a_window_does_not_read_what_lies_outside_it(tmp_path: Path) -> None:
    """Everything outside the tiles that the window needs is corrupted, and the window is still right."""
    pixels = make(64, 64)
    data = bytearray(tiff(pixels, tile=(16, 16), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        offsets, counts = file.pages.first.dataoffsets, file.pages.first.databytecounts
    for index in set(range(16)) - {5, 6}:
        data[offsets[index] : offsets[index] + counts[index]] = bytes(counts[index])
    np.testing.assert_array_equal(read(bytes(data), Window(16, 16, 32, 16))[..., 0], pixels[16:32, 16:48])
    with pytest.raises(ImageError, match="damaged") as caught:
        read(bytes(data), Window(16, 16, 33, 16))
    assert caught.value.code == "unreadable"


def test_an_image_over_the_limit_is_read_by_windows_and_refused_whole(refused: Refused) -> None:
    pixels = make(64, 64)
    small = Limits(max_pixels=1000)
    data = tiff(pixels, tile=(16, 16))
    assert "tile=512" in refused(data, "too_large", limits=small)
    with open_raster(data, limits=small) as raster:
        assert raster.header.windowed
        np.testing.assert_array_equal(raster.read(Window(40, 8, 20, 20))[..., 0], pixels[8:28, 40:60])


def test_one_compressed_strip_is_no_way_round_the_limit(refused: Refused) -> None:
    data = tiff(make(64, 64), compression="zlib", rowsperstrip=64)
    with open_raster(data) as raster:
        assert not raster.header.windowed
        np.testing.assert_array_equal(raster.read(Window(8, 9, 8, 8))[..., 0], make(64, 64)[9:17, 8:16])
    refused(data, "too_large", limits=Limits(max_pixels=1000))


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_jpeg_tiles_give_the_same_pixels_whole_and_by_windows(photometric: str) -> None:
    smooth = np.asarray(Image.fromarray(make(5, 6, 3, dtype="uint8")).resize((80, 70)))
    data = tiff(smooth, photometric=photometric, compression="jpeg", tile=(32, 32))
    whole = read(data)
    np.testing.assert_array_equal(whole, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(read(data, Window(20, 15, 40, 50)), whole[15:65, 20:60])


def test_twelve_bits_are_read_as_they_are() -> None:
    pixels = (make(20, 30) * 16).astype(np.uint16)
    np.testing.assert_array_equal(read(tiff(pixels, bitspersample=12))[..., 0], pixels)


@pytest.mark.parametrize(
    ("dtype", "bands", "options", "word"),
    [
        ("uint16", 4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, "alpha"),
        ("uint16", 4, {"photometric": "separated"}, "photometric"),
        ("int8", 1, {}, "int8"),
        ("complex64", 1, {}, "complex64"),
        ("float16", 1, {}, "float16"),
    ],
    ids=["deep alpha", "deep CMYK", "int8", "complex", "half"],
)
def test_what_has_no_one_meaning_is_refused_by_name(
    dtype: str, bands: int, options: dict[str, Any], word: str, refused: Refused
) -> None:
    pixels = make(20, 20, bands, dtype=dtype) if bands > 1 else make(20, 20, dtype=dtype)
    assert word in refused(tiff(pixels, **options), "unsupported_mode")


def test_a_fourth_band_that_is_only_marked_as_transparency_is_refused(refused: Refused) -> None:
    """`tifffile.imwrite(file, array)` of any uint8 [H, W, 4], and GDAL's of any four bands of type Byte."""
    pixels = make(40, 40, 4, dtype="uint8")
    tiled: dict[str, Any] = {"compression": "zlib", "tile": (16, 16)}
    for options in ({}, tiled):
        message = refused(tiff(pixels, **options), "unsupported_mode")
        assert "its band 4 is marked as transparency" in message
        assert "-co ALPHA=NO" in message
    np.testing.assert_array_equal(read(tiff(pixels, photometric="minisblack", planarconfig="contig")), pixels)


def test_a_twentieth_of_half_transparency_is_an_edge_and_a_tenth_is_none(refused: Refused) -> None:
    pixels = make(40, 40, 4, dtype="uint8")
    pixels[..., 3] = 255
    pixels[:2, :, 3] = 128
    np.testing.assert_array_equal(read(tiff(pixels))[2:], pixels[2:, :, :3])
    pixels[2:4, :, 3] = 128
    assert "10% of it is half transparent" in refused(tiff(pixels), "unsupported_mode")


def test_a_cut_out_with_soft_edges_lies_on_white() -> None:
    pixels = make(40, 40, 4, dtype="uint8")
    pixels[..., 3] = 255
    pixels[:8, :, 3] = 0
    pixels[8, :, 3] = 128
    got = read(tiff(pixels))
    assert (got[:8] == 255).all()
    np.testing.assert_array_equal(got[9:], pixels[9:, :, :3])


def make_subsampled(compression: int, compress: Callable[[bytes], bytes]) -> bytes:
    """16 × 16 YCbCr pixels with one colour per 2 × 2 of them: two levels of grey, left and right."""
    blocks = [bytes([value] * 4 + [128, 128]) for value in (50, 200) for _ in range(4)] * 8
    data = compress(b"".join(blocks))
    tags = [
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 3, 500), (259, 4, 1, compression), (262, 4, 1, 6), (273, 4, 1, 600),
        (277, 4, 1, 3), (278, 4, 1, 16), (279, 4, 1, len(data)), (530, 3, 2, 2 | 2 << 16),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (head.ljust(500, b"\0") + struct.pack("<3H", 8, 8, 8)).ljust(600, b"\0") + data + bytes(400)


def test_colour_of_reduced_resolution_is_read_where_a_decoder_knows_it_and_else_refused(refused: Refused) -> None:
    pixels = read(make_subsampled(8, zlib.compress))
    assert (pixels[:, :8] == 50).all()
    assert (pixels[:, 8:] == 200).all()
    message = refused(make_subsampled(1, bytes), "unsupported_mode")
    assert "uncompressed YCbCr" in message
    assert "save it as RGB" in message


def test_volumes_and_unknown_compressions_are_refused_by_name(refused: Refused) -> None:
    volume = tiff(make(16, 32, 32), volumetric=True, tile=(16, 16, 16))
    assert "ZYX" in refused(volume, "unsupported_mode")
    for dtype in ("uint8", "uint16"):
        assert "compression 34887" in refused(tiff(make(20, 20, dtype=dtype), compression="lerc"), "unsupported_mode")


def make_ome(**sizes: int | str) -> bytes:
    """One page of 20 × 20 whose OME description says otherwise."""
    said = {"X": 20, "Y": 20, "Z": 1, "C": 1, "T": 1, **sizes}
    attributes = " ".join(f'Size{axis}="{size}"' for axis, size in said.items())
    about = f"""<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYCZT" Type="uint16" {attributes}><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>"""
    return tiff(make(20, 20), description=about, metadata=None)


def test_a_description_of_planes_that_are_not_there_is_refused(refused: Refused) -> None:
    np.testing.assert_array_equal(read(make_ome())[..., 0], make(20, 20))
    assert "one file" in refused(make_ome(T=3), "unsupported_mode")
    lies: list[dict[str, int | str]] = [
        {"T": 10**9}, {"Z": 10**18}, {"X": 10**9, "Y": 10**9}, {"T": "1_000_000_000"}, {"T": "&#49;000000000"}
    ]  # fmt: skip
    for lie in lies:
        refused(make_ome(**lie), "unreadable")


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {}], ids=["tiles", "one strip"])
def test_8_bit_jpeg_2000_which_pillow_does_not_know_is_read(options: dict[str, Any]) -> None:
    pixels = make(40, 30, 3, dtype="uint8")
    data = tiff(pixels, photometric="rgb", compression="jpeg2000", **options)
    np.testing.assert_array_equal(read(data), pixels)
    np.testing.assert_array_equal(read(data, Window(3, 4, 9, 20)), pixels[4:24, 3:12])


def test_the_usual_eight_bit_kinds_come_from_pillow() -> None:
    image = Image.fromarray(make(20, 30, 3, dtype="uint8"))
    for kind in (image.quantize(16), image.convert("CMYK"), image.convert("L"), image.convert("1"), image):
        buffer = io.BytesIO()
        kind.save(buffer, "TIFF")
        np.testing.assert_array_equal(read(buffer.getvalue()), np.asarray(kind.convert("RGB")))
    frames = [image.quantize(8), image.rotate(180).quantize(8)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    for place, frame in enumerate(frames):
        np.testing.assert_array_equal(read(buffer.getvalue(), frame=place), np.asarray(frame.convert("RGB")))


def images_of_one_file(*arrays: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **options) as writer:
        for array in arrays:
            writer.write(array, photometric="minisblack")
    return buffer.getvalue()


@pytest.mark.parametrize("ome", [False, True])
def test_several_images_in_one_file_are_refused_for_only_the_first_would_be_read(refused: Refused, ome: bool) -> None:
    """As a loop over `TiffWriter.write` makes them, or a microscope that saves its positions."""
    small, same, large = (np.ones(shape, np.uint16) for shape in ((20, 30), (20, 30), (40, 60)))
    for other in (same, large, same.astype(np.float32)):
        message = refused(images_of_one_file(small, other, ome=ome), "unsupported_mode")
        height, width = other.shape
        assert f"one of 30 × 20 pixels of uint16 and one of {width} × {height} pixels of {other.dtype}" in message
    with open_raster(images_of_one_file(large, small, ome=ome)) as raster:
        assert (raster.header.height, raster.header.frames) == (40, 1), "a smaller one is a copy, reduced"


TAGS = [(256, 20), (257, 20), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 20), (279, 800)]


def chain(pages: list[list[tuple[int, int]]], *, last: int = 0) -> bytes:
    """A TIFF of pages with these (tag, value); `last` is where the last page says the next one is."""
    data, at = (b"II*\0" + struct.pack("<I", 808)).ljust(808, b"\0"), 808
    for place, tags in enumerate(pages):
        at += 6 + 12 * len(tags)
        entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags)
        data += struct.pack("<H", len(tags)) + entries + struct.pack("<I", at if place < len(pages) - 1 else last)
    return data


def test_pages_that_run_in_a_circle_are_refused(refused: Refused) -> None:
    for length in (1, 2, 150):
        assert "form a loop" in refused(chain([TAGS] * length, last=808), "unreadable")


def test_a_page_without_tags_or_with_more_than_any_is_refused(refused: Refused) -> None:
    assert "a page has 0 tags" in refused(chain([TAGS, [], TAGS]), "unreadable")
    many = [(code, 0) for code in range(40_000, 40_300)]
    assert "a page has 309 tags" in refused(chain([TAGS, TAGS + many]), "unreadable")


def test_a_file_of_more_pages_than_any_is_refused_at_once(refused: Refused) -> None:
    small = struct.pack("<HHHIII", 1, 256, 4, 1, 20, 0)
    pages = bytearray(small * 70_000)
    for place in range(70_000 - 1):
        struct.pack_into("<I", pages, 18 * place + 14, 8 + 18 * (place + 1))
    began = time.process_time()
    assert "over 65,535 pages" in refused(b"II*\0" + struct.pack("<I", 8) + pages, "too_large")
    assert time.process_time() - began < 5


def test_many_pages_of_one_kind_are_read_and_of_many_kinds_refused(refused: Refused) -> None:
    """tifffile compares all pairs of pages if they differ: a file of 7 MB kept it busy for minutes."""
    stack = [TAGS] * 3000
    with open_raster(chain(stack)) as raster:
        assert raster.header.frames == 3000
    mixed = [[(256, 20 + place % 7), *TAGS[1:]] for place in range(3000)]
    assert "3,000 pages of several kinds" in refused(chain(mixed), "too_large")


def test_where_nothing_can_bound_a_search_many_pages_are_refused_at_once(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tifffile whose searches cannot be asked to refuse: better a stack too many refused than minutes of search."""
    monkeypatch.delattr(tifffile.TiffFile, "_series_generic", raising=False)
    monkeypatch.setattr(tiffguard, "_they_ask_first", lambda: False)
    assert "3,000 pages of several kinds" in refused(chain([TAGS] * 3000), "too_large")


def with_images_below(below: bytes, times: int, *, following: int = 0) -> bytes:
    """A TIFF whose first page has `below`'s first page beneath it several times; `following`: where the next one is."""
    offsets = struct.pack("<I", 808) * times
    tags = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in TAGS)
    first = tags + struct.pack("<HHII", 330, 4, times, len(below)) + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", len(below) + len(offsets)) + below[8:] + offsets + first


def test_images_below_a_page_count_as_pages(refused: Refused) -> None:
    data = with_images_below(chain([TAGS, [(256, 24), *TAGS[1:]]]), 3000, following=808)
    assert "3,003 pages of several kinds" in refused(data, "too_large")


def test_images_below_a_page_have_no_more_tags_than_pages_have(refused: Refused) -> None:
    """tifffile reads each of them: the same one of 4,000 tags, 1,000 times, kept it busy for 20 s."""
    data = with_images_below(chain([TAGS + [(code, 0) for code in range(40_000, 44_000)]]), 1000)
    assert "a page has 4009 tags" in refused(data, "unreadable")


def test_pages_that_share_their_values_are_refused_before_each_is_given_a_copy(refused: Refused) -> None:
    """tifffile reads them again for each page: a file of 0.5 MB took 1.3 GB."""
    table = bytes(4 * 100_000)
    first = len(table) + 8
    pages = b""
    for place in range(100):
        tags = dict(TAGS) | {256: 20 + place % 7}
        entries = [(code, 100_000, 8) if code in (273, 279) else (code, 1, value) for code, value in tags.items()]
        pages += struct.pack("<H", len(TAGS)) + b"".join(
            struct.pack("<HHII", code, 4, *rest) for code, *rest in entries
        )
        pages += struct.pack("<I", first + len(pages) + 4 if place < 99 else 0)
    assert " bytes of tags and values" in refused(b"II*\0" + struct.pack("<I", first) + table + pages, "too_large")


def test_many_pages_saved_one_by_one_are_refused(refused: Refused) -> None:
    """tifffile compares all pairs: 8,000 pages, in 1 MB, kept it busy for a minute."""
    described = [*TAGS[:5], (270, 8), *TAGS[5:]]
    with_text = chain([described] * 2000).replace(
        struct.pack("<HHII", 270, 4, 1, 8), struct.pack("<HHII", 270, 2, 19, 8)
    )
    assert "2,000 pages saved one by one" in refused(
        with_text[:8] + b'{"shape": [20, 20]}' + with_text[27:], "too_large"
    )


@pytest.mark.parametrize("writer", [{}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}], ids=str)
def test_stacks_with_reduced_copies_below_or_beside_their_pages_are_read(writer: dict[str, Any]) -> None:
    stack = make(20, 32, 48)
    for below in (0, 1, 12):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, **writer) as file:
            for plane in stack:
                file.write(plane, subifds=below, metadata=None)
                for _ in range(max(1, below)):
                    file.write(plane[::2, ::2].copy(), subfiletype=1, metadata=None)
        with open_raster(buffer.getvalue()) as raster:
            assert raster.header.frames == 20
            np.testing.assert_array_equal(raster.read(frame=19)[..., 0], stack[19])


NODATA: dict[str, Any] = {"photometric": "rgb", "extratags": [(42113, 2, 0, "0", True)]}


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        ("uint16", (20, 30), {"compression": "lzw"}),
        ("uint8", (20, 30, 3), {"compression": "lzw", **NODATA}),
        ("uint8", (20, 30, 3), {"compression": "jpeg", **NODATA}),
    ],
    ids=["deep", "8-bit with no-data", "JPEG with no-data"],
)
def test_a_missing_codec_is_named_with_its_remedy(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Pillow decodes 8-bit LZW and JPEG by itself, and would ignore the no-data value."""
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(make(*shape, dtype=dtype), **options))
    program = f"""
import sys
sys.modules["imagecodecs"] = None
from jepakit.errors import MissingExtraError
from jepakit.readers import open_raster
try:
    open_raster({str(file)!r})
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'jepakit[codecs]'" in done.stdout
    assert str(file) in done.stdout


def test_a_window_of_a_file_with_missing_strips_is_read_though_its_strips_reach_over_the_whole_height(
    tmp_path: Path, refused: Refused
) -> None:
    pixels = make(200, 300, dtype="uint8")
    tifffile.imwrite(tmp_path / "s.tif", pixels, photometric="minisblack", compression="deflate", rowsperstrip=50)
    with tifffile.TiffFile(tmp_path / "s.tif", mode="r+") as file:
        for name in ("StripByteCounts", "StripOffsets"):  # as GDAL's SPARSE_OK leaves out a strip of zeros
            values = list(file.pages[0].tags[name].value)  # type: ignore[union-attr]
            file.pages[0].tags[name].overwrite([*values[:2], 0, *values[3:]])  # type: ignore[union-attr]
    pixels[100:150] = 0
    window = read(tmp_path / "s.tif", Window(20, 0, 160, 160))
    np.testing.assert_array_equal(window[..., 0], pixels[:160, 20:180])
    assert "damaged or cut short" in refused(tmp_path / "s.tif", "unreadable")


def test_a_tile_that_was_left_out_holds_no_data(tmp_path: Path) -> None:
    pixels = make(64, 64, dtype="int16")
    tag = (42113, 2, 0, "-9999", True)
    tifffile.imwrite(tmp_path / "s.tif", pixels, tile=(32, 32), compression="deflate", extratags=[tag])
    with tifffile.TiffFile(tmp_path / "s.tif", mode="r+") as file:
        for name in ("TileByteCounts", "TileOffsets"):  # as GDAL's SPARSE_OK leaves out a tile without data
            values = list(file.pages[0].tags[name].value)  # type: ignore[union-attr]
            file.pages[0].tags[name].overwrite([values[0], 0, *values[2:]])  # type: ignore[union-attr]
    pixels[:32, 32:] = -9999
    np.testing.assert_array_equal(read(tmp_path / "s.tif")[..., 0], pixels)


def test_real_files_equal_tifffile(shared: Path) -> None:
    files = [*sorted((shared / "tiff16").glob("*.tif")), *sorted((shared / "multispectral").rglob("*.tif"))]
    assert len(files) > 30
    for file in files:
        expected = tifffile.imread(file)
        expected = expected.reshape(*expected.shape[:2], -1)
        np.testing.assert_array_equal(read(file), expected, err_msg=file.name)
        np.testing.assert_array_equal(read(file, Window(7, 11, 30, 20)), expected[11:31, 7:37], err_msg=file.name)


def test_the_landsat_scene_has_six_bands_and_one_frame(shared: Path) -> None:
    with open_raster(shared / "multispectral" / "L7_ETMs.tif") as raster:
        header = raster.header
    assert (header.bands, header.dtype, header.frames, header.windowed) == (6, "uint8", 1, True)
