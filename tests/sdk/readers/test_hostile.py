"""Whatever the bytes are: the right pixels or an ImageError, quickly, and within the memory budgets."""

from __future__ import annotations

import io
import json
import lzma
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.utils import set_pixel_data
from tests.files import encoded, png_chunk, tiff, with_scans

from jepakit.errors import ImageError
from jepakit.readers import DEFAULT_LIMITS, SCENE_LIMITS, Raster, Window, open_raster
from jepakit.readers.codestream import refuse_scans

RANDOM = np.random.default_rng(0)
COLOUR: NDArray[Any] = RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP: NDArray[Any] = RANDOM.integers(0, 60_000, (32, 48), dtype=np.uint16)


def pillow(format: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(COLOUR), format, **options)


def numpy(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, DEEP)
    return buffer.getvalue()


def dicom(syntax: str | None = None) -> bytes:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    data.PatientName, data.PatientID = "Doe^Jane", "4711"
    set_pixel_data(data, DEEP, "MONOCHROME2", 16)
    if syntax is not None:
        data.compress(syntax)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


STACK = np.stack([DEEP] * 6).reshape(2, 3, *DEEP.shape)
FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: pillow("JPEG"),
    "progressive JPEG": lambda: pillow("JPEG", progressive=True),
    "PNG": lambda: pillow("PNG"),
    "16-bit grey PNG": lambda: bytes(imagecodecs.png_encode(DEEP)),
    "16-bit colour PNG": lambda: bytes(imagecodecs.png_encode(COLOUR.astype(np.uint16) * 257)),
    "WebP": lambda: pillow("WEBP", lossless=True),
    "BMP": lambda: pillow("BMP"),
    "TIFF": lambda: pillow("TIFF"),
    "LZW TIFF": lambda: pillow("TIFF", compression="tiff_lzw"),
    "deep TIFF": lambda: tiff(DEEP),
    "tiled TIFF": lambda: tiff(DEEP, tile=(16, 16), compression="zlib", predictor=True),
    "striped TIFF": lambda: tiff(DEEP, rowsperstrip=8, compression="lzw"),
    "BigTIFF": lambda: tiff(DEEP, writer={"bigtiff": True, "byteorder": ">"}),
    "JPEG TIFF": lambda: tiff(COLOUR, tile=(16, 16), compression="jpeg", photometric="ycbcr"),
    "JPEG 2000 TIFF": lambda: tiff(DEEP, tile=(16, 16), compression="jpeg2000"),
    "ImageJ": lambda: tiff(STACK, writer={"imagej": True}, metadata={"axes": "TCYX"}),
    "OME": lambda: tiff(STACK, writer={"ome": True}, metadata={"axes": "TCYX"}),
    "DICOM": dicom,
    "RLE DICOM": lambda: dicom(pydicom.uid.RLELossless),
    "npy": lambda: numpy(np.save),
    "npz": lambda: numpy(np.savez_compressed),
}


def read_all(raster: Raster) -> NDArray[Any]:
    """Read the first frames, and a window of one, as a caller might."""
    frames = [raster.read(frame=frame) for frame in range(min(2, raster.header.frames))]
    header = raster.header
    assert all(frame.shape == (header.height, header.width, header.bands) for frame in frames)
    assert raster.read(Window(0, 0, 8, 8)).shape == (8, 8, header.bands)
    return np.stack(frames)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_short_is_refused_or_nothing_was_lost(kind: str, tmp_path: Path) -> None:
    data = FILES[kind]()
    with open_raster(data) as raster:
        whole = read_all(raster)
    file = tmp_path / "cut"
    refusals = []
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 3, len(data) - 1]:
        file.write_bytes(data[:length])
        try:
            with open_raster(file) as raster:
                np.testing.assert_array_equal(read_all(raster), whole)
        except ImageError as error:
            refusals.append(error)
    assert {error.code for error in refusals} <= {"unreadable", "unsupported_format"}
    assert all(str(file) in str(error) for error in refusals)
    assert len(refusals) > 50


@pytest.mark.parametrize("kind", FILES)
def test_a_file_with_flipped_bits_is_never_another_error(kind: str) -> None:
    data = FILES[kind]()
    random = np.random.default_rng(1)
    messages = []
    for _ in range(120):
        damaged = bytearray(data)
        # Headers matter most: half of the hits go to the first bytes.
        reach = min(len(data), 600) if random.random() < 0.5 else len(data)
        for position in random.integers(0, reach, random.integers(1, 4)):
            damaged[position] = random.choice([0, 1, 127, 128, 255, int(random.integers(0, 256))])
        try:
            with open_raster(bytes(damaged)) as raster:
                read_all(raster)
        except ImageError as error:
            messages.append(str(error))
    assert messages
    assert not any("Doe" in message or "\n" in message for message in messages)


def lying_tiff(compression: int, data: bytes, *, side: int, bits: int = 16) -> bytes:
    """A TIFF with one strip of `data` that the header declares as side × side pixels."""
    tags = [(256, side), (257, side), (258, bits), (259, compression), (262, 1), (273, 500), (277, 1), (278, side)]
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in [*tags, (279, len(data))])
    head = b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + struct.pack("<I", 0)
    return head.ljust(500, b"\0") + data


def lying_jpeg() -> bytes:
    stream = bytes(imagecodecs.jpeg_encode(np.zeros((64, 64), np.uint8)))
    at = stream.index(b"\xff\xc0")
    return stream[: at + 5] + struct.pack(">HH", 65000, 65000) + stream[at + 9 :]


def lying_jpeg2000() -> bytes:
    stream = bytes(imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint16), codecformat="j2k"))
    return stream[:8] + struct.pack(">IIII", 65000, 65000, 0, 0) + stream[24:]


def bomb() -> bytes:
    return zlib.compress(bytes(200 << 20), 9)


def lying_png(*, late: bool) -> bytes:
    """A PNG whose text inflates to 200 MB."""
    text = png_chunk(b"zTXt", b"a\0\0" + bomb())
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(20 * 61)))
    parts = [header, pixels, text] if late else [header, text, pixels]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def test_bombs_stay_within_the_memory_of_the_budgets(tmp_path: Path) -> None:
    """In a process limited to 1.5 GB: each is refused, and all of them at once within seconds."""
    bombs = {
        "deflate of another size": lying_tiff(8, bomb(), side=20),
        "deflate": lying_tiff(8, bomb(), side=9000),
        "nothing there": lying_tiff(1, b"", side=65000),
        "JPEG strip": lying_tiff(7, lying_jpeg(), side=3000, bits=8),
        "JPEG 2000 strip": lying_tiff(34712, lying_jpeg2000(), side=64),
        "PNG text": lying_png(late=False),
        "PNG text behind the pixels": lying_png(late=True),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    program = f"""
import json, pathlib, resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
from jepakit.errors import ImageError
from jepakit.readers import open_raster
codes = {{}}
for file in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        open_raster(file).read()
        codes[file.name] = "read"
    except ImageError as error:
        codes[file.name] = error.code
print(json.dumps(codes))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert set(codes) == set(bombs)
    assert set(codes.values()) <= {"too_large", "unreadable", "unsupported_format"}, codes


def strip(compressed: bytes, compression: str) -> bytes:
    """A 16-bit TIFF of 64 × 64 pixels, whose one strip holds the given bytes."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, iter([compressed]), shape=(64, 64), dtype="uint16", compression=compression, rowsperstrip=64
    )
    return buffer.getvalue()


def test_without_imagecodecs_a_tiff_is_inflated_no_further_than_its_size(tmp_path: Path) -> None:
    """tifffile's own decoders inflate everything in a strip: 2 MB took 4 GB."""
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    quickly = partial(lzma.compress, preset=0)
    for name, compression, compress in (("deflate", "zlib", zlib.compress), ("lzma", "lzma", quickly)):
        (tmp_path / f"{name}.tif").write_bytes(strip(compress(pixels.tobytes()), compression))
        (tmp_path / f"{name}-bomb.tif").write_bytes(strip(compress(pixels.tobytes() + bytes(200 << 20)), compression))
    (tmp_path / "packbits.tif").write_bytes(strip(bytes(8), "packbits"))
    program = f"""
import json, sys
from pathlib import Path
sys.modules["imagecodecs"] = None
from jepakit.errors import ImageError, MissingExtraError
from jepakit.readers import open_raster
found = {{}}
for file in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        with open_raster(file) as raster:
            found[file.stem] = int(raster.read().sum())
    except (ImageError, MissingExtraError) as error:
        found[file.stem] = getattr(error, "code", "missing")
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps([found, int(peak.split()[1])]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, peak_kb = json.loads(done.stdout.splitlines()[-1])
    whole = int(pixels.sum())
    assert found == {
        "deflate": whole, "deflate-bomb": "unreadable", "lzma": whole, "lzma-bomb": "unreadable", "packbits": "missing"
    }  # fmt: skip
    assert peak_kb < 200 << 10


def in_tiff(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        iter([jpeg] * 4),
        shape=(128, 128),
        dtype="uint8",
        photometric="minisblack",
        compression="jpeg",
        tile=(64, 64),
    )
    return buffer.getvalue()


def in_dicom(jpeg: bytes) -> bytes:
    data = pydicom.dcmread(io.BytesIO(dicom()))
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    data.Rows = data.Columns = 64
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pydicom.encaps.encapsulate([jpeg])
    data["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("wrapped", [bytes, in_tiff, in_dicom])
def test_a_jpeg_of_very_many_scans_is_refused_and_one_of_many_is_read(wrapped: Callable[[bytes], bytes]) -> None:
    jpeg = encoded(Image.linear_gradient("L").resize((64, 64)), "JPEG", progressive=True)
    with open_raster(wrapped(with_scans(jpeg, 100))) as raster:
        assert raster.read(Window(0, 0, 64, 64)).any()
    # Before a marker, decoders pass over fill bytes, and over whatever is no marker with a length.
    for between in (b"", b"\xff\xff", b"\x01\xff\x02\xff\xff\xff", b"\xff\xd3\xff\x00\xff\xec\x00\x00"):
        many = with_scans(jpeg, 101)
        last = many.rindex(b"\xff\xda")
        with open_raster(wrapped(many[:last] + between + many[last:])) as raster, pytest.raises(ImageError) as caught:
            raster.read(Window(0, 0, 64, 64))
        assert "a JPEG of over 100 scans" in str(caught.value)


def test_a_jpeg_that_begins_with_a_scan_of_one_band_is_counted_on() -> None:
    frame = b"\xff\xc0\x00\x11\x08\x00\x40\x00\x40\x03" + bytes(9)
    one, all_three = b"\xff\xda\x00\x08\x01" + bytes(5), b"\xff\xda\x00\x0c\x03" + bytes(9)
    refuse_scans(b"\xff\xd8" + frame + all_three * 101, "decoders read the first only")
    with pytest.raises(ImageError, match="JPEG of over 100 scans"):
        refuse_scans(b"\xff\xd8" + frame + one + all_three * 101, "a.jpg")


def test_what_looks_like_scans_beside_a_jpegs_pixels_is_none() -> None:
    jpeg = pillow("JPEG")
    profile = b"\xff\xe2\x07\xd2" + b"\xff\xda" * 1000
    with open_raster(jpeg[:2] + profile + jpeg[2:] + b"\xff\xda" * 1000) as raster, open_raster(jpeg) as plain:
        np.testing.assert_array_equal(raster.read(), plain.read())


def with_chunks(number: int, *, late: bool) -> bytes:
    png, made = pillow("PNG"), png_chunk(b"aaAa", b"") * number
    place = len(png) - 12 if late else 33
    return png[:place] + made + png[place:]


@pytest.mark.parametrize(
    "make",
    [
        lambda count: pillow("JPEG")[:2] + b"\xff\xe1\x00\x02" * count + pillow("JPEG")[2:],
        lambda count: pillow("JPEG")[:2] + b"\xff\xe1\x00\x02" + b"\x01" * 4 * count + pillow("JPEG")[2:],
        partial(with_chunks, late=False),
        partial(with_chunks, late=True),
    ],
    ids=["segments", "no segments", "chunks", "late chunks"],
)
def test_a_file_of_very_many_tiny_pieces_is_refused_and_one_of_many_is_read(make: Callable[[int], bytes]) -> None:
    with open_raster(make(5000)) as raster:
        assert raster.read().any()
    with pytest.raises(ImageError, match="tens of thousands of tiny pieces") as caught:
        open_raster(make(100_000))
    assert caught.value.code == "too_large"


def test_a_tiff_of_very_many_strips_is_refused_or_read_by_windows() -> None:
    data = tiff(np.zeros((270_000, 8), np.uint16), rowsperstrip=1, compression="zlib")
    with open_raster(data) as raster:
        assert raster.read(Window(0, 0, 8, 60_000)).shape == (60_000, 8, 1)
        with pytest.raises(
            ImageError, match="270,000 strips or tiles of 16 bytes, but of those under 4,096 bytes at most 262,144"
        ):
            raster.read()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_tiff_whose_tiles_reach_far_beyond_its_image_is_refused(dtype: str) -> None:
    """Each tile is decoded whole, and all may be the same bytes: 0.4 MB took 22 s."""
    tile = zlib.compress(bytes(1024 * 1024 * np.dtype(dtype).itemsize), 1)
    for height, refusal in ((80 * 1024, None), (100 * 1024, "its tiles of 1024 × 1024 pixels hold 104,857,600, for")):
        buffer = io.BytesIO()
        tiles = iter([tile] * (height // 1024))
        tifffile.imwrite(buffer, tiles, shape=(height, 8), dtype=dtype, compression="zlib", tile=(1024, 1024))
        if refusal is None:
            with open_raster(buffer.getvalue()) as raster:
                assert raster.read(Window(0, height - 8, 8, 8)).shape[:2] == (8, 8)
        else:
            for limits in (DEFAULT_LIMITS, SCENE_LIMITS):
                with pytest.raises(ImageError, match=refusal) as caught:
                    open_raster(buffer.getvalue(), limits=limits)
                assert caught.value.code == "too_large"


def test_the_smallest_images_are_8_a_side() -> None:
    for side in (1, 7, 8):
        small = np.full((side, side), 9, np.uint16)
        for data in (imagecodecs.png_encode(small), tiff(small)):
            if side < 8:
                with pytest.raises(ImageError) as caught:
                    open_raster(data)
                assert caught.value.code == "too_small"
            else:
                with open_raster(data) as raster:
                    np.testing.assert_array_equal(raster.read()[..., 0], small)
