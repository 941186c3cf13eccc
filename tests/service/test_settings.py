"""One class of settings, three sources: flags, JEPAKIT_SERVE_* variables, a YAML file; in this order of precedence."""

from __future__ import annotations

import asyncio
import errno
import hmac
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn, Self, get_args, get_origin

import psutil
import pytest
import yaml

from jepakit._frontdoor import serve
from jepakit._ray import _LONGEST_PLACE, own_folder
from jepakit.cli.settings import settings_of
from jepakit.errors import ConfigError, ServeError
from jepakit_service import app, listeners, single
from jepakit_service.http import keys
from jepakit_service.http.keys import KeyFile, new_key
from jepakit_service.listeners import announce_when_ready, check_open_files, check_port_is_free, free_port, own_url
from jepakit_service.ray_environment import environment
from jepakit_service.settings import SERVICE, ServeSettings, as_yaml, load

HEALTHCHECK = Path(__file__).parents[2] / "docker" / "healthcheck.py"


def test_flags_win_over_the_environment_and_it_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("bundles: [a, b]\nport: 1001\nreplicas: 2\nmax_images: 7\n")
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "1002")
    monkeypatch.setenv("JEPAKIT_SERVE_REPLICAS", "3")
    monkeypatch.setenv("JEPAKIT_SERVE_PROXY", "python")
    found = load({"replicas": 4}, file)
    assert (found.bundles, found.port, found.replicas, found.proxy, found.max_images) == (
        ("a", "b"),
        1002,
        4,
        "python",
        7,
    )


@pytest.mark.parametrize("name", [name for name, field in ServeSettings.model_fields.items() if field.default is None])
def test_null_undoes_what_a_variable_or_a_file_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"bundles: [a]\n{name}: 2\n" if name != "api_key_file" else f"bundles: [a]\n{name}: {file}\n")
    assert getattr(load({}, file), name) is not None
    assert getattr(load(settings_of([f"{name}=null"]), file), name) is None
    monkeypatch.setenv(f"JEPAKIT_SERVE_{name.upper()}", "null")
    assert getattr(load({}, file), name) is None
    with pytest.raises(ConfigError, match="port = 'null'"):
        load({"port": "null"}, file)


def test_several_words_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPAKIT_SERVE_BUNDLES", "one,two")
    assert load({}).bundles == ("one", "two")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JEPAKIT_SERVE_BUNDLES", "~/one,two")
    (tmp_path / "keys").touch()
    found = load({"api_key_file": "~/keys"})
    assert (found.bundles, found.api_key_file) == ((f"{tmp_path}/one", "two"), f"{tmp_path}/keys")


def test_the_environment_counts_for_load_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "1002")
    assert ServeSettings(bundles=("a",)).port == 8000


def test_what_is_printed_can_be_read_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    serve({"bundles": ("a", "b"), "expect": ("0" * 64,), "max_memory_mb": 900}, print_config=True)
    printed = capfd.readouterr().out
    (tmp_path / "serve.yaml").write_text(printed)
    assert load({}, tmp_path / "serve.yaml") == ServeSettings(bundles=("a", "b"), expect=("0" * 64,), max_memory_mb=900)
    assert set(yaml.safe_load(printed)) == set(ServeSettings.model_fields)
    assert "# Maximum number of images in one request." in printed


def test_the_settings_are_printed_without_a_bundle_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve.yaml").write_text("max_images: 7\n")
    serve({"port": 1001}, tmp_path / "serve.yaml", print_config=True)
    printed = capfd.readouterr().out
    told = yaml.safe_load(printed)
    assert (told["bundles"], told["port"], told["max_images"]) == ([], 1001, 7)
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(ConfigError, match="name a bundle to serve"):
        load({}, tmp_path / "printed.yaml")


def settings_of_the_page() -> dict[str, str]:
    """The rows of the table in docs/operate.md: each setting and its documented default."""
    page = (Path(__file__).parents[2] / "docs" / "operate.md").read_text().partition("## Every setting")[2]
    found: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`.+?) \| (.+?) \| .+ \|$", page.partition("\n## ")[0], re.MULTILINE):
        defaults = default.split("; ")
        found |= zip(names.split(", "), defaults * (len(names.split(", ")) // len(defaults)), strict=True)
    return {name.strip("`"): default for name, default in found.items()}


def test_the_page_on_operation_has_every_setting_with_its_default() -> None:
    said = settings_of_the_page()
    assert set(said) == set(ServeSettings.model_fields)
    for name, field in ServeSettings.model_fields.items():
        if name not in ("bundles", "proxy", "threads"):  # needed; depends on the system; on the machine
            default = {None: "none", (): "none"}.get(field.default, f"`{str(field.default).lower()}`")
            assert said[name] == default, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bundles: [a]\nprot: 1\n", "did you mean port"),
        ("bundles: [a]\nport: http\n", "port"),
        ("- a\n", "holds no settings"),
        ("bundles: [a\n", "is not YAML"),
        ("port: 1\n", "name a bundle"),
        ("bundles: [a]\nhost: 0.0.0.0\n", "--api-key-file"),
        *(
            (
                f"bundles: [a]\nproxy: haproxy\nhost: {host}\n",
                f"host {host.strip(chr(39))} is not one of 127.0.0.1, .*--proxy python",
            )
            for host in ("192.0.2.2", "127.0.0.2", "'::1'", "'::'")
        ),
        ("bundles: [a]\nreplicas: 3\nmax_replicas: 2\n", "less than replicas"),
        *(
            (
                f"bundles: [a]\nray: false\n{name}: 2\n",
                f"{name} = 2.* is for Ray Serve: leave it out, or leave out --no-ray",
            )
            for name in ("replicas", "max_replicas", "num_gpus")
        ),
        ("bundles: [a]\n1: a\n", "unknown setting '1'"),
        ("bundles: [a]\n? [b]\n: c\n", "is not YAML"),
        ("port: 1\nbundles: [a]\nport: 2\n", "sets 'port' 2 times"),
        ("bundles: [a]\ndrain_s: .inf\n", "drain_s = inf: input should be a finite number"),
        ("bundles: [a]\nrequest_timeout_s: .nan\n", "request_timeout_s = nan"),
        ("bundles: [a]\nreplicas: yes\n", "replicas = True: true and false are only for settings that are on or off"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load({}, file)


def test_an_error_says_where_the_value_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "serve.yaml").write_text("port: web\nreplicas: 0\nwatch: 1\n")
    with pytest.raises(ConfigError) as caught:
        load({"bundles": ["b"], "replicas": -1}, file)
    port, replicas, watch = str(caught.value).split("; ", 2)
    assert port == f"port = 'web': input should be a whole number (set in {file})"
    assert replicas == "replicas = -1: input should be greater than or equal to 1"
    assert watch == f"unknown setting 'watch'; did you mean watch_s? (set in {file})"
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "0")
    with pytest.raises(ConfigError, match=r"^port = '0': .* \(set in JEPAKIT_SERVE_PORT\); replicas"):
        load({"bundles": ["b"], "replicas": -1}, file)


def test_an_error_of_two_settings_says_where_each_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "serve.yaml").write_text("bundles: [b]\nmax_replicas: 2\nwatch_s: 1\n")
    monkeypatch.setenv("JEPAKIT_SERVE_REPLICAS", "3")
    with pytest.raises(ConfigError) as caught:
        load({}, file)
    assert str(caught.value) == (
        "max_replicas = 2 is less than replicas = 3 "
        f"(max_replicas is set in {file}, replicas is set in JEPAKIT_SERVE_REPLICAS)"
    )
    monkeypatch.delenv("JEPAKIT_SERVE_REPLICAS")
    monkeypatch.setenv("JEPAKIT_SERVE_API_KEY_FILE", "/nope")
    with pytest.raises(
        ConfigError, match=r"key file /nope does not exist.*\(api_key_file is set in JEPAKIT_SERVE_API_KEY"
    ):
        load({"max_replicas": 4}, file)


@pytest.mark.parametrize("name", ["JEPAKIT_SERVE_REPLICA", "jepakit_serve_replica"])
def test_a_variable_that_sets_nothing_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{name}: unknown setting 'replica'; did you mean replicas"):
        load({"bundles": ("a",)})
    monkeypatch.setenv(name, "")
    assert load({"bundles": ("a",)})


def test_what_kubernetes_tells_of_its_services_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR", "SERVICE_PORT_HTTP"):
        monkeypatch.setenv(f"JEPAKIT_SERVE_SVC_{name}", "tcp://10.96.3.7:8000")
    monkeypatch.setenv("JEPAKIT_SERVE_SERVICE_HOST", "x")
    assert load({"bundles": ("a",)})
    monkeypatch.setenv("JEPAKIT_SERVE_HTTP_PORT", "9000")
    with pytest.raises(ConfigError, match="JEPAKIT_SERVE_HTTP_PORT: unknown setting 'http_port'"):
        load({"bundles": ("a",)})


def test_what_kubernetes_tells_of_a_service_named_like_our_variables_is_no_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "tcp://10.96.3.7:9")
    (tmp_path / "serve.yaml").write_text("port: 1001\n")
    assert load({"bundles": ("a",)}).port == 8000
    assert load({"bundles": ("a",)}, tmp_path / "serve.yaml").port == 1001
    asked = subprocess.run([sys.executable, HEALTHCHECK], capture_output=True, text=True, check=False)
    assert "Traceback" not in asked.stderr


def test_the_health_check_asks_whether_the_service_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [503, 200]

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop() if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JEPAKIT_SERVE_PORT", str(server.server_port))
        for code in (0, 1):
            assert subprocess.run([sys.executable, HEALTHCHECK], check=False).returncode == code
        server.shutdown()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_the_service_is_asked_where_it_listens(host: str, url: str) -> None:
    assert own_url(ServeSettings(bundles=("a",), host=host, api_key_file=__file__, ray=False)) == url


def test_readiness_is_asked_for_past_any_proxy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(SERVICE, settings.service)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        settings = ServeSettings(bundles=("a",), port=server.server_port)
        announce_when_ready(settings, lambda: False)
        server.shutdown()
    url = f"http://127.0.0.1:{settings.port}"
    assert capfd.readouterr().out.splitlines()[-1] == f"ready: {url} (its routes: {url}/docs)"


def test_a_service_that_does_not_become_ready_is_reported_and_asked_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every such answer is a line in its log; but a signal to stop is noticed at once, and the service that is ready at last."""
    now, asked = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def get(*_: object, **__: object) -> object:
        asked.append(now)
        return SimpleNamespace(status_code=200 if now > 400 else 503, headers={SERVICE: settings.service})

    monkeypatch.setattr(listeners, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr("httpx.get", get)
    settings = ServeSettings(bundles=("a",))
    announce_when_ready(settings, lambda: False)
    assert asked[1] < 1
    assert 10 < len(asked) < 60
    printed = capfd.readouterr()
    assert printed.err == "not ready after 300 s, still waiting: http://127.0.0.1:8000/readyz says for what\n"
    assert printed.out.splitlines()[-1].startswith("ready: ")
    now, end = 0.0, 100.0
    announce_when_ready(settings, lambda: now > end)
    assert now < end + 1


def test_the_answer_of_another_service_is_not_readiness(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when two share a port of this machine: requests and keys would go to the other one."""
    own = ServeSettings(bundles=("a",))
    answering = [{}, {SERVICE: ServeSettings(bundles=("a",), port=8001).service}, {SERVICE: own.service}]
    monkeypatch.setattr("httpx.get", lambda *_, **__: SimpleNamespace(status_code=200, headers=answering.pop(0)))
    announce_when_ready(own, lambda: False)
    assert answering == []
    printed = capfd.readouterr()
    assert printed.out.splitlines()[-1].startswith("ready: ")
    assert printed.err == "another service answers at http://127.0.0.1:8000: stop it, or choose another --port\n"


@pytest.mark.parametrize(
    ("host", "words"),
    [("203.0.113.1", "this machine has no such address"), ("a..b", "it is neither an address nor a name")],
)
def test_where_it_cannot_listen_is_told_with_the_reason(host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on .*{words}"):
        check_port_is_free(ServeSettings(bundles=("a",), host=host, api_key_file=__file__, ray=False))


def test_a_port_in_use_is_told_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="another program has it"):
        check_port_is_free(ServeSettings(bundles=("a",), port=taken.getsockname()[1]))


def test_every_address_of_a_name_has_to_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` is 127.0.0.1 and ::1: what listens on either is found, and one that this machine has not is none of its."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServeSettings(bundles=("a",), host="localhost", port=port)

        def resolving(*hosts: str) -> None:
            found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in hosts]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

        resolving("127.0.0.1", "127.0.0.2")
        with pytest.raises(ConfigError, match="another program has it"):
            check_port_is_free(settings)
        resolving("127.0.0.1", "203.0.113.1")
        check_port_is_free(settings)
        resolving("203.0.113.1")
        with pytest.raises(ConfigError, match="this machine has no such address"):
            check_port_is_free(settings)


def test_a_port_taken_while_models_were_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gate(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await send({"type": f"{(await receive())['type']}.complete"})

    monkeypatch.setattr(single, "build_app", lambda _: gate)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(single, "announce_when_ready", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeSettings(bundles=("a",), port=taken.getsockname()[1])
        with pytest.raises(ServeError, match="another program has taken it while the models were loaded"):
            single.run(settings)


class _Stoppable:
    """An application that sends this process a signal as soon as it is started."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.drained = False

    def drain(self) -> None:
        self.drained = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        asyncio.get_running_loop().call_soon(signal.raise_signal, self._number)
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture
def restored() -> Iterator[None]:
    """Signals have the handlers they had."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("nohup", [False, True])
def test_the_end_of_its_terminal_stops_the_service_like_sigterm_unless_it_is_ignored(
    monkeypatch: pytest.MonkeyPatch, nohup: bool
) -> None:
    gate = _Stoppable(signal.SIGTERM if nohup else signal.SIGHUP)
    monkeypatch.setattr(single, "build_app", lambda _: gate)
    monkeypatch.setattr(single, "announce_when_ready", lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else lambda *_: sys.exit("the signal is not handled"))
    single.run(ServeSettings(bundles=("a",), port=free_port()))
    assert gate.drained
    assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == nohup


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load({}, tmp_path / "none.yaml")


def test_a_serve_config_without_keys_is_for_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's `http_options` are not the application's to see: whoever leaves keys out must say where it listens."""
    from jepakit_service import ray_app

    monkeypatch.setattr(ray_app, "application", lambda settings, _: settings)
    with pytest.raises(ConfigError, match="api-key-file"):
        ray_app.build({"bundles": ["a"]})
    assert ray_app.build({"bundles": ["a"], "host": "127.0.0.1"}).api_key_file is None


class Replicas:
    """Ray's handle of a deployment whose replicas give these answers, or that fails itself."""

    def __init__(self, *answers: object, fails: Exception | None = None) -> None:
        self._answers, self._fails = list(answers), fails
        self.asked = ""

    def broadcast(self, method: str) -> Self:
        self.asked = method
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert timeout_s > 30
        assert return_exceptions, "one replica's error keeps the others' answers back"
        if self._fails is not None:
            raise self._fails
        return self._answers


@pytest.mark.parametrize("handle", [Replicas(RuntimeError("\nActorDiedError"), None), Replicas(fails=TimeoutError())])
def test_one_replica_that_is_dead_at_the_end_costs_the_others_no_answer(
    monkeypatch: pytest.MonkeyPatch, handle: Replicas
) -> None:
    from jepakit_service import ray_driver

    lingered: list[float] = []
    monkeypatch.setattr(time, "sleep", lingered.append)
    with pytest.raises(ServeError, match=r"requests in flight may be lost: (ActorDiedError|TimeoutError)"):
        ray_driver._drain(handle, ServeSettings(bundles=("a",)))
    assert lingered == [ray_driver._LINGER_S]


def test_a_peer_whose_call_was_cancelled_is_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from jepakit_service import ray_app

    class Handle:
        def broadcast(self, _method: str, _with_metrics: bool) -> Self:
            return self

        async def results_async(self, **_: object) -> list[object]:
            asked.set()
            if not hangs:
                raise asyncio.CancelledError
            await asyncio.sleep(60)
            return []

    context = SimpleNamespace(deployment="", app_name="")
    serve = SimpleNamespace(get_replica_context=lambda: context, get_deployment_handle=lambda *_: Handle())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    asked, hangs = asyncio.Event(), False
    assert asyncio.run(ray_app._ask_all(False)) == [None]

    async def end() -> None:
        asking = asyncio.create_task(ray_app._ask_all(False))
        await asyncio.wait_for(asked.wait(), 10)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled(), "who asks may be ended"

    asked, hangs = asyncio.Event(), True
    asyncio.run(end())


def test_requests_in_flight_are_answered_though_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    from jepakit_service import ray_driver

    handle = Replicas(None)
    monkeypatch.setattr(ray_driver, "_LINGER_S", 0.0)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        ray_driver._drain(handle, ServeSettings(bundles=("a",)))
        monkeypatch.undo()
    assert handle.asked == "drain"


def test_what_a_killed_driver_leaves_behind_is_ended_and_removed() -> None:
    """Otherwise HAProxy would keep the port, and the next start would be refused."""
    program = (
        "import os, signal, subprocess\n"
        "from jepakit_service import ray_driver\n"
        "from jepakit_service.settings import ServeSettings\n"
        "def drive(_, folder, spilling):\n"
        "    left = subprocess.Popen(['sleep', '20'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "    print(left.pid, folder, spilling, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "ray_driver._drive = drive\n"
        "ray_driver.run(ServeSettings(bundles=('a',), proxy='python'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGKILL
    left, *folders = ended.stdout.split()
    for folder in folders:
        assert Path(folder).name.startswith("jepakit-ray-")
        assert not Path(folder).exists()
    assert not psutil.pid_exists(int(left))


def test_haproxy_s_socket_has_a_path_that_haproxy_accepts_wherever_temporary_files_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even in the folder with the longest path that is taken."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with tempfile.TemporaryDirectory(prefix="x" * (_LONGEST_PLACE - len("/tmp/12345678"))) as longest:
        for place in (longest, "/var/tmp"):
            monkeypatch.setattr(tempfile, "tempdir", place)
            with own_folder() as folder:
                assert folder.parent == Path(place)
                given = environment(ServeSettings(bundles=("a",), proxy="haproxy"), folder)
            socket_path = Path(given["RAY_SERVE_HAPROXY_SOCKET_PATH"])
            assert len(str(socket_path.parent / ("0" * 56) / socket_path.name)) <= 97


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("Traceback\n  HAProxy crashed: [ALERT] socket path too long\n[ALERT] Fatal errors found", "HAProxy crashed: [ALERT] socket path too long"),
        ("ray.exceptions.RayTaskError\njepakit.errors.BundleError: damaged\n", "BundleError: damaged"),
        (TimeoutError(), "TimeoutError"),
        (Exception("The current node timed out during startup. This could happen because some of the raylet failed"), "Ray's own processes did not come up, most likely because this machine is too busy: start again"),
    ],
)  # fmt: skip
def test_why_ray_did_not_start_is_told_in_the_line_that_says_it(raised: object, told: str) -> None:
    from jepakit_service import ray_driver

    assert ray_driver._innermost(raised) == told


@pytest.mark.parametrize("name", ServeSettings.model_fields)
def test_every_setting_says_what_it_is_and_what_it_may_be(name: str) -> None:
    field = ServeSettings.model_fields[name]
    assert field.description
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    assert [choice for choice in choices if f"`{choice}`" not in field.description] == []
    assert ("null: " in field.description) == (field.default is None), "what a value of null stands for"
    assert "None" not in as_yaml(ServeSettings(bundles=("a",)))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    caplog.clear()
    return found


def test_a_key_that_is_no_longer_in_its_file_opens_nothing(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    alice, line_of_alice = new_key("alice")
    bob, line_of_bob = new_key("bob")
    key_file.write_text(f"{line_of_alice}\n")
    known = KeyFile(key_file)

    def names() -> list[str | None]:
        return [known.name_of(key) for key in (alice, bob)]

    assert names() == ["alice", None]
    key_file.write_text(f"# people\n\n{line_of_bob}\nalice {line_of_alice}\n\xe9\n", encoding="latin-1")
    assert names() == [None, "bob"]
    (error,) = errors_of(caplog)  # once, whatever the number of requests
    assert "(4, 5)" in error
    assert line_of_alice not in error
    key_file.write_text("")
    assert names() == [None, None]
    assert "holds no key" in errors_of(caplog)[0]
    key_file.write_text(f"{line_of_alice}\n{line_of_bob}\n")
    assert names() == ["alice", "bob"]
    key_file.unlink()
    assert names() == [None, None]
    (error,) = errors_of(caplog)
    assert "cannot be read (No such file" in error
    key_file.write_text(f"{line_of_bob}\n")
    assert names() == [None, "bob"]


def test_a_key_file_that_anyone_may_write_to_is_warned_of_once(
    key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key_file.write_text(f"{new_key('alice')[1]}\n")
    key_file.chmod(0o644)
    KeyFile(key_file)
    assert caplog.messages == []
    key_file.chmod(0o666)
    known = KeyFile(key_file)
    known.name_of("jk_")
    told = f"anyone here may write to the API key file {key_file}: chmod o-w {key_file}"
    assert caplog.messages == [told]
    key_file.chmod(0o664)
    known.name_of("jk_")
    assert caplog.messages == [told], "a group may share a file"


def test_a_key_is_compared_with_every_line_wherever_it_is(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key(name) for name in ("alice", "bob", "carol")]
    key_file.write_text("\n".join(line for _, line in made))
    known, compared = KeyFile(key_file), list[str]()

    def compare(ours: str, theirs: str) -> bool:
        compared.append(theirs)
        return hmac.compare_digest(ours, theirs)

    monkeypatch.setattr(keys, "hmac", SimpleNamespace(compare_digest=compare))
    assert [known.name_of(key) for key, _ in made] == ["alice", "bob", "carol"]
    assert compared == [line.partition(":")[2] for _, line in made] * 3


def test_a_key_file_that_cannot_be_read_for_a_moment_is_tried_again(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, line = new_key("alice")
    key_file.write_text(line)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        known = KeyFile(key_file)
        assert known.name_of(key) is None
    assert known.name_of(key) == "alice"


def test_keys_stay_valid_while_no_file_can_be_opened(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were read last, whatever has become of the file since."""
    (alice, line), (bob, other) = new_key("alice"), new_key("bob")
    key_file.write_text(line)
    known = KeyFile(key_file)

    def too_many(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    key_file.write_text(other + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", too_many)
        assert [known.name_of(key) for key in (alice, bob)] == ["alice", None]
    assert [known.name_of(key) for key in (alice, bob)] == [None, "bob"]


def denied(*_: object, **__: object) -> str:
    raise PermissionError(13, "Permission denied")


def test_a_key_file_with_a_fault_is_told_at_start(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, words in ((b"", "holds no key"), (b"\xff\xfea\0", r"\(1\)"), (b"alice:0\n" * 12, r"9, 10 and 2 more\)")):
        key_file.write_bytes(text)
        with pytest.raises(ConfigError, match=words):
            keys.check(key_file)
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        keys.check(key_file)


@pytest.mark.parametrize(
    ("most", "options", "refused"),
    [
        (256, {}, True),
        (10_269, {}, True),
        (10_270, {}, False),
        (resource.RLIM_INFINITY, {}, False),
        (256, {"proxy": "python"}, False),
        (256, {"ray": False}, False),
    ],
)
def test_too_few_files_for_haproxy_are_told_at_once(
    most: int, options: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, most))
    with pytest.raises(ConfigError, match=f"at most {most:,} files may be open") if refused else nullcontext():
        check_open_files(ServeSettings(bundles=("a",), **options))


def test_a_folder_of_keys_that_may_not_be_entered_is_told(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.stat", denied)
    with pytest.raises(ConfigError, match=r"keys does not exist, or this user may not enter its folder"):
        load({"bundles": ("a",), "api_key_file": str(key_file)})


def test_a_new_key_is_a_line_of_its_own(key_file: Path, tmp_path: Path) -> None:
    made = [new_key(name) for name in ("alice", "bob", "carol")]
    key_file.write_text(made[0][1])  # as an editor leaves it that ends no line
    for _, line in made[1:]:
        keys.append(line, key_file)
    known = KeyFile(key_file)
    assert [known.name_of(key) for key, _ in made] == ["alice", "bob", "carol"]
    keys.append(made[0][1], tmp_path / "new")
    assert (tmp_path / "new").read_text() == f"{made[0][1]}\n"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match=r"none/keys cannot be written"):
        keys.append(made[0][1], tmp_path / "none" / "keys")


@pytest.mark.parametrize("room", [0, 30])
def test_a_key_that_the_disk_has_no_room_for_leaves_the_file_as_it_was(key_file: Path, room: int) -> None:
    lines = [new_key(name)[1] for name in ("alice", "bob")]
    keys.append(lines[0], key_file)
    before, limits = key_file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"keys cannot be written \(File too large\)"):
            keys.append(lines[1], key_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert key_file.read_bytes() == before


def test_what_this_machine_cannot_have_is_refused_before_ray_starts(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="arithmetic = bf16 is OpenVINO's alone: use provider openvino"):
        app.run(ServeSettings(bundles=(str(bundle),), arithmetic="bf16"))
    assert capfd.readouterr().out == ""


def test_a_key_exchanged_in_place_for_one_as_long_opens_nothing_any_more(tmp_path: Path) -> None:
    (old, line), (new, other) = new_key("ann"), new_key("ann")
    path = tmp_path / "keys"
    path.write_text(line + "\n")
    held = KeyFile(path)
    assert held.name_of(old) == "ann"
    with path.open("r+") as file:  # the same inode, the same size
        file.write(other + "\n")
    assert held.name_of(old) is None
    assert held.name_of(new) == "ann"


def test_a_key_is_added_behind_a_last_line_without_its_end(tmp_path: Path) -> None:
    (old, line), (new, other) = new_key("ann"), new_key("bob")
    path = tmp_path / "keys"
    path.write_text(line)
    keys.append(other, path)
    held = KeyFile(path)
    assert (held.name_of(old), held.name_of(new)) == ("ann", "bob")


def test_more_gpus_than_ray_has_are_refused_before_it_waits_for_them() -> None:
    from jepakit_service import ray_driver

    asked = ServeSettings(bundles=("a",), replicas=2, num_gpus=0.5)
    ray_driver._check_gpus(asked, 1)
    with pytest.raises(
        ServeError,
        match=r"replicas = 2 with num_gpus = 0.5 each, but on the 0 GPUs that Ray finds there is room for 0: ask for fewer",
    ):
        ray_driver._check_gpus(asked, 0)
    split = ServeSettings(bundles=("a",), replicas=3, num_gpus=0.6)
    with pytest.raises(ServeError, match="on the 2 GPUs that Ray finds there is room for 2: ask"):
        ray_driver._check_gpus(split, 2)
    ray_driver._check_gpus(split, 3)
    ray_driver._check_gpus(ServeSettings(bundles=("a",), replicas=2), 0)
