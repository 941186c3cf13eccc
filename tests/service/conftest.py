"""A real service on a loopback port, and real images to send."""

from __future__ import annotations

import asyncio
import io
import os
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

import jepakit
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, write_bundle
from jepakit_service import single
from jepakit_service.http.api import build_app
from jepakit_service.models import tuning
from jepakit_service.settings import ServeSettings


@pytest.fixture(scope="session", autouse=True)
def briefly() -> Iterator[None]:
    """Tune models in a tenth of the time: no test depends on their speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_LEAST_S", tuning._LEAST_S / 10)
        yield


@pytest.fixture(scope="session", autouse=True)
def certificates_once() -> Iterator[None]:
    """httpx reads all certificates for every client, also for plain HTTP: 50 ms for each of thousands of requests."""
    read = httpx.create_ssl_context

    @cache
    def known(trust_env: bool, *_: str | None) -> ssl.SSLContext:
        return read(trust_env=trust_env)

    def once(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is not True or cert is not None:
            return read(verify, cert, trust_env)
        return known(trust_env, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "create_ssl_context", once)
        patch.setattr(httpx._transports.default, "create_ssl_context", once)
        yield


@pytest.fixture(scope="session")
def bundle(exported: Callable[..., Path]) -> Path:
    """A tiny backbone with random weights, exported for real."""
    return exported(image_size=32)


@pytest.fixture(scope="session")
def service(bundle: Path) -> Iterator[str]:
    """The URL of a running service with one model."""
    with running(ServeSettings(bundles=(str(bundle),), port=1, max_images=64, max_body_mb=8)) as url:
        yield url


@pytest.fixture(scope="session")
def expected(bundle: Path) -> np.ndarray[Any, Any]:
    """The bundle's vectors of pictures 0 to 2, computed in this process."""
    return jepakit.load(bundle).embed([picture(seed) for seed in range(3)], progress=False).vectors


def promising_others(bundle: Path, out: Path) -> Path:
    """A copy of a bundle, intact by its digests, whose golden vectors are not those its graph computes."""
    expected = golden.unpack(jepakit.open_bundle(bundle).read(GOLDEN))
    promised = golden.pack(expected._replace(vectors=expected.vectors[:, ::-1]))
    return copied(bundle, out, lambda folder: (folder / GOLDEN).write_bytes(promised))


def copied(bundle: Path, out: Path, change: Callable[[Path], object] = lambda _: None, **fields: Any) -> Path:
    """A copy of a bundle, intact by its digests, with other fields of the manifest, or files that `change` makes."""
    source = jepakit.open_bundle(bundle)

    def write(folder: Path) -> None:
        for name in source.manifest.files:
            (folder / name).write_bytes(source.read(name))
        change(folder)

    write_bundle(out, source.manifest.model_copy(update=fields), write)
    return out


class running:  # noqa: N801 (used like a function)
    """Serve the application on a free loopback port, in a thread; `gate` is the application."""

    def __init__(self, settings: ServeSettings) -> None:
        self.gate = build_app(settings)
        config = single.config(self.gate, settings)
        config.port = 0
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert error is not None or not self._thread.is_alive(), "the service did not stop"


@pytest.fixture
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=60) as client:
        yield client


def picture(seed: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """The bytes of a seeded image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def asked(kind: type[Any], url: str, call: Callable[[Any], Any], **options: Any) -> Any:
    """What `call` returns for a client of either kind."""

    async def ask() -> Any:
        if kind is jepakit.Client:
            with kind(url, **options) as client:
                return call(client)
        async with kind(url, **options) as client:
            return await call(client)

    return asyncio.run(ask())


def embedding_everywhere(service: str, bundle: Path) -> list[Callable[..., jepakit.Embeddings]]:
    """`embed` of both clients, and of the bundle in this process."""
    return [
        jepakit.load(bundle).embed,
        lambda images, **how: asked(jepakit.Client, service, lambda client: client.embed(images, **how)),
        lambda images, **how: asked(jepakit.AsyncClient, service, lambda client: client.embed(images, **how)),
    ]


Spans = Callable[[], list[Any]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """The spans sent so far to a collector that the usual variable names."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def sent() -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        requests = [ExportTraceServiceRequest() for _ in bodies]
        for request, body in zip(requests, bodies, strict=True):
            request.ParseFromString(body if body[:2] != b"\x1f\x8b" else zlib.decompress(body, 31))
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield sent
    server.shutdown()
    server.server_close()
