"""The servers of benchmarks/service.py: how each is started, queried, checked and stopped."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from _processes import EndedError, Script
from jepakit._machine import usable_cpus
from jepakit_service.listeners import free_port

RAW, JSON, MANY = "one image, raw bytes", "one image, JSON", "32 images"
IMAGES = {RAW: 1, JSON: 1, MANY: 32}
IMAGE = "scikit-image's astronaut at 256 × 256 pixels, JPEG of quality 86"
FASTAPI, LITSERVE, BENTOML = "FastAPI, no batching", "LitServe", "BentoML"
PEERS = {
    FASTAPI: ("fastapi", "uvicorn[standard]"),
    LITSERVE: ("litserve",),
    BENTOML: ("bentoml",),
}
"""What each peer's environment holds besides Pillow, numpy and the same ONNX Runtime as here."""

_START_S, _STOP_S = 180.0, 60.0
_TOLERANCE = 1e-3
_HERE = Path(__file__).parent


def tell(what: str) -> None:
    """Report progress, with the time, apart from the tables."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def one_image() -> bytes:
    """The JPEG that every request carries (`IMAGE`)."""
    buffer = io.BytesIO()
    photograph = Image.fromarray(skimage.data.astronaut())
    photograph.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=86)
    return buffer.getvalue()


class ServerError(Exception):
    """A server that cannot be measured, and why."""


class Request(NamedTuple):
    """One HTTP request."""

    path: str
    headers: dict[str, str]
    body: bytes

    def wire(self) -> bytes:
        """Head and body as they are sent."""
        headers = {"Host": "127.0.0.1", **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode() + self.body


def jepakit_requests(image: bytes) -> dict[str, Request]:
    """As jepakit's client sends them (32 images as multipart, float32 back), and as the openai client could."""
    as_floats = {"Accept": "application/octet-stream"}
    files = [("files", (str(place), image)) for place in range(IMAGES[MANY])]
    many = httpx.Request("POST", "http://127.0.0.1/", files=files)
    return {
        RAW: Request("/v1/embeddings", {"Content-Type": "image/jpeg", **as_floats}, image),
        JSON: Request("/v1/embeddings", {"Content-Type": "application/json"}, _openai_json(image, 1)),
        MANY: Request("/v1/embeddings", {"Content-Type": many.headers["Content-Type"], **as_floats}, many.read()),
    }


def peer_requests(name: str, image: bytes) -> dict[str, Request]:
    """32 images as OpenAI's JSON; one image as raw bytes too, except for BentoML, which only batches JSON lists."""
    json_type = {"Content-Type": "application/json"}
    one = Request("/json", json_type, _openai_json(image, 1))
    many = Request("/json", json_type, _openai_json(image, IMAGES[MANY]))
    if name == BENTOML:
        return {RAW: one, MANY: many}
    return {RAW: Request("/raw", {"Content-Type": "image/jpeg"}, image), JSON: one, MANY: many}


class Server:
    """A running server. `wires` are files of its requests, by kind."""

    def __init__(
        self, name: str, port: int, process: psutil.Popen, requests: Mapping[str, Request], folder: Path
    ) -> None:
        self.name, self.port, self._process = name, port, process
        self.wires: dict[str, Path] = {}
        self._requests = requests
        for place, (kind, request) in enumerate(requests.items()):
            self.wires[kind] = folder / f"{port}-{place}.http"
            self.wires[kind].write_bytes(request.wire())

    def cpu_s(self) -> float:
        """User and system seconds of all its processes that are alive."""
        total = 0.0
        for process in _family(self._process):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of its processes whose program's name or title begins with `title`."""
        found = []
        for process in _family(self._process):
            with contextlib.suppress(psutil.NoSuchProcess):
                if (command := process.cmdline()) and Path(command[0]).name.startswith(title):
                    found.append(process)
        return found

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run during the block; otherwise it is paused: idle, LitServe takes most of a core, Ray some of one."""
        self._signal(signal.SIGCONT)
        try:
            for _ in range(3):  # Ray's first answers are slow while it catches up
                self._wait_for_answer()
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Suspend all its processes."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in _family(self._process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def wait_until_right(self, expected: NDArray[np.float32], log: Path) -> None:
        """Wait until it answers, and compare every kind of answer with the vector [D]. Raises ServerError."""
        try:
            self._wait_for_answer()
        except ServerError as reason:
            raise ServerError(f"{reason}:\n{log.read_text()[-2000:]}") from None
        for kind, request in self._requests.items():
            answer = self._post(request)
            if answer.status_code != 200:
                raise ServerError(f"{self.name} answered {answer.status_code} to {kind}: {answer.text[:500]}")
            found = _vectors(answer)
            wanted = np.tile(expected, (IMAGES[kind], 1))
            error = np.inf if found.shape != wanted.shape else np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            if not error < _TOLERANCE:
                raise ServerError(
                    f"{self.name} gives other vectors for {kind}: relative error {error:.1e}, shape {found.shape}"
                )

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self._post(self._requests[RAW]).status_code == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer")
            time.sleep(0.2)

    def _post(self, request: Request) -> httpx.Response:
        url = f"http://127.0.0.1:{self.port}{request.path}"
        return httpx.post(url, content=request.body, headers=request.headers, timeout=120)


@contextmanager
def jepakit_server(
    name: str, options: tuple[str, ...], bundle: Path, image: bytes, expected: NDArray[np.float32], folder: Path
) -> Iterator[Server]:
    """`jepakit serve`, as from the command line; patient: a ViT-S takes two cores minutes for 32 clients' 32 images."""
    port = free_port()
    program = Path(sys.executable).with_name("jepakit")
    patient = ("--set", "request_timeout_s=600")
    command = [program, "serve", bundle, "--port", port, *patient, *options]
    with _started(name, command, port, jepakit_requests(image), expected, folder, dict(os.environ)) as server:
        yield server


@contextmanager
def peer_server(
    name: str, environments: Path, graph: Path, provider: str, image: bytes, expected: NDArray[np.float32], folder: Path
) -> Iterator[Server]:
    """A peer with the same graph on the same provider, in its own environment."""
    port, cores = free_port(), usable_cpus()
    bin_folder = _environment(environments, name) / "bin"
    script = {FASTAPI: "_service_fastapi.py", LITSERVE: "_service_litserve.py"}
    command = (
        [bin_folder / "bentoml", "serve", "_service_bentoml:Embeddings", "--port", port, "--working-dir", _HERE]
        if name == BENTOML
        else [bin_folder / "python", _HERE / script[name], port, graph, cores]
    )
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    own |= {
        "MODEL": str(graph),
        "CORES": str(cores),
        "PROVIDER": provider,
        "BENTOML_DO_NOT_TRACK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with _started(name, command, port, peer_requests(name, image), expected, folder, own) as server:
        yield server


def make_environment(environments: Path, name: str) -> str:
    """Make a peer's environment if it is missing; returns the peer's version. Raises ServerError."""
    folder = _environment(environments, name)
    python, packages = folder / "bin" / "python", PEERS[name]
    ask = [str(python), "-c", f"import onnxruntime, importlib.metadata as m; print(m.version({packages[0]!r}))"]
    if not python.exists() or subprocess.run(ask, capture_output=True, check=False).returncode:
        beside = Path(sys.executable).with_name("uv")
        uv = str(beside) if beside.exists() else shutil.which("uv")
        if uv is None:
            raise ServerError(f"{name} needs uv to make its environment: pip install uv")
        pins = [f"{one}=={importlib.metadata.version(one)}" for one in (_runtime(), "pillow", "numpy")]
        for command in (
            [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *pins, *packages],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ServerError(f"the environment of {name} could not be made: {done.stderr.strip()[-500:]}")
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


class Worker(Script):
    """A script that answers each line of JSON with another."""

    def __init__(self, script: str, *arguments: str | Path) -> None:
        super().__init__([sys.executable, _HERE / script, *arguments], start_new_session=True)
        self._script = script

    def ask(self, **order: Any) -> Any:
        """Send an order and wait for its answer. Raises ServerError if the script has died."""
        try:
            return self.asked(json.dumps(order))
        except EndedError:
            raise ServerError(f"{self._script} ended over {order}; its own words are above") from None


@contextmanager
def empty_server(answer_bytes: int) -> Iterator[int]:
    """Start a server that does nothing; yields its port."""
    port = free_port()
    process = psutil.Popen(
        [sys.executable, _HERE / "_service_empty.py", str(port), str(answer_bytes)], start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if time.monotonic() > deadline:
                raise ServerError("the empty server did not start")
            time.sleep(0.1)
        yield port
    finally:
        _stop(process)


@contextmanager
def _started(
    name: str,
    command: list[Any],
    port: int,
    requests: Mapping[str, Request],
    expected: NDArray[np.float32],
    folder: Path,
    environment: dict[str, str],
) -> Iterator[Server]:
    log = folder / f"{port}.log"
    with log.open("w") as output:
        process = psutil.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        server = Server(name, port, process, requests, folder)
        server.wait_until_right(expected, log)
        yield server
    finally:
        _stop(process)


def _stop(process: psutil.Popen) -> None:
    """SIGTERM, a pause, SIGKILL; also for children that outlive their parent, as LitServe's and BentoML's do."""
    family = _family(process)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.resume()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
    psutil.wait_procs(family[:1], timeout=_STOP_S)
    _, alive = psutil.wait_procs(family, timeout=2)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    with contextlib.suppress(ProcessLookupError):  # children of a process that died by itself
        os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _family(process: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return [process]


def _environment(environments: Path, name: str) -> Path:
    return environments.resolve() / PEERS[name][0]


def _runtime() -> str:
    """Which of the two distributions provides ONNX Runtime here."""
    return importlib.metadata.packages_distributions()["onnxruntime"][0]


def _openai_json(image: bytes, count: int) -> bytes:
    return json.dumps({"input": ["data:image/jpeg;base64," + base64.b64encode(image).decode()] * count}).encode()


def _vectors(answer: httpx.Response) -> NDArray[np.float32]:
    """Vectors [B, D] of any server's answer; float32 bytes, for one image or more, are recognised by content type."""
    if answer.headers["content-type"].startswith("application/json"):
        rows = answer.json()
        return np.array(rows if isinstance(rows, list) else [row["embedding"] for row in rows["data"]], np.float32)
    flat = np.frombuffer(answer.content, "<f4")
    rows = int(answer.headers.get("x-embedding-shape", "1").partition(",")[0])
    return flat.reshape(rows, -1)
