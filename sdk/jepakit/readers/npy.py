"""NumPy files (.npy, .npz with one array) and arrays in memory: [H, W] or [H, W, bands]."""

from __future__ import annotations

import zipfile
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import first_few
from jepakit.errors import ImageError
from jepakit.readers.checks import MIN_SIDE, READ_AS, check_encoded, check_header, check_pixels, check_ratio, reading
from jepakit.readers.encoded import Encoded, Stored
from jepakit.readers.header import Header, Limits, Pixels, Window
from jepakit.readers.raster import Raster, crop
from jepakit.readers.sniff import not_an_image, unsupported

_MAX_KEYS_SHOWN = 5
# A last axis longer than this and as long as another is a side of a square, not the bands.
_MOST_BANDS_OF_AN_IMAGE = 32


class ArrayRaster(Raster):
    """An array in memory; only the part that a window needs is copied."""

    def __init__(self, array: NDArray[Any], header: Header, name: str, limits: Limits, file: BinaryIO | None) -> None:
        super().__init__(header, name, limits, file)
        self._array = array

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        return crop(self._array, window)

    def close(self) -> None:
        self._array = np.zeros((0, 0), np.uint8)
        super().close()


class NpyRaster(Raster):
    """A .npy file; only the part that a window needs is read."""

    _decodes_anew = True

    def __init__(self, stored: Stored, said: NpyHeader, header: Header, name: str, limits: Limits) -> None:
        super().__init__(header, name, limits, stored.encoded.file)
        self._stored, self._said = stored, said

    def _decode(self, window: Window, frame: int, at_least: int | None) -> Pixels:
        part = (*window.rows_and_columns, *(slice(0, bands) for bands in self._said.shape[2:]))
        return self._said.ordered(self._stored.read(part[::-1] if self._said.fortran else part))


def open_array(array: NDArray[Any], name: str, limits: Limits) -> ArrayRaster:
    """An array [H, W] or [H, W, bands] as a raster; ImageError for another dtype or shape, or masked values."""
    if np.ma.is_masked(array):
        raise ImageError(
            f"{name}: an array with masked values, and no value can stand for them: fill them (array.filled(…)), or "
            "leave the image out",
            code="unsupported_mode",
        )
    array = np.asarray(array)  # a matrix, for one, has no third axis
    return ArrayRaster(array, _header("array", array.dtype, array.shape, name, limits), name, limits, None)


def open_npy(encoded: Encoded, limits: Limits) -> NpyRaster:
    """A .npy file, of which only the header is read yet."""
    with reading(encoded.name):
        encoded.file.seek(0)
        said = read_npy_header(encoded.file)
        header = _header("NPY", said.dtype, said.shape, encoded.name, limits)
        stored = encoded.stored(encoded.file.tell(), said.stored_shape, said.dtype)
    return NpyRaster(stored, said, header, encoded.name, limits)


def open_zip(encoded: Encoded, limits: Limits) -> ArrayRaster:
    """A .npz file with one array, inflated in memory after its declared size has been checked."""
    check_encoded(encoded.name, encoded.size, limits)
    with reading(encoded.name), zipfile.ZipFile(encoded.file) as archive:
        member = _only_array(archive.infolist(), encoded.name)
        with archive.open(member) as file:
            said = read_npy_header(file)
            header = _header("NPZ", said.dtype, said.shape, encoded.name, limits)
            shape = (header.height, header.width, header.bands)
            decoded = check_pixels(encoded.name, shape, said.dtype.name, limits, "store it in tiles")
            check_ratio(encoded.name, decoded, member.compress_size, limits)
            data = file.read(prod(said.shape) * said.dtype.itemsize)
        array = np.frombuffer(data, said.dtype).reshape(said.stored_shape)
    return ArrayRaster(said.ordered(array), header, encoded.name, limits, encoded.file)


class NpyHeader(NamedTuple):
    """The header of a .npy file."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the order of the bytes; reversed for Fortran order."""
        return self.shape[::-1] if self.fortran else self.shape

    def ordered(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.T if self.fortran else array


def read_npy_header(file: Any) -> NpyHeader:
    """Read the header of a .npy file, and leave `file` where the values begin. NumPy parses it as a literal of at most
    10,000 characters; damage can raise any exception."""
    return _parse_header(file)


def _parse_header(file: Any) -> NpyHeader:
    """A separate function, so that numpy's warnings always name this module as their origin."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return NpyHeader(*np.lib.format.read_array_header_1_0(file))
    # Version 3 differs from 2 only in the encoding of field names, and dtypes with fields are refused.
    if version in ((2, 0), (3, 0)):
        return NpyHeader(*np.lib.format.read_array_header_2_0(file))
    raise ValueError(f"version {version} of .npy")


def _header(format: str, dtype: np.dtype[Any], shape: tuple[int, ...], name: str, limits: Limits) -> Header:
    kind = f"{str(dtype)[:60]} {str(list(shape))[:100]}"
    what = f"{name} of {kind}" if format == "array" else f"{name}: {kind}"
    read_as = READ_AS.get(dtype.name)
    if read_as is None:
        raise ImageError(f"{what}: convert it to one of {', '.join(READ_AS)}", code="wrong_shape")
    if len(shape) not in (2, 3):
        raise ImageError(f"{what}: give [H, W] or [H, W, bands]", code="wrong_shape")
    if len(shape) == 3 and _bands_first(shape, limits.max_bands):
        raise ImageError(
            f"{what}: it looks like [bands, H, W] or [slices, H, W]: store bands as [H, W, bands] "
            "(numpy.moveaxis(array, 0, -1)), and each slice or frame as an image of its own, or all as one TIFF, with frame=",
            code="wrong_shape",
        )
    if len(shape) == 3 and _volume(shape):
        raise ImageError(
            f"{what}: it looks like a volume [slices, H, W], not like {shape[2]} bands: give each slice as an image of "
            "its own, or keep the bands you need as [H, W, bands]",
            code="wrong_shape",
        )
    bands = shape[2] if len(shape) == 3 else 1
    if bands < 1:
        raise ImageError(f"{what}: it has no bands", code="wrong_shape")
    bands = 3 if bands == 1 and read_as == "uint8" else bands
    header = Header(format, shape[0], shape[1], bands, read_as, windowed=True)
    check_header(header, name, limits)
    return header


def _bands_first(shape: tuple[int, ...], max_bands: int) -> bool:
    first, *sides = shape
    return 1 <= first <= max_bands and first < shape[2] and min(sides) >= MIN_SIDE


def _volume(shape: tuple[int, ...]) -> bool:
    return shape[2] > _MOST_BANDS_OF_AN_IMAGE and shape[2] in shape[:2]


def _only_array(members: list[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    names = [member.filename for member in members]
    if any(key.endswith("data.pkl") for key in names):
        raise unsupported(
            name, "a PyTorch file, which is a pickle and so is never loaded", "save the array with numpy.save"
        )
    if not names or not all(key.endswith(".npy") for key in names):
        raise unsupported(name, "a ZIP archive", "unpack it") if names else not_an_image(name)
    if len(members) > 1:
        keys = first_few([key.removesuffix(".npy")[:40] for key in names], _MAX_KEYS_SHOWN)
        raise ImageError(
            f"{name}: {len(names)} arrays ({keys}): save the one you need as a file of its own",
            code="unsupported_mode",
        )
    return members[0]
