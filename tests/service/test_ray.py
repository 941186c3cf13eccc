"""The service on Ray Serve with two replicas, behind either proxy: one deployment to whoever asks."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

import jepakit
from tests.test_pipeline import jepakit_cli, serving

from .conftest import picture

PNG = {"Content-Type": "image/png"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def eventually(wanted: Any, *, within_s: float = 60) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := wanted()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


@pytest.mark.parametrize("proxy", ["python", "haproxy"])
def test_two_replicas_are_one_deployment(bundle: Path, tmp_path: Path, proxy: str) -> None:
    folder, other = tmp_path / "bundles", tmp_path / "tiny"
    shutil.copytree(bundle, folder / "tiny")
    jepakit.export("test_vit:random", other, image_size=48)
    old, new = (jepakit.open_bundle(path).digest for path in (bundle, other))
    options = ("--replicas", "2", "--proxy", proxy, "--log-format", "json", "--set", "access_log=all")
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        ready = eventually(lambda: (seen := http.get("/readyz").json())["replicas_ready"] == 2 and seen)
        assert ready["status"] == "ready"
        for seed in range(40):
            assert http.post("/v1/embeddings", content=picture(seed), headers=PNG).status_code == 200
        text = http.get("/metrics").text
        images = {
            replica: float(count)
            for replica, count in re.findall(
                r'jepakit_images_total\{model="tiny",replica="(\w+)",result="ok"\} (\S+)', text
            )
        }
        assert len(images) == 2
        assert sum(images.values()) == 40

        done = jepakit_cli("deploy", other, folder, "--url", url)
        assert done.returncode == 0, done.stderr
        assert new in done.stdout
        for _ in range(20):
            assert http.get("/v1/models/tiny").json()["serving"] == [new]

        (folder / "tiny" / "model.onnx").unlink()
        refused = jepakit_cli("deploy", folder / "tiny", folder, "--url", url)
        assert refused.returncode == 2, refused.stderr
        assert http.post("/v1/embeddings", content=picture(0), headers=PNG).headers["x-model-id"] == (
            jepakit.open_bundle(other).manifest.model_id
        )
    assert old != new


@contextmanager
def asking(url: str, images: list[bytes], *, at_a_time: int) -> Iterator[None]:
    """Ask for the images over and over; what is answered with an error ends the test."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            while not stop.is_set():
                files = [("files", image) for image in images]
                http.post("/v1/embeddings", files=files).raise_for_status()

    with ThreadPoolExecutor(at_a_time) as pool:
        asked = [pool.submit(ask) for _ in range(at_a_time)]
        try:
            yield
        finally:
            stop.set()
        for one in asked:
            one.result()


def replicas(http: httpx.Client) -> set[str]:
    return set(re.findall(r'jepakit_waiting_images\{model="tiny",replica="(\w+)"', http.get("/metrics").text))


def test_load_brings_a_second_replica(bundle: Path) -> None:
    options = ("--set", "max_replicas=2", "--set", "target_ongoing_requests=1")
    with serving(bundle, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert len(replicas(http)) == 1
        with asking(url, [picture(seed) for seed in range(8)], at_a_time=6):
            eventually(lambda: http.get("/readyz").json()["replicas_ready"] == 2, within_s=240)
            assert len(replicas(http)) == 2


def test_a_replica_that_outgrows_its_memory_is_replaced(bundle: Path) -> None:
    """Images of 64 megapixels decode to 192 MB each; a replica at rest takes a third of the limit."""
    large = io.BytesIO()
    Image.effect_noise((1000, 1000), 50).convert("RGB").resize((8000, 8000)).save(large, "JPEG", quality=10)
    options = ("--set", "max_memory_mb=600", "--set", "threads=4", "--set", "max_pixels=64000000")
    with serving(bundle, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        (first,) = replicas(http)
        with jepakit.Client(url) as client:
            eventually(
                lambda: len(client.embed([large.getvalue()] * 8, progress=False)) and first not in replicas(http)
            )
        assert eventually(lambda: http.get("/readyz").status_code == 200)


def test_what_serves_has_the_priority_of_who_started_it(bundle: Path) -> None:
    with serving(bundle):
        mine = psutil.Process().nice()
        serves = [
            process for process in psutil.Process().children(recursive=True)
            if process.name().startswith(("ray::ServeRepl", "ray::ProxyActo", "haproxy"))
        ]  # fmt: skip
        assert len(serves) >= 3
        assert {process.nice() for process in serves} == {mine}


def test_replicas_log_to_the_service_s_own_standard_error_and_ports_are_told(bundle: Path, tmp_path: Path) -> None:
    import subprocess

    from tests.test_pipeline import PROGRAM, free_port

    port = free_port()
    command = [PROGRAM, "serve", bundle, "--port", str(port), "--log-format", "json", "--set", "access_log=all"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err)
        try:
            eventually(lambda: "ports that other machines could reach" in (tmp_path / "out").read_text())
            url = f"http://127.0.0.1:{port}/v1/embeddings"
            headers = {"X-Request-Id": "from-a-test", **PNG}
            assert httpx.post(url, content=picture(0), headers=headers, timeout=60).status_code == 200
            eventually(lambda: "from-a-test" in (tmp_path / "err").read_text())
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0
    told = (tmp_path / "out").read_text()
    assert re.search(r":\d+  gcs_server: Ray's token of this run", told)
    assert f":{port} " not in told.split("could reach:")[1], "the service's own port is on loopback"
    lines = [json.loads(line) for line in (tmp_path / "err").read_text().splitlines() if line.startswith("{")]
    assert any(line.get("request_id") == "from-a-test" and line["status"] == 200 for line in lines)
