"""Requests as other services' clients write them, over real HTTP."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import openai
import pytest
from pydantic_core import to_json

import jepakit
from jepakit_service.faults import ApiError
from jepakit_service.http import dialects, wire
from jepakit_service.http.keys import new_key
from jepakit_service.settings import ServeSettings

from .conftest import copied, picture, running

PLAIN = [base64.b64encode(picture(seed)).decode() for seed in range(3)]
URIS = [f"data:image/png;base64,{text}" for text in PLAIN]
PIXELS = 48 * 40


def decoded(vector: str | list[float]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector, np.float32)


def assert_vectors(given: list[Any], expected: np.ndarray[Any, Any]) -> None:
    found = np.stack([decoded(vector) for vector in given])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


OPENAI_INPUTS = {
    "data URIs": URIS,
    "base64": PLAIN,
    "base64 in lines": [base64.encodebytes(picture(seed)).decode() for seed in range(3)],
    "Jina's images": [{"image": text} for text in PLAIN],
    "Jina's images as data URIs": [{"image": uri} for uri in URIS],
    "OpenAI's parts": [{"type": "image_url", "image_url": {"url": uri, "detail": "low"}} for uri in URIS],
    "Jina's former images": [{"bytes": text} for text in PLAIN],
    "LlamaIndex's images": [{"url": uri} for uri in URIS],
    "after white space": [f"\n {uri}" for uri in URIS],
    "Voyage's parts": [{"type": "image_base64", "image_base64": uri} for uri in URIS],
    "contents": [{"content": [{"type": "image_url", "image_url": {"url": uri}}]} for uri in URIS],
    "all sorts": [URIS[0], {"image": PLAIN[1]}, {"content": [{"type": "image_url", "image_url": URIS[2]}]}],
}


@pytest.mark.parametrize("kind", OPENAI_INPUTS)
def test_every_way_to_write_an_image_gives_its_vector(
    http: httpx.Client, expected: np.ndarray[Any, Any], kind: str
) -> None:
    body = http.post("/v1/embeddings", json={"input": OPENAI_INPUTS[kind]}).json()
    assert_vectors([row["embedding"] for row in body["data"]], expected)
    assert body["usage"] == {"prompt_tokens": 0, "total_tokens": 0, "image_pixels": 3 * PIXELS}


def test_one_image_needs_no_list(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    for given in (URIS[1], {"image": PLAIN[1]}):
        (row,) = http.post("/v1/embeddings", json={"input": given}).json()["data"]
        assert_vectors([row["embedding"]], expected[1:2])


def test_the_openai_client_asks_for_base64_by_itself_and_may_ask_for_floats_and_the_models_own_length(
    service: str, expected: np.ndarray[Any, Any]
) -> None:
    with openai.OpenAI(base_url=f"{service}/v1", api_key="unused") as client:
        dim = expected.shape[1]
        for options in ({}, {"encoding_format": "float"}, {"dimensions": dim}, {"user": "someone"}):
            answer = client.embeddings.create(model="tiny", input=URIS, **options)
            assert_vectors([row.embedding for row in answer.data], expected)
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny", input=URIS, dimensions=dim - 1)
        assert caught.value.code == "dimensions_not_supported"
        assert f"tiny gives {dim}" in caught.value.message
        assert [(model.id, model.created) for model in client.models.list()] == [("tiny", 0)]


def test_jinas_request(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    asked = {
        "model": "tiny",
        "input": [{"image": text} for text in PLAIN],
        "embedding_type": "base64",
        "normalized": False,
        "task": "retrieval.passage",
        "truncate": True,
    }
    body = http.post("/v1/embeddings", json=asked).json()
    assert all(isinstance(row["embedding"], str) for row in body["data"])
    assert_vectors([row["embedding"] for row in body["data"]], expected)


def test_llamaindexs_request(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    """Its clients for Jina say `encoding_type`."""
    for wanted, kind in (("float", list), ("base64", str)):
        asked = {"model": "tiny", "input": [{"url": uri} for uri in URIS], "encoding_type": wanted}
        rows = http.post("/v1/embeddings", json=asked).json()["data"]
        assert all(isinstance(row["embedding"], kind) for row in rows)
        assert_vectors([row["embedding"] for row in rows], expected)


def test_voyages_request(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    asked = {
        "model": "tiny",
        "inputs": [{"content": [{"type": "image_base64", "image_base64": uri}]} for uri in URIS],
        "input_type": "document",
        "truncation": True,
        "output_dtype": "float",
        "encoding_format": None,
    }
    body = http.post("/v1/multimodalembeddings", json=asked).json()
    assert_vectors([row["embedding"] for row in body["data"]], expected)
    assert body["usage"] == {"text_tokens": 0, "image_pixels": 3 * PIXELS, "video_pixels": 0, "total_tokens": 0}
    body = http.post("/v1/multimodalembeddings", json={**asked, "encoding_format": "base64"}).json()
    assert all(isinstance(row["embedding"], str) for row in body["data"])
    assert_vectors([row["embedding"] for row in body["data"]], expected)


def test_jinas_voyages_and_coheres_clients_find_the_message_of_every_error(bundle: Path, tmp_path: Path) -> None:
    """What they read is `detail`, and `message`."""
    keys, (key, line) = tmp_path / "keys", new_key("a")
    keys.write_text(f"{line}\n")
    with running(ServeSettings(bundles=(str(bundle),), port=1, api_key_file=str(keys))) as url:
        for path, name in {
            "/v1/multimodalembeddings": "detail",
            "/v1/embeddings": "detail",
            "/v2/embed": "message",
        }.items():
            refused = [
                httpx.post(url + path, json={}, headers=headers) for headers in ({}, {"Authorization": f"Bearer {key}"})
            ]
            assert [answer.status_code for answer in refused] == [401, 400]
            for told in (answer.json() for answer in refused):
                assert told.keys() == {"error", name}
                assert told[name] == told["error"]["message"]


@pytest.mark.parametrize("types", [None, ["float"], ["base64"], ["base64", "float"]])
def test_coheres_request(http: httpx.Client, expected: np.ndarray[Any, Any], types: list[str] | None) -> None:
    ways: list[dict[str, Any]] = [
        {"images": URIS},
        {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": uri}}]} for uri in URIS]},
    ]
    for way in ways:
        asked = {"model": "tiny", "input_type": "image", "embedding_types": types, "truncate": "END", **way}
        answer = http.post("/v2/embed", json=asked)
        body = answer.json()
        assert body["id"] == answer.headers["x-request-id"]
        assert body["response_type"] == "embeddings_by_type"
        assert set(body["embeddings"]) == set(types or ["float"])
        assert "images" not in body  # width, height and format of files are not kept
        for vectors in body["embeddings"].values():
            assert_vectors(vectors, expected)


def test_other_types_are_refused_with_the_names_of_those_that_are_had(http: httpx.Client) -> None:
    answer = http.post("/v2/embed", json={"images": URIS, "embedding_types": ["float", "int8"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "embedding_types[1]"
    assert "'float' or 'base64'" in answer.json()["error"]["message"]
    answer = http.post("/v1/multimodalembeddings", json={"inputs": [{"image": PLAIN[0]}], "output_dtype": "int8"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "output_dtype")


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/embeddings", {"input": [URIS[0], {"text": "a cat"}]}, "text_not_supported", "input[1]"),
    ("/v1/embeddings", {"input": [{"content": [{"text": "a"}, {"image": PLAIN[0]}]}]}, "text_not_supported", "input[0]"),
    ("/v1/embeddings", {"input": [{"type": "image_url"}]}, "invalid_input", "input[0]"),
    ("/v1/embeddings", {"input": [{"image": PLAIN[0], "image_base64": PLAIN[0]}]}, "invalid_input", "input[0]"),
    ("/v1/embeddings", {"input": [{"content": []}]}, "invalid_input", "input[0]"),
    ("/v1/embeddings", {"input": [{"content": [{"image": PLAIN[0]}] * 2}]}, "invalid_input", "input[0]"),
    ("/v1/embeddings", {"input": [URIS[0], [1, 2]]}, "text_not_supported", "input"),
    ("/v1/embeddings", {"input": [URIS[0], [URIS[0]]]}, "invalid_input", "input[1]"),
    ("/v1/embeddings", {"input": [{"image": 7}]}, "invalid_input", "input[0].image"),
    ("/v1/embeddings", {"input": ["data:image/png,raw"]}, "invalid_base64", "input[0]"),
    ("/v1/embeddings", {"input": [{"image": "https://x/y.png"}]}, "url_not_supported", "input[0]"),
    ("/v1/embeddings", {"input": [{"image_url": {"url": "HTTP://x/y.png"}}]}, "url_not_supported", "input[0]"),
    ("/v1/embeddings", {"input": URIS, "normalized": True}, "normalized_not_supported", "normalized"),
    ("/v1/embeddings", {"input": URIS, "embedding_type": "binary"}, "invalid_request", "embedding_type"),
    ("/v1/embeddings", {"input": URIS, "modle": "vit@0123"}, "invalid_request", "modle"),
    ("/v1/embeddings", {"input": URIS, "dimension": 256}, "invalid_request", "dimension"),
    ("/v1/embeddings", {"input": URIS, "output_dimension": 256}, "invalid_request", "output_dimension"),
    ("/v1/embeddings", {"input": URIS, "normalize": True}, "invalid_request", "normalize"),
    ("/v1/embeddings", {"input": URIS, "truncate_dim": 64}, "invalid_request", "truncate_dim"),
    ("/v1/embeddings", {"input": URIS, "normalize_embeddings": True}, "invalid_request", "normalize_embeddings"),
    ("/v1/embeddings", {"input": URIS, "output_dtype": "int8"}, "invalid_request", "output_dtype"),
    ("/v1/embeddings", {"input": [" https://x/y.png"]}, "url_not_supported", "input[0]"),
    ("/v2/embed", {"images": URIS, "output_dimensionality": 64}, "invalid_request", "output_dimensionality"),
    ("/v1/embeddings", {"input": URIS, "partial": True}, "invalid_request", "partial"),
    ("/v2/embed", {"images": URIS, "embedding_type": ["base64"]}, "invalid_request", "embedding_type"),
    ("/v1/multimodalembeddings", {"inputs": [{"content": [{"text": "a"}]}]}, "text_not_supported", "inputs[0]"),
    ("/v1/multimodalembeddings", {"inputs": [{"image_url": "https://x"}]}, "url_not_supported", "inputs[0]"),
    ("/v1/multimodalembeddings", {"inputs": [{"content": [{"image": PLAIN[0]}], "image": PLAIN[1]}]}, "invalid_input", "inputs[0]"),
    ("/v1/multimodalembeddings", {"inputs": []}, "no_images", "inputs"),
    ("/v1/multimodalembeddings", {"input": URIS}, "invalid_request", "inputs"),
    ("/v1/multimodalembeddings", {"inputs": [{"image": PLAIN[0]}], "output_dimension": 5}, "dimensions_not_supported", "output_dimension"),
    ("/v2/embed", {"texts": ["a cat"]}, "text_not_supported", "texts"),
    ("/v2/embed", {"images": URIS, "inputs": [{"image": PLAIN[0]}]}, "invalid_input", "inputs"),
    ("/v2/embed", {}, "no_images", "images"),
    ("/v2/embed", {"images": ["https://x/y.png"]}, "url_not_supported", "images[0]"),
    ("/v2/embed", {"images": URIS, "output_dimension": 256}, "dimensions_not_supported", "output_dimension"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "asked", "code", "param"), REFUSED)
def test_what_cannot_be_given_is_refused_by_name(
    http: httpx.Client, path: str, asked: dict[str, Any], code: str, param: str
) -> None:
    answer = http.post(path, json=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (
            "/v1/embeddings",
            {"input": URIS, "user": "me", "task": "classification", "input_type": "query", "late_chunking": False},
        ),
        (
            "/v1/embeddings",
            {"input": URIS, "truncate": True, "truncate_prompt_tokens": 9, "priority": 0, "prompt_name": "query"},
        ),
        ("/v1/multimodalembeddings", {"inputs": [{"image": PLAIN[0]}], "input_type": "document", "truncation": True}),
        (
            "/v2/embed",
            {"images": URIS, "input_type": "image", "truncate": "END", "max_tokens": 9, "output_dimension" * 9: 1},
        ),
    ],
)
def test_other_services_fields_that_do_not_change_vectors_are_ignored(
    http: httpx.Client, path: str, asked: dict[str, Any]
) -> None:
    assert http.post(path, json=asked).status_code == 200


@pytest.mark.parametrize(("given", "param"), [(5, "input"), (None, "input"), ([URIS[0], [URIS[0]]], "input[1]")])
def test_what_an_image_may_be_is_told(http: httpx.Client, given: Any, param: str) -> None:
    error = http.post("/v1/embeddings", json={"input": given}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_input", param)
    assert error["message"].startswith(
        f"{param}: an image is a data URI or base64, or an object that holds one (seen: "
    )


def test_a_normalised_model_gives_no_other_vectors(bundle: Path) -> None:
    manifest = jepakit.open_bundle(bundle).manifest
    unit = manifest.model_copy(update={"embedding": manifest.embedding.model_copy(update={"normalize": True})})
    dialects.check_space(wire.Ask([], normalized=True), unit)
    with pytest.raises(ApiError, match=r"vectors of length 1: .* or send true$"):
        dialects.check_space(wire.Ask([], normalized=False), unit)


@pytest.mark.parametrize("field", ["images", "inputs"])
def test_a_bad_image_is_named_in_the_dialects_own_words(http: httpx.Client, field: str) -> None:
    broken = base64.b64encode(b"broken").decode()
    items = [PLAIN[0], broken] if field == "images" else [{"image": PLAIN[0]}, {"image": broken}]
    answer = http.post("/v2/embed", json={field: items})
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, f"{field}[1]")
    answer = http.post("/v2/embed?partial=true", json={field: items})  # Cohere's answer has no place for a reason
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "partial")


def test_voyages_answer_may_be_partial(http: httpx.Client, expected: np.ndarray[Any, Any]) -> None:
    items = [{"image": PLAIN[0]}, {"image": "aGk="}, {"image": PLAIN[2]}]
    rows = http.post("/v1/multimodalembeddings?partial=true", json={"inputs": items}).json()["data"]
    assert_vectors([rows[0]["embedding"], rows[2]["embedding"]], expected[[0, 2]])
    assert rows[1]["error"]["code"] == "unsupported_format"


def test_tokens_of_text_are_told_to_be_text(http: httpx.Client) -> None:
    """As LangChain sends what it has tokenized."""
    answer = http.post("/v1/embeddings", json={"input": [[1, 2], [3]]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "text_not_supported")


def test_json_without_a_content_type_is_read_where_nothing_else_is(
    http: httpx.Client, expected: np.ndarray[Any, Any]
) -> None:
    """As LiteLLM sends it to Voyage's route."""
    body = json.dumps({"inputs": [{"content": [{"type": "image_base64", "image_base64": URIS[0]}]}]}).encode()
    (row,) = http.post("/v1/multimodalembeddings", content=body).json()["data"]
    assert_vectors([row["embedding"]], expected[:1])


@pytest.mark.parametrize("path", ["/v1/multimodalembeddings", "/v2/embed"])
def test_only_json_is_read_there(http: httpx.Client, path: str) -> None:
    answer = http.post(path, content=picture(0), headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    answer = http.get(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_every_dialect_says_which_space_it_answers_in(http: httpx.Client, bundle: Path) -> None:
    model_id = jepakit.open_bundle(bundle).manifest.model_id
    inputs = {"inputs": [{"image": PLAIN[0]}]}
    ways: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": URIS[:1]},
        "/v1/multimodalembeddings": inputs,
        "/v2/embed": inputs,
    }
    for path, asked in ways.items():
        for model in (None, "tiny", f"tiny@{model_id}"):
            answer = http.post(path, json={**asked, "model": model})
            assert (answer.headers["x-model-id"], answer.json()["model_id"]) == (model_id, model_id)
        answer = http.post(path, json={**asked, "model": "embed-v4.0"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_several_models_want_a_name(bundle: Path, tmp_path: Path) -> None:
    copied(bundle, tmp_path / "other", name="other")
    with (
        running(ServeSettings(bundles=(str(bundle), str(tmp_path / "other")), port=1)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        answer = http.post("/v1/embeddings", json={"input": URIS[0]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_missing")
        ways: list[dict[str, Any]] = [
            {"json": {"input": URIS[0], "model": "other"}},
            {"json": {"input": URIS[0]}, "params": {"model": "other"}},
            {"files": {"files": ("x", picture(0))}, "data": {"model": "other"}},
            {"content": picture(0), "headers": {"Content-Type": "image/png"}, "params": {"model": "other"}},
        ]
        for way in ways:
            assert http.post("/v1/embeddings", **way).json()["model"] == "other"


def test_json_floats_are_the_vectors_bit_for_bit() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 384)).astype(np.float32) * np.float32(1e-7)
    for encoding in get_args(wire.Encoding):
        written = [json.loads(to_json(wire.write_vector(vector, encoding))) for vector in vectors]
        assert np.stack([decoded(one) for one in written]).tobytes() == vectors.tobytes()


def test_a_short_json_cannot_become_large_in_memory(http: httpx.Client) -> None:
    for inner in ("[]", "{}", '""', "1"):
        body = '{"input":[' + ",".join([inner] * 100_000) + "]}"
        answer = http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_values")


def test_objects_count_as_lists_do() -> None:
    wire.check_json_size(b"[{" * 5, 10)
    with pytest.raises(ApiError, match="11 lists and objects, at most 10"):
        wire.check_json_size(b"{" * 11, 10)
