"""Images of other depths and bands: read as the model expects them, or refused with the value and the remedy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from jepakit.bundles.manifest import Preprocess, Scaling
from jepakit.errors import ImageError
from jepakit.images import fit, neutral, preprocess, read_image
from jepakit.readers import ImageRef, Window


def spec(bands: int = 1, stored_as: str = "uint16", low: float = 1000, high: float = 3000, **values: Any) -> Preprocess:
    """A model for 16-bit images of one band, unless told otherwise."""
    scaling = Scaling(low=(low,) * bands, high=(high,) * bands, measured=values.pop("measured", True))
    settings: dict[str, Any] = {
        "size": 32, "resize_to": 32, "resize": "shorter", "interpolation": "bicubic", "bands": bands,
        "dtype": "uint8" if stored_as == "uint8" else "float32", "stored_as": stored_as,
        "scaling": None if stored_as == "uint8" else scaling, "mean": (0.5,) * bands, "std": (0.25,) * bands, **values,
    }  # fmt: skip
    return Preprocess(**settings)


def values(height: int = 40, width: int = 50, bands: int = 1, dtype: str = "uint16") -> NDArray[Any]:
    return np.random.default_rng(0).integers(1000, 3000, (height, width, bands)).astype(dtype)


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", **options)
    return buffer.getvalue()


def refused(source: Any, model: Preprocess) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_image(source, model)
    return caught.value


def test_16_bit_values_arrive_untouched_as_float32() -> None:
    pixels = read_image(tiff(values()), spec())
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, values().astype(np.float32))


def test_six_bands_of_8_bits_stay_uint8() -> None:
    stored = np.random.default_rng(0).integers(0, 256, (20, 24, 6), np.uint8)
    pixels = read_image(tiff(stored, planarconfig="contig"), spec(6, "uint8"))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, stored)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_another_depth_than_the_models_is_refused(dtype: str) -> None:
    error = refused(tiff(np.random.default_rng(0).integers(0, 255, (40, 50)).astype(dtype)), spec())
    assert error.code == "unsupported_mode"
    assert "made for uint16 pixels of 1 band" in str(error)


def test_another_number_of_bands_is_refused() -> None:
    error = refused(tiff(values(bands=4), planarconfig="contig"), spec())
    assert "holds uint16 pixels of 4 bands" in str(error)


def test_float32_arrays_hand_over_values_of_any_depth() -> None:
    pixels = read_image(values().astype(np.float32), spec())
    np.testing.assert_array_equal(pixels, values().astype(np.float32))
    assert "made for" in str(refused(values(dtype="int16"), spec()))


def test_over_1_percent_outside_the_measured_range_is_refused_with_what_was_seen() -> None:
    stored = values(40, 50)
    stored[0, :19] = 60000
    assert read_image(tiff(stored), spec()).max() == 60000, "0.95 % may be clipped"
    stored[0, :21] = 60000
    error = refused(tiff(stored), spec())
    assert error.code == "saturated"
    assert "1.1%" in str(error)
    assert "1000 … 3000" in str(error)
    assert "most of it is exactly 60000: if that means no data, declare it" in str(error)
    assert "is it in the same units?" in str(refused(stored, spec())), "an array has no tag"
    stored[0, :21] = np.arange(50000, 50021)[:, None]
    assert "is it in the same units?" in str(refused(tiff(stored), spec()))


def test_a_window_that_the_user_chose_clips_by_intent() -> None:
    stored = values(40, 50)
    stored[:20] = 60000
    assert read_image(tiff(stored), spec(measured=False)).max() == 60000


def test_an_image_of_one_value_is_refused() -> None:
    error = refused(tiff(np.full((40, 50), 1234, np.uint16)), spec())
    assert error.code == "constant"
    assert "1234" in str(error)
    blank = io.BytesIO()
    Image.new("RGB", (40, 40), (7, 7, 7)).save(blank, "PNG")
    assert refused(blank.getvalue(), spec(3, "uint8")).code == "constant"


def test_one_other_pixel_is_enough_to_be_an_image() -> None:
    stored = np.full((40, 50, 3), 7, np.uint8)
    stored[39, 49, 2] = 8
    np.testing.assert_array_equal(read_image(stored, spec(3, "uint8")), stored)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(bad: float) -> None:
    stored = values(dtype="float32")
    stored[3, 4] = bad
    error = refused(tiff(stored), spec(stored_as="float32"))
    assert error.code == "not_finite"
    assert "1 of 2000" in str(error)


@pytest.mark.parametrize("nodata", [-9999.0, float("nan")])
def test_no_data_is_left_out_of_every_check_and_filled_with_the_mean(nodata: float) -> None:
    stored = values(dtype="float32")
    stored[:20, :25] = nodata
    tag = [(42113, "s", 0, str(nodata), True)]
    pixels = read_image(tiff(stored, extratags=tag), spec(stored_as="float32"))
    assert (pixels[:20, :25] == 2000).all(), "low + mean × (high - low): 0 once mean and std are applied"
    np.testing.assert_array_equal(pixels[20:], stored[20:])


def test_nothing_but_no_data_is_refused() -> None:
    stored = np.full((40, 50), -9999, np.float32)
    error = refused(tiff(stored, extratags=[(42113, "s", 0, "-9999", True)]), spec(stored_as="float32"))
    assert "no valid pixel" in str(error)


def test_several_frames_need_a_choice() -> None:
    stack = np.random.default_rng(0).integers(1000, 3000, (3, 40, 50)).astype(np.uint16)
    assert "3 frames" in str(refused(tiff(stack), spec()))
    np.testing.assert_array_equal(read_image(tiff(stack), spec(frame=1))[:, :, 0], stack[1])
    np.testing.assert_array_equal(read_image(ImageRef(tiff(stack), "stack", frame=2), spec())[:, :, 0], stack[2])
    assert "there is no frame 3" in str(refused(tiff(stack), spec(frame=3)))


def test_an_array_is_the_frame_already_that_a_model_of_films_was_made_for() -> None:
    film, model = values()[:, :, 0], spec(frame=2)
    opened = Image.open(io.BytesIO(tiff(film)))
    for held in (film, film.astype(np.float32), Image.fromarray(film), opened):
        np.testing.assert_array_equal(read_image(held, model)[:, :, 0], film)
    assert "has 1 frame, so there is no frame 2" in str(refused(tiff(film), model)), (
        "in a file the third one is missing"
    )
    asked = ImageRef(film, "film", frame=2)
    assert "there is no frame 2" in str(refused(asked, spec())), "a frame that is asked for is there, or refused"


def test_a_pillow_image_of_several_frames_gives_the_models_own() -> None:
    pages, buffer = [Image.fromarray(values()[:, :, 0] + place) for place in range(3)], io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    pixels = read_image(Image.open(buffer), spec(frame=2))
    np.testing.assert_array_equal(pixels[:, :, 0], values()[:, :, 0] + 2)


def test_a_model_of_tiles_refuses_a_scene_and_takes_tiles(tmp_path: Path) -> None:
    model = spec(tile=64)
    assert "tile=64" in str(refused(tiff(values(100, 128)), model))
    assert read_image(tiff(values(64, 64)), model).shape == (64, 64, 1)
    assert read_image(tiff(values(32, 32)), model).shape == (32, 32, 1), "downscaled already, as golden images are"
    part = ImageRef(tiff(values(100, 128)), "scene", Window(10, 20, 64, 64))
    np.testing.assert_array_equal(read_image(part, model)[:, :, 0], values(100, 128)[20:84, 10:74, 0])


def test_a_tile_of_a_scene_smaller_than_a_tile_is_filled_up() -> None:
    part = ImageRef(tiff(values(50, 64)), "scene", Window(0, 0, 64, 50))
    pixels = read_image(part, spec(tile=64))
    assert pixels.shape == (64, 64, 1)
    assert (pixels[50:] == 2000).all()


def test_float32_is_resized_band_by_band_without_rounding() -> None:
    stored = values(64, 64, bands=2, dtype="float32")
    resized = fit(stored, spec(2, "float32"))
    assert resized.shape == (32, 32, 2)
    assert resized.dtype == np.float32
    one = np.asarray(Image.fromarray(stored[:, :, 1]).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resized[:, :, 1], one)


def test_the_same_values_give_the_same_input_from_tiff_png_npy_and_array(tmp_path: Path) -> None:
    stored = values(40, 40)
    buffer = io.BytesIO()
    np.save(buffer, stored)
    png = io.BytesIO()
    Image.fromarray(stored[:, :, 0]).save(png, "PNG")
    expected = preprocess(stored, spec())
    for source in (tiff(stored), png.getvalue(), buffer.getvalue(), stored[:, :, 0]):
        np.testing.assert_array_equal(preprocess(source, spec()), expected)


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_bands_are_resized_by_the_specs_own_filter(name: str) -> None:
    stored = values(64, 64, bands=2, dtype="float32")
    one = np.asarray(Image.fromarray(stored[:, :, 1]).resize((32, 32), Image.Resampling[name.upper()]))
    np.testing.assert_array_equal(fit(stored, spec(2, "float32", interpolation=name))[:, :, 1], one)


@pytest.mark.parametrize("wrong", [10, 60000])
def test_one_band_of_many_in_other_units_is_refused_by_its_number(wrong: int) -> None:
    stored = values(40, 50, bands=4)
    stored[0, :21, 2] = wrong  # 1.05 % of band 3, 0.3 % of all
    assert "1.1% of band 3" in str(refused(tiff(stored, planarconfig="contig"), spec(4)))


def test_missing_8_bit_pixels_become_the_nearest_level_to_the_mean() -> None:
    assert neutral(spec(3, "uint8", mean=(0.485, 0.456, 0.406))).tolist() == [124, 116, 104]


@pytest.mark.parametrize("window", [Window(0, 0, 64, 20), Window(0, 0, 20, 64)])
def test_a_window_longer_than_a_tile_is_refused_however_narrow(window: Window) -> None:
    ref = ImageRef(values(80, 80), "strip", window=window)
    assert refused(ref, spec(tile=32)).code == "wrong_scale"
