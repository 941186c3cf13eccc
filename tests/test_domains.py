"""The whole workflow for other than photographs: 16-bit and multispectral tiles, adapted, exported, served as TIFF."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from typer.testing import CliRunner

import jepakit
from jepakit.cli import app
from jepakit.errors import DataError, ImageError
from jepakit.images import preprocess
from jepakit_service.settings import ServeSettings
from tests.conftest import SHARED_DATA
from tests.service.conftest import running

MULTICHANNEL = SHARED_DATA / "multichannel"


def trainers_own(run: jepakit.Run, paths: list[Path]) -> NDArray[np.float32]:
    """What training's model says of these files, before any export."""
    import torch
    from safetensors.torch import load

    from jepakit.backbones.backbone import restore
    from jepakit.backbones.embedder import Embedder
    from jepakit.bundles.bundle import WEIGHTS

    manifest = run.bundle.manifest
    embedder = Embedder(
        restore(manifest.backbone, load(run.bundle.read(WEIGHTS))), manifest.preprocess, manifest.embedding
    )
    pixels = np.stack([preprocess(path, manifest.preprocess) for path in paths])
    with torch.inference_mode():
        vectors: NDArray[np.float32] = embedder.eval()(torch.from_numpy(pixels)).numpy()
    return vectors


def walk_the_road(images: Path, out: Path, weights: Path, **settings: Any) -> tuple[jepakit.Run, NDArray[np.float32]]:
    """Adapt, export, serve; the vectors of the first three files over HTTP and from the trainer must be equal."""
    run = jepakit.adapt(
        images, out=out / "run", backbone="test_vit", weights=str(weights), image_size=64, steps=2, batch_size=8,
        workers=0, **settings,
    )  # fmt: skip
    bundle = run.export(out / "bundles" / "domain")
    paths = sorted(images.rglob("*.tif"))[:3]
    with running(ServeSettings(bundles=(str(bundle.path),), port=1)) as url:
        answers = [
            httpx.post(
                f"{url}/v1/embeddings", content=path.read_bytes(), timeout=60,
                headers={"Content-Type": "image/tiff", "Accept": "application/octet-stream"},
            )
            for path in paths
        ]  # fmt: skip
        assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
        with jepakit.Client(url) as client:
            assert client.verify(bundle.path) < 1e-4
            np.testing.assert_array_equal(
                client.embed(paths, progress=False).vectors,
                np.stack([np.frombuffer(a.content, "<f4") for a in answers]),
            )
        wrong = httpx.post(f"{url}/v1/embeddings", content=eight_bit_tiff(), headers={"Content-Type": "image/tiff"})
        assert wrong.status_code == 422
        assert "the model was made for" in wrong.json()["error"]["message"]
    served = np.stack([np.frombuffer(answer.content, "<f4") for answer in answers])
    expected = trainers_own(run, paths)
    assert np.abs(served - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 * np.abs(expected).max(), "different tiles, different vectors"
    return run, served


def eight_bit_tiff() -> bytes:
    import io

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), photometric="rgb")
    return buffer.getvalue()


@pytest.mark.slow
def test_16_bit_grey_tiles(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    random = np.random.default_rng(0)
    for number in range(24):
        tile = 3000 + 800 * np.sin(np.arange(72)[:, None] / (3 + number % 5)) + random.normal(0, 60, (72, 72))
        path = tmp_path / "images" / f"{number:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, tile.astype(np.uint16))
    run, _ = walk_the_road(tmp_path / "images", tmp_path, weights_file("test_vit"), domain="microscopy")
    spec = run.bundle.manifest.preprocess
    assert (spec.bands, spec.dtype, spec.stored_as) == (1, "float32", "uint16")
    assert spec.scaling is not None
    assert 1500 < spec.scaling.low[0] < 1900
    assert 4100 < spec.scaling.high[0] < 4500
    assert run.bundle.manifest.backbone.arguments["in_chans"] == 1


@pytest.mark.slow
def test_six_band_tiles(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    random = np.random.default_rng(1)
    for number in range(24):
        wave = np.sin(np.arange(72)[None, :, None] / (2 + np.arange(6) + number % 3))
        tile = 120 + 60 * wave + random.normal(0, 10, (72, 72, 6))
        path = tmp_path / "images" / f"{number:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, tile.clip(0, 255).astype(np.uint8), planarconfig="contig", photometric="minisblack")
    run, _ = walk_the_road(tmp_path / "images", tmp_path, weights_file("test_vit"), domain="multispectral")
    spec = run.bundle.manifest.preprocess
    assert (spec.bands, spec.dtype, spec.scaling) == (6, "uint8", None)


def test_16_bit_tiles_cut_from_a_real_scene(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    if not MULTICHANNEL.is_dir():
        pytest.skip("shared data is not at hand")
    scene = tifffile.imread(MULTICHANNEL / "tiff16" / "examples_overlay_u16.tif")
    cut_tiles(scene, tmp_path / "images", 72)
    run, _ = walk_the_road(tmp_path / "images", tmp_path, weights_file("test_vit"), domain="radiology")
    assert run.bundle.manifest.preprocess.stored_as == "uint16"


@pytest.mark.slow
def test_multispectral_tiles_cut_from_a_real_scene(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    if not MULTICHANNEL.is_dir():
        pytest.skip("shared data is not at hand")
    scene = tifffile.imread(MULTICHANNEL / "multispectral" / "L7_ETMs.tif")
    cut_tiles(scene if scene.shape[-1] == 6 else np.moveaxis(scene, 0, -1), tmp_path / "images", 64)
    run, _ = walk_the_road(tmp_path / "images", tmp_path, weights_file("test_vit"), domain="multispectral")
    assert run.bundle.manifest.preprocess.bands == 6


def cut_tiles(scene: NDArray[np.uint16], folder: Path, side: int) -> None:
    folder.mkdir()
    for y in range(0, scene.shape[0] - side + 1, side):
        for x in range(0, scene.shape[1] - side + 1, side):
            tile = scene[y : y + side, x : x + side]
            if tile.max() > tile.min():
                planar: Any = {} if tile.ndim == 2 else {"planarconfig": "contig"}
                tifffile.imwrite(folder / f"{y:04d}_{x:04d}.tif", tile, photometric="minisblack", **planar)


def test_a_scene_is_adapted_on_and_embedded_by_tiles_and_refused_whole(
    tmp_path: Path, weights_file: Callable[[str], Path]
) -> None:
    random = np.random.default_rng(2)
    rows, columns = np.mgrid[:200, :290]
    (tmp_path / "scenes").mkdir()
    for number in range(2):
        scene = 900 + 300 * np.sin(rows / (5 + number)) * np.cos(columns / 9) + random.normal(0, 20, rows.shape)
        tifffile.imwrite(tmp_path / "scenes" / f"{number}.tif", scene.astype(np.float32), tile=(64, 64))
    run = jepakit.adapt(
        tmp_path / "scenes", out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")),
        image_size=64, tile=96, steps=1, batch_size=8, workers=0,
    )  # fmt: skip
    assert run.bundle.manifest.preprocess.tile == 96
    model = jepakit.load(run.export(tmp_path / "bundle").path)
    embedded = model.embed(tmp_path / "scenes", tile=96, progress=False)
    assert len(embedded) == 2 * 3 * 4
    assert embedded.ids[0].endswith("0.tif#0,0,96,96")
    with pytest.raises(ImageError, match=r"tile=96"):
        model.embed(tmp_path / "scenes", progress=False)

    settings = ServeSettings(bundles=(str(tmp_path / "bundle"),), port=1)
    with running(settings) as url, jepakit.Client(url) as client:
        remote = client.embed(tmp_path / "scenes", tile=96, progress=False)
        with pytest.raises(ImageError, match=r"tile=96"):
            client.embed(tmp_path / "scenes" / "0.tif", progress=False)
    assert remote.ids == embedded.ids
    np.testing.assert_allclose(remote.vectors, embedded.vectors, rtol=0, atol=1e-5 * np.abs(embedded.vectors).max())


def write_dicom(path: Path, pixels: NDArray[np.int16], patient: str) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientID = dataset.PatientName = patient
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
    dataset.PixelData = pixels.astype("<i2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_dicom_patients_are_held_out_whole_and_nothing_of_their_tags_is_kept(
    tmp_path: Path, weights_file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(3)
    for number in range(30):
        pixels = 500 + 200 * np.sin(np.arange(80)[:, None] / (2 + number % 6)) + random.normal(0, 20, (80, 80))
        path = tmp_path / "scans" / f"{number:02d}.dcm"
        path.parent.mkdir(exist_ok=True)
        write_dicom(path, pixels.astype(np.int16), f"SECRET-{number // 3}")
    run = jepakit.adapt(
        tmp_path / "scans", out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")),
        image_size=64, steps=2, batch_size=8, workers=0, domain="radiology", value_range="ct-soft-tissue",
    )  # fmt: skip
    assert "10 patients by DICOM PatientID" in capsys.readouterr().err
    spec = run.bundle.manifest.preprocess
    assert spec.scaling is not None
    assert (spec.stored_as, spec.scaling.low, spec.scaling.high) == ("float32", (-160,), (240,))
    bundle = run.export(tmp_path / "bundles" / "ct")
    # A hash would be found by trying all likely IDs.
    hashes = [hashlib.sha256(f"SECRET-{patient}".encode()).hexdigest()[:16].encode() for patient in range(10)]
    for file in [*run.path.rglob("*"), *bundle.path.rglob("*")]:
        held = file.read_bytes() if file.is_file() else b""
        assert not [secret for secret in (b"SECRET", *hashes) if secret in held], file
    with running(ServeSettings(bundles=(str(bundle.path),), port=1)) as url:
        body = (tmp_path / "scans" / "04.dcm").read_bytes()
        headers = {"Content-Type": "application/dicom", "Accept": "application/octet-stream"}
        answer = httpx.post(f"{url}/v1/embeddings", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    expected = trainers_own(run, [tmp_path / "scans" / "04.dcm"])[0]
    served = np.frombuffer(answer.content, "<f4")
    assert np.abs(served - expected).max() <= 1e-4 * np.abs(expected).max()


def test_long_images_that_a_run_has_squashed_are_served_so(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    random = np.random.default_rng(0)
    for number in range(20):
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", random.integers(0, 4000, (40, 120)).astype(np.uint16))
    run = jepakit.adapt(
        f"{tmp_path}/*.tif", out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")), resize="squash",
        image_size=64, steps=2, batch_size=8, workers=0,
    )  # fmt: skip
    assert run.bundle.manifest.preprocess.resize == "squash"
    model = jepakit.load(run.export(tmp_path / "bundle"), provider="cpu")
    changed = tmp_path / "changed.tif"
    pixels = tifffile.imread(tmp_path / "00.tif")
    pixels[:, :30] = pixels[:, :30][::-1]  # an end, which the middle would not show
    tifffile.imwrite(changed, pixels)
    files = [tmp_path / "00.tif", changed]
    expected, served = trainers_own(run, files), model.embed(files).vectors
    assert np.abs(served - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(served[0] - served[1]).max() > 1e-3 * np.abs(expected).max()


def test_images_of_two_kinds_are_refused_by_name_before_training(
    tmp_path: Path, weights_file: Callable[[str], Path]
) -> None:
    random = np.random.default_rng(0)
    for number in range(20):
        dtype = np.uint16 if number % 4 else np.float32
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", random.integers(0, 4000, (64, 64)).astype(dtype))
    with pytest.raises(DataError, match=r"several kinds: most hold uint16 .* 00\.tif holds float32"):
        jepakit.adapt(
            tmp_path, out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")), steps=1
        )


def test_inspect_reports_and_draws(tmp_path: Path) -> None:
    random, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        tifffile.imwrite(folder / f"{number:02d}.tif", random.integers(0, 4000, (80, 80)).astype(np.uint16))
    (folder / "broken.tif").write_bytes(b"II*\0rubbish")
    sheet = tmp_path / "out" / "sheet.png"
    done = CliRunner().invoke(app, ["inspect", str(folder), "--sheet", str(sheet)])
    assert done.exit_code == 0, done.stderr
    assert "uint16 pixels of 1 band" in done.stdout
    assert "broken.tif" in done.stdout
    assert sheet.read_bytes().startswith(b"\x89PNG")
