"""The scan: the kind of the images, and the meaning of their values."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError, ImageError
from jepakit.images import preprocess, read_image
from jepakit.readers import Header, ImageRef
from jepakit.sources import list_images
from jepakit_training.data.doubts import doubts
from jepakit_training.data.scan import Kind, Scan, _seen, refuse_mixed, scan
from jepakit_training.data.values import (
    choose_preprocess,
    describe_values,
    fill_notes,
    look_at,
    outlier_notes,
    range_notes,
)
from jepakit_training.inspecting import inspect, near_duplicates, report

STOCK = Preprocess(
    size=32, resize_to=32, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)  # fmt: skip


def write(folder: Path, images: list[NDArray[Any]], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(images):
        tifffile.imwrite(folder / f"{number:03d}.tif", pixels, **{"photometric": "minisblack", **options})
    return folder


def noise(count: int, shape: tuple[int, ...], low: int, high: int, dtype: str, seed: int = 0) -> list[NDArray[Any]]:
    random = np.random.default_rng(seed)
    return [random.integers(low, high, shape).astype(dtype) for _ in range(count)]


def write_with_nodata(folder: Path, images: list[NDArray[Any]]) -> Path:
    return write(folder, images, planarconfig="contig", extratags=[(42113, "s", 2, "0", True)])


def write_dicom(path: Path, stored: NDArray[Any], bits: int, intercept: int, kind: str = "MONOCHROME2") -> None:
    """A CT image with `bits` of 16 stored, and its own soft-tissue window."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, "1.2.3"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, kind
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = 1, intercept
    data.WindowCenter, data.WindowWidth = 40, 400
    data.PixelData = stored.tobytes()
    data.save_as(path, enforce_file_format=True)


def without_data_in_band_4(folder: Path, dtype: str, count: int) -> Path:
    """Six images of four bands; in the first `count`, the last band is all no-data."""
    images = noise(6, (40, 40, 4), 1, 200, dtype)
    for image in images[:count]:
        image[:, :, 3] = 0
    return write_with_nodata(folder, images)


def look(folder: Path, **options: Any) -> Scan:
    return scan(list_images(folder, "none"), progress=False, **options)


def test_8_bit_rgb_keeps_the_start_weights_own_statistics(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a", noise(5, (40, 40, 3), 0, 256, "uint8"), photometric="rgb"))
    assert found.kind == Kind(3, "uint8")
    assert found.preprocess(STOCK) == STOCK


def test_16_bit_values_are_scaled_by_the_widest_percentiles_of_any_image_and_a_quarter_more(tmp_path: Path) -> None:
    images = noise(3, (64, 64), 500, 1500, "uint16") + noise(2, (64, 64), 2000, 4000, "uint16")
    images[0][0, 0] = 65535  # a hot pixel: 1 of 4096, less than 0.1 %
    found = look(write(tmp_path / "a", images))
    spec = found.preprocess(STOCK)
    assert (spec.bands, spec.dtype, spec.stored_as) == (1, "float32", "uint16")
    assert spec.scaling is not None
    assert spec.scaling.measured
    assert spec.scaling.low[0] == 0, "500 less a quarter of 3500, but nothing lies below an unsigned zero"
    assert spec.scaling.high[0] == pytest.approx(4000 + 0.25 * 3500, abs=40)
    low, high = spec.scaling.low[0], spec.scaling.high[0]
    scaled = np.concatenate([(image.ravel() - low) / (high - low) for image in images]).clip(0, 1)
    assert spec.mean[0] == pytest.approx(scaled.mean(), abs=0.01)
    assert spec.std[0] == pytest.approx(scaled.std(), abs=0.01)


def test_the_numbers_speak_of_the_whole_image_not_of_a_few_columns(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(700, 800, (512, 512)).astype(np.float32)
    image[:, :64] = 0  # a dark border; 512 × 512 pixels thinned evenly would be a few columns
    spec = look(write(tmp_path / "a", [image] * 3)).preprocess(STOCK)
    assert spec.scaling is not None
    low, high = spec.scaling.low[0], spec.scaling.high[0]
    assert spec.mean[0] == pytest.approx((image.mean() - low) / (high - low), abs=0.02)


def test_one_file_in_other_units_does_not_set_the_range_and_is_named(tmp_path: Path) -> None:
    images = noise(20, (40, 40), 100, 3000, "uint16") + noise(1, (40, 40), 100, 65000, "uint16")
    folder = write(tmp_path / "a", images)
    found = look(folder)
    spec = found.preprocess(STOCK)
    assert spec.scaling is not None
    assert spec.scaling.high[0] < 3800
    assert found.outliers() == (20,)
    assert "020.tif" in outlier_notes(found, list_images(folder, "none").ids, spec.scaling)[0]
    with pytest.raises(ImageError, match=r"outside 0 …"):
        read_image(folder / "020.tif", spec)


def test_images_that_were_not_sampled_have_room(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def image(seed: int) -> NDArray[np.float32]:
        levels = 1000 * np.exp(0.3 * np.random.default_rng(seed).standard_normal(13))
        return (levels * random.uniform(0.5, 1.5, (32, 32, 13))).astype(np.float32)

    spec = look(write(tmp_path / "a", [image(seed) for seed in range(120)], planarconfig="contig")).preprocess(STOCK)
    refused = 0
    for seed in range(1000, 1200):
        try:
            read_image(image(seed), spec)
        except ImageError:
            refused += 1
    assert refused <= 4


def test_every_sampled_image_can_be_read_with_what_was_measured(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(6, (50, 50, 4), 0, 10000, "int16"), planarconfig="contig")
    spec = look(folder).preprocess(STOCK)
    for path in folder.iterdir():
        assert read_image(path, spec).shape == (50, 50, 4)


def test_each_band_has_numbers_of_its_own(tmp_path: Path) -> None:
    images = [np.stack([image, 10 * image], axis=2) for image in noise(4, (40, 40), 10, 100, "uint16")]
    spec = look(write(tmp_path / "a", images, planarconfig="contig")).preprocess(STOCK)
    assert spec.scaling is not None
    assert spec.scaling.high[1] == pytest.approx(10 * spec.scaling.high[0], rel=0.05)


def test_8_bit_multispectral_has_measured_statistics_and_no_scaling(tmp_path: Path) -> None:
    spec = look(write(tmp_path / "a", noise(4, (40, 40, 6), 50, 150, "uint8"), planarconfig="contig")).preprocess(STOCK)
    assert (spec.bands, spec.dtype, spec.scaling) == (6, "uint8", None)
    assert spec.mean == pytest.approx([99.5 / 255] * 6, abs=0.01)


def test_a_chosen_window_is_used_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(4, (40, 40), -1000, 1000, "int16"))
    scaling = look(folder).scaling((-160, 240))
    assert scaling is not None
    assert (scaling.low, scaling.high, scaling.measured) == ((-160,), (240,), False)
    named = look(folder).scaling("ct-lung")
    assert named is not None
    assert (named.low, named.high) == ((-1350,), (150,))


def test_a_window_for_8_bit_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="value_range"):
        look(write(tmp_path / "a", noise(3, (40, 40), 0, 255, "uint8"))).scaling((0, 100))


def test_a_window_in_which_nothing_would_be_seen_is_refused(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a", noise(4, (40, 40), 500, 3500, "uint16")))
    with pytest.raises(ConfigError, match=r"100\.0% of the values lie outside"):
        found.scaling((10, 20))
    assert "of the values lie outside" in range_notes(found, found.scaling((1000, 2000)))[0]
    with pytest.raises(ConfigError, match="not DICOM"):
        found.scaling("file")


def test_the_files_own_windows_give_one_range_and_other_units_are_refused(tmp_path: Path) -> None:
    random, folder = np.random.default_rng(0), tmp_path / "a"
    folder.mkdir()
    for number in range(6):
        hounsfield = random.integers(-1000, 1000, (40, 40))
        if number % 2:
            write_dicom(folder / f"{number}.dcm", (hounsfield + 1024).astype(np.uint16), 12, -1024)
        else:
            write_dicom(folder / f"{number}.dcm", hounsfield.astype(np.int16), 16, 0)
    spec = look(folder, value_range="file").preprocess(STOCK, value_range="file")
    assert spec.voi
    assert spec.scaling is not None
    assert (spec.scaling.low, spec.scaling.high) == ((0,), (1,))
    assert spec.mean[0] == pytest.approx(0.5, abs=0.05)
    assert spec.std[0] > 0.4, "four of five values lie outside the window: they are black or white in every file"
    for path in folder.iterdir():
        pixels = read_image(path, spec)
        assert (pixels.min(), pixels.max()) == (0, 1)
    with pytest.raises(ImageError, match="lies outside 0 … 1"):
        read_image(hounsfield.astype(np.float32), spec)


def test_no_data_stays_out_of_the_numbers(tmp_path: Path) -> None:
    images = noise(4, (40, 40), 100, 200, "float32")
    for image in images:
        image[:10] = -9999
    folder = write(tmp_path / "a", images, extratags=[(42113, "s", 0, "-9999", True)])
    scaling = look(folder).scaling("auto")
    assert scaling is not None
    assert scaling.low[0] >= 100 - 0.25 * 100


def test_a_band_that_is_the_same_everywhere_is_named(tmp_path: Path) -> None:
    images = [np.stack([image, np.full_like(image, 7)], axis=2) for image in noise(4, (40, 40), 10, 100, "uint16")]
    with pytest.raises(DataError, match="band 2 is 7 in every sampled image"):
        look(write(tmp_path / "a", images, planarconfig="contig")).scaling("auto")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "value_range"), [("uint8", "auto"), ("uint16", "auto"), ("uint16", (0.0, 300.0))])
def test_a_band_without_any_data_is_named_with_what_to_do(tmp_path: Path, dtype: str, value_range: Any) -> None:
    found = look(without_data_in_band_4(tmp_path / "a", dtype, 6))
    with pytest.raises(DataError, match="band 4 holds no data in any sampled image: write the files without it"):
        found.preprocess(STOCK, value_range=value_range)


def test_what_lies_outside_a_window_is_told_where_an_image_lacks_a_band(tmp_path: Path) -> None:
    found = look(without_data_in_band_4(tmp_path / "a", "uint16", 1))
    assert found.outside(5000, 6000) == 1
    with pytest.raises(ConfigError, match=r"100.0% of the values lie outside it \(they are 1 … 199\)"):
        found.scaling((5000.0, 6000.0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_report_with_an_image_that_lacks_a_band_is_json_and_tells_faint_images(tmp_path: Path, dtype: str) -> None:
    folder = without_data_in_band_4(tmp_path / "a", dtype, 1)
    faint = noise(1, (40, 40, 4), 100, 102, dtype)[0]
    faint[:, :, 3] = 0
    write_with_nodata(folder / "b", [faint])
    listed = list_images(folder, "none")
    seen = report(listed, scan(listed, progress=False), AdaptConfig(images="images", image_size=32), STOCK)
    assert len(seen.low) == len(seen.high) == 4
    json.dumps(seen.model_dump(mode="json"), allow_nan=False)
    if dtype == "uint16":
        assert any(
            "less than 2% of the value range is used by 1 image, e.g. b/000.tif" in words for words in seen.advice
        )


def test_mixed_kinds_are_refused_with_the_first_odd_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(9, (40, 40), 0, 1000, "uint16"))
    tifffile.imwrite(folder / "zzz.tif", noise(1, (40, 40), 0, 1000, "float32")[0])
    images = list_images(folder, "none")
    found = scan(images, progress=False)
    assert found.kind == Kind(1, "uint16")
    with pytest.raises(DataError, match=r"zzz\.tif holds float32"):
        refuse_mixed(found, images.ids, 0.01)
    refuse_mixed(found, images.ids, 0.1)


def test_unreadable_images_are_told_and_nothing_readable_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(3, (40, 40), 0, 1000, "uint16"))
    (folder / "bad.tif").write_bytes(b"II*\0rubbish")
    found = look(folder)
    assert [reason for _, reason in found.unreadable if "bad.tif" in reason]
    for path in folder.glob("0*.tif"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of 1 sampled images can be read.*bad\.tif"):
        look(folder)


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    smooth = [
        np.asarray(Image.fromarray(random.uniform(40, 200, (9, 9)).astype(np.float32)).resize((80, 80)))
        for _ in range(6)
    ]
    images = [
        (image + random.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8) for image in [*smooth, smooth[2]]
    ]
    found = look(write(tmp_path / "a", images))
    assert near_duplicates(found) == [(2, 6)]


def test_the_report_says_what_a_person_would_ask(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(5, (1000, 1200), 0, 4000, "uint16"))
    images = list_images(folder, "none")
    seen = report(images, scan(images, progress=False), AdaptConfig(images="images"), STOCK)
    text = str(seen)
    assert "uint16 pixels of 1 band" in text
    assert "1200 × 1000" in text
    assert "tile=448" in text
    assert seen.domain == "microscopy"
    assert type(seen).model_validate_json(seen.model_dump_json()) == seen


def test_a_report_holds_names_that_are_not_utf_8_as_json_can(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xfe.tif")
    folder = write(tmp_path / os.fsdecode(b"a\xfe"), noise(3, (40, 40), 0, 4000, "uint16"))
    (folder / name).write_bytes(b"rubbish")
    listed = list_images(folder, "none")
    seen = report(listed, scan(listed, progress=False), AdaptConfig(images="images", image_size=32), STOCK)
    (unreadable,) = json.loads(seen.model_dump_json())["unreadable"]
    assert unreadable["id"] == r"bad\udcfe.tif"
    assert r"bad\udcfe.tif" in str(seen)


def test_bands_without_data_stay_out_and_no_warning_filter_is_left_changed(tmp_path: Path) -> None:
    """Several threads measure at once, and the filters belong to the process."""
    images = noise(40, (300, 300, 2), 1, 1000, "uint16")
    for image in images[::2]:
        image[:, :, 1] = 0
    folder = write_with_nodata(tmp_path / "a", images)
    before = warnings.filters
    kept = list(before)
    found = look(folder)
    assert warnings.filters is before
    assert list(warnings.filters) == kept
    assert [bool(np.isnan(one.low[1])) for one in found.seen] == [True, False] * 20
    assert not any(np.isnan(one.high[0]) for one in found.seen)


def test_three_bands_of_16_bits_have_statistics_of_their_own(tmp_path: Path) -> None:
    spec = look(write(tmp_path / "a", noise(4, (40, 40, 3), 100, 3000, "uint16"), photometric="rgb")).preprocess(STOCK)
    assert spec.mean != STOCK.mean
    assert spec.mean[0] == pytest.approx(0.5, abs=0.1)


def test_signed_values_have_room_below_zero(tmp_path: Path) -> None:
    scaling = look(write(tmp_path / "a", noise(4, (40, 40), -1000, 1000, "int16"))).scaling("auto")
    assert scaling is not None
    assert scaling.low[0] == pytest.approx(-1500, abs=20)


def test_one_file_far_below_the_others_does_not_set_the_range(tmp_path: Path) -> None:
    stored = noise(20, (40, 40), 100, 3000, "float32") + noise(1, (40, 40), -65000, 3000, "float32")
    found = look(write(tmp_path / "a", stored))
    scaling = found.scaling("auto")
    assert scaling is not None
    assert found.outliers() == (20,)
    assert scaling.low[0] > -1000


def test_8_bit_rgb_keeps_its_frame_and_tile(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a", noise(5, (40, 40, 3), 0, 256, "uint8"), photometric="rgb"))
    spec = found.preprocess(STOCK, frame=1, tile=32)
    assert (spec.frame, spec.tile) == (1, 32)


def test_of_tiles_the_whole_is_seen(tmp_path: Path) -> None:
    """The middle alone, as most weights want it of photographs, would leave seams that no vector knows of."""
    cropping = STOCK.model_copy(update={"resize_to": 37})
    for dtype, options in (("uint8", {"photometric": "rgb"}), ("uint16", {})):
        shape = (64, 64, 3) if dtype == "uint8" else (64, 64)
        found = look(write(tmp_path / dtype, noise(3, shape, 0, 250, dtype), **options))
        assert found.preprocess(cropping).resize_to == 37
        spec = found.preprocess(cropping, tile=64)
        assert spec.resize_to == spec.size
        scene = np.full(shape, 100, dtype)
        scratched = scene.copy()
        scratched[:, :2] = scratched[0, 0] = 240
        scene[32] = scratched[32] = 9
        seen = [preprocess(ImageRef(each, "scene"), spec) for each in (scene, scratched)]
        assert (seen[0] != seen[1]).any()


# Grey whose lowest value is white


def test_monochrome1_is_turned_round_within_the_range_not_its_stored_bits(tmp_path: Path) -> None:
    """Air of -1000 as 3047, as the stored bits would have it, is white in any window of real units, and so is all else."""
    random = np.random.default_rng(0)
    stored = [random.integers(700, 1500, (40, 40)).astype(np.uint16) for _ in range(4)]
    for number, each in enumerate(stored):
        write_dicom(tmp_path / f"{number}.dcm", each, 12, -1024, "MONOCHROME2" if number < 2 else "MONOCHROME1")
    found = look(tmp_path)
    for value_range in ("auto", "ct-soft-tissue", "file"):
        spec = look(tmp_path, value_range=value_range).preprocess(STOCK, value_range=value_range)
        assert spec.scaling is not None
        write_dicom(tmp_path / "other.dcm", stored[0], 12, -1024, "MONOCHROME1")
        plain, turned = (spec.scaling.to_unit(read_image(tmp_path / name, spec)) for name in ("0.dcm", "other.dcm"))
        (tmp_path / "other.dcm").unlink()
        np.testing.assert_allclose(turned, 1 - plain, atol=1e-6)
        assert plain.std() > 0.1
    assert found.outliers() == ()
    low, high = found.scaling("auto").low[0], found.scaling("auto").high[0]  # type: ignore[union-attr]
    assert -700 < low < -300
    assert 450 < high < 900
    falling = tmp_path / "falling"
    falling.mkdir()
    for number in range(3):
        write_dicom(falling / f"{number}.dcm", (stored[number] // 4 + 700).astype(np.uint16), 12, -1024, "MONOCHROME1")
    mean = look(falling).preprocess(STOCK, value_range=(-400, 400)).mean[0]
    values = np.stack([(each // 4 + 700) - 1024.0 for each in stored[:3]])
    assert mean == pytest.approx(1 - ((values + 400) / 800).clip(0, 1).mean(), abs=0.02)


def test_one_picture_stored_with_white_high_and_with_white_low_is_a_near_duplicate(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 4000, (3, 10, 10)).repeat(8, axis=1).repeat(8, axis=2)
    for number, stored in enumerate([*blocks, 4095 - blocks[1]]):
        kind = "MONOCHROME1" if number == 3 else "MONOCHROME2"
        write_dicom(tmp_path / f"{number}.dcm", stored.astype(np.uint16), 12, 0, kind)
    assert near_duplicates(look(tmp_path)) == [(1, 3)]


def test_an_image_of_which_a_chosen_range_leaves_nothing_is_refused(tmp_path: Path) -> None:
    images = noise(5, (40, 40), 100, 3000, "uint16")
    spec = look(write(tmp_path / "a", images)).preprocess(STOCK, value_range=(500, 1500))
    read_image(images[0], spec)
    half = np.where(np.arange(1600).reshape(40, 40) % 2 == 0, 100, 3000).astype(np.uint16)
    read_image(half, spec)  # black and white
    for low, high in ((1500, 3000), (100, 500)):
        with pytest.raises(ImageError, match=r"every value lies outside 500 … 1500, .* it shows nothing") as caught:
            read_image(noise(1, (40, 40), low, high + 1, "uint16")[0], spec)
        assert caught.value.code == "saturated"


def test_float_values_that_no_file_of_integers_could_hold_are_refused(tmp_path: Path) -> None:
    images = noise(5, (40, 40, 4), 100, 3000, "uint16")
    spec = look(write(tmp_path / "a", images, planarconfig="contig")).preprocess(STOCK)
    np.testing.assert_array_equal(read_image(images[0].astype(np.float32), spec), read_image(images[0], spec))
    with pytest.raises(ImageError, match=r"all round to one whole number, but the model was made for uint16"):
        read_image((images[0] / 10_000).astype(np.float32), spec)


def test_inspect_says_the_range_that_training_would_measure_and_who_is_beyond_it(tmp_path: Path) -> None:
    looked_at = set(np.linspace(0, 399, 256).astype(int).tolist())
    stored = [
        image if number in looked_at else image * 3
        for number, image in enumerate(noise(400, (16, 16), 100, 1000, "uint16"))
    ]
    images = list_images(write(tmp_path / "a", stored), "none")
    seen = inspect(AdaptConfig(images="x"), images, None)
    assert seen.n_looked_at == 400
    assert seen.scaling == scan(images, progress=False).scaling("auto")
    (told,) = [line for line in seen.advice if "outside the range" in line]
    assert told.startswith("144 images, e.g. ")
    assert "measure on a sample of 256, and may be refused: set the range with value_range=LOW:HIGH" in told


# Values that stand for no data, and are not declared


@pytest.mark.parametrize(
    ("dtype", "low", "fill", "named"),
    [("int16", 200, -9999, True), ("uint16", 200, 65535, True), ("float32", 0, -9999, True), ("uint16", 0, 0, False)],
)
def test_a_collar_that_is_not_declared_is_told_before_it_widens_the_range(
    tmp_path: Path, dtype: str, low: int, fill: int, named: bool
) -> None:
    images = noise(5, (40, 40), low, 3000, dtype)
    for image in images[:2]:
        image[:, :4] = fill
    told = fill_notes(look(write(tmp_path / "a", images)))
    assert [f"4% of band 1 is exactly {fill}, and all else" in note for note in told] == [True] * named
    assert fill_notes(look(write(tmp_path / "b", noise(5, (40, 40), low, 3000, dtype)))) == []


def test_near_duplicates_of_two_classes_groups_or_sides_of_the_split_are_told(tmp_path: Path) -> None:
    a, b, c = noise(3, (64, 64, 3), 0, 255, "uint8")
    for name, pixels in {"a": a, "a2": a, "b": b, "b2": b, "c": c, "c2": c}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = ["path,label,group,split", "a.png,x,1,train", "a2.png,x,1,test", "b.png,x,1,train", "b2.png,y,2,train",
            "c.png,x,1,train", "c2.png,,2,train"]  # fmt: skip
    (tmp_path / "m.csv").write_text("\n".join(rows))
    told = [
        "1 of 3 pairs of near-duplicates, e.g. b.png ~ b2.png, have different labels",
        "2 of 3 pairs of near-duplicates, e.g. b.png ~ b2.png, are in different groups",
        "1 of 3 pairs of near-duplicates, e.g. a.png ~ a2.png, lie on both sides of the split",
    ]
    seen = report(list_images(tmp_path / "m.csv"), look(tmp_path), AdaptConfig(images="images", image_size=32), STOCK)
    assert [words.partition(":")[0] for words in seen.advice if "near-dup" in words] == told


@pytest.mark.parametrize(
    ("mode", "soft", "told"), [("RGBA", 30, True), ("LA", 30, True), ("RGBA", 4, True), ("RGBA", 1, False)], ids=str
)
@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_band_that_may_not_be_transparency_is_told(
    tmp_path: Path, mode: str, soft: int, told: bool, format: str
) -> None:
    images = noise(3, (40, 40, 4), 0, 255, "uint8")
    for number, pixels in enumerate(images):
        pixels[:, :, 3] = 255
        pixels[:soft, :, 3] = 100 if number else 255
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{number}.{format}", lossless=True)
    doubted = doubts(list_images(tmp_path), look(tmp_path))
    assert len(doubted) == told
    assert all(line.startswith(f"of 2 images of 3 looked at, e.g. 1.{format}, over 5% is half") for line in doubted)


def test_dicom_images_of_several_kinds_are_counted(tmp_path: Path) -> None:
    for number, (modality, types) in enumerate(
        [("CT", "AXIAL"), ("CT", "AXIAL"), ("CT", "LOCALIZER"), ("DOE", "JANE")]
    ):
        write_dicom(tmp_path / f"{number}.dcm", np.arange(400, dtype=np.int16).reshape(20, 20), 12, -100)
        data = dcmread(tmp_path / f"{number}.dcm")
        data.Modality, data.ImageType = modality, ["ORIGINAL", "PRIMARY", types]
        data.save_as(tmp_path / f"{number}.dcm")
    told = "the DICOM images are of several kinds (2 CT, 1 CT localizer, 1 unknown modality; 3.dcm is unknown modality): leave out"
    images = list_images(tmp_path)
    assert doubts(images, look(tmp_path))[0].startswith(told)
    for number in (2, 3):
        (tmp_path / f"{number}.dcm").unlink()
    assert doubts(list_images(tmp_path), look(tmp_path)) == []


def test_images_of_one_group_are_told_before_training(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", noise(5, (40, 40), 0, 3000, "uint16"))
    listed = list_images(folder, "none", group="folder")
    seen = report(listed, scan(listed, progress=False), AdaptConfig(images="images", image_size=32), STOCK)
    assert any("all images are one group" in words for words in seen.advice)


@pytest.mark.parametrize(("value_range", "origin"), [("auto", "measured"), ((0.0, 65535.0), "as requested")])
def test_values_are_those_of_the_chosen_frame_and_it_is_told_who_chose_their_range(
    tmp_path: Path, value_range: Any, origin: str
) -> None:
    for number, low in enumerate(noise(4, (40, 50), 0, 1000, "uint16")):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.stack([low, low + 50_000]), photometric="minisblack")
    config = AdaptConfig(images=str(tmp_path), frame=1, value_range=value_range)
    images = list_images(tmp_path, "none")
    found = look_at(images, config, progress=False)
    spec = choose_preprocess(found, config, STOCK)
    assert spec.frame == 1
    assert spec.scaling is not None
    assert spec.scaling.high[0] > 50_000
    assert f"become 0 … 1 ({origin})" in " ".join(describe_values(found, spec, images.ids))


@pytest.mark.parametrize(
    ("resize", "rule", "resize_to"), [("auto", "shorter", 32), ("shorter", "shorter", 32), ("squash", "squash", 28)]
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_images_become_square_as_the_user_says(
    tmp_path: Path, dtype: str, resize: Any, rule: str, resize_to: int
) -> None:
    images = list_images(write(tmp_path / "a", noise(3, (40, 90), 0, 250, dtype)), "none")
    config = AdaptConfig(images="images", resize=resize)
    stock = STOCK.model_copy(update={"size": 28, "resize_to": 32})
    spec = choose_preprocess(look_at(images, config, progress=False), config, stock)
    assert (spec.resize, spec.size, spec.resize_to) == (rule, 28, resize_to)


# Large images


@pytest.mark.parametrize("nodata", [False, True])
def test_an_image_is_measured_in_little_more_memory_than_it_takes(nodata: bool) -> None:
    stored = noise(1, (2200, 2200, 2), 0, 4000, "uint16")[0]
    header = Header("TIFF", 2200, 2200, 2, "uint16", nodata=0 if nodata else None)
    tracemalloc.start()
    _seen(stored, 0, header, "a.tif")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (4 if nodata else 2) * stored.nbytes


def test_only_so_much_is_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, two, met = write(tmp_path / "a", noise(4, (40, 40), 0, 4000, "uint16")), threading.Barrier(2), []
    most_s = 0.1

    def met_by_another(*of: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            met.append(two.wait(most_s))
        return _seen(*of)

    monkeypatch.setattr("jepakit_training.data.scan._seen", met_by_another)
    monkeypatch.setattr("jepakit.readers.room.AT_ONCE_BYTES", 2 * 40 * 40 * 2 - 1)
    look(folder)
    assert not met
    two.reset()
    most_s = 10
    monkeypatch.setattr("jepakit.readers.room.AT_ONCE_BYTES", 2 * 40 * 40 * 2)
    look(folder)
    assert len(met) >= 2


def test_a_large_image_is_a_near_duplicate_of_its_smaller_copy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    small = [random.integers(0, 4000, (12, 16)).repeat(60, axis=0).repeat(60, axis=1) for _ in range(3)]
    large = small[1].repeat(4, axis=0).repeat(4, axis=1)
    noisy = [image + random.integers(0, 400, image.shape) for image in (*small, large)]
    assert near_duplicates(look(write(tmp_path / "a", [image.astype(np.uint16) for image in noisy]))) == [(1, 3)]
