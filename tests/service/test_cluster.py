"""The application of docs/deploy/serve.yaml on a cluster that `ray start` made: nothing of jepakit starts or ends it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import yaml

import jepakit
from jepakit_service.http.keys import new_key
from jepakit_service.listeners import free_port
from jepakit_service.ray_environment import NODE_ENVIRONMENT
from tests.test_pipeline import ROOT, jepakit_cli

from .conftest import picture
from .load import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent


class Cluster(NamedTuple):
    """A node of Ray's, as an operator starts one."""

    dashboard: str
    environment: dict[str, str]
    output: Path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    gcs, dashboard = free_port(), free_port()
    environment = {**os.environ, **NODE_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's own paths are too long for Ray's sockets
    command = f"start --head --block --port {gcs} --dashboard-port {dashboard} --num-cpus 3 --temp-dir {folder} --object-store-memory 104857600"
    output = tmp_path / "ray.log"
    with output.open("w") as stream:
        node = psutil.Popen(
            [BIN / "ray", *command.split()], env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield Cluster(f"http://127.0.0.1:{dashboard}", environment, output)
    finally:
        family = [node]
        with contextlib.suppress(psutil.NoSuchProcess):  # it may not have started
            family += node.children(recursive=True)
        node.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=15)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_shipped_config_serves_deploys_and_logs(
    cluster: Cluster, bundle: Path, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, other, port = tmp_path / "bundles", exported(image_size=48), free_port()
    shutil.copytree(bundle, watched / "tiny")
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(f"{line}\n")
    config = yaml.safe_load((ROOT / "docs" / "deploy" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {
        "bundles": [str(watched)],
        "api_key_file": str(tmp_path / "keys"),
        "threads": 1,
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    deploy = [str(BIN / "serve"), "deploy", str(tmp_path / "serve.yaml"), "--address", cluster.dashboard]

    def answered() -> bool:
        try:
            return httpx.get(f"{cluster.dashboard}/api/version", timeout=5).status_code < 500
        except httpx.TransportError:
            return False

    wait_until(answered, "the dashboard does not answer")
    subprocess.run(deploy, env=cluster.environment, check=True)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["replicas_ready"] == 2

    wait_until(ready, "the two replicas are not ready", within_s=240)
    headers = {"Content-Type": "image/png", "X-Request-Id": "from-a-test"}
    assert httpx.post(f"{url}/v1/embeddings", content=picture(0), headers=headers).status_code == 401
    monkeypatch.setenv("JEPAKIT_API_KEY", key)
    with jepakit.Client(url) as client:
        old = jepakit.load(bundle).embed([picture(0)], progress=False)
        assert client.embed([picture(0)], progress=False).model_id == old.model_id
        done = jepakit_cli("deploy", other, watched, "--url", url)
        assert done.returncode == 0, done.stderr
        assert client.embed([picture(0)], progress=False).model_id == jepakit.open_bundle(other).manifest.model_id

    def logged() -> list[dict[str, object]]:
        lines = [line[line.index("{") :] for line in cluster.output.read_text().splitlines() if '"request_id"' in line]
        return [told for line in lines if (told := json.loads(line))["request_id"] == "from-a-test"]

    (told,) = wait_until(logged, "the refused request is not logged", within_s=10)
    assert told["status"] == 401
