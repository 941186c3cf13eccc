"""The Open Inference Protocol v2, by NVIDIA's own client and by hand, over real HTTP."""

from __future__ import annotations

import base64
import json
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

import jepakit
from jepakit_service.faults import ApiError
from jepakit_service.http import oip

from .conftest import picture

FILES = [picture(seed) for seed in range(3)]
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
INFER = "/v2/models/tiny/infer"


@pytest.fixture
def client(service: str) -> Iterator[Any]:
    with triton.InferenceServerClient(service.removeprefix("http://")) as made:
        yield made


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The bundle's vectors, computed in this process."""
    model = jepakit.load(bundle)
    return {
        "image": model.embed(FILES, progress=False).vectors,
        "images": model.embed(PIXELS, progress=False).vectors,
    }


def assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def files_input(*, binary: bool, shape: tuple[int, ...] = (3,)) -> Any:
    given = triton.InferInput("image", list(shape), "BYTES")
    items = FILES if binary else [base64.b64encode(file) for file in FILES]
    given.set_data_from_numpy(np.array(items, dtype=np.object_).reshape(shape), binary_data=binary)
    return given


def pixels_input(*, binary: bool) -> Any:
    given = triton.InferInput("images", list(PIXELS.shape), "UINT8")
    given.set_data_from_numpy(PIXELS, binary_data=binary)
    return given


@pytest.mark.parametrize("sent", ["binary", "json"])
@pytest.mark.parametrize("answered", ["binary", "json", "as the client chooses"])
@pytest.mark.parametrize("kind", ["image", "images"])
def test_tritons_client_embeds(
    client: Any, expected: dict[str, np.ndarray[Any, Any]], kind: str, sent: str, answered: str
) -> None:
    given = (files_input if kind == "image" else pixels_input)(binary=sent == "binary")
    wanted = triton.InferRequestedOutput("embeddings", binary_data=answered == "binary")
    outputs = None if answered == "as the client chooses" else [wanted]
    result = client.infer("tiny", [given], outputs=outputs, request_id="mine")
    assert_close(result.as_numpy("embeddings"), expected[kind])
    assert result.get_response()["id"] == "mine"
    assert ("data" in result.get_output("embeddings")) == (answered == "json")


def test_tritons_client_finds_its_way(client: Any, bundle: Path, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    manifest = jepakit.open_bundle(bundle).manifest
    version, dim = manifest.model_id, manifest.embedding.dim
    assert client.is_server_live()
    assert client.is_server_ready()
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    for named in ({}, {"model_version": version}):
        assert client.is_model_ready("tiny", **named)
        described = client.get_model_metadata("tiny", **named)
        assert (described["name"], described["versions"]) == ("tiny", [version])
        assert described["outputs"] == [{"name": "embeddings", "datatype": "FP32", "shape": [-1, dim]}]
        assert {one["name"]: one["datatype"] for one in described["inputs"]} == {"image": "BYTES", "images": "UINT8"}
        result = client.infer("tiny", [files_input(binary=True, shape=(3, 1))], **named)
        assert result.get_response()["model_version"] == version
        assert_close(result.as_numpy("embeddings"), expected["image"])
    assert not client.is_model_ready("tiny", "0" * 16)
    assert not client.is_model_ready("other")


def test_tritons_client_is_told_what_is_wrong(client: Any) -> None:
    broken = triton.InferInput("image", [2], "BYTES")
    broken.set_data_from_numpy(np.array([FILES[0], b"broken"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match=r"^\[415\] inputs\[0\]\[1\]: "):
        client.infer("tiny", [broken])
    with pytest.raises(InferenceServerException, match=r"^\[404\] no model 'other'"):
        client.infer("other", [files_input(binary=True)])
    floats = triton.InferInput("images", [1, 40, 40, 3], "FP32")
    floats.set_data_from_numpy(np.zeros((1, 40, 40, 3), np.float32))
    with pytest.raises(InferenceServerException, match=r"^\[422\] .*float32 pixels of 3 bands"):
        client.infer("tiny", [floats])


def request(**changes: Any) -> dict[str, Any]:
    """A request with one file in JSON, and some of its input's fields changed or (None) left out."""
    given = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(FILES[0]).decode()]}
    return {"inputs": [{key: value for key, value in {**given, **changes}.items() if value is not None}]}


def pixels(**changes: Any) -> dict[str, Any]:
    return request(**{"name": "images", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [7] * 12, **changes})


WRONG = {
    "no inputs": {"inputs": []},
    "two inputs": {"inputs": request()["inputs"] * 2},
    "another input": request(name="tokens"),
    "files as numbers": request(datatype="UINT8"),
    "pixels as bytes": pixels(datatype="BYTES"),
    "a datatype that is not had": pixels(datatype="FP64"),
    "no data": request(data=None),
    "another number of files": request(shape=[2]),
    "no files": request(shape=[0], data=[]),
    "a negative shape": request(shape=[-1]),
    "a shape of floats": request(shape=[1.0]),
    "no shape": request(shape=[]),
    "numbers as files": request(data=[1]),
    "text as a file": request(data=["not base64!"]),
    "a URL": request(data=["http://127.0.0.1:1/x.png"]),
    "text as pixels": pixels(data=["7"] * 12),
    "truth as pixels": pixels(data=[True] * 12),
    "halves as UINT8": pixels(data=[0.5] * 12),
    "too large for UINT8": pixels(data=[256] * 12),
    "negative in UINT8": pixels(data=[-1] * 12),
    "too few numbers": pixels(data=[1] * 11),
    "huge numbers": pixels(datatype="FP32", data=[10**400] * 12),
    "three axes": pixels(shape=[2, 2, 3]),
    "a huge shape": pixels(shape=[1, 2**40, 2**40, 3]),
    "sides of thousands of digits": pixels(shape=[1, 10**3000, 10**3000, 3]),
    "bytes announced that do not come": request(data=None, parameters={"binary_data_size": 9}),
    "data twice": request(parameters={"binary_data_size": 0}),
    "another output": {**request(), "outputs": [{"name": "tokens"}]},
    "classes as output": {**request(), "outputs": [{"name": "embeddings", "parameters": {"classification": 2}}]},
    "an output in shared memory": {
        **request(),
        "outputs": [{"name": "embeddings", "parameters": {"shared_memory_region": "mine"}}],
    },
    "too many outputs": {**request(), "outputs": [{"name": "embeddings"}] * 17},
    "a list": [1],
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_requests_are_told_in_the_protocols_shape(http: httpx.Client, kind: str) -> None:
    answer = http.post(INFER, json=WRONG[kind])
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert len(answer.json()["error"]) > 10
    assert answer.headers["x-request-id"]


def test_a_tensor_without_the_header_of_its_extension_is_told_of_it(http: httpx.Client) -> None:
    head = json.dumps(request(data=None, parameters={"binary_data_size": 9})).encode()
    answer = http.post(INFER, content=head + bytes(9))
    assert answer.status_code == 400
    assert "the header Inference-Header-Content-Length is missing" in answer.json()["error"]


def test_a_long_list_of_wrong_outputs_is_not_judged_one_by_one() -> None:
    body = json.dumps({"inputs": [], "outputs": [1] * 100_000}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="inputs"):
            oip.read(body, None, "tiny", 4)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    finally:
        tracemalloc.stop()


def test_an_output_may_be_asked_for_repeatedly(http: httpx.Client) -> None:
    assert http.post(INFER, json={**request(), "outputs": [{"name": "embeddings"}] * 2}).status_code == 200


def test_numbers_in_json_may_be_nested_or_flat(http: httpx.Client, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    for data in (PIXELS.tolist(), PIXELS.ravel().tolist()):
        asked = {"inputs": [{"name": "images", "shape": PIXELS.shape, "datatype": "UINT8", "data": data}]}
        (output,) = http.post(INFER, json=asked).json()["outputs"]
        assert_close(np.array(output["data"], np.float32).reshape(output["shape"]), expected["images"])


def test_pixels_that_are_no_numbers_are_refused(http: httpx.Client) -> None:
    for number in ("NaN", "Infinity", "1e39"):
        body = json.dumps(pixels(datatype="FP32", shape=[1, 40, 40, 1], data=[0.5] * 1600)).replace("0.5", number, 1)
        answer = http.post(INFER, content=body)
        assert answer.status_code == 422, answer.text


def framed(asked: dict[str, Any], tensor: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(asked).encode()
    return head + tensor, {"Inference-Header-Content-Length": str(len(head))}


def files_tensor(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def announced(tensor: bytes, **changes: Any) -> dict[str, Any]:
    return request(data=None, parameters={"binary_data_size": len(tensor)}, **changes)


def test_the_binary_form_by_hand(http: httpx.Client, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    tensor = files_tensor(*FILES)
    asked = {**announced(tensor, shape=[3]), "parameters": {"binary_data_output": True}}
    body, headers = framed(asked, tensor)
    answer = http.post(INFER, content=body, headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    told = json.loads(answer.content[:length])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert told["outputs"][0]["parameters"] == {"binary_data_size": len(answer.content) - length}
    assert_close(np.frombuffer(answer.content[length:], "<f4").reshape(3, -1), expected["image"])
    # An output's own wish goes before the request's.
    body, headers = framed({**asked, "outputs": [{"name": "embeddings", "parameters": {"binary_data": False}}]}, tensor)
    answer = http.post(INFER, content=body, headers=headers)
    assert "inference-header-content-length" not in answer.headers
    assert_close(np.array(answer.json()["outputs"][0]["data"], np.float32).reshape(3, -1), expected["image"])


@pytest.mark.parametrize(
    ("tensor", "size", "length"),
    [
        (files_tensor(FILES[0])[:-1], None, None),
        (struct.pack("<I", 2**32 - 1) + b"x", None, None),
        (b"\x01\x00", None, None),
        (files_tensor(FILES[0], FILES[1]), None, None),
        (bytes(8_000_000), None, None),
        (files_tensor(FILES[0]), 10**18, None),
        (files_tensor(FILES[0]), -1, None),
        (files_tensor(FILES[0]), None, "0"),
        (files_tensor(FILES[0]), None, "-5"),
        (files_tensor(FILES[0]), None, "x"),
        (files_tensor(FILES[0]), None, "9" * 5000),
        (files_tensor(FILES[0]), None, "\u00b2"),
        (files_tensor(FILES[0]), None, "10"),
    ],
)
def test_a_binary_tensor_that_lies_is_refused(
    http: httpx.Client, tensor: bytes, size: int | None, length: str | None
) -> None:
    asked = request(data=None, parameters={"binary_data_size": len(tensor) if size is None else size})
    body, headers = framed(asked, tensor)
    if length is not None:
        headers["Inference-Header-Content-Length"] = length
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = http.post(INFER, content=body, headers=encoded)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]


def test_no_more_elements_are_taken_than_the_shape_says() -> None:
    taken = []
    elements = oip._elements

    def counted(tensor: memoryview) -> Iterator[memoryview]:
        for element in elements(tensor):
            taken.append(element)
            yield element

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(oip, "_elements", counted)
        with pytest.raises(ApiError, match="more elements follow the JSON, but the shape says 2"):
            oip._files(oip.InferInput(name="image", datatype="BYTES", shape=[2]), memoryview(bytes(4000)))
    assert len(taken) == 3


def test_numbers_that_are_too_many_for_json_are_sent_to_the_binary_form(http: httpx.Client) -> None:
    body = json.dumps(pixels(shape=[1, 600, 600, 3], data=[0] * 1_080_000), separators=(",", ":"))
    answer = http.post(INFER, content=body)
    assert answer.status_code == 413
    assert "1000000" in answer.json()["error"]


def test_too_many_images_and_other_methods(http: httpx.Client) -> None:
    assert http.post(INFER, json=request(shape=[65], data=["aGk="] * 65)).status_code == 413
    answer = http.get(INFER)
    assert (answer.status_code, list(answer.json())) == (405, ["error"])
    assert list(http.get("/v2/models/other").json()) == ["error"]
    assert list(http.get("/v2/models/tiny/config").json()) == ["error"]


def test_a_long_body_is_read_beside_the_event_loop(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    read = oip.read

    def watched(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return read(*arguments)

    monkeypatch.setattr(oip, "read", watched)
    for side in (40, 41, 700):  # 5 kB twice, and 1.5 MB
        pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
        given = triton.InferInput("images", list(pixels.shape), "UINT8")
        given.set_data_from_numpy(pixels)
        client.infer("tiny", [given])
    assert [thread == threads[0] for thread in threads] == [True, True, False]
