"""NumPy files and arrays: checked by their header, read by windows, never unpickled."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from tests.files import npy

from jepakit.errors import ImageError, NoMemoryError
from jepakit.readers import Limits, Window, open_raster

Refused = Callable[..., str]


def make(*shape: int, dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_npy", ".npy"), data)
    return buffer.getvalue()


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64", ">u2", ">f4"])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 3), (20, 30, 7)], ids=str)
def test_arrays_and_their_files_give_their_values(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = make(*shape, dtype=dtype)
    expected = array.reshape(20, 30, -1)
    if dtype == "uint8" and expected.shape[2] == 1:
        expected = np.repeat(expected, 3, axis=2)
    file = tmp_path / "a.npy"
    np.save(file, array)
    fortran = np.asfortranarray(array)
    for source in (array, fortran, array[::-1][::-1], file, npy(array), npy(fortran), npz(a=array), npz(a=fortran)):
        with open_raster(source) as raster:
            pixels = raster.read()
            window = raster.read(Window(3, 5, 9, 11))
        assert pixels.dtype == np.dtype(raster.header.dtype)
        assert pixels.dtype.isnative
        assert pixels.flags.c_contiguous
        assert raster.header.dtype == {"float64": "float32"}.get(array.dtype.name, array.dtype.name)
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(window, expected[5:16, 3:12])


def test_what_is_read_is_the_callers_own() -> None:
    array = make(20, 30)
    with open_raster(array) as raster:
        raster.read()[:] = 0
        np.testing.assert_array_equal(raster.read()[..., 0], array)
    assert array.any()


@pytest.mark.parametrize(
    "array",
    [np.zeros((20, 20), bool), np.zeros((20, 20), np.int64), np.zeros((20, 20), np.float16), np.zeros((20, 20), complex),
     np.full((20, 20), "a"), np.zeros((20, 20), [("a", "u1")]), np.zeros(400, np.uint8), np.zeros((), np.uint8),
     np.zeros((2, 20, 20, 3), np.uint8), np.zeros((20, 20, 0), np.uint8)],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)  # fmt: skip
def test_other_types_and_shapes_are_refused(array: NDArray[Any], refused: Refused) -> None:
    for source in (array, npy(array), npz(a=array)):
        message = refused(source, "wrong_shape")
        assert str(list(array.shape)) in message


@pytest.mark.parametrize("shape", [(3, 20, 30), (13, 64, 64), (1, 100, 100), (8, 200, 300)], ids=str)
def test_bands_first_are_refused_with_the_remedy(shape: tuple[int, ...], refused: Refused) -> None:
    for source in (make(*shape), npy(make(*shape))):
        assert "[H, W, bands]" in refused(source, "wrong_shape")


@pytest.mark.parametrize("shape", [(100, 64, 64), (64, 64, 64), (64, 100, 64), (100, 512, 512)], ids=str)
def test_a_volume_is_not_taken_for_bands(shape: tuple[int, ...], refused: Refused) -> None:
    for source in (make(*shape), npy(make(*shape))):
        assert "give each slice as an image" in refused(source, "wrong_shape")


@pytest.mark.parametrize("shape", [(64, 100, 40), (32, 40, 32), (100, 100, 64)], ids=str)
def test_many_bands_are_bands_where_no_side_is_as_long(shape: tuple[int, ...]) -> None:
    with open_raster(make(*shape)) as raster:
        assert raster.header.bands == shape[2]


def test_no_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("jepakit.readers.npy.read_npy_header", no_memory)
    with pytest.raises(NoMemoryError, match="image: out of memory while it was read"):
        open_raster(npy(make(20, 30)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_masked_values_are_refused_and_a_mask_of_nothing_is_not(dtype: str, refused: Refused) -> None:
    whole = make(20, 30, dtype=dtype)
    masked = np.ma.masked_array(whole, np.zeros((20, 30), bool))
    with open_raster(masked) as raster:
        assert type(raster.read()) is np.ndarray
    masked[3, 4] = np.ma.masked
    assert "masked values" in refused(masked, "unsupported_mode", name="image 7")


def test_a_matrix_is_read_as_an_array() -> None:
    """NumPy reads past the end of a matrix to which a third axis was added."""
    array = make(140, 160, dtype="uint8")
    matrix = array.view(np.matrix)
    for source in (matrix, np.ma.masked_array(array)):
        with open_raster(source) as raster:
            assert type(raster._decode(Window(0, 0, 160, 140), 0, None)) is np.ndarray
            np.testing.assert_array_equal(raster.read()[..., 0], array)


def test_sizes_are_judged_on_the_header(refused: Refused) -> None:
    assert "100 bands" in refused(make(200, 200, 100), "too_large")
    refused(make(7, 20), "too_small")
    refused(make(0, 20), "too_small")
    refused(npy_header((50_000, 50_000)), "unreadable")
    refused(npy_header((-1000, 8)) + bytes(100), "too_small")
    refused(make(40, 40), "too_large", limits=Limits(max_pixels=1000))
    refused(make(40, 40), "too_large", limits=Limits(max_decoded_bytes=3000))


def test_an_npz_is_judged_before_it_is_inflated(refused: Refused) -> None:
    bomb = zipped(a_npy=npy_header((3000, 3000)) + bytes(4 * 3000 * 3000))
    assert "over 500 times" in refused(bomb, "too_large")
    refused(zipped(a_npy=npy_header((50_000, 50_000))), "too_large")
    refused(zipped(a_npy=npy_header((-1000, 8)) + bytes(1000)), "too_small")
    refused(zipped(a_npy=npy_header((100, 100)) + bytes(100)), "unreadable")
    refused(npz(a=make(40, 40)), "too_large", limits=Limits(max_encoded_bytes=100))


def test_an_npz_holds_exactly_one_array(refused: Refused) -> None:
    several = npz(**{f"key{number}": make(20, 20) for number in range(7)})
    message = refused(several, "unsupported_mode")
    assert "7 arrays" in message
    assert "key4 and 2 more" in message
    assert "key5" not in message


def test_other_archives_are_refused_by_name(refused: Refused) -> None:
    assert "ZIP" in refused(zipped(readme=b"hello"), "unsupported_format")
    assert "PyTorch" in refused(zipped(data_pkl=b"", **{"archive/data.pkl": b""}), "unsupported_format")
    refused(zipped(), "unsupported_format")


def test_nothing_is_ever_unpickled(tmp_path: Path, refused: Refused) -> None:
    made = tmp_path / "made"
    objects = np.empty((20, 20), object)
    objects[:] = Bomb(made)
    refused(npy(objects, allow_pickle=True), "wrong_shape")
    refused(npz(a=objects), "wrong_shape")
    assert "pickle" in refused(pickle.dumps(Bomb(made)), "unsupported_format")
    assert not made.exists()


def test_a_window_of_a_large_file_touches_only_its_rows(tmp_path: Path) -> None:
    """The file is sparse, 40 GB on paper: reading it would never end."""
    file = tmp_path / "scene.npy"
    head = npy_header((100_000, 100_000))
    with file.open("wb") as handle:
        handle.write(head)
        handle.seek(len(head) + 4 * (100_000 * 99_990 + 5))
        handle.write(np.arange(100, dtype="<f4").tobytes())
        handle.truncate(len(head) + 4 * 100_000 * 100_000)
    with open_raster(file) as raster:
        np.testing.assert_array_equal(raster.read(Window(5, 99_990, 100, 1))[0, :, 0], np.arange(100))


@pytest.mark.parametrize("kind", ["C order", "Fortran order", "TIFF", "planar TIFF"])
@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("window", [Window(5, 7, 20, 13), Window(0, 7, 50, 13), Window(9, 0, 12, 40)], ids=str)
def test_windows_of_a_file_are_those_of_its_array(kind: str, bands: int, window: Window, tmp_path: Path) -> None:
    array = make(40, 50, bands)
    file = stored(array, kind, tmp_path)
    rows, columns = window.rows_and_columns
    with open_raster(file) as raster:
        np.testing.assert_array_equal(raster.read(window), array[rows, columns])
        np.testing.assert_array_equal(raster.read(), array)


@pytest.mark.parametrize("kind", ["C order", "Fortran order", "TIFF"])
@pytest.mark.parametrize("window", [None, Window(900, 900, 20, 20), Window(0, 900, 1000, 20)], ids=str)
def test_a_file_cut_short_while_it_is_open_is_named(kind: str, window: Window | None, tmp_path: Path) -> None:
    file = stored(make(1000, 1000, 1), kind, tmp_path)
    with open_raster(file, name="mine") as raster:
        os.truncate(file, 100_000)
        with pytest.raises(ImageError, match="mine: damaged or cut short"):
            raster.read(window)


def stored(array: NDArray[Any], kind: str, folder: Path) -> Path:
    file = folder / "a"
    if "order" in kind:
        np.save(folder / "a.npy", np.asfortranarray(array) if kind.startswith("Fortran") else array)
        return folder / "a.npy"
    planar = kind.startswith("planar") and array.shape[2] > 1
    tifffile.imwrite(
        file,
        np.moveaxis(array, 2, 0) if planar else array.squeeze(),
        photometric="minisblack",
        planarconfig="separate" if planar else "contig",
    )
    return file
