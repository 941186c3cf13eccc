"""The clients against a real service, and against answers that no correct service gives."""

from __future__ import annotations

import asyncio
import csv
import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

import jepakit
from jepakit import Embeddings
from jepakit.bundles.manifest import Manifest
from jepakit.cli import app
from jepakit.client import ModelInfo
from jepakit.client.job import Job, RequestLimits
from jepakit.client.models import spec_of
from jepakit.embedding.results import Results
from jepakit.errors import (
    AuthenticationError,
    BundleError,
    ClientError,
    ConfigError,
    ConnectionFailedError,
    ImageError,
    ModelChangedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ResponseError,
)
from jepakit.inference.session import Model, Session
from jepakit.sources import gather
from jepakit_service.settings import ServeSettings
from tests.files import encoded

from .conftest import asked, embedding_everywhere, picture, promising_others, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for place in range(70):
        path = root / ("cats" if place % 2 else "dogs") / f"{place:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(place))
    return root


def test_a_folder_gives_vectors_in_order_with_labels_like_the_bundle_in_process(
    service: str, bundle: Path, folder: Path
) -> None:
    with jepakit.Client(service) as client:
        remote = client.embed(folder, progress=False)
    local = jepakit.load(bundle).embed(folder, progress=False)
    assert remote.ids == local.ids
    assert remote.labels == local.labels
    assert remote.model_id == local.model_id
    assert set(remote.labels or ()) == {"cats", "dogs"}
    np.testing.assert_allclose(remote.vectors, local.vectors, rtol=0, atol=1e-5 * np.abs(local.vectors).max())


def test_the_async_client_gives_the_same(service: str, folder: Path) -> None:
    async def embed() -> jepakit.Embeddings:
        async with jepakit.AsyncClient(service) as client:
            assert (await client.models())[0].name == "tiny"
            return await client.embed(folder, progress=False)

    with jepakit.Client(service) as client:
        np.testing.assert_allclose(
            asyncio.run(embed()).vectors, client.embed(folder, progress=False).vectors, rtol=1e-4, atol=1e-5
        )


def test_every_kind_of_image_gives_the_same_vector(service: str, tmp_path: Path) -> None:
    data = picture(5)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
        kinds = [path, str(path), data, bytearray(data), opened.copy(), pixels, pixels[None]]
    with jepakit.Client(service) as client:
        vectors = [client.embed(kind, progress=False).vectors[0] for kind in kinds]
        mixed = client.embed([data, pixels, path], progress=False)
    for vector in [*vectors, *mixed.vectors]:
        np.testing.assert_allclose(vector, vectors[0], rtol=0, atol=1e-5 * np.abs(vectors[0]).max())


def in_memory(kind: str) -> Any:
    """Images whose pixels are not simply what the object holds."""
    pixels = np.random.default_rng(7).integers(0, 256, (40, 48, 3), np.uint8)
    image = Image.fromarray(pixels)
    if kind == "grey array":
        return pixels[:, :, 0]
    if kind == "Fortran's order":
        return np.asfortranarray(pixels)
    if kind != "turned":
        return image.convert(kind)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)


@pytest.mark.parametrize(
    "kind", ["turned", "CMYK", "YCbCr", "P", "L", "1", "RGBA", "LA", "grey array", "Fortran's order"]
)
def test_an_image_in_memory_gives_the_same_vector_here_and_there(service: str, bundle: Path, kind: str) -> None:
    image = in_memory(kind)
    local = jepakit.load(bundle).embed(image, progress=False).vectors
    with jepakit.Client(service) as client:
        for given in (image, [image, image]):
            for vector in client.embed(given, progress=False).vectors:
                np.testing.assert_allclose(vector, local[0], rtol=0, atol=1e-5 * np.abs(local).max())


def test_a_turned_pillow_image_is_embedded_upright(service: str) -> None:
    turned = in_memory("turned")
    upright = np.rot90(np.asarray(turned), -1)
    with jepakit.Client(service) as client:
        vectors = client.embed([turned, upright], progress=False).vectors
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=1e-5 * np.abs(vectors).max())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_service_takes_one_grey_array_of_two_axes(service: str, bundle: Path, wrapped: bool) -> None:
    grey, buffer = in_memory("grey array"), io.BytesIO()
    np.save(buffer, grey[:, :, None] if wrapped else grey)
    headers = {"Content-Type": "application/x-npy", "Accept": "application/octet-stream"}
    answer = httpx.post(f"{service}/v1/embeddings", content=buffer.getvalue(), headers=headers, timeout=60)
    local = jepakit.load(bundle).embed(grey, progress=False).vectors
    assert answer.headers["x-embedding-shape"] == f"1,{local.shape[1]}"
    vectors = np.frombuffer(answer.content, "<f4").reshape(1, -1)
    np.testing.assert_allclose(vectors, local, rtol=0, atol=1e-5 * np.abs(local).max())


def test_several_frames_in_memory_are_refused_here_and_there_and_one_may_be_chosen(service: str, bundle: Path) -> None:
    pages = [Image.open(io.BytesIO(picture(seed))) for seed in range(3)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    film, model = Image.open(buffer), jepakit.load(bundle)
    with jepakit.Client(service) as client:
        for embed in (client.embed, model.embed):
            with pytest.raises(ImageError, match=r"^0: 3 frames: choose one"):
                embed(film, progress=False)
            one = embed(film, frame=2, progress=False)
            np.testing.assert_allclose(one.vectors, embed(pages[2], progress=False).vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_one_frame_of_films_takes_films_arrays_and_its_golden_inputs(
    tmp_path: Path, weights_file: Callable[[str], Path]
) -> None:
    random = np.random.default_rng(0)
    for place in range(24):
        (tmp_path / "films").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "films" / f"{place:02}.tif", random.integers(0, 256, (2, 40, 40, 3), np.uint8))
    run = jepakit.adapt(
        tmp_path / "films", out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")), frame=1,
        image_size=32, steps=1, batch_size=8, workers=0,
    )  # fmt: skip
    bundle = run.export(tmp_path / "bundle").path
    first = tifffile.imread(tmp_path / "films" / "00.tif")[1]
    local = jepakit.load(bundle)
    expected = local.embed(tmp_path / "films" / "00.tif", progress=False).vectors
    close = partial(np.testing.assert_allclose, desired=expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    close(local.embed(first, progress=False).vectors)
    with running(ServeSettings(bundles=(str(bundle),), port=1)) as url, jepakit.Client(url) as client:
        assert client.verify(bundle) < 1e-4
        close(client.embed(first, progress=False).vectors)
        close(client.embed(tmp_path / "films" / "00.tif", frame=1, progress=False).vectors)
        close(client.embed(tmp_path / "films" / "00.tif", progress=False).vectors)
        with pytest.raises(ImageError, match="has 1 frame, so there is no frame 1"):
            client.embed(picture(0), progress=False)


def test_vectors_that_a_bundle_does_not_promise_are_noticed(service: str, bundle: Path, tmp_path: Path) -> None:
    other = promising_others(bundle, tmp_path / "other")

    async def verify(path: Path) -> float:
        async with jepakit.AsyncClient(service) as client:
            return await client.verify(path)

    with jepakit.Client(service) as client:
        assert max(client.verify(bundle), asyncio.run(verify(bundle))) < 1e-5
        told = "the service computes other vectors than the bundle promises"
        with pytest.raises(BundleError, match=told):
            client.verify(other)
        with pytest.raises(BundleError, match=told):
            asyncio.run(verify(other))


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
@pytest.mark.parametrize("model", ["", "tiny@", 5])
def test_what_names_no_model_or_pins_none_is_refused(kind: type[Any], service: str, bundle: Path, model: Any) -> None:
    for call in (
        lambda client: client.embed(picture(0), model=model, progress=False),
        lambda client: client.verify(bundle, model=model),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"model = {model!r}: give NAME or NAME@MODEL_ID")):
            asked(kind, service, call)
    if model != "tiny@":
        with pytest.raises(ConfigError, match="give a model's name"):
            asked(kind, service, lambda client: client.model(model))


def test_a_pin_without_a_model_id_is_refused_by_the_service_too(service: str) -> None:
    answer = httpx.post(
        f"{service}/v1/embeddings", params={"model": "tiny@"}, content=picture(0), headers={"Content-Type": "image/png"}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "'tiny@' pins no MODEL_ID" in answer.json()["error"]["message"]


def test_a_closed_client_says_so(service: str) -> None:
    with jepakit.Client(service) as client:
        client.models()
    with pytest.raises(ClientError, match="this client is closed: make another"):
        client.models()

    async def ask() -> None:
        async with jepakit.AsyncClient(service) as client:
            await client.models()
        await client.models()

    with pytest.raises(ClientError, match="this client is closed: make another"):
        asyncio.run(ask())


def test_a_client_closed_in_the_middle_says_so() -> None:
    busy = (503, {"Retry-After": "0"}, b"")
    with _answering([busy], before=lambda _: client.close()) as url:
        client = jepakit.Client(url)
        with pytest.raises(ClientError, match="this client is closed: make another"):
            client.models()

    async def ask(url: str) -> None:
        client = jepakit.AsyncClient(url)
        asking = asyncio.create_task(client.models())
        while not _Scripted.seen:
            await asyncio.sleep(0.01)
        await client.close()
        await asking

    with _answering([busy]) as url, pytest.raises(ClientError, match="this client is closed: make another"):
        asyncio.run(ask(url))


def test_an_async_client_belongs_to_one_event_loop(service: str) -> None:
    client = jepakit.AsyncClient(service)
    with asyncio.Runner() as runner:
        runner.run(client.models())
        with (
            asyncio.Runner() as other,
            pytest.raises(ClientError, match="belongs to the event loop of its first request"),
        ):
            other.run(client.models())
        with (
            asyncio.Runner() as other,
            pytest.raises(ClientError, match="belongs to the event loop of its first request"),
        ):
            other.run(client.close())
        runner.run(client.close())


def test_a_bad_array_is_named_once_and_by_the_callers_name(service: str, bundle: Path) -> None:
    images = [np.zeros((40, 48, 3), np.uint8), np.zeros((40, 48), np.float32)]
    with jepakit.Client(service) as client:
        for image in images:
            told = []
            for embed in (client.embed, jepakit.load(bundle).embed):
                with pytest.raises(ImageError) as error:
                    embed([image], progress=False)
                told.append(str(error.value))
            assert told[0] == told[1]
            assert told[0].startswith("0: ")
            assert "array" not in told[0]
            assert "input" not in told[0]


def test_a_manifests_labels_come_along_by_default(service: str, bundle: Path, folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:3]
    manifest = folder / "manifest.csv"
    manifest.write_text("path,label\n" + "".join(f"{name},kind {place}\n" for place, name in enumerate(names)))
    with jepakit.Client(service) as client:
        for embed in (client.embed, jepakit.load(bundle).embed):
            assert embed(manifest, progress=False).labels == ("kind 0", "kind 1", "kind 2")
            assert embed(manifest, labels="none", progress=False).labels is None
    manifest.unlink()


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two images in class folders, a stray one that is half blank, and a file that is ignored."""
    folder = tmp_path / "scenes"
    for name in ("cat/1.png", "dog/2.png", "stray.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
        if name == "stray.png":
            pixels[:, 40:] = 255
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(folder / name)
    (folder / "film.gif").write_bytes(b"GIF89a")
    return folder


TOLD = (
    "no labels: images lie outside class folders (1 of 3, stray.png first); 1 .gif file passed over: GIF is not read, "
    "save the frame you mean as PNG; 5 tiles of 40 × 40 of 3 images; left out: 1 blank tile, of one value everywhere; "
    "the pieces of an image are one group\n"
)


def test_what_is_left_out_of_an_embedding_is_told(
    service: str, bundle: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = jepakit.load(bundle)
    for embed in (
        local.embed,
        lambda images, **how: asked(jepakit.Client, service, lambda client: client.embed(images, **how)),
        lambda images, **how: asked(jepakit.AsyncClient, service, lambda client: client.embed(images, **how)),
    ):
        embed(scenes, tile=40, progress=False)
        assert capsys.readouterr().err == ""
        assert len(embed(scenes, tile=40)) == 5
        assert capsys.readouterr().err == TOLD
        embed(scenes / "stray.png")
        assert capsys.readouterr().err == ""


def test_the_command_line_tells_what_it_leaves_out(service: str, bundle: Path, scenes: Path, tmp_path: Path) -> None:
    for where in (["--url", service], ["--bundle", str(bundle)]):
        done = subprocess.run(
            [
                sys.executable, "-c", "from jepakit.cli import main; main()", "embed", scenes, *where, "--tile", "40",
                "--out", tmp_path / "e.npz",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, TOLD)


def test_an_image_that_cannot_be_opened_is_never_left_out_of_an_embedding(
    service: str, bundle: Path, tmp_path: Path
) -> None:
    for place in range(100):
        (tmp_path / f"{place:03}.png").write_bytes(picture(place, (16, 16)))
    (tmp_path / "042.png").write_bytes(b"no image")
    with jepakit.Client(service) as client:
        for embed in (client.embed, jepakit.load(bundle).embed):
            for how in ({"tile": 16}, {"frame": "each"}):
                with pytest.raises(ImageError, match=r"^042\.png: "):
                    embed(tmp_path, progress=False, **how)


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    """The folder with damage: files that are no images, one of a single value, and one too large for any request."""
    shutil.copytree(folder, tmp_path / "spoilt")
    for place, data in (
        (8, b"no image"),
        (9, picture(9)[:100]),
        (40, blank()),
        (42, b"no image"),
        (69, bytes(9 << 20)),
    ):
        next((tmp_path / "spoilt").rglob(f"{place:03}.png")).write_bytes(data)
    return tmp_path / "spoilt"


def blank() -> bytes:
    return encoded(Image.new("RGB", (48, 40), (7, 7, 7)), "PNG")


def test_bad_images_are_left_out_up_to_a_share_here_and_there(
    service: str, bundle: Path, folder: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local, *remote = embedding_everywhere(service, bundle)
    whole = local(folder, progress=False)
    bad = [place for place, name in enumerate(whole.ids) if name[-7:-4] in ("008", "009", "040", "042", "069")]
    kept = [place for place in range(70) if place not in bad]
    for embed in (local, *remote):
        told: list[tuple[str, str]] = []
        found = embed(spoilt, most_skipped=5 / 70, progress=False, on_skipped=lambda *row, told=told: told.append(row))
        assert (found.ids, found.labels, found.model_id) == (whole[kept].ids, whole[kept].labels, whole.model_id)
        np.testing.assert_allclose(found.vectors, whole[kept].vectors, rtol=0, atol=1e-5 * np.abs(whole.vectors).max())
        assert [name for name, _ in told] == [whole.ids[place] for place in bad]
        assert not [reason for _, reason in told if "input[" in reason or "image: " in reason]
        assert capsys.readouterr().err == ""
        embed(spoilt, most_skipped=0.5)
        assert "5 images left out, as they cannot be embedded: cats/009.png, " in capsys.readouterr().err
        with pytest.raises(
            ImageError, match=r"\.png.*; \d of 70 images cannot be embedded so far, and at most a share of 0.05"
        ):
            embed(spoilt, most_skipped=0.05, progress=False)
        with pytest.raises(
            ImageError, match=r"0[06]9\.png: .*; to leave such images out, allow a share of them \(most_skipped\)"
        ):
            embed(spoilt / "cats", progress=False)


def test_images_of_which_none_is_left_are_an_error(service: str, bundle: Path) -> None:
    for embed in embedding_everywhere(service, bundle):
        for images in ([blank()] * 3, [blank()], [b"no image", blank()]):
            with pytest.raises(ImageError, match=rf"^0: .*; {len(images)} of .* and at most a share of 1 .* never all"):
                embed(images, most_skipped=1.0, progress=False)


def test_images_that_a_model_does_not_take_are_left_out_of_arrays_and_of_single_requests(bundle: Path) -> None:
    good = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    images = [good, np.zeros_like(good), good, good[:, :, :2].copy(), picture(1), blank()]
    with running(ServeSettings(bundles=(str(bundle),), port=1, max_images=2)) as url:
        for embed in embedding_everywhere(url, bundle):
            assert embed(images, most_skipped=0.5, progress=False).ids == ("0", "2", "4")


@pytest.mark.parametrize("tile", [{"tile": 16}, {"frame": "each"}], ids=str)
def test_files_that_cannot_be_cut_are_left_out_up_to_the_share(
    service: str, bundle: Path, tmp_path: Path, tile: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(10):
        (tmp_path / f"{place}.png").write_bytes(picture(place, (16, 16)))
    (tmp_path / "4.png").write_bytes(b"no image")
    for embed in embedding_everywhere(service, bundle):
        assert len(embed(tmp_path, most_skipped=0.1, **tile)) == 9
        assert "1 file that cannot be opened left out (4.png: " in capsys.readouterr().err


def test_an_error_of_the_service_or_the_way_to_it_is_never_taken_for_a_bad_image() -> None:
    for status, error in ((500, ResponseError), (401, AuthenticationError)):
        for kind in (jepakit.Client, jepakit.AsyncClient):
            call = partial(kind.embed, images=[picture(0)] * 2, most_skipped=1.0, progress=False)
            with _answering([MODELS, (status, {}, b"")]) as url, pytest.raises(error):
                asked(kind, url, call, deadline_s=0.5)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_an_image_that_the_service_lacks_a_decoder_for_is_not_left_out(kind: type[Any]) -> None:
    error = b'{"message": "%sreading DICOM needs pydicom", "code": "decoder_missing", "param": "input[1]"}'
    call = partial(kind.embed, images=[picture(0)] * 2, most_skipped=0.5, progress=False)
    with _answering([MODELS, (415, {}, b'{"error": %s}' % (error % b"input[1]: image: "))]) as url:
        with pytest.raises(ImageError, match=r"1: reading DICOM needs pydicom$"):
            asked(kind, url, call)
        assert _Scripted.seen == 2
    bad = b'{"error": {"message": "input[0]: of one value", "code": "constant", "param": "input[0]"}}'
    rows = b'{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "error": %s}]}' % (error % b"")
    good = {"X-Embedding-Shape": "2,1", "X-Model-Id": "a" * 16}
    with _answering([MODELS, (422, {}, bad), (200, good, rows)]) as url, pytest.raises(ImageError, match=r"pydicom$"):
        asked(kind, url, call)


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b'{"data": [{"index": 0, "embedding": [1.0]}]}',
        b'{"data": [{"index": 1, "embedding": [1.0]}, {"index": 0, "error": {"code": "constant", "message": ""}}]}',
        b'{"data": [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 1, "error": {"code": "constant", "message": ""}}]}',
        b'{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "error": "constant"}]}',
    ],
    ids=["no rows", "one row", "another order", "another length", "no message"],
)
def test_a_partial_answer_that_is_not_the_protocols_is_a_typed_error(data: bytes) -> None:
    refusal = b'{"error": {"message": "input[1]: of one value", "code": "constant", "param": "input[1]"}}'
    good = {"X-Embedding-Shape": "2,1", "X-Model-Id": "a" * 16}
    with (
        _answering([MODELS, (422, {}, refusal), (200, good, data)]) as url,
        jepakit.Client(url) as client,
        pytest.raises(ProtocolError, match="the answer for 2 images"),
    ):
        client.embed([picture(0)] * 2, most_skipped=0.5, progress=False)


def test_the_command_line_lists_what_is_left_out(service: str, bundle: Path, spoilt: Path, tmp_path: Path) -> None:
    for where in (["--url", service], ["--bundle", str(bundle)]):
        command = ["embed", str(spoilt), *where, "--out", str(tmp_path / "e.npz"), "--most-skipped"]
        assert CliRunner().invoke(app, [*command, "0.1"]).exit_code == 0
        assert len(Embeddings.load(tmp_path / "e.npz")) == 65
        with (tmp_path / "e.npz.skipped.csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["id", "reason"]
        assert [name for name, _ in rows] == [
            "cats/009.png",
            "cats/069.png",
            *(f"dogs/{n}.png" for n in ("008", "040", "042")),
        ]
        (tmp_path / "e.npz.skipped.csv").unlink()
        assert isinstance(CliRunner().invoke(app, [*command, "0.01"]).exception, ImageError)
        assert not (tmp_path / "e.npz.skipped.csv").exists()


def with_tile(bundle: Path, tile: int) -> Manifest:
    """The manifest of the tiny model as if it had been adapted on tiles."""
    manifest = jepakit.open_bundle(bundle).manifest
    return manifest.model_copy(update={"preprocess": manifest.preprocess.model_copy(update={"tile": tile})})


def test_a_model_of_tiles_refuses_another_tile_in_process(bundle: Path) -> None:
    session = Session.open(bundle)
    session.manifest = with_tile(bundle, 40)
    model = Model(session)
    scene = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"tile = 20: the model was made for tiles of 40 × 40"):
        model.embed(scene, tile=20, progress=False)
    assert len(model.embed(scene, tile=40, progress=False)) == 4
    assert len(model.embed(scene[:32, :36], tile=40, progress=False)) == 1, "a smaller scene is padded"
    assert len(jepakit.load(bundle).embed(scene, tile=20, progress=False)) == 16, "a model of whole images takes any"


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_model_of_tiles_refuses_another_tile_from_afar(bundle: Path, kind: type[Any]) -> None:
    described = {
        "id": "tiny", "model_id": "a" * 16, "digest": "", "dim": 2, "precision": "fp32", "provider": "cpu",
        "preprocess": with_tile(bundle, 40).preprocess.model_dump(mode="json"),
    }  # fmt: skip

    scene = np.zeros((80, 80, 3), np.uint8)
    with (
        _answering([(200, {}, json.dumps({"data": [described]}).encode())]) as url,
        pytest.raises(ConfigError, match=r"tile = 20: the model was made for tiles of 40 × 40"),
    ):
        asked(kind, url, lambda client: client.embed(scene, tile=20, progress=False))
    assert _Scripted.seen == 1, "no image was sent"


@pytest.mark.parametrize("described", [{}, {"preprocess": None}, {"preprocess": {"from_a_later_version": 1}}], ids=str)
def test_a_description_that_this_version_does_not_know_is_an_error_of_ours(described: dict[str, Any]) -> None:
    model = ModelInfo("m", "0" * 16, "", 1, "fp32", "cpu", described)
    with pytest.raises(ProtocolError, match="how m wants its images in a way that this jepakit does not know"):
        spec_of([model], None, 64)


def test_the_async_client_reads_images_outside_the_event_loops_thread(service: str) -> None:
    threads = set()

    class Images:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, place: int) -> bytes:
            threads.add(threading.get_ident())
            return picture(place)

    async def embed() -> int:
        async with jepakit.AsyncClient(service) as client:
            return len(await client.embed(Images(), progress=False))

    assert asyncio.run(embed()) == 40
    assert threading.get_ident() not in threads


def test_a_bad_image_is_named_by_the_callers_own_name(service: str, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(picture(0)[:100])
    with jepakit.Client(service) as client, pytest.raises(ImageError, match=r"bad\.png"):
        client.embed([*sorted(folder.rglob("*.png"))[:40], bad], progress=False)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_what_files_are_called_is_not_sent(kind: type[Any], tmp_path: Path) -> None:
    (tmp_path / "ward7").mkdir()
    for name in ("patient_smith.png", "patient_jones.png"):
        (tmp_path / "ward7" / name).write_bytes(picture(0))
    sent: list[bytes] = []
    good = {"X-Embedding-Shape": "2,1", "X-Model-Id": "a" * 16}
    with _answering([MODELS, (200, good, np.ones((2, 1), "<f4").tobytes())], before=sent.append) as url:
        asked(kind, url, lambda client: client.embed(tmp_path / "ward7", progress=False))
    assert picture(0) in sent[-1]
    assert not re.search(b"patient|smith|ward7", b"".join(sent))


def test_verify_from_afar(service: str, bundle: Path, exported: Callable[..., Path]) -> None:
    with jepakit.Client(service) as client:
        assert client.verify(bundle) < 1e-5
        assert client.verify(bundle, model=f"tiny@{jepakit.open_bundle(bundle).manifest.model_id}") < 1e-5
        with pytest.raises(NotFoundError, match="not"):
            client.verify(exported(image_size=48))


@pytest.mark.parametrize(
    ("precision", "service"), [("fp16", {}), ("fp32", {"provider": "openvino", "arithmetic": "bf16"})]
)
def test_verify_judges_by_the_precision_that_the_service_computes_in(
    precision: str, service: dict[str, Any], exported: Callable[..., Path], tmp_path: Path
) -> None:
    if service:
        pytest.importorskip("openvino")
    bundle = exported(image_size=32, precision=precision)
    with running(ServeSettings(bundles=(str(bundle),), port=1, **service)) as url, jepakit.Client(url) as client:
        assert client.verify(bundle) > 1e-4, "fp32's tolerance"
        with pytest.raises(BundleError, match=r"computes other vectors than the bundle promises: .*cosine"):
            client.verify(promising_others(bundle, tmp_path / "other"))


def test_a_service_that_computes_something_else_is_caught(bundle: Path) -> None:
    manifest = jepakit.open_bundle(bundle).manifest
    shape = f"8,{manifest.embedding.dim}"
    headers = {"X-Model-Id": manifest.model_id, "X-Embedding-Shape": shape}
    body = np.ones((8, manifest.embedding.dim), "<f4").tobytes()
    with _answering([MODELS, (200, headers, body)]) as url, jepakit.Client(url) as client, pytest.raises(BundleError):
        client.verify(bundle)


def test_an_unknown_model_is_told(service: str) -> None:
    with jepakit.Client(service) as client, pytest.raises(NotFoundError, match="tiny"):
        client.embed(picture(0), model="other")


def test_no_service_is_told_after_the_deadline() -> None:
    with (
        jepakit.Client("http://127.0.0.1:9", deadline_s=0.5) as client,
        pytest.raises(ConnectionFailedError, match="running"),
    ):
        client.models()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://::1:8000", "http://host:99999"])
def test_a_wrong_address_is_told_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        jepakit.Client(url)


@pytest.mark.parametrize("key", ["jk_café", "jk_abc\n", "jk_abc def"])
@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_key_that_no_header_can_hold_is_told_at_once_and_not_shown(kind: type[Any], key: str) -> None:
    with pytest.raises(ConfigError, match="the API key") as error:
        kind("http://127.0.0.1:8000", api_key=key)
    assert "jk_" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://user:secret@127.0.0.1:8000", "http://secret@host", "user:secret@host:8000", "http://u:sec/ret@host"]
)
@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_password_in_the_address_is_refused_and_not_shown(kind: type[Any], url: str) -> None:
    with pytest.raises(ConfigError, match="without a user and a password") as error:
        kind(url, api_key="key")
    assert "ret" not in str(error.value)


def test_https_asked_of_a_service_without_is_told_at_once() -> None:
    with (
        _answering([MODELS]) as url,
        jepakit.Client(url.replace("http:", "https:"), deadline_s=2) as client,
        pytest.raises(ConnectionFailedError, match="does not speak https"),
    ):
        client.models()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a self-signed certificate for this machine, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", file, "-out", file.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


def context_of(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_certificate_that_is_not_trusted_is_told_at_once(kind: type[Any], certificate: Path) -> None:
    with (
        _answering([MODELS], context=context_of(certificate)) as url,
        pytest.raises(ConnectionFailedError, match=r"not trusted \(self-signed certificate\): set SSL_CERT_FILE"),
    ):
        asked(kind, url, lambda client: client.models(), deadline_s=2)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_certificate_named_by_the_environment_is_trusted(
    kind: type[Any], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with _answering([MODELS], context=context_of(certificate)) as url:
        assert asked(kind, url, lambda client: client.models(), deadline_s=2) == []


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_what_the_environment_names_wrongly_is_said_by_its_variable(
    kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "certificate.pem").write_text("not one")
    for file in (tmp_path / "certificate.pem", tmp_path / "nowhere.pem"):
        with monkeypatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(file))
            with pytest.raises(ConfigError, match=rf"SSL_CERT_FILE = '{file}': no certificates can be read there \("):
                kind("https://127.0.0.1:8000")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy in ("socks5://127.0.0.1:9", "foo://127.0.0.1:9", "http://127.0.0.1:port"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(ConfigError, match=r"the environment's proxy \(ALL_PROXY\) cannot be used") as error:
            kind("http://embed.example:8000")
        assert "NO_PROXY" in str(error.value)
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ConnectionFailedError, match=r"within 0\.2 s through the proxy that ALL_PROXY names") as dead:
        asked(kind, "http://embed.example:8000", lambda client: client.models(), deadline_s=0.2)
    assert "secret" not in str(dead.value)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_proxy_of_the_environment_sees_nothing_of_what_stays_on_this_machine(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with _answering([MODELS]) as url:
        for host in ("127.0.0.1", "localhost"):
            here = url.replace("127.0.0.1", host)
            assert asked(kind, here, lambda client: client.models(), deadline_s=2) == []
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("HTTP_PROXY", url)
        assert asked(kind, "http://elsewhere.invalid", lambda client: client.models(), deadline_s=2) == []
    assert _Scripted.seen == 3


MODELS: tuple[int, dict[str, str], bytes] = (200, {}, b'{"data": []}')
GOOD = {"X-Model-Id": "0123456789abcdef", "X-Embedding-Shape": "1,2"}
VECTOR = np.array([1, 2], "<f4").tobytes()


def test_overload_outage_and_foreign_errors_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepakit.client.attempts._FIRST_PAUSE_S", 0.01)
    answers = [
        (429, {"Retry-After": "0"}, b'{"error": {"message": "later", "code": "overloaded"}}'),
        (503, {"Retry-After": "0"}, b"<html>nginx</html>"),
        (500, {"Retry-After": "0"}, b"Internal Server Error"),
        (404, {"Retry-After": "0"}, b"Path '/v1/embeddings' not found. Ping http://.../-/routes for available routes."),
        (200, GOOD, VECTOR),
    ]
    with _answering(answers) as url, jepakit.Client(url) as client:
        assert client.embed(picture(0)).vectors.tolist() == [[1, 2]]
    assert _Scripted.seen == 5


def test_overload_until_the_deadline_is_an_error_of_its_own() -> None:
    busy = (429, {"Retry-After": "0.2"}, b'{"error": {"message": "later", "code": "overloaded"}}')
    with (
        _answering([busy] * 50) as url,
        jepakit.Client(url, deadline_s=0.7) as client,
        pytest.raises(OverloadedError, match=r"^later \(deadline_s = 0\.7\)$"),
    ):
        client.embed(picture(0))


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_no_attempt_outlasts_the_deadline(kind: type[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, began = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(ConnectionFailedError, match=r"gave no answer within 0\.3 s \(ReadTimeout"):
            asked(kind, url, lambda client: client.embed(picture(0)), timeout_s=5, deadline_s=0.3)
    assert time.monotonic() - began < 4


def test_overload_is_told_where_the_deadline_cuts_the_last_attempt_short() -> None:
    busy = (503, {"Retry-After": "0.3"}, b'{"error": {"message": "later", "code": "overloaded"}}')
    waits = iter([0, 5])
    with (
        _answering([busy], lambda _: time.sleep(next(waits, 0))) as url,
        jepakit.Client(url, deadline_s=2) as client,
        pytest.raises(OverloadedError, match="later"),
    ):
        client.embed(picture(0))
    assert _Scripted.seen == 2


@pytest.mark.parametrize("retry_after", ["0", "-5", "nan"])
def test_there_is_a_least_pause_whatever_the_service_says(retry_after: str) -> None:
    busy = (429, {"Retry-After": retry_after}, b'{"error": {"message": "later", "code": "overloaded"}}')
    with (
        _answering([busy]) as url,
        jepakit.Client(url, deadline_s=0.4) as client,
        pytest.raises(OverloadedError, match="later"),
    ):
        client.models()
    assert 1 <= _Scripted.seen <= 2


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_what_waits_for_the_clients_own_requests_is_not_late(kind: type[Any]) -> None:
    """Together they take 3 s, each of them half a second."""

    async def all_at_once(client: Any) -> list[Embeddings]:
        calls = [partial(client.embed, picture(0), progress=False) for _ in range(48)]
        if kind is jepakit.Client:
            with ThreadPoolExecutor(48) as pool:
                return list(await asyncio.to_thread(lambda: list(pool.map(lambda call: call(), calls))))
        return list(await asyncio.gather(*(call() for call in calls)))

    async def go(url: str) -> list[Embeddings]:
        if kind is jepakit.Client:
            with kind(url, deadline_s=2) as client:
                return await all_at_once(client)
        async with kind(url, deadline_s=2) as client:
            return await all_at_once(client)

    with _answering([(200, GOOD, VECTOR)], before=lambda _: time.sleep(0.5)) as url:
        assert len(asyncio.run(go(url))) == 48


def test_a_service_that_was_never_started_is_told_while_one_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepakit.client.attempts._TOLD_AFTER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with jepakit.Client(url, deadline_s=1.5) as client, pytest.raises(ConnectionFailedError, match="gave no answer"):
        client.models()
    (line,) = caplog.messages
    told = rf" gives no answer yet \(\[Errno {errno.ECONNREFUSED}\] Connection refused\): trying for [01] s more\."
    assert re.match(re.escape(url) + told, line)


def test_a_refusal_is_not_tried_again() -> None:
    refusal: tuple[int, dict[str, str], bytes] = (
        401,
        {},
        b'{"error": {"message": "no key", "code": "missing_api_key"}}',
    )
    with (
        _answering([refusal] * 3) as url,
        jepakit.Client(url) as client,
        pytest.raises(AuthenticationError, match=r"no key \(give it as api_key=…, or in JEPAKIT_API_KEY\)"),
    ):
        client.models()
    assert _Scripted.seen == 1


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, VECTOR),
        ({**GOOD, "X-Embedding-Shape": "2,2"}, VECTOR),
        (GOOD, VECTOR[:-1]),
        ({**GOOD, "X-Embedding-Shape": "1"}, b""),
        ({**GOOD, "X-Embedding-Shape": "1,²"}, VECTOR),
        ({**GOOD, "Content-Encoding": "gzip"}, VECTOR),
    ],
)
def test_an_answer_that_is_not_the_protocols_is_a_typed_error(headers: dict[str, str], body: bytes) -> None:
    with _answering([(200, headers, body)]) as url, jepakit.Client(url) as client, pytest.raises(ProtocolError):
        client.embed(picture(0))


@pytest.mark.parametrize(
    "param",
    [7, None, ["input[0]"], "input[99]", "input[0]" * 2, f"input[{'9' * 5000}]"],
    ids=lambda param: str(param)[:20],
)
def test_a_refusal_that_names_no_image_of_the_request_is_told_as_it_is(param: Any) -> None:
    body = json.dumps({"error": {"message": "no good", "code": 1, "param": param}}).encode()
    with (
        _answering([(422, {}, body)]) as url,
        jepakit.Client(url) as client,
        pytest.raises(ResponseError, match=r"^no good$") as error,
    ):
        client.embed(picture(0), progress=False)
    assert error.value.code is None


def test_requests_are_cut_by_the_services_own_limits(bundle: Path) -> None:
    many, large = [picture(0)] * 20, [picture(0, (360, 360))] * 3
    with running(ServeSettings(bundles=(str(bundle),), port=1, max_images=4, max_body_mb=1)) as url:
        for kind in (jepakit.Client, jepakit.AsyncClient):
            assert len(asked(kind, url, lambda client: client.embed(many, progress=False))) == 20
            assert len(asked(kind, url, lambda client: client.embed(large, progress=False))) == 3
            assert asked(kind, url, lambda client: client.verify(bundle)) < 1e-5


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of which all bytes are read, as they are."""
    read, seen = Path.read_bytes, list[Path]()

    def read_bytes(path: Path) -> bytes:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return seen


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_an_image_that_no_request_can_hold_is_named_with_its_size(
    bundle: Path, tmp_path: Path, files_read: list[Path], kind: type[Any]
) -> None:
    large, array = tmp_path / "large.png", np.zeros((1024, 1024, 3), np.uint8)
    large.write_bytes(bytes(2 << 20))
    cases: list[tuple[Any, Any, str]] = [
        ([large, picture(0)], large, "2,097,152 bytes, but a request holds at most 1,048,576"),
        ([picture(0), bytes(2 << 20)], 1, "2,097,152 bytes, but a request holds at most 1,048,576"),
        ([array, array], 0, "3,145,728 bytes, but a request holds at most 1,048,576"),
        (bytes(2 << 20), 0, "2,097,152 bytes, but the body is larger than 1 MB"),
    ]
    with running(ServeSettings(bundles=(str(bundle),), port=1, max_images=4, max_body_mb=1)) as url:
        for images, name, told in cases:
            embed = partial(kind.embed, images=images, progress=False)
            with pytest.raises(ImageError, match=re.escape(f"{name}: {told}: save it smaller, cut it into")) as error:
                asked(kind, url, embed)
            assert error.value.code == "too_large"
    assert large not in files_read


def test_a_refusal_of_a_body_is_told_as_it_is_where_it_held_several_images() -> None:
    body = b'{"error": {"message": "the body is larger than 1 MB: send fewer", "code": "body_too_large"}}'
    with (
        _answering([MODELS, (413, {}, body)]) as url,
        jepakit.Client(url) as client,
        pytest.raises(ResponseError, match="send fewer"),
    ):
        client.embed([picture(0)] * 2, progress=False)


def test_limits_are_asked_for_once_and_not_for_a_single_image() -> None:
    two = (200, {**GOOD, "X-Embedding-Shape": "2,1"}, VECTOR)
    with _answering([(200, GOOD, VECTOR), MODELS, two, two]) as url, jepakit.Client(url) as client:
        for images in (1, 2, 2):
            client.embed([picture(0)] * images, progress=False)
    assert _Scripted.seen == 4


def rows(number: int, model_id: str = "a" * 16) -> tuple[int, dict[str, str], bytes]:
    return 200, {"X-Embedding-Shape": f"{number},1", "X-Model-Id": model_id}, np.arange(number, dtype="<f4").tobytes()


def told(max_images: int, *names: str) -> tuple[int, dict[str, str], bytes]:
    """A model list with this limit, of one model or of these."""
    limits = {"max_images": max_images, "max_body_mb": 8, "max_images_in_time": 999}
    row = {"model_id": "a" * 16, "digest": "", "dim": 1, "precision": "fp32", "provider": "cpu", "limits": limits}
    return 200, {}, json.dumps({"data": [{**row, "id": name} for name in names or ("tiny",)]}).encode()


REFUSED = (413, dict[str, str](), b'{"error": {"message": "too many", "code": "too_many_images"}}')


def test_a_dataset_is_read_in_the_caller_s_own_thread(service: str) -> None:
    class Bound:
        threads: ClassVar[set[int]] = set()

        def __len__(self) -> int:
            return 40

        def __getitem__(self, place: int) -> bytes:
            self.threads.add(threading.get_ident())
            return picture(place % 2)

    with jepakit.Client(service) as client:
        assert len(client.embed(Bound(), progress=False)) == 40
    assert Bound.threads == {threading.get_ident()}


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_the_next_request_is_sent_as_soon_as_the_oldest_is_answered(kind: type[Any]) -> None:
    pictures = [picture(seed) for seed in range(6)]
    fifth, in_time = threading.Event(), list[bool]()

    def wait_for_the_fifth(sent: bytes) -> None:
        if pictures[4] in sent:
            fifth.set()
        if any(each in sent for each in pictures[1:4]):
            in_time.append(fifth.wait(10))

    with _answering([told(1), rows(1)], wait_for_the_fifth) as url:
        asked(kind, url, lambda client: client.embed(pictures, progress=False))
    assert in_time == [True] * 3


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_no_image_is_sent_before_the_model_is_clear(kind: type[Any]) -> None:
    message = "the service's models are tiny, second: name one of them as model"
    with _answering([told(8, "tiny", "second")]) as url, pytest.raises(ConfigError, match=message):
        asked(kind, url, lambda client: client.embed([picture(0)] * 2, progress=False))
    assert _Scripted.seen == 1


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_limits_that_have_become_lower_are_asked_for_anew_and_the_rest_is_cut_by_them(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("async_client", "job"):
        monkeypatch.setattr(f"jepakit.client.{module}.AT_ONCE", 1)
    with _answering([told(4), rows(4), REFUSED, told(2), rows(2), rows(2)]) as url:
        found = asked(kind, url, lambda client: client.embed([picture(0)] * 8, progress=False))
    assert found.vectors[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert _Scripted.seen == 6


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_proxy_that_takes_less_than_the_service_is_sent_less(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("async_client", "job"):
        monkeypatch.setattr(f"jepakit.client.{module}.AT_ONCE", 1)
    page = (413, dict[str, str](), b"<h1>413 Request Entity Too Large</h1>")
    with _answering([told(4), page, told(4), rows(2), page, told(4), rows(1), rows(1)]) as url:
        found = asked(kind, url, lambda client: client.embed([picture(0)] * 4, progress=False))
    assert found.vectors[:, 0].tolist() == [0, 1, 0, 0]
    assert _Scripted.seen == 8
    with (
        _answering([page]) as url,
        pytest.raises(ImageError, match=r"front of the service takes less .*client_max_body_size"),
    ):
        asked(kind, url, lambda client: client.embed([picture(0)], progress=False))


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
@pytest.mark.parametrize(
    ("location", "told_"),
    [
        ("https://user:pass@pics.example/v1/models?key=1", r"301, a redirect to https://pics\.example/v1/models: give the part of that address"),
        ("/login", r"301, a redirect to http://127\.0\.0\.1:\d+/login: give the part of that address before /v1 as url"),
    ],
)  # fmt: skip
def test_a_redirect_is_told_with_where_it_leads(kind: type[Any], location: str, told_: str) -> None:
    with _answering([(301, {"Location": location}, b"")]) as url, pytest.raises(ResponseError, match=told_) as caught:
        asked(kind, url, lambda client: client.models())
    assert "pass" not in str(caught.value)
    assert "key" not in str(caught.value)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_an_address_with_a_query_is_refused_and_not_repeated(kind: type[Any]) -> None:
    with pytest.raises(ConfigError, match=r"the url has a query \(what follows its \?\)") as caught:
        kind("http://127.0.0.1:1/?key=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_refusal_by_the_same_limits_is_told(kind: type[Any]) -> None:
    with _answering([told(4), REFUSED, told(4)]) as url, pytest.raises(ResponseError, match="too many"):
        asked(kind, url, lambda client: client.embed([picture(0)] * 2, progress=False))
    assert _Scripted.seen == 3


def test_limits_are_asked_for_anew_after_a_model_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("async_client", "job"):
        monkeypatch.setattr(f"jepakit.client.{module}.AT_ONCE", 1)
    answers = [told(2), rows(2), rows(2, "b" * 16), told(4), rows(4, "b" * 16)]
    with _answering(answers) as url, jepakit.Client(url) as client:
        with pytest.raises(ModelChangedError):
            client.embed([picture(0)] * 4, progress=False)
        assert len(client.embed([picture(0)] * 4, progress=False)) == 4
    assert _Scripted.seen == 5


@pytest.mark.parametrize("limits", [None, [], {}, {"max_images": "8"}, {"max_images": 8, "max_body_mb": None}], ids=str)
def test_a_service_that_tells_no_limits_is_sent_what_most_take(limits: Any) -> None:
    info = ModelInfo("tiny", "a" * 16, "", 2, "fp32", "cpu", {"limits": limits})
    assert RequestLimits.of([info], None, 75) == RequestLimits.of([], None, 75) == RequestLimits(32, 16 << 20)


def described(name: str, in_time: int, **more: Any) -> ModelInfo:
    limits = {"max_images": 64, "max_body_mb": 8, "max_images_in_time": in_time, **more}
    return ModelInfo(name, "a" * 16, "", 2, "fp32", "cpu", {"limits": limits})


def test_requests_are_cut_by_the_speed_of_the_model_that_is_meant() -> None:
    models = [described("slow", 30), described("slowest", 1), described("fast", 9999)]
    images = {asked: RequestLimits.of(models, asked, 75).images for asked in ("slow", "slow@id", "slowest", "fast")}
    assert images == {"slow": 5, "slow@id": 5, "slowest": 1, "fast": 32}
    assert RequestLimits.of(models[:1], None, 75).images == 5


@pytest.mark.parametrize(("patience_s", "images"), [(300, 18), (60, 18), (30, 9), (1, 1), (0.001, 1)])
def test_requests_are_cut_by_how_long_the_client_waits_where_that_is_less(patience_s: float, images: int) -> None:
    assert RequestLimits.of([described("tiny", 100, request_timeout_s=60.0)], None, patience_s).images == images


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_client_waits_longer_than_the_service_and_less_long_than_its_proxy(kind: type[Any]) -> None:
    proxy = (Path(__file__).parents[2] / "docker" / "proxy" / "nginx.conf").read_text()
    proxys = re.search(r"proxy_read_timeout (\d+)s", proxy)
    assert proxys
    timeout_s = inspect.signature(kind).parameters["timeout_s"].default
    assert ServeSettings.model_fields["request_timeout_s"].default < timeout_s < int(proxys[1])


def slow_service(bundle: Path, images_a_second: float, takes_s: float, **settings: Any) -> running:
    """A service of a model that was measured at so many images a second, and takes so long for each."""
    service = running(ServeSettings(bundles=(str(bundle),), port=1, **settings))
    model = service.gate.replica.registry.find("tiny")
    model.plan = model.plan._replace(rate=images_a_second)
    run = model._batcher._run

    def slowly(images: Any) -> Any:
        time.sleep(takes_s * len(images))
        return run(images)

    model._batcher._run = model._batcher._whole = slowly
    return service


@pytest.mark.parametrize("patience", [{"timeout_s": 2, "deadline_s": 6}, {"deadline_s": 2}], ids=str)
@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_an_impatient_client_is_answered_by_a_slow_model(bundle: Path, kind: type[Any], patience: Any) -> None:
    """In one request, as many as it may hold, the images would take 3 s."""
    with slow_service(bundle, images_a_second=10, takes_s=0.1, threads=1) as url:
        found = asked(kind, url, lambda client: client.embed([picture(0)] * 30, progress=False), **patience)
    assert len(found) == 30


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_slow_model_refuses_nothing_of_its_only_client(bundle: Path, kind: type[Any]) -> None:
    service = slow_service(bundle, images_a_second=8, takes_s=0.02, request_timeout_s=2)
    with service as url:
        (told,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert told["limits"]["max_images_in_time"] == 8
        found = asked(kind, url, lambda client: client.embed([picture(0)] * 64, progress=False))
        assert len(found) == 64
        refused = re.findall(r'refused_total\{code="overloaded"[^}]*\} (\S+)', httpx.get(f"{url}/metrics").text)
        assert refused == ["0.0"]


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Interrupts the main thread once, as Ctrl-C does, also where a shell has started the tests in its background."""
    interrupted = threading.Event()

    def interrupt_once(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def press() -> None:
        # CPython sees a signal late that comes between its last look and the wait for a lock: it is sent until seen.
        while not interrupted.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            interrupted.wait(0.1)

    before = signal.signal(signal.SIGINT, interrupt_once)
    yield press
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_no_answer_and_nothing_is_sent_after_it(ctrl_c: Callable[[], None]) -> None:
    released = threading.Event()

    def interrupt(_: bytes) -> None:
        ctrl_c()
        released.wait(60)

    with _answering([(503, {}, b"")], interrupt) as url, jepakit.Client(url, deadline_s=2) as client:
        with pytest.raises(KeyboardInterrupt):
            client.embed(picture(0), progress=False)
        sending = [thread for thread in threading.enumerate() if thread.name == "jepakit-send"]
        assert [thread.daemon for thread in sending] == [True], "the program's end does not wait either"
        released.set()
        sending[0].join(60)
    assert _Scripted.seen == 1


@pytest.mark.parametrize("cancelled", [False, True], ids=["failing", "cancelled"])
def test_no_request_of_the_async_client_outlives_the_call(cancelled: bool) -> None:
    class Stuck(jepakit.AsyncClient):
        sent = 0

        async def _send(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                return httpx.Response(200, content=MODELS[2])
            self.sent += 1
            if self.sent == 1 and not cancelled:
                raise ProtocolError("broken")
            await asyncio.sleep(60)
            raise AssertionError

    async def embed() -> None:
        async with Stuck("http://127.0.0.1:9") as client:
            call = asyncio.create_task(client.embed([picture(0)] * 64, progress=False))
            while client.sent < 2:
                await asyncio.sleep(0.01)
            if cancelled:
                call.cancel()
            with pytest.raises(asyncio.CancelledError if cancelled else ProtocolError):
                await call
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(embed())


def test_a_client_whose_requests_are_cancelled_at_any_moment_goes_on(service: str) -> None:
    async def cancel_many() -> list[ModelInfo]:
        async with jepakit.AsyncClient(service, deadline_s=3) as client:
            for turns in [*range(40)] * 3:
                calls = [asyncio.create_task(client.models()) for _ in range(4)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
            return await client.models()

    assert asyncio.run(cancel_many())


def test_vectors_of_two_spaces_are_never_mixed() -> None:
    rows = {"X-Embedding-Shape": "32,1", "X-Model-Id": "a" * 16}
    changed = {"X-Embedding-Shape": "32,1", "X-Model-Id": "b" * 16}
    body = np.zeros(32, "<f4").tobytes()
    with (
        _answering([MODELS, (200, rows, body), (200, changed, body)]) as url,
        jepakit.Client(url) as client,
        pytest.raises(ModelChangedError, match="b" * 16),
    ):
        client.embed([picture(0)] * 64, progress=False)


FORKED = """
import asyncio, os, sys
import jepakit

async def ask(client, name):
    found = client.model(name)
    return (await found if asyncio.iscoroutine(found) else found).name

async def close(client):
    closed = client.close()
    if closed is not None:
        await closed
    return "closed" if client._http.is_closed else "left"

async def main():
    client = getattr(jepakit, sys.argv[1])(sys.argv[2], timeout_s=5, deadline_s=10)
    assert await ask(client, "before") == "before"
    for inside in (ask(client, "child"), close(client)):
        child = os.fork()
        if child == 0:
            print(asyncio.run(inside), flush=True)
            os._exit(0)
        inside.close()
        os.waitpid(child, 0)
        print(await ask(client, "parent"), flush=True)
    print(await close(client))

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_a_forked_process_shares_no_connection_with_its_parent(kind: str) -> None:
    """On one connection, each would now and then read the answer to the other's request."""
    ports: dict[str, set[int]] = {}

    class Model(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            ports.setdefault(name, set()).add(self.client_address[1])
            row = {"id": name, "model_id": "a" * 16, "digest": "", "dim": 2, "precision": "fp32", "provider": "cpu"}
            body = json.dumps(row).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, kind, f"http://127.0.0.1:{server.server_address[1]}"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["child", "closed", "left", "parent", "parent"], done.stderr
    assert ports["parent"] == ports["before"]
    assert len(ports["child"] - ports["before"]) == 1


def test_redirects_are_not_followed() -> None:
    with (
        _answering([(302, {"Location": "http://127.0.0.1:9/"}, b"")]) as url,
        jepakit.Client(url, api_key="k") as client,
        pytest.raises(jepakit.JepakitError, match="302"),
    ):
        client.models()


class _Scripted(BaseHTTPRequestHandler):
    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]] = []
    seen: ClassVar[int] = 0
    before: ClassVar[Callable[[bytes], object] | None] = None

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        place = _Scripted.seen
        _Scripted.seen += 1
        if _Scripted.before is not None:
            _Scripted.before(sent)
        status, headers, body = self.answers[min(place, len(self.answers) - 1)]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


class _answering:  # noqa: N801 (used like a function)
    """A server that gives these answers, one per request, and calls `before` with its body before each; with `context` over HTTPS."""

    def __init__(
        self, answers: list[tuple[int, dict[str, str], bytes]], before: Callable[[bytes], object] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        _Scripted.answers, _Scripted.seen, _Scripted.before = answers, 0, before
        self._scheme = "https" if context else "http"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
        # What a client does that leaves in the middle of a handshake is no concern of these tests.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JEPAKIT_API_KEY", raising=False)


def test_the_examples_of_the_page_run(service: str, folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "client.md").read_text().replace("http://127.0.0.1:8000", service)
    files = sorted(folder.rglob("*.png"))
    for side, chosen in (("train", files[1::2]), ("test", files[::2])):
        for file in chosen:
            place = tmp_path / "labelled" / side / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    (tmp_path / "more").symlink_to(folder)
    (tmp_path / "notes.txt").write_text("not an image")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "notes.txt" in done.stdout
    assert "on 35 images" in done.stdout, "a probe is judged on images that it was not fitted on"
    (shell,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    programs = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-ec", shell], cwd=tmp_path, env=programs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 35 images" in done.stdout


@pytest.mark.parametrize(
    ("url", "how", "message"),
    [
        (None, {}, "url = None: give the service's address"),
        (8000, {}, "url = 8000: give the service's address"),
        ("http://127.0.0.1:8000/v1", {}, "without /v1, which"),
        ("http://127.0.0.1:8000/v1/embeddings/", {}, "without /v1/embeddings"),
        ("http://127.0.0.1:8000/docs", {}, "without /docs"),
        ("http://127.0.0.1:8000", {"timeout_s": "a"}, "timeout_s = 'a': give seconds"),
        ("http://127.0.0.1:8000", {"timeout_s": -1}, "timeout_s = -1: give seconds"),
        ("http://127.0.0.1:8000", {"deadline_s": float("nan")}, "deadline_s = nan: give seconds"),
    ],
)
def test_what_a_client_cannot_be_made_of_is_said_when_it_is_made(url: Any, how: dict[str, Any], message: str) -> None:
    for kind in (jepakit.Client, jepakit.AsyncClient):
        with pytest.raises(ConfigError, match=re.escape(message)):
            kind(url, **how)


@pytest.mark.parametrize("url", ["http://docs", "https://metrics/", "https://gateway.example/models/v2"])
def test_an_address_that_only_looks_like_a_route_is_one(url: str) -> None:
    jepakit.Client(url).close()


def test_tiles_of_no_number_are_refused(service: str, folder: Path) -> None:
    with jepakit.Client(service) as client, pytest.raises(ConfigError, match="tile = 'a': give a number of pixels"):
        client.embed(folder, tile="a")  # type: ignore[arg-type]


def test_what_multipart_adds_to_a_file_counts_in_its_request() -> None:
    listed = gather(
        [bytes(500)] * 4, "none", tile=None, overlap=0, min_valid=0.5, frame=None, progress=False, most_skipped=0
    )
    with httpx.Client(base_url="http://127.0.0.1") as http:
        chunks = list(Job(listed, None, RequestLimits(bytes=2000, largest=2000), Results(listed, 0)).parts())
        assert max(len(chunk.request(http).read()) for chunk in chunks) <= 2000
    assert [place for chunk in chunks for place in chunk.places] == [0, 1, 2, 3]


@pytest.mark.parametrize(("size", "expected"), [(500, [32, 32, 6]), (1 << 20, [15, 15, 15, 15, 10])])
def test_a_request_has_32_images_or_16_mb_at_most(size: int, expected: list[int]) -> None:
    listed = gather([bytes(size)] * 70, "none")
    assert [len(chunk.places) for chunk in Job(listed, None, RequestLimits(), Results(listed, 0)).parts()] == expected


def test_what_a_failed_call_left_under_way_takes_no_place_from_the_next(bundle: Path) -> None:
    """A service that takes long refuses one image at once: the call ends, and its other requests still run."""
    may_end, pictures = threading.Event(), [picture(seed) for seed in range(40)]

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, told(8)[2])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if b"refused" not in body:
                may_end.wait(60)
            told = {"error": {"message": "input[0]: no image", "code": "unreadable", "param": "input[0]"}}
            with suppress(OSError):
                self._answer(422, json.dumps(told).encode())

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with jepakit.Client(f"http://127.0.0.1:{server.server_address[1]}") as client:

            def fail() -> None:
                with pytest.raises(ImageError):
                    client.embed([b"refused", *pictures], progress=False)

            for _ in range(12):  # each leaves requests that would take places
                asked = threading.Thread(target=fail, daemon=True)
                asked.start()
                asked.join(20)
                assert not asked.is_alive(), "it waits for answers that nobody wants"
    finally:
        may_end.set()
        server.shutdown()
        server.server_close()
