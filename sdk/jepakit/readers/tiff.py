"""TIFF of every depth, band count and layout through tifffile, common 8-bit kinds through Pillow.

Frames and bands follow tifffile's axes: samples (S) and channels (C) are bands, every other axis counts
frames. So pages saved one after the other as (n, H, W) are n frames, while planar samples, or the channels
of an ImageJ or OME hyperstack, are bands. Only the first series counts, or that of the slide: reduced
copies, thumbnails and labels are neither frames nor bands, and files of several images are refused.
"""

from __future__ import annotations

import importlib.util
import lzma
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepakit.errors import ImageError, MissingExtraError
from jepakit.readers.checks import CUT, MIN_SIDE, READ_AS, check_pixels, check_ratio, reading
from jepakit.readers.codestream import claimed_size, refuse_scans
from jepakit.readers.encoded import Encoded
from jepakit.readers.header import DEFAULT_LIMITS, Header, Limits, Pixels, Window
from jepakit.readers.orientation import ORIENTATION, SWAPPED, stored_window, upright, valid_orientation
from jepakit.readers.pillow import PillowFile
from jepakit.readers.raster import Raster
from jepakit.readers.slides import slide_series
from jepakit.readers.tiffguard import check_structure

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_COLOUR_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, 3: 1, 5: 4, _YCBCR: 3, 8: 3}
"""Samples per pixel, without alpha, of the photometric kinds that Pillow makes RGB (3 palette, 5 CMYK, 8 CIELAB)."""
_ALPHA = frozenset({1, 2})
_GDAL_NODATA = 42113

_JPEG = 7
_COMPRESSIONS = frozenset({1, 5, _JPEG, 8, 32773, 32946, 33005, 34712, 34925, 50000})
"""None, LZW, JPEG, deflate (2 codes), PackBits, JPEG 2000 (2 codes), LZMA, ZSTD: their output size is bounded."""
_COMPRESSIONS_OF_PILLOW = frozenset({1, 2, 3, 4, 5, 6, _JPEG, 8, 32773, 32946, 34925, 50000, 50001})
_DEFLATE, _LZMA = frozenset({8, 32946}), 34925
_READ_BY_TIFFFILE = _DEFLATE | {1, _LZMA}
"""Those read without imagecodecs. tifffile's own PackBits takes a list entry per byte, whatever the strip's size."""
_MOST_MARGIN = 4
"""Most pixels in all tiles together per pixel of the image, on top of the most that any image may have."""
_MOST_SMALL, _SMALL = 1 << 18, 4096
"""Most strips or tiles decoded at once if each holds fewer than `_SMALL` bytes: each takes 20 µs, however small it is."""
_CLAIMS_ITS_SIZE = frozenset({_JPEG, 33005, 34712})


def open_tiff(encoded: Encoded, limits: Limits) -> Raster:
    """A TIFF or BigTIFF file, or a slide, as a raster."""
    try:
        import tifffile
    except ImportError:
        raise MissingExtraError("reading TIFF needs tifffile: pip install 'jepakit[images]'") from None
    name = encoded.name
    with reading(name):
        encoded.file.seek(0)
        # Some microscope formats span several files; only this one is read.
        tif = tifffile.TiffFile(encoded.file, _multifile=False, is_ndtiff=False, is_mmstack=False)
        check_structure(tif, name)
        if tif.is_dng:
            raise ImageError(f"{name}: a camera's raw file: develop it to TIFF", code="unsupported_mode")
        slide = slide_series(tif, name)
        series: Any = tif.series[0] if slide is None else slide
        layout = _layout(series, encoded)
        page = series.keyframe
        _refuse_margins(page, name, limits)
        if slide is None:
            _refuse_preview(tif, page, name)
            _refuse_mask(tif, name)
            _refuse_others(tif, page, name)
        as_usual = None
        if slide is None and _is_usual(page) and len(series.pages) == layout.frames:
            as_usual = [kept.index for kept in series.pages]
            # Pillow does not read no-data values.
            if _GDAL_NODATA in page.tags:
                _refuse_inexact(page, name)
            elif not (_is_exact(page) and _can_decode(page)):
                return PillowFile(encoded, limits, ("TIFF",), as_usual)
        _refuse_unread(page, name)
        format = "TIFF" if slide is None else "SLIDE"
        # Many frames are never left to Pillow: it walks through all pages up to the one wanted.
        return TiffRaster(encoded, limits, series, layout, format, as_usual if layout.frames == 1 else None)


@dataclass(frozen=True)
class _Layout:
    """How the planes of a series, in file order, map to frames and bands."""

    planes: NDArray[np.int64]
    """[frames, planes per frame]"""
    samples: int
    """Bands per plane."""

    @property
    def frames(self) -> int:
        return len(self.planes)

    @property
    def bands(self) -> int:
        return int(self.planes.shape[1]) * self.samples


def _layout(series: Any, encoded: Encoded) -> _Layout:
    page = series.keyframe
    axes, shape = series.axes, series.shape
    if shape[-1] == 1 and not page.axes.endswith(axes[-1]):
        axes, shape = axes[:-1], shape[:-1]  # an array [H, W, 1], as tifffile writes it
    lead = axes.removesuffix(page.axes)
    lead_shape = shape[: len(lead)]
    if set(page.axes) - set("SYX") or axes != lead + page.axes or shape[len(lead) :] != page.shape:
        raise ImageError(
            f"{encoded.name}: a TIFF with axes {series.axes}; this version reads pages of rows, columns and bands: "
            "save each plane as a page",
            code="unsupported_mode",
        )
    if any(kept is None for kept in series.pages):
        raise ImageError(
            f"{encoded.name}: it describes planes that it does not hold, perhaps as one of a series of OME-TIFF files: "
            "save them as one file",
            code="unsupported_mode",
        )
    count = math.prod(lead_shape)
    if count != len(series.pages) and (series.dataoffset is None or count * page.nbytes > encoded.size):
        raise ValueError("pages are missing")
    of_bands = [place for place, axis in enumerate(lead) if axis in "CS"]
    n_planes = math.prod(lead_shape[place] for place in of_bands)
    order = np.moveaxis(np.arange(count).reshape(lead_shape), of_bands, range(-len(of_bands), 0))
    samples = page.samplesperpixel if "S" in page.axes else 1
    if count > 1 and page.imagewidth < MIN_SIDE:
        # What tifffile.imwrite writes for [H, W, bands] without `photometric` and `planarconfig`.
        raise ImageError(
            f"{encoded.name}: {count} pages of {page.imagewidth} × {page.imagelength} pixels, which look like the rows "
            'of one image with bands: save it with photometric="minisblack", planarconfig="contig"',
            code="wrong_shape",
        )
    if n_planes > 1 and samples > 1:
        raise ImageError(
            f"{encoded.name}: a TIFF with both channels and samples (axes {series.axes}): save one of them as pages",
            code="unsupported_mode",
        )
    return _Layout(order.reshape(-1, n_planes), samples)


class TiffRaster(Raster):
    """Planes read by windows: only the rows needed if uncompressed and in one piece, else the strips or tiles."""

    _decodes_anew = True

    def __init__(
        self, encoded: Encoded, limits: Limits, series: Any, layout: _Layout, format: str, as_usual: list[int] | None
    ) -> None:
        """`as_usual`: the page left to Pillow when all of it is wanted: same pixels, but stricter about damage."""
        page = series.keyframe
        self._encoded, self._series, self._layout, self._as_usual = encoded, series, layout, as_usual
        self._white_is_zero = page.photometric == _WHITE_IS_ZERO
        self._orientation = _orientation(page)
        height, width = page.imagelength, page.imagewidth
        if self._orientation in SWAPPED:
            height, width = width, height
        dtype = READ_AS[page.dtype.name]
        bands = 3 if dtype == "uint8" and layout.bands == 1 else layout.bands
        windowed = self._offset(0) is not None or math.prod(_grid(page)) > 1
        strip = self._strip() if windowed else 0
        header = Header(format, height, width, bands, dtype, layout.frames, self._nodata(dtype), windowed, strip=strip)
        needed = sum(sum(series.pages[plane].databytecounts) for plane in layout.planes[0]) if not windowed else None
        super().__init__(header, encoded.name, limits, encoded.file, needed)

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        if self._as_usual is not None:
            return PillowFile(self._encoded, self._limits, ("TIFF",), self._as_usual).read()
        return self._decode_part(window, frame)

    def _decode_part(self, window: Window, frame: int) -> Pixels:
        header = self.header
        if self._as_usual is not None and not header.windowed:
            return self._decode(window, frame, None)
        stored = stored_window(window, self._orientation, header.height, header.width)
        planes = [self._plane(int(plane), stored) for plane in self._layout.planes[frame]]
        pixels = upright(planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2), self._orientation)
        return self._top - pixels if self._white_is_zero else pixels

    def _plane(self, plane: int, window: Window) -> Pixels:
        """A window of one plane as stored, [height, width, samples]."""
        page = self._series.keyframe
        offset = self._offset(plane)
        if offset is None:
            return self._from_segments(plane, window)
        stored = page.dtype.newbyteorder(page.parent.byteorder)
        rows, columns = window.rows_and_columns
        of_axis = {"Y": rows, "X": columns, "S": slice(0, self._layout.samples)}
        part = tuple(of_axis[axis] for axis in page.axes)
        pixels = self._encoded.stored(offset, page.shape, stored).read(part)
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        return pixels.reshape(window.height, window.width, -1)

    def _offset(self, plane: int) -> int | None:
        """The offset of a plane stored uncompressed in one piece; None for any other."""
        series = self._series
        if series.dataoffset is not None:
            return int(series.dataoffset) + plane * int(series.keyframe.nbytes)
        page = series.pages[plane]
        # tifffile assumes that a later page's pieces are laid out like the first page's: only true of single pieces.
        if page.is_final and (len(page.dataoffsets) == 1 or page is series.keyframe):
            return int(page.dataoffsets[0])
        return None

    def _strip(self) -> int:
        """The rows of a strip (or tile) as wide as the upright image; 0 if windows are read without decoding any."""
        page = self._series.keyframe
        in_strips = self._offset(0) is None and self._orientation == 1 and _grid(page)[1] == 1
        return int(page.chunks[0]) if in_strips else 0

    def _from_segments(self, plane: int, window: Window) -> Pixels:
        page, key = self._series.pages[plane], self._series.keyframe
        wanted = _overlapping(key, window)
        if wanted[-1] >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise ValueError("strips or tiles are missing")
        counts = [page.databytecounts[index] for index in wanted]
        there = sum(count > 0 for count in counts)
        size = check_pixels(self.name, key.chunks, key.dtype.name, self._limits, CUT)
        if len(wanted) > _MOST_SMALL and size < _SMALL:
            raise ImageError(
                f"{self.name}: {len(wanted):,} strips or tiles of {size:,} bytes, but of those under {_SMALL:,} bytes at most "
                f"{_MOST_SMALL:,} are read: save it with larger ones",
                code="too_large",
            )
        check_ratio(self.name, there * size, sum(counts), self._limits)
        pixels = np.full((window.height, window.width, self._layout.samples), key.nodata, key.dtype)
        for index, count in zip(wanted, counts, strict=True):
            if count:
                self._paste(page, index, self._segment(page.dataoffsets[index], count), window, pixels)
        return pixels

    def _segment(self, offset: int, count: int) -> bytes:
        if offset + count > self._encoded.size:
            raise ValueError("the file ends before its pixels do")
        self._encoded.file.seek(offset)
        data = self._encoded.file.read(count)
        page = self._series.keyframe
        if page.compression in _CLAIMS_ITS_SIZE and page.jpegheader is None:
            width, height = claimed_size(data) or (math.inf, math.inf)
            if width > page.chunks[1] or height > page.chunks[0]:
                raise ValueError("a strip or tile claims another size")
        if page.compression == _JPEG:
            refuse_scans((page.jpegheader or b"") + data, self.name)
        if importlib.util.find_spec("imagecodecs") is None:
            _refuse_bomb(data, page.compression, math.prod(page.chunks) * page.dtype.itemsize)
        return data

    def _paste(self, page: Any, index: int, data: bytes, window: Window, pixels: Pixels) -> None:
        """Decode one strip or tile and copy the part that the window needs."""
        key = self._series.keyframe
        tables = {}
        if key.compression == _JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
        segment, (band, _, top, left, _), _ = key.decode(data, index, **tables)
        segment = segment[0]
        first_row, first_column = max(top, window.y), max(left, window.x)
        part = segment[
            first_row - top : window.y + window.height - top, first_column - left : window.x + window.width - left
        ]
        to = pixels[first_row - window.y :, first_column - window.x :, band : band + part.shape[2]]
        to[: part.shape[0], : part.shape[1]] = part

    @property
    def _top(self) -> int:
        """The value that zero stands for if white is zero."""
        return int(2**self._series.keyframe.bitspersample - 1)

    def _nodata(self, dtype: str) -> float | None:
        tag = self._series.keyframe.tags.get(_GDAL_NODATA)
        if tag is None:
            return None
        text = str(tag.value).strip(" \0")
        try:
            value = float(text)
        except ValueError:
            raise ImageError(
                f"{self._encoded.name}: its no-data value (GDAL_NODATA) is {text[:20]!r}, not a number: correct it "
                "(gdal_edit.py -a_nodata VALUE), or leave it out (gdal_edit.py -unsetnodata)",
                code="unsupported_mode",
            ) from None
        if self._white_is_zero:
            return self._top - value
        with np.errstate(over="ignore"):
            # The value as stored in pixels, so that they compare equal.
            return float(np.float32(value)) if dtype == "float32" else value


def _orientation(page: Any) -> int:
    tag = page.tags.get(ORIENTATION)
    return 1 if tag is None else valid_orientation(tag.value)


def _is_usual(page: Any) -> bool:
    """Whether Pillow reads it correctly: at most 8 bits of a common colour kind, alpha only if the file declares it."""
    colours = _COLOUR_SAMPLES.get(page.photometric)
    extra = [int(kind) for kind in page.extrasamples]
    return (
        page.dtype is not None
        and page.dtype.name in ("uint8", "bool")
        and isinstance(page.bitspersample, int)
        and page.bitspersample <= 8
        and page.compression in _COMPRESSIONS_OF_PILLOW
        and not _is_bare_subsampled(page)
        and (page.planarconfig == 1 or page.samplesperpixel == 1)
        and page.samplesperpixel == (colours or 0) + len(extra)
        and (not extra or (len(extra) == 1 and extra[0] in _ALPHA))
    )


def _is_bare_subsampled(page: Any) -> bool:
    """Whether it is uncompressed YCbCr with subsampled colour, which Pillow reads as if it had full resolution."""
    return bool(page.photometric == _YCBCR and page.compression == 1 and page.is_subsampled)


def _is_exact(page: Any) -> bool:
    """Whether tifffile reads exactly the same pixels of a usual page as Pillow."""
    in_colour = page.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) or (
        page.photometric == _YCBCR and page.compression == _JPEG
    )
    return in_colour and page.bitspersample == 8 and not page.extrasamples and page.compression in _COMPRESSIONS


def _refuse_preview(tif: Any, page: Any, name: str) -> None:
    """Refuse a file whose first image is a reduced copy, unless that is all it holds."""
    if page.is_reduced and (len(tif.pages) > 1 or page.subifds):
        raise ImageError(
            f"{name}: a TIFF that begins with a reduced copy ({page.imagewidth} × {page.imagelength} pixels) of another of "
            "its pages: save the image itself as the first page (a camera's raw file: develop it to TIFF)",
            code="unsupported_mode",
        )


def _refuse_mask(tif: Any, name: str) -> None:
    """Refuse a file with a mask: no value can stand for masked pixels, as any may be a real one."""
    if any(series.keyframe.is_mask for series in tif.series):
        raise ImageError(
            f"{name}: a TIFF with a mask beside its image, which is not honoured: give the masked pixels a value that no other "
            "pixel has, and name it (gdal_translate -mask none -a_nodata VALUE)",
            code="unsupported_mode",
        )


def _refuse_others(tif: Any, page: Any, name: str) -> None:
    """Refuse a file of several images, of which only the first would be read. Smaller ones count as copies of it."""
    others = [series.keyframe for series in tif.series if series.keyframe.index != page.index]
    for other in others:
        if not other.is_reduced and other.imagelength * other.imagewidth >= page.imagelength * page.imagewidth:
            raise ImageError(
                f"{name}: a TIFF of several images, one of {_kind(page)} and one of {_kind(other)}: save each as a file, or all "
                "as one stack of one size, type and compression (tifffile.imwrite(FILE, numpy.stack(IMAGES)))",
                code="unsupported_mode",
            )


def _kind(page: Any) -> str:
    return f"{page.imagewidth} × {page.imagelength} pixels of {page.dtype}"


def _refuse_inexact(page: Any, name: str) -> None:
    """Refuse a no-data value if only Pillow reads the pixels correctly."""
    if not _is_exact(page):
        raise ImageError(
            f"{name}: an 8-bit TIFF with a no-data value, which is not honoured where there is a palette, CMYK, transparency, "
            "under 8 bits or an unusual compression: write grey, RGB or plain bands (gdal_translate: -expand rgb, "
            "-co ALPHA=NO, -co COMPRESS=DEFLATE), or leave the value out (gdal_edit.py -unsetnodata)",
            code="unsupported_mode",
        )


def _can_decode(page: Any) -> bool:
    import tifffile

    try:
        return bool(tifffile.TIFF.DECOMPRESSORS[page.compression]) and bool(tifffile.TIFF.UNPREDICTORS[page.predictor])
    except KeyError:
        return False


def _refuse_unread(page: Any, name: str) -> None:
    """Refuse by name what tifffile would misinterpret, or could not read."""

    def refusal(what: str) -> ImageError:
        return ImageError(f"{name}: a TIFF with {what}", code="unsupported_mode")

    if page.dtype is None or page.dtype.name not in READ_AS or not isinstance(page.bitspersample, int):
        kind = page.dtype or f"{page.bitspersample} bits"
        raise refusal(f"values of type {kind}: store them as one of {', '.join(READ_AS)}")
    if _is_bare_subsampled(page):
        raise refusal("uncompressed YCbCr with reduced colour resolution: save it as RGB")
    of_jpeg = page.photometric == _YCBCR and page.compression == _JPEG and page.dtype.name == "uint8"
    if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) and not of_jpeg:
        raise refusal(f"photometric kind {int(page.photometric)} in {page.dtype}: save it as grey, RGB or plain bands")
    if page.photometric == _WHITE_IS_ZERO and page.dtype.kind != "u":
        raise refusal(f"white as zero in {page.dtype}, which has no highest value: save it with black as zero")
    if _ALPHA & {int(kind) for kind in page.extrasamples}:
        raise refusal(
            f"alpha beside {page.dtype} bands, which cannot be laid on white without scaling them: save it without alpha"
        )
    how = f"compression {int(page.compression)} and predictor {int(page.predictor)}"
    by_itself = _can_decode(page) and page.compression in _READ_BY_TIFFFILE and page.bitspersample % 8 == 0
    if not by_itself and importlib.util.find_spec("imagecodecs") is None:
        raise MissingExtraError(f"{name}: a TIFF with {how} needs imagecodecs: pip install 'jepakit[codecs]'")
    if page.compression not in _COMPRESSIONS or not _can_decode(page):
        raise refusal(f"{how}, which is not read: save it with deflate or ZSTD")


def _refuse_bomb(data: bytes, compression: int, most: int) -> None:
    """ValueError for a strip or tile of more than `most` bytes: tifffile's own decoders inflate without a limit."""
    if compression in _DEFLATE:
        inflated = zlib.decompressobj().decompress(data, most + 1)
    elif compression == _LZMA:
        inflated = lzma.LZMADecompressor().decompress(data, most + 1)
    else:
        return
    if len(inflated) > most:
        raise ValueError("a strip or tile holds more than its size")


def _grid(page: Any) -> tuple[int, int]:
    """How many strips or tiles a plane has, down and across."""
    length, width = page.chunks[:2]
    return math.ceil(page.imagelength / length), math.ceil(page.imagewidth / width)


def _refuse_margins(page: Any, name: str, limits: Limits) -> None:
    """Refuse tiles that reach far beyond the image: they may all be the same few bytes, and each is decoded whole."""
    if not page.is_tiled:
        return
    length, width = page.tilelength, page.tilewidth
    tiles = math.ceil(page.imagelength / length) * math.ceil(page.imagewidth / width)
    held = tiles * length * width * page.tiledepth
    most = _MOST_MARGIN * page.imagewidth * page.imagelength + max(limits.max_pixels, DEFAULT_LIMITS.max_pixels)
    if held > most:
        raise ImageError(
            f"{name}: its tiles of {width} × {length} pixels hold {held:,}, for an image of {page.imagewidth} × "
            f"{page.imagelength}; the limit is {most:,}: save it in smaller tiles, or in strips",
            code="too_large",
        )


def _overlapping(page: Any, window: Window) -> list[int]:
    """The strips or tiles that a stored window needs, by their index in the file's list."""
    length, width = page.chunks[:2]
    down, across = _grid(page)
    rows = range(window.y // length, (window.y + window.height - 1) // length + 1)
    columns = range(window.x // width, (window.x + window.width - 1) // width + 1)
    separate = page.samplesperpixel if page.axes == "SYX" else 1
    return [(band * down + row) * across + column for band in range(separate) for row in rows for column in columns]
