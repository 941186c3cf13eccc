"""The clients against a real service, and against answers that no good service gives."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import jepakit
from jepakit.errors import (
    AuthenticationError,
    BundleError,
    ConfigError,
    ConnectionFailedError,
    ImageError,
    ModelChangedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
)

from .conftest import picture


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


def test_a_bad_image_is_named_by_the_callers_own_name(service: str, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(picture(0)[:100])
    with jepakit.Client(service) as client, pytest.raises(ImageError, match=r"bad\.png"):
        client.embed([*sorted(folder.rglob("*.png"))[:40], bad], progress=False)


def test_verify_from_afar(service: str, bundle: Path, tmp_path: Path) -> None:
    with jepakit.Client(service) as client:
        assert client.verify(bundle) < 1e-5
        jepakit.export("test_vit:random", tmp_path / "tiny", image_size=48)
        with pytest.raises(NotFoundError, match="not"):
            client.verify(tmp_path / "tiny")


def test_a_service_that_computes_something_else_is_caught(bundle: Path) -> None:
    manifest = jepakit.open_bundle(bundle).manifest
    shape = f"8,{manifest.embedding.dim}"
    headers = {"X-Model-Id": manifest.model_id, "X-Embedding-Shape": shape}
    body = np.ones((8, manifest.embedding.dim), "<f4").tobytes()
    with _answering([(200, headers, body)]) as url, jepakit.Client(url) as client, pytest.raises(BundleError):
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


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_a_wrong_address_is_told_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        jepakit.Client(url)


GOOD = {"X-Model-Id": "0123456789abcdef", "X-Embedding-Shape": "1,2"}
VECTOR = np.array([1, 2], "<f4").tobytes()


def test_overload_outage_and_foreign_errors_are_tried_again() -> None:
    answers = [
        (429, {"Retry-After": "0"}, b'{"error": {"message": "later", "code": "overloaded"}}'),
        (503, {"Retry-After": "0"}, b"<html>nginx</html>"),
        (500, {"Retry-After": "0"}, b"Internal Server Error"),
        (200, GOOD, VECTOR),
    ]
    with _answering(answers) as url, jepakit.Client(url) as client:
        assert client.embed(picture(0)).vectors.tolist() == [[1, 2]]
    assert _Scripted.seen == 4


def test_overload_until_the_deadline_is_an_error_of_its_own() -> None:
    busy = (429, {"Retry-After": "0.2"}, b'{"error": {"message": "later", "code": "overloaded"}}')
    with (
        _answering([busy] * 50) as url,
        jepakit.Client(url, deadline_s=0.7) as client,
        pytest.raises(OverloadedError, match="later"),
    ):
        client.embed(picture(0))


def test_a_refusal_is_not_tried_again() -> None:
    refusal: tuple[int, dict[str, str], bytes] = (
        401,
        {},
        b'{"error": {"message": "no key", "code": "missing_api_key"}}',
    )
    with (
        _answering([refusal] * 3) as url,
        jepakit.Client(url) as client,
        pytest.raises(AuthenticationError, match="no key"),
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
    ],
)
def test_an_answer_that_is_not_the_protocols_is_a_typed_error(headers: dict[str, str], body: bytes) -> None:
    with _answering([(200, headers, body)]) as url, jepakit.Client(url) as client, pytest.raises(ProtocolError):
        client.embed(picture(0))


def test_vectors_of_two_spaces_are_never_mixed() -> None:
    rows = {"X-Embedding-Shape": "32,1", "X-Model-Id": "a" * 16}
    changed = {"X-Embedding-Shape": "32,1", "X-Model-Id": "b" * 16}
    body = np.zeros(32, "<f4").tobytes()
    with (
        _answering([(200, rows, body), (200, changed, body)]) as url,
        jepakit.Client(url) as client,
        pytest.raises(ModelChangedError, match="b" * 16),
    ):
        client.embed([picture(0)] * 64, progress=False)


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

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        place = _Scripted.seen
        _Scripted.seen += 1
        status, headers, body = self.answers[min(place, len(self.answers) - 1)]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815 (http.server's name)

    def log_message(self, *_: object) -> None:
        pass


class _answering:  # noqa: N801 (used like a function)
    """A server that gives these answers, one a request."""

    def __init__(self, answers: list[tuple[int, dict[str, str], bytes]]) -> None:
        _Scripted.answers, _Scripted.seen = answers, 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JEPAKIT_API_KEY", raising=False)
