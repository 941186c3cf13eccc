"""The HTTP surface, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.client import HTTPResponse, parse_headers
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import openai
import pytest

import jepakit
from jepakit.bundles.bundle import open_bundle
from jepakit.errors import AuthenticationError, ConfigError, ImageError, MissingExtraError
from jepakit_service.faults import ApiError
from jepakit_service.http import api, dialects, posts, routes, wire
from jepakit_service.http.api import build_app
from jepakit_service.http.keys import new_key
from jepakit_service.http.openapi_posts import POSTS
from jepakit_service.models.model import LoadedModel
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry.metrics import Metrics, merge
from tests.files import npy

from .conftest import picture, running
from .load import wait_until

RAW = {"Accept": "application/octet-stream"}


def vectors_of(response: httpx.Response) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    rows, dim = map(int, response.headers["x-embedding-shape"].split(","))
    return np.frombuffer(response.content, "<f4").reshape(rows, dim)


def test_raw_image_bytes_give_the_vector_of_the_bundle(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    answer = http.post("/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png", **RAW})
    np.testing.assert_allclose(vectors_of(answer), expected[:1], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_multipart_keeps_the_order_of_many_images(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    files = [("files", (f"{seed}.png", picture(seed))) for seed in range(3)]
    answer = http.post("/v1/embeddings", files=files, headers=RAW)
    np.testing.assert_allclose(vectors_of(answer), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_json_takes_data_uris_and_bare_base64(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    text = base64.b64encode(picture(1)).decode()
    answer = http.post("/v1/embeddings", json={"input": [f"data:image/png;base64,{text}", text], "user": "ignored"})
    body = answer.json()
    assert [row["index"] for row in body["data"]] == [0, 1]
    for row in body["data"]:
        np.testing.assert_allclose(row["embedding"], expected[1], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert body["model"] == "tiny"
    assert body["provider"] == "cpu"
    assert body["precision"] == "fp32"
    assert body["model_id"] == answer.headers["x-model-id"]


def test_the_unmodified_openai_client_embeds_images(service: str, expected: np.ndarray[Any, Any]) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(picture(2)).decode()}"
    with openai.OpenAI(base_url=f"{service}/v1", api_key="unused") as client:
        answer = client.embeddings.create(model="tiny", input=[uri])
    np.testing.assert_allclose(answer.data[0].embedding, expected[2], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_arrays_are_taken_and_given_as_npy(http: httpx.Client) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    headers = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
    answer = http.post("/v1/embeddings", content=buffer.getvalue(), headers=headers)
    assert answer.status_code == 200
    assert np.load(io.BytesIO(answer.content), allow_pickle=False).shape[0] == 2


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_an_image_has_the_same_vector_whatever_batch_it_rides_in(
    http: httpx.Client, expected: np.ndarray[Any, Any], batch: int
) -> None:
    files = [("files", (str(place), picture(place % 3))) for place in range(batch)]
    got = vectors_of(http.post("/v1/embeddings", files=files, headers=RAW))
    wanted = expected[np.arange(batch) % 3]
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(expected).max()


def test_concurrent_requests_get_their_own_vectors(service: str, expected: np.ndarray[Any, Any]) -> None:
    async def ask_all() -> list[np.ndarray[Any, Any]]:
        async with httpx.AsyncClient(base_url=service, timeout=60) as http:
            headers = {"Content-Type": "image/png", **RAW}
            posts = [http.post("/v1/embeddings", content=picture(i % 3), headers=headers) for i in range(60)]
            return [vectors_of(answer)[0] for answer in await asyncio.gather(*posts)]

    for place, vector in enumerate(asyncio.run(ask_all())):
        np.testing.assert_allclose(vector, expected[place % 3], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_models_and_health(http: httpx.Client, bundle: Path) -> None:
    model = http.get("/v1/models").json()["data"][0]
    manifest = jepakit.open_bundle(bundle).manifest
    assert model["digest"] == manifest.digest
    assert model["model_id"] == manifest.model_id
    assert model["dim"] == manifest.embedding.dim
    assert model["limits"]["request_timeout_s"] == 60
    assert (model["limits"]["max_body_mb"], model["limits"]["max_images"]) == (8, 64)
    assert (model["serving"], model["update"]) == ([manifest.digest], None)
    assert http.get("/v1/models/tiny").json() == model
    assert http.get("/healthz").status_code == 200
    ready = {"status": "ready", "replicas": 1, "replicas_ready": 1, "models": ["tiny"], "faults": {}}
    assert http.get("/readyz").json() == ready
    assert "/v1/embeddings" in http.get("/openapi.json").json()["paths"]


def test_a_model_can_be_pinned(http: httpx.Client, bundle: Path) -> None:
    model_id = jepakit.open_bundle(bundle).manifest.model_id
    headers = {"Content-Type": "image/png", **RAW}
    assert http.post(f"/v1/embeddings?model=tiny@{model_id}", content=picture(0), headers=headers).status_code == 200
    for path in ("/v1/models/tiny", "/v2/models/tiny", "/v2/models/tiny/ready"):
        assert http.get(path.replace("tiny", f"tiny@{model_id}")).json() == http.get(path).json()
        assert http.get(path.replace("tiny", "tiny@0000000000000000")).status_code == 404
    refused = http.post("/v1/embeddings?model=tiny@0000000000000000", content=picture(0), headers=headers)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"


TWO_MODELS = b"".join(
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + name + b"\r\n" for name in (b"other", b"tiny")
) + b"--x--\r\n"  # fmt: skip
BAD_REQUESTS = [
    ("text in place of an image", "application/json", b'{"input": "hello world"}', 400, "invalid_base64"),
    ("a URL", "application/json", b'{"input": "http://127.0.0.1:1/x.png"}', 400, "url_not_supported"),
    ("not JSON", "application/json", b"{", 400, "invalid_request"),
    ("deep JSON", "application/json", b"[" * 100_000, 400, "invalid_request"),
    ("no input", "application/json", b"{}", 400, "invalid_request"),
    ("no images", "application/json", b'{"input": []}', 400, "no_images"),
    ("numbers", "application/json", b'{"input": [1, 2]}', 400, "invalid_input"),
    ("dimensions", "application/json", b'{"input": "aGk=", "dimensions": 8}', 400, "dimensions_not_supported"),
    ("an odd encoding", "application/json", b'{"input": "aGk=", "encoding_format": "int8"}', 400, "invalid_request"),
    ("another model", "application/json", b'{"input": "aGk=", "model": "../../etc"}', 404, "model_not_found"),
    ("no bytes", "image/png", b"", 415, "unsupported_format"),
    ("a page", "image/png", b"<html></html>", 415, "unsupported_format"),
    ("a cut image", "image/png", picture(0)[:-200], 422, "unreadable"),
    ("one pixel", "image/png", picture(0, (1, 1)), 422, "too_small"),
    ("another type", "text/plain", b"hi", 415, "unsupported_media_type"),
    ("a broken form", "multipart/form-data; boundary=x", b"nonsense", 400, "invalid_multipart"),
    ("a form without boundary", "multipart/form-data", b"nonsense", 400, "invalid_multipart"),
    ("two models in a form", "multipart/form-data; boundary=x", TWO_MODELS, 400, "invalid_request"),
    ("a form without files", "multipart/form-data; boundary=x", b"--x--\r\n", 400, "no_images"),
    ("float arrays", "application/x-npy", npy(np.zeros((1, 40, 40, 3))), 400, "invalid_npy"),
    ("pickled arrays", "application/x-npy", npy(np.array([print], dtype=object)), 400, "invalid_npy"),
    ("a cut array", "application/x-npy", npy(np.zeros((1, 40, 40, 3), np.uint8))[:-9], 400, "invalid_npy"),
    ("four bands", "application/x-npy", npy(np.zeros((1, 40, 40, 4), np.uint8)), 422, "unsupported_mode"),
    ("a body over the limit", "image/png", b"\0" * (9 << 20), 413, "body_too_large"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [case[1:] for case in BAD_REQUESTS],
    ids=[case[0] for case in BAD_REQUESTS],
)
def test_bad_requests_are_named_and_never_a_fault(
    http: httpx.Client, content_type: str, body: bytes, status: int, code: str
) -> None:
    answer = http.post("/v1/embeddings", content=body, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert http.post("/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [(b'{"input": [1,]}', "trailing comma at line 1"), (b"", "EOF while parsing"), (b'{"input": "a', "EOF"), (b"{} {}", "trailing characters")],
)  # fmt: skip
def test_what_is_no_json_is_told_where_and_never_quoted(http: httpx.Client, body: bytes, said: str) -> None:
    answer = http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    message = answer.json()["error"]["message"]
    assert message.startswith("the body is not JSON: ")
    assert said in message


def test_a_part_is_an_image_by_its_filename_or_its_type(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    """A file name is optional (RFC 7578, 4.2); Rust's reqwest sends none."""
    kinds: list[tuple[str | None, str | None]] = [
        ("a.png", None),
        (None, "image/png"),
        (None, "Application/Octet-Stream"),
    ]
    forms = [[("files", (name, picture(0), kind))] for name, kind in kinds]
    for form in forms:
        row = http.post("/v1/embeddings", files=form, data={"model": "tiny"}).json()["data"][0]
        np.testing.assert_allclose(row["embedding"], expected[0], rtol=0, atol=1e-5 * np.abs(expected).max())
    refused = http.post("/v1/embeddings", files=[("files", (None, picture(0), "text/plain"))])
    assert "'files' is not a file: it has neither a filename nor" in refused.json()["error"]["message"]


def test_a_form_whose_type_was_set_by_hand_is_told_so(http: httpx.Client) -> None:
    """Browsers' boundaries begin with dashes, which end the form for one that knows no boundary."""
    body = b'------x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\na\r\n------x--\r\n'
    answer = http.post("/v1/embeddings", content=body, headers={"Content-Type": "multipart/form-data"})
    assert answer.json()["error"]["code"] == "invalid_multipart"
    assert "names no boundary" in answer.json()["error"]["message"]


def test_the_refusal_of_another_type_names_all_that_are_read(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", content=b"hi", headers={"Content-Type": "text/plain"})
    (takes,) = [post.takes for post in POSTS if post.path == "/v1/embeddings"]
    assert [media for media in takes if media not in answer.json()["error"]["message"]] == []


def test_an_image_over_the_services_own_limits_is_told_their_setting(bundle: Path) -> None:
    limited = ServeSettings(bundles=(str(bundle),), threads=1, max_pixels=1600)
    model = LoadedModel(open_bundle(bundle), limited, Metrics())
    try:
        with pytest.raises(ImageError, match=r"the limit is 1,600 \(by the service's setting max_pixels\): "):
            model._decode(np.zeros((41, 40, 3), np.uint8))
        assert model._limits.max_decoded_bytes == 8 * 1600
    finally:
        model.close()


def test_images_that_take_long_to_decode_are_counted_in(bundle: Path) -> None:
    """20 images a second are inferred, and two threads take 0.4 s of a core each to decode one."""
    model = LoadedModel(open_bundle(bundle), ServeSettings(bundles=(str(bundle),), threads=2), Metrics())
    try:
        model.plan = model.plan._replace(rate=20.0)
        assert model.rate == pytest.approx(20)
        model._decode(model._golden_image)
        assert model.rate == pytest.approx(20), "the heartbeat's image says nothing about the others"
        model._decode(picture(0))
        assert model.rate < 20
        model._decode_s = 0.4
        assert model.rate == pytest.approx(4)
        model.provider = "cuda"
        assert model.rate == pytest.approx(5), "beside a GPU, the slower of the two counts"
    finally:
        model.close()


def test_an_image_whose_decoder_is_not_installed_is_told_as_such(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "reading DICOM needs pydicom: pip install 'jepakit[dicom]'"
    monkeypatch.setattr("jepakit_service.models.model.read_image", MagicMock(side_effect=MissingExtraError(reason)))
    answer = http.post("/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (415, "decoder_missing", "input[0]")
    assert f"{reason}, where the service runs" in error["message"]


@pytest.mark.parametrize(
    "where", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load", "jepakit_service.models.model.fit"]
)
def test_a_lack_of_memory_for_decoding_is_no_fault_of_the_image_and_passes(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    files = [("files", (str(place), picture(place))) for place in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(where, MagicMock(side_effect=MemoryError))
        for path in ("/v1/embeddings", "/v1/embeddings?partial=true"):
            answer = http.post(path, files=files)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
            assert answer.headers["retry-after"] == "1"
    assert http.post("/v1/embeddings", files=files).status_code == 200


def test_too_many_images_are_refused(http: httpx.Client) -> None:
    files = [("files", (str(place), b"x")) for place in range(65)]
    assert http.post("/v1/embeddings", files=files).status_code == 413


def test_one_bad_image_is_named_by_its_index_and_partial_keeps_the_others(http: httpx.Client) -> None:
    files = [("files", ("a", picture(0))), ("files", ("b", b"broken")), ("files", ("c", picture(2)))]
    refused = http.post("/v1/embeddings", files=files)
    assert refused.status_code == 415
    assert refused.json()["error"]["param"] == "input[1]"
    rows = http.post("/v1/embeddings?partial=true", files=files).json()["data"]
    assert ["embedding" in row for row in rows] == [True, False, True]
    assert rows[1]["error"]["code"] == "unsupported_format"
    for value in ("false", "0"):
        assert http.post(f"/v1/embeddings?partial={value}", files=files).status_code == 415
    for value in ("=yes", "=", ""):
        unclear = http.post(f"/v1/embeddings?partial{value}", files=files)
        assert (unclear.status_code, unclear.json()["error"]["param"]) == (400, "partial")
    # Raw vectors have no place for a reason.
    answer = http.post("/v1/embeddings?partial=1", files=files, headers=RAW)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("accept", "due"),
    [
        ("application/x-npy;q=0", "application/json"),
        ("application/json, application/x-npy;q=0.5", "application/json"),
        ("application/json;q=0.5, application/x-npy", "application/x-npy"),
        ("application/octet-stream;q=0.1, APPLICATION/x-npy; Q=0.9", "application/x-npy"),
        ("*/*, application/x-npy;q=x", "application/json"),
        ("application/octet-stream, application/x-npy", "application/octet-stream"),
    ],
)
def test_the_answer_is_of_the_kind_that_is_wanted_most(http: httpx.Client, accept: str, due: str) -> None:
    headers = {"Content-Type": "image/png", "Accept": accept}
    assert http.post("/v1/embeddings", content=picture(0), headers=headers).headers["content-type"] == due


def test_unknown_routes_and_methods_answer_in_the_one_shape(http: httpx.Client) -> None:
    nowhere = http.get("/nothing").json()["error"]
    assert nowhere["code"] == "no_such_route"
    assert nowhere["message"].endswith("Not Found; the routes are listed at /docs")
    for path, meant in {
        "/embeddings": "/v1/embeddings",
        "/v1/embeddings/": "/v1/embeddings",
        "/health": "/healthz",
    }.items():
        assert f"did you mean {meant}" in http.post(path).json()["error"]["message"]
    for path in ("/v2/models", "/v2/health", "/v2/models/tiny/infer/"):  # no routes, and so not proposed
        told = http.get(path).json()["error"]
        assert "did you mean /v2/models" not in told
        assert "did you mean /v2/health" not in told
    assert http.get("/v2/nothing").json()["error"].startswith("GET /v2/nothing: Not Found; "), "in the protocol's"
    assert http.get("/v1/embeddings").json()["error"]["code"] == "method_not_allowed"


def test_a_request_id_is_kept_when_it_is_harmless(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Request-Id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    assert len(http.get("/healthz", headers={"X-Request-Id": "a b<script>"}).headers["x-request-id"]) == 16


def test_the_key_is_judged_before_the_body_and_the_key_file_is_reread(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, line = new_key("alice")
    file = tmp_path / "keys"
    file.write_text(f"# people\n{line}\n")
    settings = ServeSettings(bundles=(str(bundle),), port=1, api_key_file=str(file))
    with running(settings) as url, httpx.Client(base_url=url) as http:
        assert http.get("/readyz").status_code == 200
        assert http.get("/v1/models").status_code == 401
        assert (
            http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).json()["error"]["code"]
            == "invalid_api_key"
        )
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        monkeypatch.setenv("JEPAKIT_API_KEY", key)
        with jepakit.Client(url) as client, jepakit.Client(url, api_key="wrong") as stranger:
            assert [model.name for model in client.models()] == ["tiny"]
            with pytest.raises(AuthenticationError):
                stranger.models()
        behind_a_proxy = {
            "Authorization": f"Bearer {key}",
            "Host": "embeddings.example",
            "Sec-Fetch-Site": "cross-site",
        }
        assert http.get("/v1/models", headers=behind_a_proxy).status_code == 200
        assert status_of_a_declared_body(url, 100 << 30) == 401
        with jepakit.Client(url, api_key=key) as client:
            assert client.models()[0].name == "tiny"
        other, line = new_key("bob")
        file.write_text(f"{line}\nbob2:{'0' * 64}\n")
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {other}"}).status_code == 200
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost:8000", "Sec-Fetch-Site": "none"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_without_keys_no_page_of_another_site_is_answered(
    http: httpx.Client, headers: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/embeddings", headers=headers, files=[("files", ("a.png", picture(0)))])
    assert answer.status_code == status, answer.text
    if status != 200:
        error, of_a_page = answer.json()["error"], "Origin" in headers or "Sec-Fetch-Site" in headers
        assert error["code"] == "other_site"
        assert ("one proxy" in error["message"]) == of_a_page, "what helps a page differs from what helps a program"
    assert http.get("/v1/models", headers=headers).status_code == status
    assert http.get("/healthz", headers=headers).status_code == 200


def status_of_a_declared_body(url: str, length: int) -> int:
    """The status of a POST whose headers declare a body that is never sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        return int(connection.recv(4096).split()[1])


def test_a_body_is_read_though_the_client_offers_an_upgrade(service: str) -> None:
    """As Java's client does, and curl --http2; the body may come later, and must not pass for a request."""
    host, port = service.removeprefix("http://").split(":")
    image = picture(0)
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        f"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(head.encode())
            time.sleep(0.05)
            connection.sendall(image)
            with closing(HTTPResponse(connection)) as answer:
                answer.begin()
                assert answer.status == 200
                assert len(json.loads(answer.read())["data"]) == 1
        connection.sendall((head.encode() + image) * 3 + head.encode())  # at once, and a head whose body never comes
        with connection.makefile("rb") as answers:  # one buffer: several may arrive together
            for _ in range(3):
                assert answers.readline().split()[1] == b"200"
                length = parse_headers(answers)["content-length"]
                assert len(json.loads(answers.read(int(length)))["data"]) == 1


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (["application/x-npy", "application/json;q=0.1"], "application/x-npy"),
        (["application/json;q=0.1", "application/octet-stream"], "application/octet-stream"),
        (["text/html, application/octet-stream;q=0.9"], "application/octet-stream"),
        (["text/html"], "application/json"),
        (["*/*, application/x-npy;q=0.9"], "application/json"),
    ],
)
def test_the_answer_is_what_is_wanted_most_of_what_there_is(http: httpx.Client, accept: list[str], kind: str) -> None:
    headers = [("Content-Type", "image/png"), *(("Accept", each) for each in accept)]
    with httpx.Client(base_url=http.base_url) as plain:
        del plain.headers["accept"]
        assert plain.post("/v1/embeddings", headers=headers, content=picture(0)).headers["content-type"] == kind


def test_what_a_refusal_by_headers_allows_is_in_its_headers(http: httpx.Client) -> None:
    assert http.put("/v1/models").headers["allow"] == "GET, HEAD"
    packed = http.post(
        "/v1/embeddings", headers={"Content-Type": "image/png", "Content-Encoding": "gzip"}, content=picture(0)
    )
    assert (packed.status_code, packed.headers["accept-encoding"]) == (415, "identity")
    plain = http.post(
        "/v1/embeddings", headers={"Content-Type": "image/png", "Content-Encoding": ""}, content=picture(0)
    )
    assert plain.status_code == 200


def test_a_declared_length_over_the_limit_is_refused_unread(service: str) -> None:
    assert status_of_a_declared_body(service, 100 << 30) == 413


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v1/models/tiny", "/no"]
)
def test_head_is_answered_as_get_without_a_body(http: httpx.Client, path: str) -> None:
    """As monitors and load balancers ask."""
    whole, head = http.get(path), http.head(path)
    assert head.content == b""
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == str(len(whole.content))
    assert http.head("/v1/embeddings").status_code == 405


def test_draining_refuses_new_requests_and_readiness_says_so(bundle: Path) -> None:
    server = running(ServeSettings(bundles=(str(bundle),), port=1))
    with server as url, httpx.Client(base_url=url) as http:
        server.gate.drain()
        assert http.get("/readyz").status_code == http.get("/v2/health/ready").status_code == 503
        answer = http.post("/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert http.get("/healthz").status_code == 200


def test_an_answer_that_is_not_taken_before_the_service_ends_is_not_followed_by_another(bundle: Path) -> None:
    gate = build_app(ServeSettings(bundles=(str(bundle),), port=1))
    sent: list[dict[str, Any]] = []

    async def ask() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def stop_in_the_middle() -> None:
        begun = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                begun.set()
                await asyncio.Event().wait()

        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "query_string": b""}
        request = asyncio.create_task(gate(scope, ask, send))
        await asyncio.wait_for(begun.wait(), 30)
        gate.drain()
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()

    asyncio.run(stop_in_the_middle())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    counted = {(*sample.labels.values(),): sample.value for family in gate.replica.metrics.families()
               for sample in family.samples if sample.name == "jepakit_requests_total"}  # fmt: skip
    assert counted == {("/v1/models", "200"): 1.0}
    assert gate.in_flight == 0


@pytest.mark.parametrize("draining", [False, True])
def test_a_body_that_is_still_arriving_when_the_service_ends_is_told_so(bundle: Path, draining: bool) -> None:
    """As uvicorn does it: a request that outlasts `drain_s` is cancelled. It came before the drain, or after."""
    gate = build_app(ServeSettings(bundles=(str(bundle),), port=1))
    sent: list[dict[str, Any]] = []

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    async def stop_in_the_middle() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [(b"content-length", b"9")]}
        gate.replica.draining = draining
        request = asyncio.create_task(gate(scope, never, send))
        await asyncio.sleep(0)
        assert gate.in_flight == 1
        gate.drain()
        request.cancel()
        await request

    asyncio.run(stop_in_the_middle())
    assert sent[0]["status"] == 503
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "draining"
    assert gate.in_flight == 0


def test_a_request_that_ray_cancels_for_its_client_left_is_counted(bundle: Path) -> None:
    gate = build_app(ServeSettings(bundles=(str(bundle),), port=1))

    async def never() -> Any:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def leave() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [(b"content-length", b"9")]}
        request = asyncio.create_task(gate(scope, never, send))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(leave())
    text = merge({"r": gate.replica.metrics.families()}).decode()
    assert 'jepakit_requests_total{replica="r",route="/v1/embeddings",status="499"} 1.0' in text
    assert 'jepakit_refused_total{code="disconnected",replica="r"} 1.0' in text
    assert gate.in_flight == 0


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models/tiny", "/v1/models"),
        ("/v1/modelsX", "other"),
        ("/readyzz", "other"),
        ("/docs/main.js", "/docs"),
        ("/v2/models/tiny/ready", "/v2/models"),
        ("/v2/models/tiny/infer", "/v2/models/{name}/infer"),
        ("/v2/models/tiny/versions/0123456789abcdef/infer", "/v2/models/{name}/infer"),
    ],
)
def test_metrics_know_a_route_and_no_name(path: str, route: str) -> None:
    assert routes.label(path) == route


def test_long_answers_are_written_beside_the_event_loop(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = build_app(ServeSettings(bundles=(str(bundle),), port=1))
    threads: list[str] = []
    written = dialects.write_openai

    def seen(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return written(*arguments)

    monkeypatch.setattr(dialects, "write_openai", seen)

    async def ask(images: int) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            files = [("files", ("a.png", picture(0)))] * images
            return await client.post("/v1/embeddings", files=files)

    few = asyncio.run(ask(2))
    monkeypatch.setattr(posts, "_LONG_ANSWER", 100)
    many = asyncio.run(ask(2))
    assert few.json()["data"] == many.json()["data"]
    assert threads[0] == "MainThread"
    assert threads[1] != "MainThread"


@pytest.mark.parametrize("first", ["the answer", "the client", "the server"])
def test_an_answer_and_its_client_may_go_at_the_same_moment(first: str) -> None:
    """Within one turn of the loop; what comes second cancels nothing that is still to be sent."""
    reply = posts.Reply(b"", "", {})

    async def request(answered: asyncio.Future[posts.Reply], left: asyncio.Future[Any]) -> object:
        async def answering() -> posts.Reply:
            return await answered

        async def receive() -> Any:
            return await left

        try:
            outcome: object = await api._while_wanted(answering(), receive)
        except ApiError as error:
            outcome = error.code
        for _ in range(5):  # the sending
            await asyncio.sleep(0)
        return outcome

    async def go() -> object:
        loop = asyncio.get_running_loop()
        answered, left = loop.create_future(), loop.create_future()
        task = asyncio.create_task(request(answered, left))
        for _ in range(5):
            await asyncio.sleep(0)
        if first == "the server":
            task.cancel()
        if first == "the answer":
            loop.call_soon(answered.set_result, reply)
        left.set_result(None)  # its task ends a turn later, as the answer does
        if first == "the client":
            loop.call_soon(answered.set_result, reply)
        return (await asyncio.gather(task, return_exceptions=True))[0]

    outcome = asyncio.run(go())
    if first == "the server":
        assert isinstance(outcome, asyncio.CancelledError)
    else:
        assert outcome == (reply if first == "the answer" else "disconnected")


def test_overload_is_answered_429(bundle: Path) -> None:
    async def ask_all(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            files = [("files", (str(place), picture(place))) for place in range(8)]
            return [
                a.status_code
                for a in await asyncio.gather(*(http.post("/v1/embeddings", files=files) for _ in range(12)))
            ]

    with running(ServeSettings(bundles=(str(bundle),), port=1, max_waiting=16)) as url:
        statuses = asyncio.run(ask_all(url))
    assert set(statuses) == {200, 429}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "api-key-file"),
        ({"api_key_file": "/nowhere"}, "does not exist"),
        ({"prot": 1}, "did you mean port"),
        ({"port": 0}, "port"),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings: dict[str, Any], words: str) -> None:
    from jepakit._explain import parse

    with pytest.raises(ConfigError, match=words) as caught:
        parse(ServeSettings, {"bundles": ("x",), **settings})
    assert "\n" not in str(caught.value)


def test_the_answer_to_json_is_valid_json_with_finite_numbers(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    json.loads(answer.text, parse_constant=lambda text: pytest.fail(text))


def test_what_a_client_that_left_still_wanted_is_dropped(bundle: Path) -> None:
    server = running(ServeSettings(bundles=(str(bundle),), port=1, threads=1))
    images = 100
    files = [("files", (str(place), picture(place % 3, (400, 400), "JPEG"))) for place in range(images)]
    request = httpx.Request("POST", "http://localhost/v1/embeddings", files=files)
    with server as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = [b"POST /v1/embeddings HTTP/1.1", *(name + b": " + value for name, value in request.headers.raw)]
            connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + request.read())
            wait_until(lambda: server.gate.in_flight == 1, "the request does not come in", every_s=0.005)
        wait_until(lambda: server.gate.in_flight == 0, "the request is not dropped")
        assert httpx.post(f"{url}/v1/embeddings", files=files[:2]).status_code == 200
        found = httpx.get(f"{url}/metrics").text
        (answered,) = re.findall(r'^jepakit_images_total{[^}]*result="ok"[^}]*} (\S+)', found, re.MULTILINE)
        assert 2 <= float(answered) < images


PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


def test_the_examples_of_the_page_run(service: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes(picture(seed, kind="JPEG"))
    page = PAGE.replace("127.0.0.1:8000", service.removeprefix("http://")).replace('"scans"', '"tiny"')
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    commands = [line for code in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in code.splitlines()]
    assert len(commands) == 5
    if shutil.which("curl"):
        for command in commands:
            done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
            assert "error" not in json.loads(done.stdout), done.stdout


def test_the_page_names_every_error_and_every_route(http: httpx.Client) -> None:
    table = set(re.findall(r"`([a-z0-9_]+)`", PAGE.split("| status | code | when |")[1]))
    folder = Path(wire.__file__).parents[1]
    raised = {
        code
        for file in folder.rglob("*.py")
        for code in re.findall(r'(?:ApiError\(\s*\d+,|unavailable\()\s*"(\w+)"', file.read_text())
    }
    assert len(raised) > 15
    assert raised >= {"draining", "overloaded", "timeout", "not_ready"}
    assert not raised - table
    for path in http.get("/openapi.json").json()["paths"]:
        plain = path if path.endswith("/infer") else path.replace("/versions/{version}", "")  # told in words
        assert f"`{plain.replace('{version}', '{model_id}')}`" in PAGE.replace("`POST ", "`").replace("`GET ", "`"), (
            path
        )


def test_an_open_path_of_the_page_needs_no_key(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{new_key('alice')[1]}\n")
    with (
        running(ServeSettings(bundles=(str(bundle),), port=1, api_key_file=str(file))) as url,
        httpx.Client(base_url=url) as http,
    ):
        for path in ("/healthz", "/readyz", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert http.get("/", follow_redirects=True).url.path == "/docs", "what a browser opens first"
        document = http.get("/openapi.json").json()
        assert document["security"] == [{"key": []}]
        assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                needs_none = path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
                assert operation.get("security", document["security"]) == ([] if needs_none else [{"key": []}]), path
                answer = http.request(method, path.format(name="tiny", version=open_bundle(bundle).manifest.model_id))
                assert answer.status_code == (200 if needs_none else 401), (method, path)
                assert needs_none or answer.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/embeddings", content=picture(0)).status_code == 401


def test_a_mistyped_parameter_or_field_is_refused_and_never_passed_over(http: httpx.Client) -> None:
    headers = {"Content-Type": "image/png"}
    refused = http.post("/v1/embeddings?modle=other", content=picture(0), headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "modle")
    assert "did you mean model?" in refused.json()["error"]["message"]
    for query, name in (("modle=", "modle"), ("modle", "modle"), ("partial", "partial")):
        refused = http.post(f"/v1/embeddings?{query}", content=picture(0), headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert http.post("/v1/embeddings?model=", content=picture(0), headers=headers).status_code == 200
    refused = http.post("/v1/embeddings", files={"files": ("a.png", picture(0))}, data={"modle": "other"})
    assert refused.status_code == 400
    assert "field 'modle' is not a file" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/embeddings?model=tiny&model=tiny", "model is in the query 2 times"),
        ("/v1/embeddings?model=other", "'tiny' in the body and 'other' in the query"),
        ("/v2/embed?partial=true", "unknown parameter 'partial'"),
        ("/v2/models/tiny/infer?model=other", "unknown parameter 'model'"),
    ],
)
def test_what_the_query_says_is_never_passed_over(service: str, path: str, said: str) -> None:
    refused = httpx.post(f"{service}{path}", json={"model": "tiny", "input": [base64.b64encode(picture(0)).decode()]})
    assert refused.status_code == 400
    assert said in refused.text


@pytest.mark.parametrize("path", ["/v2/models", "/v2/health", "/v2/models/nobody"])
def test_errors_of_the_inference_protocol_are_in_its_shape(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert isinstance(answer.json()["error"], str)
