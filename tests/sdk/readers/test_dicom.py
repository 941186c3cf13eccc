"""DICOM: real units as pydicom gives them, colour as RGB, and no patient tags anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from jepakit.errors import ImageError
from jepakit.readers import Window, dicom_group, open_raster

Refused = Callable[..., str]
SECRET = "Doe^Jane"


def make(stored: NDArray[Any], *, kind: str = "MONOCHROME2", bits: int | None = None, **tags: Any) -> bytes:
    """A DICOM file of [H, W], [H, W, 3] or, with NumberOfFrames, [N, H, W]."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    data.PatientName, data.PatientID = SECRET, "4711"
    colour = stored.shape[-1] == 3
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if colour else 1), kind
    if colour:
        data.PlanarConfiguration = 0
    data.Rows, data.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compress(data: bytes, syntax: Any, frames: list[bytes], **tags: Any) -> bytes:
    changed = pydicom.dcmread(io.BytesIO(data))
    changed.file_meta.TransferSyntaxUID = syntax
    changed.PixelData = encapsulate(frames)
    changed["PixelData"].VR = "OB"
    for name, value in tags.items():
        setattr(changed, name, value)
    buffer = io.BytesIO()
    changed.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ramp(dtype: str = "uint16", low: int = 0, height: int = 16, width: int = 20) -> NDArray[Any]:
    return (np.arange(height * width).reshape(height, width) + low).astype(dtype)


def read(source: Any, *, voi: bool = False, **options: Any) -> NDArray[Any]:
    with open_raster(source, voi=voi) as raster:
        pixels = raster.read(**options)
        assert pixels.dtype.name == raster.header.dtype
        assert pixels.shape[2] == raster.header.bands
    return pixels


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


# Grey


@pytest.mark.parametrize("empty", ["RescaleSlope", "RescaleIntercept"])
def test_an_empty_rescale_is_refused_by_its_name(empty: str) -> None:
    tags: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -1024, empty: None}
    with pytest.raises(ImageError, match=f"its {empty} is empty: give it a number, or remove it"):
        read(make(ramp("int16", -100), **tags))


@pytest.mark.parametrize("empty", ["RescaleSlope", "RescaleIntercept"])
def test_an_empty_rescale_that_is_never_applied_hinders_nothing(empty: str) -> None:
    stored = ramp("int16", -100)
    np.testing.assert_array_equal(read(make(stored, **dict[str, Any]({empty: None})))[..., 0], stored)
    colour = np.arange(16 * 20 * 3, dtype=np.uint8).reshape(16, 20, 3)
    both: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -1024, empty: None}
    np.testing.assert_array_equal(read(make(colour, kind="RGB", **both)), colour)


def test_grey_comes_back_in_real_units() -> None:
    stored = ramp("int16", -100)
    got = read(make(stored, RescaleSlope=2, RescaleIntercept=-1024))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[..., 0], stored * 2.0 - 1024)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_bits_above_those_stored_change_no_value_of_a_compressed_file(syntax: Any, dtype: str) -> None:
    import imagecodecs

    encode = imagecodecs.jpegls_encode if syntax == JPEGLSLossless else imagecodecs.jpeg2k_encode
    options: dict[str, Any] = {} if syntax == JPEGLSLossless else {"level": 0, "codecformat": "j2k"}
    values = (ramp() % 4096).astype(dtype) - (2048 if dtype == "int16" else 0)
    above = 0 if dtype == "int16" else 0x8000  # no sign, or an overlay
    frame = bytes(encode((values & 0xFFF).astype("uint16") | above, **options))
    np.testing.assert_array_equal(read(compress(make(values, bits=12), syntax, [frame]))[..., 0], values)


def test_a_modality_table_is_applied() -> None:
    table = [5000 - 7 * value for value in range(320)]
    lut = item(LUTDescriptor=[320, 0, 16], ModalityLUTType="US", LUTData=table)
    lut["LUTDescriptor"].VR = "US"
    lut["LUTData"].VR = "US"
    got = read(make(ramp(), ModalityLUTSequence=[lut]))
    np.testing.assert_array_equal(got[..., 0], 5000.0 - 7.0 * ramp())


def test_monochrome1_keeps_its_real_units_and_says_that_its_lowest_value_is_white() -> None:
    tags: dict[str, Any] = {"RescaleSlope": 3, "RescaleIntercept": -10}
    with open_raster(make(ramp(), kind="MONOCHROME1", bits=12, **tags)) as raster:
        assert raster.header.inverted
        np.testing.assert_array_equal(raster.read()[..., 0], ramp() * 3.0 - 10)
    with open_raster(make(ramp(), **tags)) as raster:
        assert not raster.header.inverted


def through_window(values: NDArray[Any], center: float, width: float) -> NDArray[Any]:
    """DICOM's linear window (PS3.3 C.11.2.1.2.1), from 0 to 1."""
    return ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def test_a_window_is_applied_after_the_modality_lut_when_asked_for() -> None:
    tags: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 200, "WindowWidth": 150}
    expected = through_window(ramp() * 2.0 - 100, 200, 150)
    assert (expected.min(), expected.max()) == (0, 1)
    data = make(ramp(), bits=12, **tags)
    np.testing.assert_allclose(read(data, voi=True)[..., 0], expected, atol=1e-6)
    np.testing.assert_array_equal(read(data)[..., 0], ramp() * 2.0 - 100)
    inverted = read(make(ramp(), kind="MONOCHROME1", bits=12, **tags), voi=True)[..., 0]
    np.testing.assert_allclose(inverted, expected, atol=1e-6, err_msg="turned round with any other range's values")
    falling = read(make(4095 - ramp(), bits=12, **{**tags, "RescaleSlope": -2, "RescaleIntercept": 8090}), voi=True)
    np.testing.assert_allclose(falling[..., 0], expected, atol=1e-6, err_msg="a slope below 0")


def test_a_window_gives_the_same_values_however_they_are_stored() -> None:
    hounsfield = np.linspace(-1000, 1000, 320).round().reshape(16, 20)
    window: dict[str, Any] = {"WindowCenter": 40, "WindowWidth": 400}
    files = (
        make((hounsfield + 1024).astype("uint16"), bits=12, RescaleSlope=1, RescaleIntercept=-1024, **window),
        make(hounsfield.astype("int16"), RescaleSlope=1, RescaleIntercept=0, **window),
        make((hounsfield + 1024).astype("uint16"), RescaleSlope=1, RescaleIntercept=-1024, **window),
        make((1024 - hounsfield).astype("uint16"), bits=12, RescaleSlope=-1, RescaleIntercept=1024, **window),
    )
    for data in files:
        np.testing.assert_allclose(read(data, voi=True)[..., 0], through_window(hounsfield, 40, 400), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("vr", ["US", "OW"])
def test_a_window_may_be_a_table(bits: int, vr: str) -> None:
    """With more entries than its own bits can count, for values that begin before it and end after it."""
    table = np.linspace(0, 2**bits - 1, 300).round().astype("<u2")
    lut = item(LUTDescriptor=[300, 10, bits], LUTData=table.tolist() if vr == "US" else table.tobytes())
    lut["LUTDescriptor"].VR = "US"
    lut["LUTData"].VR = vr
    expected = table[(ramp().astype(int) - 10).clip(0, 299)] / (2**bits - 1)
    tags: dict[str, Any] = {"VOILUTSequence": [lut], "WindowCenter": 40, "WindowWidth": 400}
    np.testing.assert_allclose(read(make(ramp(), **tags), voi=True)[..., 0], expected, atol=1e-6)
    shifted = make(ramp() + 24, RescaleSlope=1, RescaleIntercept=-24, **tags)
    np.testing.assert_allclose(read(shifted, voi=True)[..., 0], expected, atol=1e-6)


def test_a_file_without_a_window_is_refused_when_its_window_is_asked_for(refused: Refused) -> None:
    assert "window" in refused(make(ramp()), "unsupported_mode", voi=True)
    assert "window" in refused(
        make(ramp(), VOILUTSequence=[item(LUTExplanation="empty")]), "unsupported_mode", voi=True
    )


def test_a_frame_without_a_window_is_refused_when_its_window_is_asked_for() -> None:
    groups = [item(FrameVOILUTSequence=[item(WindowCenter=100, WindowWidth=50)]), item()]
    data = make(np.stack([ramp(), ramp()]), NumberOfFrames=2, PerFrameFunctionalGroupsSequence=groups)
    assert read(data, voi=True, frame=0).max() == 1
    with pytest.raises(ImageError, match="no window"):
        read(data, voi=True, frame=1)


@pytest.mark.parametrize("most_reads", [1 << 20, 100], ids=["short", "long"])
def test_enhanced_objects_keep_rescale_and_window_for_each_frame(
    most_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepakit.readers.dicom._MOST_READS", most_reads)
    stack = np.stack([ramp(), ramp()])
    groups = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=slope, RescaleType="US")],
            FrameVOILUTSequence=[item(WindowCenter=100, WindowWidth=50)],
        )
        for slope in (1, 5)
    ]
    data = make(stack, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=groups)
    for frame, slope in enumerate((1, 5)):
        np.testing.assert_array_equal(read(data, frame=frame)[..., 0], ramp() * float(slope) + slope)
    assert read(data, voi=True).min() < read(data, voi=True).max()


def test_padding_is_nodata_after_the_modality_lut() -> None:
    stored = ramp("int16")
    stored[0, 0] = -2000
    with open_raster(make(stored, PixelPaddingValue=-2000, RescaleSlope=2, RescaleIntercept=-1024)) as raster:
        assert raster.header.nodata == -2000 * 2 - 1024
        assert (raster.read() == raster.header.nodata).sum() == 1
    turned = make(ramp(), kind="MONOCHROME1", bits=12, PixelPaddingValue=0)
    with open_raster(turned) as raster:
        assert raster.header.nodata == 0
        assert (raster.read() == 0).sum() == 1
    with open_raster(make(ramp())) as raster:
        assert raster.header.nodata is None


@pytest.mark.parametrize(
    ("dtype", "bits", "padding", "tag"),
    [
        ("uint16", 12, 0xFFFF, 0xFFFF),
        ("uint16", 12, 0x8000, 0x8000),  # in the stored bits it is 0, a value of the ramp
        ("int16", 12, -0x8000, -0x8000),
        ("uint16", 16, 63536, -2000),
        ("int16", 16, -2000, 63536),
    ],
)
def test_padding_is_told_by_bits_above_those_stored_and_by_either_sign(
    dtype: str, bits: int, padding: int, tag: int
) -> None:
    stored = ramp(dtype)
    stored[3, 4] = padding
    data = make(stored, bits=bits, RescaleSlope=2, RescaleIntercept=-1024)
    changed = pydicom.dcmread(io.BytesIO(data))
    changed.add_new("PixelPaddingValue", "SS" if tag < 0 else "US", tag)
    buffer = io.BytesIO()
    changed.save_as(buffer, enforce_file_format=True)
    with open_raster(buffer.getvalue()) as raster:
        padded = raster.read()[..., 0] == raster.header.nodata
    assert padded[3, 4]
    assert padded.sum() == 1


@pytest.mark.parametrize("left_over", [-2000, -1024, 256, 65535])
def test_padding_that_no_pixel_can_hold_is_no_pixels(left_over: int) -> None:
    changed = pydicom.dcmread(io.BytesIO(make(ramp("uint8"))))
    changed.add_new("PixelPaddingValue", "SS" if left_over < 0 else "US", left_over)
    buffer = io.BytesIO()
    changed.save_as(buffer, enforce_file_format=True)
    with open_raster(buffer.getvalue()) as raster:
        np.testing.assert_array_equal(raster.read()[..., 0], ramp("uint8"))
        assert raster.header.nodata not in range(256)


@pytest.mark.parametrize(("value", "limit"), [(0, 10), (10, 0)], ids=["rising", "falling"])
def test_a_range_of_padding_is_one_nodata_value(value: int, limit: int) -> None:
    tags: dict[str, Any] = {"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}
    with open_raster(make(ramp(), RescaleSlope=2, RescaleIntercept=-5, **tags)) as raster:
        assert raster.header.nodata == 2 * value - 5
        got = raster.read()[..., 0]
    assert (got == 2 * value - 5)[ramp() <= 10].all()
    np.testing.assert_array_equal(got[ramp() > 10], ramp()[ramp() > 10] * 2.0 - 5)
    signed = make(ramp("int16", -100), PixelPaddingValue=value - 100, PixelPaddingRangeLimit=limit - 100)
    unsigned = signed.replace(b"\x28\0\x20\x01SS", b"\x28\0\x20\x01US").replace(
        b"\x28\0\x21\x01SS", b"\x28\0\x21\x01US"
    )
    assert unsigned != signed
    for data in (signed, unsigned):
        with open_raster(data) as raster:
            assert raster.header.nodata == value - 100
            assert (raster.read() == raster.header.nodata).sum() == 11


def test_padding_is_nodata_in_every_frame_whatever_its_rescale() -> None:
    """The first frame's padding, 0, is a real value of the second, and the second's is one of the first."""
    groups = [
        item(PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=low, RescaleType="US")])
        for low in (0, -7)
    ]
    stack = np.stack([ramp(), ramp()])
    data = make(stack, NumberOfFrames=2, PixelPaddingValue=0, PerFrameFunctionalGroupsSequence=groups)
    with open_raster(data) as raster:
        assert np.isnan(raster.header.nodata or 0)
        for frame, low in enumerate((0, -7)):
            np.testing.assert_array_equal(
                raster.read(frame=frame)[..., 0], np.where(ramp() == 0, np.nan, ramp("int64") + low)
            )


def test_padding_is_nodata_where_a_table_gives_other_pixels_the_same_value() -> None:
    lut = item(LUTDescriptor=[319, 1, 16], ModalityLUTType="US", LUTData=[7, *range(2, 320)])
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    got = read(make(ramp(), PixelPaddingValue=0, ModalityLUTSequence=[lut]))[0, :3, 0]
    np.testing.assert_array_equal(got, [np.nan, 7, 2])


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_nodata_in_a_window_too(kind: str) -> None:
    window: dict[str, Any] = {"WindowCenter": 200, "WindowWidth": 150}
    plain = read(make(ramp(), kind=kind, bits=12, **window), voi=True)[..., 0]
    data = make(ramp(), kind=kind, bits=12, PixelPaddingValue=0, PixelPaddingRangeLimit=10, **window)
    with open_raster(data, voi=True) as raster:
        assert np.isnan(raster.header.nodata or 0)
        np.testing.assert_array_equal(raster.read()[..., 0], np.where(ramp() <= 10, np.nan, plain))


def test_frames_are_read_one_at_a_time(refused: Refused) -> None:
    stack = np.stack([ramp(low=100 * frame) for frame in range(3)])
    data = make(stack, NumberOfFrames=3)
    with open_raster(data) as raster:
        assert raster.header.frames == 3
        for frame in (2, 0, 1):
            np.testing.assert_array_equal(raster.read(frame=frame)[..., 0], stack[frame])
        np.testing.assert_array_equal(raster.read(Window(3, 5, 9, 8), frame=1)[..., 0], stack[1, 5:13, 3:12])
        with pytest.raises(ImageError, match="no frame 3"):
            raster.read(frame=3)


# Colour


def test_colour_is_rgb() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(make(colour, kind="RGB")), colour)
    data = make(colour, kind="YBR_FULL")
    np.testing.assert_array_equal(read(data), pixel_array(io.BytesIO(data)))
    grey = np.full((16, 20, 3), (90, 128, 128), np.uint8)
    np.testing.assert_array_equal(read(make(grey, kind="YBR_FULL")), np.full((16, 20, 3), 90))


@pytest.mark.parametrize("scale", [257, 256, 1], ids=["full range", "high byte", "8-bit colours in a 16-bit table"])
def test_palettes_of_16_bits_come_out_in_8(scale: int) -> None:
    entries = np.random.default_rng(0).integers(0, 256, (3, 256))
    tags: dict[str, Any] = {}
    for name, colours in zip(("Red", "Green", "Blue"), entries, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = (colours * scale).astype("<u2").tobytes()
    stored = (ramp() % 256).astype(np.uint8)
    np.testing.assert_array_equal(read(make(stored, kind="PALETTE COLOR", **tags)), entries.T[stored])


def test_colour_of_16_bits_and_other_kinds_are_refused(refused: Refused) -> None:
    colour = np.zeros((16, 20, 3), np.uint16)
    assert "16 bits" in refused(make(colour, kind="RGB"), "unsupported_mode")
    refused(make(colour.astype(np.uint8), kind="HSV"), "unsupported_mode")
    assert "palette" in refused(make(ramp(), kind="PALETTE COLOR"), "unsupported_mode")


# Lies, damage, privacy


def test_a_header_that_lies_about_its_pixels_is_refused(refused: Refused) -> None:
    assert "do not fit" in refused(make(ramp(), Rows=6500, Columns=100), "unreadable")
    assert "do not fit" in refused(make(ramp(), NumberOfFrames=100_000), "unreadable")
    refused(make(ramp(), Rows=65000, Columns=65000), "too_large")
    refused(make(ramp(), Rows=1), "too_small")


def test_a_compressed_frame_that_claims_another_size_is_refused_before_it_is_decoded(refused: Refused) -> None:
    import imagecodecs

    stream = bytes(imagecodecs.jpeg2k_encode(ramp(), codecformat="j2k", reversible=True))
    whole = compress(make(ramp()), JPEG2000Lossless, [stream])
    np.testing.assert_array_equal(read(whole)[..., 0], ramp())
    lying = stream[:8] + (65000).to_bytes(4, "big") * 2 + stream[16:]
    message = refused(compress(make(ramp()), JPEG2000Lossless, [lying]), "unreadable")
    assert "65000 × 65000" in message


def with_sequence(data: bytes, tag: tuple[int, int], items: bytes, *, declared: bool) -> bytes:
    """The file with a sequence before its pixels, whose length is declared or not."""
    pixels = data.index(struct.pack("<HH", 0x7FE0, 0x10))
    length, end = (len(items), b"") if declared else (0xFFFFFFFF, struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
    return data[:pixels] + struct.pack("<HH2sHI", *tag, b"SQ", 0, length) + items + end + data[pixels:]


ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
ONE_OF_MANY_ELEMENTS = struct.pack("<HHI", 0xFFFE, 0xE000, 8 * 4000) + b"".join(
    struct.pack("<HH2sH", 0x5403, number, b"LO", 0) for number in range(4000)
)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
@pytest.mark.parametrize("made_of", [ITEM * 4000, ONE_OF_MANY_ELEMENTS], ids=["items", "elements"])
@pytest.mark.parametrize("tag", [(0x5200, 0x9230), (0x5401, 0x1)], ids=["read", "passed over"])
def test_a_sequence_of_too_many_items_or_elements_is_refused_before_all_are_made(
    tag: tuple[int, int], made_of: bytes, declared: bool, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_sequence(make(ramp()), tag, made_of, declared=declared)
    np.testing.assert_array_equal(read(data)[..., 0], ramp())
    monkeypatch.setattr("jepakit.readers.dicom._MOST_READS", 3000)
    if declared and tag == (0x5401, 0x1):
        assert read(data).any(), "pydicom makes nothing of it"
    else:
        assert "too many elements and items of sequences" in refused(data, "too_large")
        assert dicom_group(with_sequence(make(ramp()), tag, made_of, declared=False)) is None


def test_tables_and_groups_of_a_frame_have_no_more_items_than_a_file(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepakit.readers.dicom._MOST_READS", 3000)
    table = with_sequence(make(ramp()), (0x0028, 0x3000), ITEM * 4000, declared=True)
    assert "too many elements" in refused(table, "too_large")
    inner = struct.pack("<HH2sHI", 0x0028, 0x9145, b"SQ", 0, 32000) + ITEM * 4000
    group = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
    assert "too many elements" in refused(
        with_sequence(make(ramp()), (0x5200, 0x9229), group, declared=True), "too_large"
    )


def boxed(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def test_a_jp2_is_judged_by_the_stream_that_is_decoded(refused: Refused) -> None:
    import imagecodecs

    stream = bytes(imagecodecs.jpeg2k_encode(ramp(height=300, width=200), codecformat="jp2", reversible=True))
    whole = compress(make(ramp(height=300, width=200)), JPEG2000Lossless, [stream])
    np.testing.assert_array_equal(read(whole)[..., 0], ramp(height=300, width=200))
    small = bytes(imagecodecs.jpeg2k_encode(ramp(), codecformat="j2k", reversible=True))
    head = stream.index(b"jp2h") - 4
    hidden = stream[:head] + boxed(b"free", small) + stream[head:]
    assert "claims 200 × 300 pixels" in refused(compress(make(ramp()), JPEG2000Lossless, [hidden]), "unreadable")
    for bad in (stream[:head], stream[:head] + boxed(b"jp2c", b"none"), stream[:head] + bytes(8), stream[: head + 6]):
        assert "does not say how large" in refused(compress(make(ramp()), JPEG2000Lossless, [bad]), "unreadable")


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_a_damaged_jpeg_is_refused_or_read_and_never_ends_the_process(colour: bool) -> None:
    """GDCM throws an error past Python for a quarter of these."""
    pixels = np.tile(ramp("uint8", height=64, width=64)[..., None], 3) if colour else ramp("uint8", height=64, width=64)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG")
    stream, random = jpeg.getvalue(), np.random.default_rng(0)
    whole = make(pixels, kind="YBR_FULL_422" if colour else "MONOCHROME2")
    with pytest.raises(ImageError, match="does not say how large it is"):
        read(compress(whole, JPEGBaseline8Bit, [stream[:2] + bytes(2) + stream[2:]]))
    n_read = 0
    for place in random.integers(2, len(stream) - 2, 100):
        damaged = [
            stream[:place] + bytes([stream[place] ^ 1 << random.integers(8)]) + stream[place + 1 :],
            stream[:place] + random.bytes(2) + stream[place:],
            stream[:place] + stream[place + 2 :],
        ][place % 3]
        with contextlib.suppress(ImageError):
            n_read += read(compress(whole, JPEGBaseline8Bit, [damaged])).shape[:2] == (64, 64)
    assert 0 < n_read < 100


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless], ids=["JPEG 2000", "RLE"])
def test_compressed_pixels_cut_short_are_refused(syntax: Any) -> None:
    dataset = pydicom.dcmread(io.BytesIO(make(ramp())))
    if syntax == RLELossless:
        dataset.compress(RLELossless)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        data = buffer.getvalue()
    else:
        import imagecodecs

        data = compress(
            make(ramp()), syntax, [bytes(imagecodecs.jpeg2k_encode(ramp(), codecformat="j2k", reversible=True))]
        )
    np.testing.assert_array_equal(read(data)[..., 0], ramp())
    for length in range(len(data) - 400, len(data) - 20, 13):
        with pytest.raises(ImageError) as caught:
            read(data[:length])
        assert caught.value.code == "unreadable"


def test_deflated_files_and_unread_syntaxes_are_refused_by_name(refused: Refused) -> None:
    for syntax in ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.100"):
        data = compress(make(ramp()), "1.2.840.10008.1.2.4.100", [b"1234"])
        data = data.replace(b"1.2.840.10008.1.2.4.100\0", syntax.encode().ljust(24, b"\0"))
        assert "DICOM" in refused(data, "unsupported_format")


def test_a_deflated_file_is_not_inflated_wherever_its_syntax_stands() -> None:
    """A decoy before the real transfer syntax, and 8 KB of private data: pydicom would inflate 100 MB."""
    inflated = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    body = inflated.compress(bytes(100 << 20)) + inflated.flush()
    decoy = b"\x02\x00\x10\x00UI\x12\x001.2.840.10008.1.2\0"
    private = b"\x02\x00\x02\x01OB\0\0" + struct.pack("<I", 8000) + decoy.ljust(8000, b"\0")
    syntax = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
    data = decoy.ljust(128, b"\0") + b"DICM" + private + syntax + body
    with pytest.raises(ImageError, match="deflated"):
        open_raster(data)
    assert dicom_group(data) is None


def test_a_dicom_file_without_an_image_is_named(refused: Refused) -> None:
    report = pydicom.dcmread(io.BytesIO(make(ramp())))
    for tag in ("PixelData", "Rows", "Columns", "PhotometricInterpretation"):
        delattr(report, tag)
    buffer = io.BytesIO()
    report.save_as(buffer)
    assert "without an image" in refused(buffer.getvalue(), "unreadable")


def test_a_dicom_file_without_its_preamble_is_named(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "old.dcm"
    file.write_bytes(make(ramp())[132:])
    assert "preamble" in refused(file, "unsupported_format")


def test_no_message_holds_a_tag() -> None:
    data = make(ramp(), RescaleSlope=1, RescaleIntercept=0)
    random = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(data)
        for position in random.integers(132, len(data) - 700, 3):
            damaged[position] = random.integers(0, 256)
        try:
            read(bytes(damaged))
        except ImageError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any(SECRET in message or "Doe" in message or "4711" in message for message in messages)


@pytest.mark.parametrize(
    ("tags", "content"),
    [
        ({"Modality": "CT"}, "CT"),
        ({"Modality": "MR", "ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "MR"),
        ({"Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "CT localizer"),
        ({"Modality": "CT", "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "CT secondary capture"),
        ({"Modality": "DX", "SOPClassUID": SecondaryCaptureImageStorage}, "DX secondary capture"),
        ({}, "unknown modality"),
        ({"Modality": "DOE", "ImageType": "DOE JANE"}, "unknown modality"),
    ],
)
def test_the_kind_of_image_is_told_in_known_words_only(tags: dict[str, Any], content: str) -> None:
    with open_raster(make(ramp(), **{"SOPClassUID": CTImageStorage, **tags})) as raster:
        assert raster.header.content == content


def test_a_kind_of_image_that_cannot_be_read_hinders_nothing() -> None:
    data = make(ramp(), SOPClassUID=CTImageStorage, ImageType="ORIGINAL")
    with open_raster(data.replace(b"CS\x08\x00ORIGINAL", b"US\x08\x00ORIGINAL", 1)) as raster:
        assert raster.read().shape == (16, 20, 1)
        assert raster.header.content == "unknown modality"


def test_the_group_is_a_digest_of_the_patient_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.dcm"
    file.write_bytes(make(ramp()))
    group = dicom_group(file)
    assert group == hashlib.sha256(b"4711").hexdigest()[:16]
    assert dicom_group(make(ramp(low=7))) == group
    assert dicom_group(make(ramp(), PatientID="4712")) != group
    assert dicom_group(make(ramp(), PatientID="")) is None
    assert dicom_group(b"\x89PNG") is None
    assert dicom_group(make(ramp())[:140]) is None


# Real files


@pytest.mark.parametrize(
    "name",
    ["CT_small", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_jp2klossless", "JPEG2000", "examples_overlay",
     "liver_1frame"],
)  # fmt: skip
def test_real_grey_files_equal_pydicom(name: str, shared: Path) -> None:
    file = shared / "dicom" / f"{name}.dcm"
    dataset = pydicom.dcmread(file)
    expected = apply_modality_lut(dataset.pixel_array, dataset)
    np.testing.assert_array_equal(read(file)[..., 0], expected.astype(np.float32))


@pytest.mark.parametrize("name", ["examples_rgb_color", "examples_jpeg2k"])
def test_real_colour_files_equal_pydicom(name: str, shared: Path) -> None:
    file = shared / "dicom" / f"{name}.dcm"
    np.testing.assert_array_equal(read(file), pydicom.dcmread(file).pixel_array)


def test_a_real_palette_equals_pydicoms_high_byte(shared: Path) -> None:
    file = shared / "dicom" / "examples_palette.dcm"
    dataset = pydicom.dcmread(file)
    np.testing.assert_array_equal(read(file), apply_color_lut(dataset.pixel_array, dataset) >> 8)


def test_a_real_ultrasound_loop_equals_pydicom_frame_by_frame(shared: Path) -> None:
    file = shared / "dicom" / "examples_ybr_color.dcm"
    frames = pydicom.dcmread(file).pixel_array
    with open_raster(file) as raster:
        assert raster.header.frames == 30
        for frame in (0, 13, 29):
            np.testing.assert_array_equal(raster.read(frame=frame), frames[frame])


def test_a_real_12_bit_jpeg_is_read(shared: Path) -> None:
    """Values known from pydicom's own tests, which decode it with libjpeg."""
    pixels = read(shared / "dicom" / "JPEG-lossy.dcm")[..., 0]
    assert (pixels[420, 140], pixels[230, 120]) == (244, 95)


def test_real_ct_padding_is_in_hounsfield_units(shared: Path) -> None:
    with open_raster(shared / "dicom" / "CT_small.dcm") as raster:
        assert raster.header.nodata == -3024


def test_a_window_table_of_0_entries_has_65536() -> None:
    stored = np.array([[0, 1], [32768, 65535]], np.uint16).repeat(8, axis=0).repeat(8, axis=1)
    table = item(LUTDescriptor=[0, 0, 16], LUTData=np.arange(2**16, dtype="<u2").tobytes())
    table["LUTData"].VR = "OW"
    table["LUTDescriptor"].VR = "US"
    shown = read(make(stored, VOILUTSequence=[table]), voi=True)[..., 0]
    np.testing.assert_allclose(shown, stored / 65535, atol=1e-6)


@pytest.mark.parametrize("suffix", [".dcm", ".dicom", ".IMA"])
def test_a_file_without_preamble_is_told_how_to_get_one(tmp_path: Path, suffix: str) -> None:
    (file := tmp_path / f"slice{suffix}").write_bytes(make(ramp())[132:])
    with pytest.raises(ImageError, match=r"without its preamble.*enforce_file_format=True"):
        open_raster(file)
