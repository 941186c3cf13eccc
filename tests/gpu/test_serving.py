"""Serving on a GPU: torch's vectors, the same in any batch, from the requested provider, or an error."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import jepakit
from jepakit.bundles import golden
from jepakit.bundles.bundle import Bundle
from jepakit.errors import InferenceError
from jepakit.inference.session import Session
from jepakit_service.settings import ServeSettings
from tests.service.conftest import picture, running
from tests.service.load import Load, processes, wait_until
from tests.test_pipeline import jepakit_cli, serving

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PNG = {"Content-Type": "image/png"}
# Name, and what it is exported with; attention is one operator from opset 23 on.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "resnet18": {},
    "mobilenetv2_100": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224 opset 23": {"opset": 23},
    "vit_tiny_patch16_224 fp16": {"precision": "fp16"},
    "vit_tiny_patch16_224 fp16 opset 23": {"precision": "fp16", "opset": 23},
    "resnet18 fp16": {"precision": "fp16"},
}


@pytest.fixture(scope="module", params=list(MODELS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    backbone, settings = request.param.partition(" ")[0], MODELS[request.param]
    return jepakit.export(f"{backbone}:random", tmp_path_factory.mktemp("bundles") / "model", **settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    return jepakit.export("test_vit:random", out, image_size=32).path


def images_of(bundle: Bundle, count: int) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = golden.synthetic_images(count, bundle.manifest.preprocess.size, 3, seed=3)
    return found


def apart(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_a_model_gives_torchs_vectors(bundle: Bundle) -> None:
    gpu, cpu = (Session.open(bundle, provider=provider) for provider in ("cuda", "cpu"))
    assert gpu.provider == "cuda"
    images = images_of(bundle, 8)
    found, expected = gpu.run(images), cpu.run(images)
    assert bundle.manifest.graph is not None
    if bundle.manifest.graph.precision == "fp32":
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    else:
        assert golden.agreement(found, expected).centred_cosine > 0.999


def test_by_itself_it_takes_the_gpu(tiny: Path) -> None:
    assert Session.open(tiny).provider == "cuda"


def test_an_image_has_the_same_vector_in_any_batch(bundle: Bundle) -> None:
    session, images = Session.open(bundle, provider="cuda"), images_of(bundle, 33)
    alone = np.concatenate([session.run(images[place : place + 1]) for place in range(33)])
    assert bundle.manifest.graph is not None
    most = 1e-5 if bundle.manifest.graph.precision == "fp32" else 1e-2
    for size in (2, 7, 32, 33):
        found = np.concatenate([session.run(images[start : start + size]) for start in range(0, 33, size)])
        assert apart(found, alone) < most, size


def test_threads_at_once_get_their_own_rows(bundle: Bundle) -> None:
    session, images = Session.open(bundle, provider="cuda"), images_of(bundle, 16)
    alone = [session.run(images[place : place + 1]) for place in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for place, found in enumerate(pool.map(lambda at: session.run(images[at % 16 : at % 16 + 1]), range(160))):
            assert np.array_equal(found, alone[place % 16])


def test_a_provider_that_is_not_there_is_an_error(tiny: Path) -> None:
    with pytest.raises(InferenceError, match="provider tensorrt was asked for and cannot be used here"):
        Session.open(tiny, provider="tensorrt")


def test_the_service_answers_from_the_gpu(tiny: Path) -> None:
    files = [picture(seed) for seed in range(60)]
    expected = jepakit.load(tiny, provider="cpu").embed(files, progress=False).vectors
    settings = ServeSettings(bundles=(str(tiny),), port=1, provider="cuda")
    with running(settings) as url, httpx.Client(base_url=url, timeout=60) as http:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda file: http.post("/v1/embeddings", content=file, headers=PNG), files))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-provider"] for answer in answers} == {"cuda"}
        found = np.array([answer.json()["data"][0]["embedding"] for answer in answers], np.float32)
        assert apart(found, expected) < 1e-4
        with jepakit.Client(url) as client:
            assert apart(client.embed(files, progress=False).vectors, expected) < 1e-4
            client.verify(tiny)


def test_a_new_version_takes_over_on_the_gpu(tiny: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "bundles", tmp_path / "tiny"
    shutil.copytree(tiny, folder / "tiny")
    new = jepakit.export("test_vit:random", other, image_size=48).manifest.model_id
    stop, failed = threading.Event(), list[int]()
    with serving(folder, "--no-ray", "--provider", "cuda") as url:

        def ask() -> None:
            with httpx.Client(base_url=url, timeout=60) as http:
                while not stop.is_set():
                    answer = http.post("/v1/embeddings", content=picture(0), headers=PNG)
                    if answer.status_code != 200:
                        failed.append(answer.status_code)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            done = jepakit_cli("deploy", other, folder, "--url", url)
            stop.set()
            for one in asked:
                one.result()
        assert done.returncode == 0, done.stderr
        assert not failed
        answer = httpx.post(f"{url}/v1/embeddings", content=picture(0), headers=PNG, timeout=60)
        assert answer.headers["x-model-id"] == new
        assert answer.headers["x-provider"] == "cuda"


def test_two_replicas_on_ray_share_a_gpu(tiny: Path) -> None:
    options = ("--replicas", "2", "--provider", "cuda", "--set", "num_gpus=0.49")
    with serving(tiny, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/readyz").json()["replicas_ready"] == 2
        for seed in range(20):
            answer = http.post("/v1/embeddings", content=picture(seed), headers=PNG)
            assert answer.status_code == 200
            assert answer.headers["x-provider"] == "cuda"


def test_a_killed_replica_is_replaced_on_the_gpu_and_no_image_is_lost(tiny: Path) -> None:
    files = [picture(seed) for seed in range(40)]
    right = jepakit.load(tiny, provider="cuda").embed(files, progress=False)
    with (
        serving(tiny, "--replicas", "2", "--provider", "cuda") as url,
        Load(url, files, {right.model_id: right.vectors}) as load,
    ):
        load.wait_for(2)
        before = {process.pid: process for process in processes("ray::ServeReplica")}
        next(iter(before.values())).kill()
        load.wait_for(5)
        wait_until(
            lambda: any(process.pid not in before for process in processes("ray::ServeReplica")), "it was not replaced"
        )
        wait_until(lambda: httpx.get(f"{url}/readyz").json()["replicas_ready"] == 2, "the new one is not ready")
        load.wait_for(2)
    assert load.failures == []


def test_replicas_that_ask_for_no_gpu_of_ray_have_it_all_the_same(tiny: Path) -> None:
    with serving(tiny, "--provider", "cuda") as url:
        answer = httpx.post(f"{url}/v1/embeddings", content=picture(0), headers=PNG, timeout=60)
        assert answer.headers["x-provider"] == "cuda"


def test_no_room_on_the_gpu_is_an_error_that_passes(tmp_path: Path) -> None:
    """Others may fill the card while the service runs: what fits is answered, then and after; the rest is refused."""
    bundle = jepakit.export("vit_tiny_patch16_224:random", tmp_path / "model")
    session = Session.open(bundle, provider="cuda")
    few, many = images_of(bundle, 2), np.repeat(images_of(bundle, 1), 4096, axis=0)
    before = session.run(few)
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (300 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(InferenceError, match="no room on the GPU for a batch of 4096 images"):
        session.run(many)
    assert np.array_equal(session.run(few), before)
    del hog
    torch.cuda.empty_cache()
    assert np.array_equal(session.run(few), before)
