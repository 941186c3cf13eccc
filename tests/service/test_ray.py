"""The service on Ray Serve with two replicas, behind either proxy: to clients it is one deployment."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

import jepakit
from jepakit_service.listeners import free_port
from tests.test_pipeline import PROGRAM, jepakit_cli, serving

from .conftest import Spans, picture, promising_others
from .load import Load, is_ready, processes, wait_until

PNG = {"Content-Type": "image/png"}
ASKS_WITHOUT_THE_TOKEN = "import sys; from ray._raylet import GcsClient; GcsClient(address=f'127.0.0.1:{sys.argv[1]}').internal_kv_keys(b'', None)"
"""A program that reads Ray's control store, and whoever can do that can run code."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("proxy", ["python", "haproxy"])
def test_two_replicas_are_one_deployment(
    bundle: Path, exported: Callable[..., Path], tmp_path: Path, proxy: str
) -> None:
    folder, other = tmp_path / "bundles", exported(image_size=48)
    shutil.copytree(bundle, folder / "tiny")
    old, new = (jepakit.open_bundle(path).digest for path in (bundle, other))
    options = ("--replicas", "2", "--proxy", proxy, "--log-format", "json", "--set", "access_log=all")
    with serving(folder, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        ready = wait_until(
            lambda: (seen := http.get("/readyz").json())["replicas_ready"] == 2 and seen, "no second replica"
        )
        assert ready["status"] == "ready"
        assert (http.head("/readyz").status_code, http.head("/readyz").content) == (200, b"")
        for seed in range(40):
            answer = http.post("/v1/embeddings", content=picture(seed), headers=PNG)
            assert (answer.status_code, len(answer.headers.get_list("x-request-id"))) == (200, 1)
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


def ray_session() -> Path:
    """The folder where Ray keeps its files."""
    (session,) = {
        argument.partition("=")[2]
        for argument in processes("raylet")[0].cmdline()
        if argument.startswith("--session_dir=")
    }
    return Path(session)


def replicas(http: httpx.Client) -> set[str]:
    return set(re.findall(r'jepakit_waiting_images\{model="tiny",replica="(\w+)"', http.get("/metrics").text))


def test_a_replica_that_hangs_keeps_no_probe_of_another_waiting(bundle: Path) -> None:
    with serving(bundle, "--replicas", "2") as url:

        def probe(path: str) -> httpx.Response | None:
            try:
                return httpx.get(f"{url}{path}", timeout=5)
            except httpx.TimeoutException:  # the one that hangs was asked
                return None

        def ready() -> tuple[str, int] | None:
            answer = probe("/readyz")
            return None if answer is None else (answer.json().get("status"), answer.json().get("replicas_ready"))

        wait_until(lambda: ready() == ("ready", 2), "no second replica")
        hangs = next(
            one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::ServeRepl")
        )
        hangs.suspend()
        try:  # sooner than Ray notices
            wait_until(lambda: ready() == ("degraded", 1), "no answer of the other", within_s=30)
            wait_until(lambda: (answer := probe("/metrics")) and answer.status_code == 200, "no metrics", within_s=30)
        finally:
            hangs.resume()
        wait_until(lambda: ready() == ("ready", 2), "it is not back")


def test_load_brings_a_second_replica_which_goes_with_it_and_no_request_is_lost(bundle: Path) -> None:
    scaling = ("max_replicas=2", "target_ongoing_requests=1", "upscale_delay_s=5", "downscale_delay_s=5")
    options = [word for setting in scaling for word in ("--set", setting)]
    images = [picture(seed) for seed in range(8)]
    found = jepakit.load(bundle).embed(images, progress=False)
    with serving(bundle, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert len(replicas(http)) == 1
        with Load(url, images, {found.model_id: found.vectors}, clients=6) as load:
            wait_until(lambda: http.get("/readyz").json()["replicas_ready"] == 2, "no second replica", within_s=240)
            assert len(replicas(http)) == 2
        with Load(url, images, {found.model_id: found.vectors}, clients=1) as light:
            wait_until(lambda: len(replicas(http)) == 1, "the second replica stays", within_s=240)
            light.wait_for(3)
        assert load.failures == light.failures == []


def test_a_replica_that_outgrows_its_memory_is_replaced(bundle: Path) -> None:
    """Images of 64 megapixels decode to 192 MB each; a replica at rest takes a third of the limit."""
    large = io.BytesIO()
    Image.effect_noise((1000, 1000), 50).convert("RGB").resize((8000, 8000)).save(large, "JPEG", quality=10)
    options = ("--set", "max_memory_mb=600", "--set", "threads=4", "--set", "max_pixels=64000000")
    with serving(bundle, *options) as url, httpx.Client(base_url=url, timeout=60) as http:
        (first,) = replicas(http)
        with jepakit.Client(url) as client:
            wait_until(
                lambda: len(client.embed([large.getvalue()] * 8, progress=False)) and first not in replicas(http),
                "the replica stays",
            )
        wait_until(lambda: http.get("/readyz").status_code == 200, "no other replica")


def test_what_serves_has_the_priority_of_who_started_it_and_idle_helpers_of_ray_are_gone(bundle: Path) -> None:
    with serving(bundle):
        mine = psutil.Process().nice()
        serves = [
            process for process in psutil.Process().children(recursive=True)
            if process.name().startswith(("ray::ServeRepl", "ray::ProxyActo", "haproxy"))
        ]  # fmt: skip
        assert len(serves) >= 3
        assert {process.nice() for process in serves} == {mine}
        asked = [*serves, *processes("gcs_server"), *processes("raylet")]
        assert {process.environ()["RAY_USAGE_STATS_ENABLED"] for process in asked} == {"0"}
        scripts = {
            argument for process in processes("python") for argument in process.cmdline()[:4] if "/ray/" in argument
        }
        assert {Path(script).name for script in scripts} == set()
        # A dashboard would have asked clouds' metadata services, before it could be ended.
        logs = {path.name for path in (ray_session() / "logs").iterdir()}
        assert "raylet.out" in logs
        assert "dashboard.log" not in logs


def test_replicas_log_to_the_service_s_own_standard_error_and_ports_are_told(bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [PROGRAM, "serve", bundle, "--port", str(port), "--log-format", "json", "--set", "access_log=all"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err)
        try:
            wait_until(
                lambda: "ports that other machines could reach" in (tmp_path / "out").read_text(), "no ports are told"
            )
            url = f"http://127.0.0.1:{port}/v1/embeddings"
            headers = {"X-Request-Id": "from-a-test", **PNG}
            answer = httpx.post(url, content=picture(0), headers=headers, timeout=60)
            assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["from-a-test"])
            wait_until(lambda: "from-a-test" in (tmp_path / "err").read_text(), "the request is not logged")
            accepted, refused = picture(0) + b"patient42" * 300_000, b"patient42, a PNG that is none"
            for body, status in ((accepted, 200), (refused, 415)):
                form = httpx.post(url, files={"files": ("patient42.png", body)}, timeout=60)
                assert [form.status_code, httpx.post(url, content=body, headers=PNG).status_code] == [status, status]
            (proxy,) = {process.cmdline()[3] for process in processes("haproxy")}
            files = [file for file in Path(proxy).parents[1].rglob("*") if file.is_file()]
            assert any("replica_jepakit" in file.name for file in files)
            for words in (b"- POST /", b"patient42"):
                assert not [file for file in files if words in file.read_bytes()], f"Ray keeps {words!r}"
            listed = (tmp_path / "out").read_text().partition("ready:")[0]
            agents = re.findall(r"(\d[\d.]+:\d+)  ray::\w*Agent: Ray's token of this run", listed)
            assert {httpx.get(f"http://{agent}/").status_code for agent in agents} == {401}
            (store,) = re.findall(r":(\d+)  gcs_server: Ray's token of this run", listed)
            asked = subprocess.run(
                [sys.executable, "-c", ASKS_WITHOUT_THE_TOKEN, store], capture_output=True, text=True, check=False
            )
            assert (asked.returncode, "InvalidAuthToken" in asked.stderr) == (1, True), asked
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0
    told = (tmp_path / "out").read_text()
    assert "patient42" not in told + (tmp_path / "err").read_text()
    assert "unknown" not in told
    assert re.search(r":\d+  gcs_server: Ray's token of this run", told)
    assert re.search(
        r"ray::ServeReplica:.*, nothing guards it but this host's firewall for requests past the proxy", told
    )
    ports, ready, _ = told.partition("could reach:")[2].partition("ready:")
    assert ready, "where it is comes last"
    assert f":{port} " not in ports, "the service's own port is on loopback"
    lines = [json.loads(line) for line in (tmp_path / "err").read_text().splitlines() if line.startswith("{")]
    assert any(line.get("request_id") == "from-a-test" and line["status"] == 200 for line in lines)


@pytest.fixture
def syslog() -> Iterator[socket.socket]:
    """A system log on UDP, where Ray has HAProxy log to by default; port 514 is root's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 514))
        listener.setblocking(False)
        yield listener


@pytest.mark.skipif(os.geteuid() != 0, reason="port 514 is root's")
def test_the_machine_s_own_log_learns_of_no_request(bundle: Path, syslog: socket.socket) -> None:
    with serving(bundle, "--proxy", "haproxy") as url:
        for _ in range(3):
            httpx.post(f"{url}/v1/embeddings?model=tiny", content=picture(0), headers=PNG).raise_for_status()
        assert processes("haproxy")
        with pytest.raises(BlockingIOError):
            syslog.recv(1 << 16)


@pytest.mark.parametrize("proxy", ["python", "haproxy"])
def test_large_bodies_at_once_reach_no_disk(bundle: Path, proxy: str) -> None:
    """More than fits into Ray's object store, which writes the rest to files: the replica takes them all at once."""
    body = picture(0) + os.urandom(30 << 20)

    def post(url: str) -> int:
        return httpx.post(f"{url}/v1/embeddings", content=body, headers=PNG, timeout=120).status_code

    with serving(bundle, "--proxy", proxy) as url, ThreadPoolExecutor(16) as pool:
        before, seen, looks = on_disk(), set[str](), 0
        (replica,) = processes("ray::ServeReplica")
        replica.suspend()
        asked = [pool.submit(post, url) for _ in range(16)]
        time.sleep(3)
        seen |= on_disk()
        replica.resume()
        while not all(one.done() for one in asked):
            seen |= on_disk()
            looks += 1
        assert {one.result() for one in asked} == {200}
        assert looks > 1
    assert seen <= before, seen - before


def on_disk() -> set[str]:
    """What this test's processes have open to write, including deleted files, and Ray's files, but for logs and memory."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    told = Path(f"/proc/{process.pid}/fdinfo/{descriptor.name}").read_text()
                    if int(told.partition("flags:")[2].split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
                        found.add(str(descriptor.readlink()))
    found |= {str(file) for file in ray_session().rglob("*")}
    return {
        file for file in found
        if file.startswith("/") and not file.startswith(("/dev/", "/memfd:", "/proc/")) and "/logs/" not in file
    }  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--no-ray",)], ids=["ray", "no-ray"])
def test_a_stop_answers_what_is_in_flight_though_nobody_reads_what_the_service_prints(
    bundle: Path, options: tuple[str, ...]
) -> None:
    url, body = f"http://127.0.0.1:{(port := free_port())}", picture(0)
    command = [str(PROGRAM), "serve", str(bundle), "--port", str(port), "--set", "access_log=all", *options]
    stopped = threading.Event()

    def in_two_parts() -> Iterator[bytes]:
        yield body[:100]
        assert stopped.wait(60)
        yield body[100:]

    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    try:
        wait_until(lambda: is_ready(url), "the service does not start")
        with ThreadPoolExecutor(1) as pool:
            headers = {"Content-Length": str(len(body)), **PNG}
            answer = pool.submit(
                httpx.post, f"{url}/v1/embeddings", content=in_two_parts(), headers=headers, timeout=60
            )
            time.sleep(1)
            process.terminate()
            time.sleep(2)
            stopped.set()
            assert answer.result().status_code == 200
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


def test_traces_of_the_last_requests_are_sent_before_the_end(
    bundle: Path, spans: Spans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with temporary files in a place whose name is too long for Ray's sockets."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert len(str(tmp_path)) > 30
    with serving(bundle) as url:
        for seed in range(3):
            assert httpx.post(f"{url}/v1/embeddings", content=picture(seed), headers=PNG).status_code == 200
    posts = [span for span in spans() if span.name == "POST /v1/embeddings"]
    assert len(posts) == 3


def test_why_a_model_cannot_start_is_said(bundle: Path, tmp_path: Path) -> None:
    refused = jepakit_cli("serve", promising_others(bundle, tmp_path / "other"), "--port", free_port())
    assert refused.returncode == 1
    assert "the service did not start: BundleError: tiny computes other vectors here" in refused.stderr


def test_two_services_of_a_machine_never_answer_for_each_other(bundle: Path, tmp_path: Path) -> None:
    """Not even while one of them has no replica."""
    jepakit.export("test_vit:random", tmp_path / "tiny", image_size=48)
    mine, other = (jepakit.open_bundle(path).manifest.model_id for path in (bundle, tmp_path / "tiny"))
    with serving(bundle) as url:
        (replica,) = (one for one in psutil.Process().children(recursive=True) if "ServeRepl" in one.name())
        folder = Path(replica.environ()["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        with serving(tmp_path / "tiny") as theirs, httpx.Client(timeout=60) as http:
            answer = http.post(f"{theirs}/v1/embeddings", content=picture(0), headers=PNG)
            assert answer.headers["x-model-id"] == other
            replica.kill()
            seen: dict[object, int] = {}
            while seen.get(mine, 0) < 100:
                try:
                    answer = http.post(f"{url}/v1/embeddings", content=picture(0), headers=PNG)
                    told: object = answer.headers.get("x-model-id", answer.status_code)
                except httpx.TransportError:
                    told = "no answer"
                seen[told] = seen.get(told, 0) + 1
                time.sleep(0.03)
        assert other not in seen
        assert len(seen) > 1, "its death was not noticed"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "whoever is on this machine can speak to HAProxy"


def test_a_client_that_never_sends_its_body_is_let_go(bundle: Path) -> None:
    """HAProxy alone would keep it for an hour."""
    with (
        serving(bundle, "--set", "body_timeout_s=2", "--set", "request_timeout_s=2") as url,
        socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as client,
    ):
        client.sendall(b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.fixture
def started(bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A ready service with its output in `out`, and all its child processes; all of them end, whatever happens."""
    with (tmp_path / "out").open("w") as out:
        command = [str(PROGRAM), "serve", str(bundle), "--port", str(free_port())]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        wait_until(lambda: "ready:" in (tmp_path / "out").read_text(), "the service does not start")
        yield process, psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()


@pytest.mark.parametrize("ended", ["asked to stop", "killed"])
def test_a_service_whose_replica_hangs_while_it_starts_can_be_ended(bundle: Path, tmp_path: Path, ended: str) -> None:
    def replicas() -> list[psutil.Process]:
        family = psutil.Process(process.pid).children(recursive=True)
        return [one for one in family if any("ServeReplica" in word for word in one.cmdline())]

    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [str(PROGRAM), "serve", str(bundle), "--port", str(free_port())], stdout=out, stderr=out
        )
    wait_until(replicas, "no replica starts")
    family = psutil.Process(process.pid).children(recursive=True)
    for replica in replicas():
        replica.suspend()
    if ended == "killed":
        process.kill()
    else:
        process.terminate()
    assert process.wait(timeout=60) == (-signal.SIGKILL if ended == "killed" else 0)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_nothing_of_ray_outlives_a_killed_service(
    started: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, family = started
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert any("gcs_server" in one.name() for one in family)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_death_of_ray_s_control_store_or_node_ends_the_service(
    started: tuple[subprocess.Popen[bytes], list[psutil.Process]], name: str, tmp_path: Path
) -> None:
    """Whoever started it starts it anew: nothing else would."""
    process, family = started
    (killed,) = (one for one in family if one.name() == name)
    killed.kill()
    assert process.wait(timeout=120) == 1
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert "Traceback" not in (tmp_path / "out").read_text()
