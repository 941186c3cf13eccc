"""The shipped proxy and monitoring configurations, run for real: Debian's nginx, prometheus and promtool.

apt-get install --no-install-recommends nginx prometheus openssl systemd
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, generate_latest

import jepakit
from jepakit_service.http.routes import REPEATED_AS
from jepakit_service.listeners import free_port
from jepakit_service.telemetry.metrics import Metrics, merge
from tests.service.conftest import picture
from tests.test_docker import systemd_unit
from tests.test_pipeline import serving

pytestmark = pytest.mark.slow
DOCKER = Path(__file__).parents[1] / "docker"
STRIPPED = (
    "x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id",
    "serve-multiplexed-model-id", "x-session-id",
)  # fmt: skip
CONNECTIONS = 32  # `limit_conn per_address` of the shipped file


def program(name: str) -> str:
    """The path of a Debian program; a missing one is a failure, not a skip."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, f"{name} is not installed: apt-get install --no-install-recommends nginx prometheus openssl systemd"
    return found


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """`text` with every old part replaced by its new one, in one pass; a missing old part is an error."""
    for old in changes:
        assert old in text, f"the shipped file no longer holds {old!r}"
    return re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)


class Proxy:
    """nginx with the shipped configuration, except for its paths, port and upstream address."""

    def __init__(
        self, folder: Path, upstream: int, changes: Mapping[str, str] | None = None, listen: str = "ssl"
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.certificate = folder / "tls" / "fullchain.pem"
        for name in ("tls", "tmp"):
            (folder / name).mkdir()
        subprocess.run(
            [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-keyout", folder / "tls" / "key.pem", "-out", self.certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        put_in = {
            " /tls/": f" {folder}/tls/",
            " /tmp/": f" {folder}/tmp/",
            "/dev/stdout": f"{folder}/access.log",
            "listen 8443 ssl": f"listen 127.0.0.1:{self.port} {listen}",
            "server jepakit:8000": f"server 127.0.0.1:{upstream}",
        }
        text = replaced((DOCKER / "proxy" / "nginx.conf").read_text(), put_in | dict(changes or {}))
        (folder / "nginx.conf").write_text(text)
        with (folder / "errors.log").open("w") as errors:
            self._process = subprocess.Popen(
                [program("nginx"), "-c", folder / "nginx.conf", "-e", "stderr", "-g", "daemon off; user root;"],
                stderr=errors,
            )

    def __enter__(self) -> Proxy:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                assert self._process.poll() is None, (self.folder / "errors.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(timeout=10) == 0

    def reload(self, changes: Mapping[str, str]) -> None:
        """Do what `nginx -s reload` does, with a changed file; returns once no old worker accepts connections."""
        file, master = self.folder / "nginx.conf", psutil.Process(self._process.pid)
        file.write_text(replaced(file.read_text(), changes))
        before = master.children()
        master.send_signal(signal.SIGHUP)
        wait_for(lambda: all(map(_is_going, before)), bool)

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def raw(self) -> ssl.SSLSocket:
        """A raw TLS connection, to send what no client library would."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.trust.wrap_socket(plain, server_hostname="localhost")

    def get(self, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of a request whose path is sent unchanged."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.trust)
        try:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def files(self) -> list[str]:
        """What the workers hold open below /tmp, including deleted files, and what is there."""
        found = [str(path) for path in (self.folder / "tmp").rglob("*") if path.is_file() and path.name != "nginx.pid"]
        for worker in psutil.Process(self._process.pid).children():
            for handle in Path(f"/proc/{worker.pid}/fd").iterdir():
                target = str(handle.readlink())
                if target.startswith(f"{self.folder}/tmp/") and not target.endswith("nginx.pid"):
                    found.append(target)
        return found


def _is_going(worker: psutil.Process) -> bool:
    """Whether an nginx worker has ended, or only finishes what it had begun."""
    try:
        return "shutting down" in " ".join(worker.cmdline()) or worker.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Echo:
    """An upstream that answers with the headers it received, and records them; `while_answering` runs meanwhile."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.while_answering: Callable[[], None] = lambda: None
        echo = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                echo.seen.append((self.path, len(body)))
                echo.while_answering()
                answer = json.dumps([[name.lower(), value] for name, value in self.headers.items()]).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Echo:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@pytest.fixture
def proxy(tmp_path: Path, echo: Echo) -> Iterator[Proxy]:
    with Proxy(tmp_path, echo.port) as server:
        yield server


def test_an_embedding_over_tls_is_the_direct_one(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(seed) for seed in range(3)]
    (tmp_path / "proxy").mkdir()
    with serving(exported(image_size=32), "--no-ray") as url:
        with jepakit.Client(url) as client:
            direct = client.embed(images, progress=False)
        with Proxy(tmp_path / "proxy", int(url.rpartition(":")[2])) as proxy:
            monkeypatch.setenv("SSL_CERT_FILE", str(proxy.certificate))
            with jepakit.Client(f"https://localhost:{proxy.port}", deadline_s=20) as client:
                through = client.embed(images, progress=False)
                assert client.verify(exported(image_size=32)) < 1e-5
            assert proxy.get("/readyz")[0] == 200
    np.testing.assert_array_equal(through.vectors, direct.vectors)
    assert through.model_id == direct.model_id


def test_headers_that_lift_the_services_limits_do_not_arrive_and_the_key_does(proxy: Proxy) -> None:
    sent = dict.fromkeys(STRIPPED, "1") | {"Authorization": "Bearer jk_x", "X-Request-Id": "mine-1"}
    status, body = proxy.get("/v1/models?model=a", sent)
    assert status == 200
    arrived = dict(json.loads(body))
    assert not arrived.keys() & {*STRIPPED, *(name.replace("_", "-") for name in STRIPPED)}
    assert arrived["authorization"] == "Bearer jk_x"
    assert arrived["x-request-id"] == "mine-1"
    assert arrived["x-forwarded-for"] == "127.0.0.1"


def test_a_request_without_a_host_arrives_with_one(proxy: Proxy) -> None:
    """As health checks of load balancers send them, in HTTP/1.0: in HTTP/1.1, a service may refuse it."""
    with proxy.raw() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        with http.client.HTTPResponse(connection) as answer:
            answer.begin()
            assert answer.status == 200
            assert dict(json.loads(answer.read()))["host"] == "_"


def test_an_upgrade_that_a_client_offers_does_not_arrive(proxy: Proxy) -> None:
    """Ray's own proxy, which clusters have, would lose the request's body."""
    status, body = proxy.get("/v1/models", {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"})
    assert status == 200
    assert "upgrade" not in dict(json.loads(body))


def test_a_request_id_that_is_none_is_replaced(proxy: Proxy) -> None:
    for bad in ("a" * 65, "a b", "<script>"):
        _, body = proxy.get("/v1/models", {"X-Request-Id": bad})
        assert re.fullmatch("[0-9a-f]{32}", dict(json.loads(body))["x-request-id"])


@pytest.mark.parametrize(
    "path", ["/-/routes", "/-/healthz", "//-/routes", "/%2d/routes", "/v1/../-/routes", "/metrics", "//metrics"]
)
def test_rays_own_routes_and_the_metrics_are_not_there(proxy: Proxy, echo: Echo, path: str) -> None:
    status, body = proxy.get(path)
    assert status == 404
    assert json.loads(body)["error"]["code"] == "no_such_route"
    assert echo.seen == []


def test_headers_are_bounded_in_one_line_and_in_all(proxy: Proxy, echo: Echo) -> None:
    assert proxy.get("/v1/models", {f"X-{n}": "a" * 4000 for n in range(3)})[0] == 200
    assert proxy.get("/v1/models", {f"X-{n}": "a" * 1000 for n in range(20)})[0] == 400
    assert proxy.get("/v1/models", {"X-Big": "a" * (8 << 10)})[0] == 400
    assert proxy.get(f"/v1/models?{'a' * (8 << 10)}")[0] == 414
    assert len(echo.seen) == 1


def test_a_header_of_50_mb_is_refused_while_it_is_being_sent(proxy: Proxy, echo: Echo) -> None:
    with proxy.raw() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: ")
        connection.settimeout(5)
        sent, answer = 0, b""
        try:
            while sent < 50 << 20:
                sent += connection.send(b"a" * 65536)
                connection.settimeout(0.001)
                try:
                    answer += connection.recv(4096)
                except TimeoutError:
                    connection.settimeout(5)
                    continue
                break
        except OSError:
            pass  # it has closed the connection
    assert answer.startswith(b"HTTP/1.1 400") or answer == b""
    assert sent < 50 << 20
    assert echo.seen == []
    assert proxy.get("/v1/models")[0] == 200


def unanswered(connection: ssl.SSLSocket) -> bool:
    """Whether the connection closes without a byte of an answer."""
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


def test_a_header_that_does_not_come_is_given_up_after_10_s_without_an_answer(proxy: Proxy) -> None:
    started = time.monotonic()
    with proxy.raw() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
        assert unanswered(connection)
    assert 8 < time.monotonic() - started < 15
    (line,) = wait_for(proxy.log, lambda lines: len(lines) == 1)
    assert line["status"] == 408


def test_a_body_that_pauses_is_given_up_without_an_answer(tmp_path: Path, echo: Echo) -> None:
    with Proxy(tmp_path, echo.port, {"client_body_timeout 30s": "client_body_timeout 1s"}) as proxy:
        with proxy.raw() as connection:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na")
            assert unanswered(connection)
        (line,) = wait_for(proxy.log, lambda lines: len(lines) == 1)
    assert line["status"] == 408
    assert echo.seen == []


def test_more_requests_at_once_than_one_address_may_have_are_told_to_come_back(proxy: Proxy, echo: Echo) -> None:
    with ExitStack() as open_requests:
        for _ in range(CONNECTIONS):
            connection = open_requests.enter_context(proxy.raw())
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        answer = wait_for(lambda: proxy.get("/v1/models"), lambda got: got[0] == 429)
        assert json.loads(answer[1])["error"]["code"] == "too_many_connections"
        assert "too many requests at once" in json.loads(proxy.get("/v2/models/tiny/ready")[1])["error"], (
            "the protocol's"
        )
        for path, repeated in REPEATED_AS.items():  # Voyage's client retries only then
            told = json.loads(proxy.get(path)[1])
            assert told["error"]["code"] == "too_many_connections"
            assert told[repeated] == told["error"]["message"]
            assert set(told) == {"error", repeated}
        assert proxy.get("/readyz")[0] == 200
    wait_for(lambda: proxy.get("/v1/models"), lambda got: got[0] == 200)
    # Not one of the slow bodies has kept the service busy.
    assert {size for _, size in echo.seen} == {0}


BALANCER = {"# set_real_ip_from 192.0.2.1": "set_real_ip_from 127.0.0.1", "# real_ip_header": "real_ip_header"}
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"


def test_clients_behind_one_balancer_have_limits_of_their_own(tmp_path: Path, echo: Echo) -> None:
    with Proxy(tmp_path, echo.port, BALANCER) as proxy, ExitStack() as open_requests:
        for _ in range(CONNECTIONS):
            connection = open_requests.enter_context(proxy.raw())
            connection.sendall(POST + b"X-Forwarded-For: 10.0.0.1\r\n\r\n")
        # What a client had put there itself comes before what the balancer adds, and does not count.
        for sent in ("10.0.0.1", "10.0.0.2, 10.0.0.1"):
            mine = {"X-Forwarded-For": sent}
            wait_for(partial(proxy.get, "/v1/models", mine), lambda got: got[0] == 429)
        status, body = proxy.get("/v1/models", {"X-Forwarded-For": "10.0.0.2"})
        assert status == 200
        assert dict(json.loads(body))["x-forwarded-for"] == "10.0.0.2"
        lines = wait_for(proxy.log, lambda lines: lines and lines[-1]["status"] == 200)
    assert lines[-1]["client"] == "10.0.0.2"


def test_the_address_that_a_stranger_gives_himself_does_not_count(proxy: Proxy) -> None:
    _, body = proxy.get("/v1/models", {"X-Forwarded-For": "10.0.0.2"})
    assert dict(json.loads(body))["x-forwarded-for"] == "127.0.0.1"


def test_a_balancer_may_tell_the_clients_address_by_the_proxy_protocol(tmp_path: Path, echo: Echo) -> None:
    changes = {**BALANCER, "# real_ip_header X-Forwarded-For": "real_ip_header proxy_protocol"}
    del changes["# real_ip_header"]
    with Proxy(tmp_path, echo.port, changes, listen="ssl proxy_protocol") as proxy:
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
        plain.sendall(b"PROXY TCP4 10.0.0.2 127.0.0.1 4444 8443\r\n")
        with proxy.trust.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        (line,) = wait_for(proxy.log, lambda lines: len(lines) == 1)
    assert line["client"] == "10.0.0.2"


def test_a_machine_is_taken_out_and_put_back_without_a_lost_request(tmp_path: Path, echo: Echo) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def stay() -> None:
        arrived.set()
        assert go_on.wait(20)

    with Echo() as other:
        one, two = (f"server 127.0.0.1:{server.port}" for server in (echo, other))
        with Proxy(tmp_path, 0, {"server jepakit:8000": f"{one}; {two} down"}) as proxy, ThreadPoolExecutor(1) as slow:
            echo.while_answering = stay
            at_work = slow.submit(proxy.get, "/v1/embeddings", {}, b"x")
            assert arrived.wait(10)
            proxy.reload({f"{one}; {two} down": f"{one} down; {two}"})
            assert [proxy.get("/v1/models")[0] for _ in range(4)] == [200] * 4
            assert [len(server.seen) for server in (echo, other)] == [1, 4]
            go_on.set()
            assert at_work.result(timeout=10)[0] == 200
            proxy.reload({f"{one} down; {two}": f"{one}; {two}"})
            wait_for(lambda: (proxy.get("/v1/models")[0], len(echo.seen)), lambda told: told == (200, 2))


def wait_for(ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 10) -> Any:
    """Wait for the first good answer; AssertionError with the last one otherwise."""
    deadline = time.monotonic() + seconds
    while not good(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    return answer


def test_a_body_above_the_limit_is_refused_by_its_declared_length(proxy: Proxy, echo: Echo) -> None:
    with proxy.raw() as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 67108865\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"body_too_large"' in answer
    assert echo.seen == []


def test_a_body_where_requests_are_not_counted_is_refused_unread(proxy: Proxy, echo: Echo) -> None:
    for path in (b"/healthz", b"/readyz"):
        with proxy.raw() as connection:
            connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 67108864\r\n\r\na")
            assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    assert echo.seen == []


@pytest.mark.parametrize("megabytes", [8, 64])
def test_a_body_stays_in_memory(proxy: Proxy, echo: Echo, megabytes: int) -> None:
    files: list[str] = []
    echo.while_answering = lambda: files.extend(proxy.files())
    assert proxy.get("/v1/embeddings", {}, b"\0" * (megabytes << 20))[0] == 200
    assert echo.seen == [("/v1/embeddings", megabytes << 20)]
    assert files == []
    assert proxy.files() == []


def test_the_test_above_would_see_a_body_on_the_disk(tmp_path: Path, echo: Echo) -> None:
    small = {"client_body_buffer_size 64m": "client_body_buffer_size 8k"}
    with Proxy(tmp_path, echo.port, small) as proxy:
        files: list[str] = []
        echo.while_answering = lambda: files.extend(proxy.files())
        assert proxy.get("/v1/embeddings", {}, b"\0" * (8 << 20))[0] == 200
    assert files


def test_the_log_holds_no_query_and_no_header(proxy: Proxy) -> None:
    secret = "patient-42"
    proxy.get(f"/v1/models?model={secret}", {"Authorization": f"Bearer {secret}", "User-Agent": secret})
    (line,) = wait_for(proxy.log, lambda lines: len(lines) == 1)
    assert line["path"] == "/v1/models"
    assert line["status"] == 200
    assert secret not in (proxy.folder / "access.log").read_text()


def test_a_service_that_is_away_is_told_as_such_and_the_query_is_not_logged(tmp_path: Path) -> None:
    with Proxy(tmp_path, free_port()) as proxy:
        answer = httpx.get(f"https://localhost:{proxy.port}/v1/models?model=patient-42", verify=proxy.trust)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "unreachable"
        of_protocol = httpx.get(f"https://localhost:{proxy.port}/v2/repository/index", verify=proxy.trust)
        assert of_protocol.json() == {"error": "the service does not answer: try again shortly"}
        line, _ = wait_for(proxy.log, lambda lines: len(lines) == 2)
    assert line["upstream_status"] == "502"
    assert "patient-42" not in (tmp_path / "errors.log").read_text()


KEY = "jk_prometheus"


@contextmanager
def exporting() -> Iterator[int]:
    """A server of /metrics, behind KEY: the service's own registry at work, and NVIDIA's two; the port."""
    metrics = Metrics()
    model = metrics.of_model("scans")
    metrics.model_info.labels("scans", "0123", "4567", "fp32", "cpu").set(1)
    metrics.ready.set(1)
    gpu = CollectorRegistry()
    for name in ("DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED"):
        Gauge(name, name, ["gpu"], registry=gpu).labels("0").set(50)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["authorization"] == f"Bearer {KEY}"
            metrics.requests.labels("/v1/embeddings", 200).inc()
            metrics.request_seconds.labels("/v1/embeddings").observe(0.5)
            metrics.refused.labels("overloaded").inc()
            model.decoded(0.01)
            model.answered(1, 1)
            model.ran(1, [0.1], 0.2)
            self.send_response(200 if allowed else 401)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(merge({"r1": metrics.families()}) + generate_latest(gpu) if allowed else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def dashboard_queries() -> dict[str, str]:
    """`{panel and letter: PromQL}` of the shipped dashboard, with Grafana's variables filled in."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "jepakit.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def test_prometheus_scrapes_with_its_key_and_every_panel_of_the_dashboard_has_data(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with exporting() as port:
        put_in = {
            "/run/secrets/jepakit.key": str(tmp_path / "key"),
            "jepakit:8000": f"127.0.0.1:{port}",
            "scrape_interval: 15s": "scrape_interval: 1s\n  scrape_timeout: 1s",
        }
        text = replaced((DOCKER / "prometheus" / "prometheus.yml").read_text(), put_in)
        (tmp_path / "prometheus.yml").write_text(text)
        shutil.copy(DOCKER / "prometheus" / "rules.yml", tmp_path)
        promtool("check", "config", tmp_path / "prometheus.yml")
        listen = free_port()
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [program("prometheus"), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/db",
                 f"--web.listen-address=127.0.0.1:{listen}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listen}", timeout=10) as api:
                wait_for(lambda: asked(api, "jepakit_ready"), bool, seconds=60)
                for name, query in dashboard_queries().items():
                    values = wait_for(partial(asked, api, query), bool, seconds=20)
                    assert all(np.isfinite(values)), f"{name}: {query} gave {values}"
        finally:
            process.terminate()
            process.wait(timeout=20)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_for_its_fault_and_not_for_less() -> None:
    file = Path(__file__).with_name("prometheus_rules.yml")
    promtool("test", "rules", file)
    (group,) = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    wanted = {True: set[str](), False: set[str]()}
    for case in yaml.safe_load(file.read_text())["tests"]:
        for rule in case["alert_rule_test"]:
            wanted["exp_alerts" in rule].add(rule["alertname"])
    assert wanted[True] == wanted[False] == {rule["alert"] for rule in group["rules"]}


def test_prometheus_takes_the_lines_that_send_alerts_on(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    put_in = {"# alerting:": "alerting:", "/run/secrets/jepakit.key": str(tmp_path / "key")}
    text = replaced((DOCKER / "prometheus" / "prometheus.yml").read_text(), put_in)
    assert yaml.safe_load(text)["alerting"]["alertmanagers"]
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(DOCKER / "prometheus" / "rules.yml", tmp_path)
    promtool("check", "config", tmp_path / "prometheus.yml")


def asked(api: httpx.Client, query: str) -> list[float]:
    """The values that Prometheus returns for a query; none until it is up."""
    try:
        answer = api.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, answer.text
    return [float(row["value"][1]) for row in answer.json()["data"]["result"]]


def test_systemd_finds_nothing_in_the_unit_of_the_docs(tmp_path: Path) -> None:
    unit = tmp_path / "jepakit.service"
    unit.write_text(replaced(systemd_unit(), {"/opt/jepakit/bin/jepakit": program("true")}))
    checked = subprocess.run([program("systemd-analyze"), "verify", unit], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
