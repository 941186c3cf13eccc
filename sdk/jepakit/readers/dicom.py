"""DICOM through pydicom: grey as the modality LUT's real units, colour as RGB.

Grey is returned as float32 [H, W, 1]: stored values through the modality LUT or rescale (Hounsfield units in CT). This
includes MONOCHROME1, whose lowest value is white, as the header says. With the file's own window, grey is 0 to 1 from
one end of the window to the other, however it is stored. Padding, a value or a range of values, is no data. One-bit
segmentations are grey with 0 and 1. Colour (RGB, YBR, palettes) is uint8 [H, W, 3].

Only the tags that pixels need, and the kind of image, are ever read, so that no data about a patient can leak: only
`dicom_group` reads the PatientID, and returns its digest. The kind of image is told in words of this module, not the file's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jepakit.errors import ImageError, MissingExtraError
from jepakit.readers.checks import check_encoded, reading
from jepakit.readers.codestream import claimed_size, refuse_scans
from jepakit.readers.encoded import Counted, Encoded, open_encoded
from jepakit.readers.header import Header, Limits, Pixels, Window
from jepakit.readers.quiet import quiet
from jepakit.readers.raster import Raster
from jepakit.readers.sniff import begins_as_dicom, unsupported

_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "Modality", "SOPClassUID", "ImageType",
]  # fmt: skip
_OF_FRAMES = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
"""Functional groups of enhanced objects, which hold the rescale and the window of each frame."""
_TABLES = ("ModalityLUTSequence", "VOILUTSequence")

_AMBIGUOUS = ("ModalityLUTSequence", "PerFrameFunctionalGroupsSequence")
"""With a table, or a rescale per frame, a value in real units does not identify the stored value."""

_MODALITIES = frozenset({
    "BI", "CR", "CT", "DG", "DX", "ES", "GM", "IO", "IVOCT", "IVUS", "LS", "MG", "MR", "NM", "OCT", "OP", "OPM", "OPT", "OPV", "OSS",
    "OT", "PA", "PT", "PX", "RF", "RG", "RTDOSE", "RTIMAGE", "SC", "SEG", "SM", "TG", "US", "XA", "XC",
})  # fmt: skip
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_VERBATIM = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_DECODERS = ("gdcm", "pillow", "pydicom")
"""pydicom's plugins, of which the first available is used: named, so that an installed GPL one is never picked up."""
_IMAGECODECS = "imagecodecs"
_JPEGS = "1.2.840.10008.1.2.4."
"""Prefixes of the JPEG, JPEG-LS and JPEG 2000 transfer syntaxes, whose streams declare their size."""
_JPEG_BASELINE, _JPEG_EXTENDED = f"{_JPEGS}50", f"{_JPEGS}51"
_MOST_READS, _BYTES_A_READ = 1 << 20, 32
"""Most reads by pydicom, and one more for every so many bytes of the file. An element takes one or two and an item three, each some
250 bytes of memory and 10 µs. A frame needs 80 to 300, and has pixels as well."""
_ITEM, _LAST_ITEM = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_RESCALE = ("RescaleSlope", "RescaleIntercept")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"


def dicom_group(source: str | Path | bytes) -> str | None:
    """An anonymous id of the patient: 16 hex digits of the PatientID's SHA-256; None without one.

    It serves to keep a patient's images on one side of a split. Computed in memory; it does not resist trying all
    likely IDs, so do not publish it.
    """
    encoded = open_encoded(source, None)
    with encoded.file, quiet():
        if not begins_as_dicom(encoded.head):
            return None
        import_pydicom()
        try:
            if _transfer_syntax(encoded) == _DEFLATED:
                return None
            patient = _dataset(encoded, ["PatientID"]).get("PatientID")
        except Exception:
            return None
    return hashlib.sha256(str(patient).encode()).hexdigest()[:16] if patient else None


def open_dicom(encoded: Encoded, limits: Limits, *, voi: bool) -> DicomRaster:
    """A DICOM file (Part 10) as a raster; `voi` applies its own window after the modality LUT."""
    import_pydicom()
    name = encoded.name
    check_encoded(name, encoded.size, limits)
    with reading(name):
        if _transfer_syntax(encoded) == _DEFLATED:
            # pydicom would inflate all of it before anything can be checked.
            raise unsupported(name, "a deflated DICOM file", "rewrite it with another transfer syntax")
        dataset = _dataset(encoded, _TAGS)
        pixels_at = encoded.file.tell()
        _refuse_unread(dataset, name)
        return DicomRaster(encoded, limits, dataset, pixels_at, voi=voi)


class DicomRaster(Raster):
    """One DICOM object; frames are decoded one at a time."""

    def __init__(self, encoded: Encoded, limits: Limits, dataset: Any, pixels_at: int, *, voi: bool) -> None:
        self._encoded, self._dataset, self._pixels_at, self._voi = encoded, dataset, pixels_at, voi
        self._grey = dataset.PhotometricInterpretation in _GREY
        self._padding = _padding(dataset) if self._grey else None
        self._syntax = str(dataset.file_meta.TransferSyntaxUID)
        frames = int(dataset.get("NumberOfFrames") or 1)
        bands, dtype = (1, "float32") if self._grey else (3, "uint8")
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        header = Header(
            "DICOM",
            int(dataset.Rows),
            int(dataset.Columns),
            bands,
            dtype,
            frames,
            self._nodata(),
            inverted=inverted,
            content=_content(dataset),
        )
        pixel_bytes = encoded.size - pixels_at
        super().__init__(header, encoded.name, limits, encoded.file, pixel_bytes)
        self._refuse_lies(frames, pixel_bytes)
        self._plugin = self._find_plugin()

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        from pydicom.pixels.utils import pixel_array

        compressed = self._compressed_frame(frame)
        if self._plugin == _IMAGECODECS:
            from imagecodecs import jpeg_decode

            return self._in_real_units(jpeg_decode(compressed), frame)
        self._encoded.file.seek(0)
        # In grey, bits above those stored are kept: sometimes only they identify padding.
        stored = pixel_array(
            self._encoded.file, index=frame, decoding_plugin=self._plugin, correct_unused_bits=not self._grey
        )
        if self._grey:
            return self._in_real_units(stored, frame)
        if self._dataset.PhotometricInterpretation == _PALETTE:
            return _palette_colours(stored, self._dataset)
        return stored

    def _in_real_units(self, stored: Pixels, frame: int) -> Pixels:
        """A frame's values as `read` returns them, with all padding set to the header's no-data value."""
        whole, stored = stored, _in_stored_bits(stored, self._dataset)
        values, nodata = self._units(stored, frame), self.header.nodata
        if self._padding is None or nodata is None:
            return values
        low, high = sorted(self._padding)
        marked = stored if _are_stored(low, high, self._dataset) else whole
        return np.where((marked >= low) & (marked <= high), nodata, values)

    def _units(self, stored: Pixels, frame: int) -> Pixels:
        from pydicom.pixels.processing import apply_modality_lut

        dataset = _of_frame(self._dataset, frame, self._encoded.name)
        values = np.asarray(apply_modality_lut(stored, dataset))
        return self._through_window(values, dataset) if self._voi else values

    def _through_window(self, values: Pixels, dataset: Any) -> Pixels:
        """Values through the file's own window, 0 to 1; ImageError for a frame without one."""
        from pydicom.pixels.processing import apply_windowing

        if _has_table(dataset):
            return _through_table(values, dataset)
        if None in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
            raise ImageError(
                f"{self.name}: it has no window (VOI LUT) of its own, and value_range = 'file' needs one: choose "
                "another value_range",
                code="unsupported_mode",
            )
        # pydicom's black and white depend on the bits stored and the rescale, so files with equal values can differ.
        black, white = apply_windowing(np.array([-1e9, 1e9]), dataset)
        shown: Pixels = (apply_windowing(values, dataset) - black) / (white - black)
        return shown

    def _nodata(self) -> float | None:
        """The padding value as `read` returns it; NaN if other pixels, or other frames, may have the same value."""
        if self._padding is None:
            return None
        if self._voi or any(tag in self._dataset for tag in _AMBIGUOUS):
            return math.nan
        return float(np.float32(self._units(np.array(self._padding[:1], np.int64), 0)[0]))

    def _refuse_lies(self, frames: int, pixel_bytes: int) -> None:
        """Refuse a header that declares more pixels than the file could hold."""
        dataset = self._dataset
        if self._syntax in _VERBATIM:
            bits = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated * frames
            # 4:2:2 stores two samples per pixel.
            needed = bits // 8 * 2 // 3 if dataset.PhotometricInterpretation == "YBR_FULL_422" else bits // 8
        else:
            needed = 8 * frames
            self._check_fragments()
        if frames < 1 or needed > pixel_bytes:
            raise ImageError(
                f"{self.name}: damaged or cut short: {frames} frames of {dataset.Columns} × {dataset.Rows} do not fit in "
                f"its {pixel_bytes:,} bytes of pixels",
                code="unreadable",
            )

    def _check_fragments(self) -> None:
        """Refuse compressed pixels cut short by the end of the file: decoders would make up the rest."""
        at = self._pixels_at + 12
        while at + 8 <= self._encoded.size:
            self._encoded.file.seek(at)
            group, element, length = struct.unpack("<HHI", self._encoded.file.read(8))
            at += 8 + length
            if (group, element) == _LAST_ITEM:
                return
            if (group, element) != _ITEM:
                break
        if at != self._encoded.size:
            raise ImageError(
                f"{self.name}: damaged or cut short: the end of its compressed pixels is missing", code="unreadable"
            )

    def _find_plugin(self) -> str:
        """The decoder for this file; "" if none is needed."""
        from pydicom.pixels.decoders.base import get_decoder

        if self._syntax in _VERBATIM:
            return ""
        available: tuple[str, ...]
        if self._syntax == _JPEG_EXTENDED and self._grey and self._dataset.BitsStored > 8:
            # 12-bit JPEG, which neither GDCM nor Pillow can decode.
            available, could = (_IMAGECODECS,) if importlib.util.find_spec(_IMAGECODECS) else (), True
        else:
            try:
                decoder = get_decoder(self._syntax)
            except NotImplementedError:
                raise self._unread_syntax() from None
            available = decoder.available_plugins
            could = any(line.startswith(_DECODERS) for line in decoder.missing_dependencies)
        for plugin in (*_DECODERS, _IMAGECODECS):
            # On a damaged stream of these, GDCM throws an exception that Python cannot catch: the process ends.
            if plugin == "gdcm" and self._syntax in (_JPEG_BASELINE, _JPEG_EXTENDED):
                continue
            if plugin in available:
                return plugin
        if not could:
            raise self._unread_syntax()
        raise MissingExtraError(
            f"{self.name}: its transfer syntax ({self._syntax}) needs a decoder: pip install 'jepakit[codecs]'"
        )

    def _unread_syntax(self) -> ImageError:
        return unsupported(self.name, "a DICOM file of a transfer syntax that is not read", "decompress it")

    def _compressed_frame(self, frame: int) -> bytes:
        """A frame's own bytes, refused if they declare another size: decoders would trust it and allocate memory."""
        from pydicom.encaps import get_frame

        if self._syntax in _VERBATIM:
            return b""
        dataset, file = self._dataset, self._encoded.file
        offsets = None
        if dataset.get("ExtendedOffsetTable"):
            offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
        # Compressed pixels always have an explicit VR: tag, VR and length are 12 bytes.
        file.seek(self._pixels_at + 12)
        data = get_frame(file, frame, number_of_frames=self.header.frames, extended_offsets=offsets)
        size = claimed_size(data)
        if size is None and self._syntax.startswith(_JPEGS):
            raise ImageError(
                f"{self.name}: damaged: a frame is not a JPEG or JPEG 2000 stream, or does not say how large it is",
                code="unreadable",
            )
        if size is not None and size != (self.header.width, self.header.height):
            raise ImageError(
                f"{self.name}: damaged: a frame claims {size[0]} × {size[1]} pixels, the header "
                f"{self.header.width} × {self.header.height}",
                code="unreadable",
            )
        refuse_scans(data, self.name)
        return data


def _in_stored_bits(stored: Pixels, dataset: Any) -> Pixels:
    """Values from their BitsStored only: decoders keep the bits above, which would change the value or its sign."""
    size = stored.dtype.itemsize
    spare = 8 * size - int(dataset.BitsStored)
    if stored.dtype.kind not in "iu" or spare <= 0:
        return stored
    values: Pixels = stored.astype(f"{'i' if dataset.PixelRepresentation else 'u'}{size}") << spare >> spare
    return values


def import_pydicom() -> None:
    """MissingExtraError when pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise MissingExtraError("reading DICOM needs pydicom: pip install 'jepakit[images]'") from None


def _dataset(encoded: Encoded, tags: list[str]) -> Any:
    """Read these tags and no others; leaves the file positioned where its pixels begin."""
    from pydicom import dcmread

    encoded.file.seek(0)
    with _counted(encoded.file, encoded.size, encoded.name) as file:
        return dcmread(file, stop_before_pixels=True, specific_tags=list(tags))


def _transfer_syntax(encoded: Encoded) -> str:
    """Found with pydicom's own functions, as pydicom does: a plain byte search could be misled."""
    from pydicom.filereader import _read_file_meta_info, read_preamble

    encoded.file.seek(0)
    with _counted(encoded.file, encoded.size, encoded.name) as file:
        read_preamble(file, force=False)
        return str(_read_file_meta_info(file).get("TransferSyntaxUID"))


@contextmanager
def _counted(file: Any, size: int, name: str) -> Iterator[Any]:
    """The file, for pydicom to read; ImageError once it has read too many elements, of whichever sequences."""
    refusal = ImageError(
        f"{name}: a DICOM file of too many elements and items of sequences, hundreds of thousands before its pixels: save "
        "its frames as several files",
        code="too_large",
    )
    counted = Counted(file, _MOST_READS + size // _BYTES_A_READ, refusal)
    try:
        yield counted
    except Exception:
        # pydicom replaces the exceptions of its file.
        if counted.left < 0:
            raise refusal from None
        raise


def _refuse_unread(dataset: Any, name: str) -> None:
    """Refuse kinds of pixels that this version cannot read."""
    if "PhotometricInterpretation" not in dataset or "Rows" not in dataset:
        raise ImageError(
            f"{name}: a DICOM file without an image (a report, a plan), or cut short: leave it out", code="unreadable"
        )
    kind, bits = str(dataset.PhotometricInterpretation), dataset.BitsAllocated
    samples = 3 if kind in _COLOUR else 1
    if kind not in (*_GREY, *_COLOUR, _PALETTE) or dataset.SamplesPerPixel != samples:
        raise ImageError(
            f"{name}: DICOM pixels of a kind that is not read (grey, RGB, YBR and palettes are): convert it to RGB",
            code="unsupported_mode",
        )
    if kind in _COLOUR and bits != 8:
        raise ImageError(f"{name}: DICOM colour of {bits} bits: convert it to 8 bits", code="unsupported_mode")
    if kind == _PALETTE and "RedPaletteColorLookupTableData" not in dataset:
        raise ImageError(
            f"{name}: a DICOM palette that is segmented or only named: convert it to RGB", code="unsupported_mode"
        )
    if kind in _GREY and all(tag in dataset for tag in _RESCALE):  # one without the other is never applied
        for tag in _RESCALE:
            if dataset.get(tag) in (None, ""):
                raise ImageError(f"{name}: its {tag} is empty: give it a number, or remove it", code="unsupported_mode")


def _content(dataset: Any) -> str:
    """The kind of image, `CT` or `CT localizer`. Only words that are known beforehand: any tag may hold any text."""
    try:
        modality, types = str(dataset.get("Modality")), dataset.get("ImageType") or ()
        words = {types} if isinstance(types, str) else set(types)
        captured = str(dataset.get("SOPClassUID")).startswith(_SECONDARY_CAPTURE) or "SCREEN SAVE" in words
    except Exception:
        # The pixels do not depend on these tags.
        return "unknown modality"
    kind = " localizer" if "LOCALIZER" in words else " secondary capture" if captured else ""
    return (modality if modality in _MODALITIES else "unknown modality") + kind


def _of_frame(dataset: Any, frame: int, name: str) -> Any:
    """The tags that apply to one frame: enhanced objects keep the rescale and the window in functional groups."""
    from pydicom import Dataset

    shared = _items(dataset, "SharedFunctionalGroupsSequence", name)
    each = _items(dataset, "PerFrameFunctionalGroupsSequence", name)
    groups = [*shared[:1], *each[frame : frame + 1]]
    items = [item for group in groups for kind in _OF_FRAMES for item in _items(group, kind, name)[:1]]
    own = dataset
    if items:
        own = Dataset()
        own.file_meta = dataset.file_meta
        for tags in (dataset, *items):
            own.update(tags)
    for kind in _TABLES:
        _make_long(own, kind, name)
    return own


def _items(dataset: Any, kind: str, name: str) -> Any:
    """The items of a sequence; pydicom parses a sequence of a declared length only here, when it is accessed."""
    _make_long(dataset, kind, name)
    return dataset.get(kind) or []


def _make_long(dataset: Any, kind: str, name: str) -> None:
    """Parse a long sequence of a declared length, with its reads counted: ImageError once they are too many."""
    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.filereader import read_sequence

    raw = dataset.get_item(kind)
    if isinstance(raw, RawDataElement) and raw.value is not None and len(raw.value) > _MOST_READS:
        with _counted(io.BytesIO(raw.value), len(raw.value), name) as file:
            items = read_sequence(file, raw.is_implicit_VR, raw.is_little_endian, len(raw.value), "iso8859")
        dataset.add(DataElement(raw.tag, "SQ", items))


def _padding(dataset: Any) -> tuple[int, int] | None:
    """The stored values that mean no data, from the padding value to its limit; None if there are none."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    return _as_stored(value, dataset), _as_stored(value if limit is None else limit, dataset)


def _as_stored(value: int, dataset: Any) -> int:
    """A stored value from the header: some writers give signed values an unsigned type, or the other way round.

    A value that no pixel can hold, such as a CT's -2000 left in 8 bits, is kept, and matches no pixel.
    """
    span = 1 << int(dataset.BitsAllocated)
    if dataset.PixelRepresentation == 1:
        return value - span if span // 2 <= value < span else value
    return value + span if -span // 2 <= value < 0 else value


def _are_stored(low: int, high: int, dataset: Any) -> bool:
    """Whether `low` to `high` fit in the stored bits: some writers pad with values that need the bits above."""
    span = 1 << int(dataset.BitsStored)
    return -span // 2 <= low and high < span // 2 if dataset.PixelRepresentation == 1 else high < span


def _has_table(dataset: Any) -> bool:
    """Whether the window is a table, which takes precedence over a centre and a width."""
    tables = dataset.get("VOILUTSequence")
    return bool(tables) and None not in (tables[0].get("LUTDescriptor"), tables[0].get("LUTData"))


def _through_table(values: Pixels, dataset: Any) -> Pixels:
    """Values through the window's table, 0 to 1; values beyond its ends get the value of that end.

    Not done by pydicom, where indexes above 255 wrap around in a table of 8-bit entries.
    """
    table = dataset.VOILUTSequence[0]
    entries, first, bits = table.LUTDescriptor
    order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
    data = table.LUTData
    given = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.array(data)
    places = np.clip(values.astype(np.int64) - first, 0, (entries or 2**16) - 1)
    shown: Pixels = given[places] / (2**bits - 1)
    return shown


def _palette_colours(stored: Pixels, dataset: Any) -> Pixels:
    """Palette indexes as RGB uint8, 16-bit tables by their high byte."""
    from pydicom.pixels.processing import apply_color_lut

    entries, first, _ = dataset.RedPaletteColorLookupTableDescriptor
    entries = entries or 2**16
    table = apply_color_lut(np.arange(first, first + entries), dataset)
    # Many writers declare a 16-bit table and fill it with 8-bit colours.
    if table.dtype == np.uint16 and table.max() > 255:
        table = table >> 8
    colours: Pixels = table.astype(np.uint8)[np.clip(stored.astype(np.int64) - first, 0, entries - 1)]
    return colours
