"""The OpenAPI document against the running service: answers match what it promises, whatever is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import jepakit
from jepakit_service.http import routes

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
POSTS = {
    "/v1/embeddings",
    "/v1/multimodalembeddings",
    "/v2/embed",
    "/v2/models/{name}/infer",
    "/v2/models/{name}/versions/{version}/infer",
}


@pytest.fixture(scope="module")
def document(service: str) -> dict[str, Any]:
    answer = httpx.get(f"{service}/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    made: dict[str, Any] = answer.json()
    return made


# What other tests have left in this process, such as an exporter of traces that tries again, may draw from `random` meanwhile.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
def test_every_operation_answers_as_the_document_says(service: str, bundle: Path) -> None:
    schema = schemathesis.openapi.from_url(f"{service}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {operation.path for operation in operations} > POSTS
    served = {"name": "tiny", "version": jepakit.open_bundle(bundle).manifest.model_id}
    with requests.Session() as session:
        for operation in operations:
            is_post = operation.path in POSTS
            seen = statuses_of(operation, session, GenerationMode.POSITIVE, 25 if is_post else 3, served)
            if is_post:
                assert 400 in statuses_of(operation, session, GenerationMode.NEGATIVE, 10)
            else:
                assert 200 in seen, (operation.path, seen)
                if "{name}" in operation.path:
                    assert 404 in statuses_of(operation, session, GenerationMode.POSITIVE, 3)


def statuses_of(
    operation: Any,
    session: requests.Session,
    mode: GenerationMode,
    examples: int,
    served: Mapping[str, str] = MappingProxyType({}),
) -> set[int]:
    """Statuses of generated requests that fit the document, or do not; each answer is checked against it.

    served  what the parameters of paths are; others are generated
    """
    seen: set[int] = set()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(mode))
    def check(case: schemathesis.Case[Any]) -> None:
        case.path_parameters.update((name, served[name]) for name in case.path_parameters if name in served)
        seen.add(case.call_and_validate(session=session, checks=CHECKS).status_code)

    check()
    return seen


def example_of(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The document's example of a POST's JSON: one image."""
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example: dict[str, Any] = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]["example"]
    return example


@pytest.mark.parametrize("path", sorted(POSTS))
def test_the_documents_examples_are_answered_and_fit_the_document(
    service: str, bundle: Path, document: dict[str, Any], path: str
) -> None:
    operation = schemathesis.openapi.from_url(f"{service}/openapi.json")[path]["POST"]
    example = example_of(document, path)
    place = path.format(name="tiny", version=jepakit.open_bundle(bundle).manifest.model_id)
    answer = requests.post(service + place, json=example, timeout=60)
    assert answer.status_code == 200, answer.text
    operation.validate_response(answer)
    in_parts = path.startswith("/v1")
    bad = json.loads(json.dumps(example).replace("iVBOR", "aGVsb"))
    answer = requests.post(f"{service}{place}{'?partial=true' if in_parts else ''}", json=bad, timeout=60)
    assert answer.status_code == (200 if in_parts else 415), answer.text
    operation.validate_response(answer)


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        *((path, "application/json") for path in sorted(POSTS)),
        ("/v1/embeddings", "application/octet-stream"),
        ("/v1/embeddings", "application/x-npy"),
        ("/v2/models/{name}/infer", "application/octet-stream"),
    ],
)
def test_every_answer_with_vectors_has_the_headers_of_the_document(
    service: str, bundle: Path, document: dict[str, Any], path: str, accept: str
) -> None:
    manifest, binary = jepakit.open_bundle(bundle).manifest, {}
    if path.startswith("/v2/models") and accept == "application/octet-stream":
        binary = {"parameters": {"binary_data_output": True}}
    answer = requests.post(
        service + path.format(name="tiny", version=manifest.model_id),
        json={**example_of(document, path), **binary},
        headers={"Accept": accept, "X-Request-Id": "from-a-test"},
        timeout=60,
    )
    due = {
        "X-Model-Id": manifest.model_id,
        "X-Embedding-Shape": f"1,{manifest.embedding.dim}",
        "X-Embedding-Dtype": "float32",
        "X-Precision": "fp32",
        "X-Provider": "cpu",
        "X-Request-Id": "from-a-test",
    }
    assert answer.headers["content-type"] == accept, answer.text
    assert {name: answer.headers.get(name) for name in due} == due
    described = set(document["paths"][path]["post"]["responses"]["200"]["headers"])
    assert described - {"Inference-Header-Content-Length"} == set(due)


def test_the_document_is_complete(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.0.")  # Swagger's page shows no later one
    assert set(document["paths"]) > POSTS
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["operationId"], (method, path)
            assert {"200", "500"} <= set(operation["responses"]), (method, path)
            refusals = set() if routes.is_open(path) else {"401", "403"}
            assert {"401", "403"} & set(operation["responses"]) == refusals, (method, path)
            for status, answer in operation["responses"].items():
                assert answer["description"]
                due = {"X-Request-Id", *(["Retry-After"] if status in ("429", "503") else [])}
                assert status == "200" or set(answer["headers"]) == due, (method, path, status)
            told = {one["name"]: one.get("description", "") for one in operation.get("parameters", ())}
            pinned = "{name}" in path and "{version}" not in path
            assert ("NAME@MODEL_ID" in told.get("name", "")) == pinned, path
            assert ("model_id" in told.get("version", "")) == ("{version}" in path), path
            assert operation["summary"].endswith(".")
            assert operation["summary"] not in operation.get("description", "")
    assert set(document["components"]["schemas"]["ErrorAnswer"]["properties"]) == {
        "error",
        *routes.REPEATED_AS.values(),
    }
    used = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert used == set(document["components"]["schemas"])


def test_the_document_misleads_no_generator_of_clients(document: dict[str, Any]) -> None:
    """openapi-typescript demands fields that have a default; openapi-generator names types by titles, over others."""
    assert document["info"]["title"] == "jepakit"
    schemas = list(mappings_in([document["paths"], document["components"]]))
    for schema in schemas:
        assert "title" not in schema
        assert schema.get("default", "") is not None, schema
    nullable = [schema["enum"] for schema in schemas if schema.get("nullable") and schema.get("enum", [None]) != [None]]
    assert nullable == [["float", None], ["base64", None], ["float", None]]
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)
    assert {"healthz", "readyz", "metrics", "list_models", "get_model", "server_metadata", "embed"} < set(names)
    components = document["components"]["schemas"]
    assert {"Input", "Encoding"} < set(components)
    assert components["Readiness"]["properties"]["status"]["enum"] == ["ready", "degraded"]


def test_null_is_allowed_by_strict_readers_too(document: dict[str, Any]) -> None:
    """In OpenAPI 3.0, `nullable` widens only the `type` beside it; a reference or a union beside it still forbids null."""
    schemas = list(mappings_in([document["paths"], document["components"]]))
    for schema in schemas:
        if schema.get("nullable"):
            assert "type" in schema
            assert not schema.keys() & {"allOf", "anyOf", "oneOf", "$ref"}
    (model,) = (
        each["properties"]
        for each in document["components"]["schemas"].values()
        if "update" in each.get("properties", ())
    )
    assert {"type": "object", "nullable": True, "enum": [None]} in model["update"]["anyOf"]


def mappings_in(node: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside, but those that map names of fields."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(value, dict) and key != "properties":
            yield value
        yield from mappings_in(value)


def test_the_document_tells_all_that_the_service_says_of_a_model(service: str, document: dict[str, Any]) -> None:
    told, schemas = httpx.get(f"{service}/v1/models/tiny").json(), document["components"]["schemas"]
    assert set(told) == set(schemas["ModelDescription"]["properties"]) == set(schemas["ModelDescription"]["required"])
    assert set(told["limits"]) == set(schemas["ModelLimits"]["properties"])


def test_the_document_says_that_a_key_is_wanted_where_one_is(document: dict[str, Any]) -> None:
    assert "security" not in document


def test_the_page_loads_nothing_from_elsewhere(service: str, document: dict[str, Any]) -> None:
    page = httpx.get(f"{service}/docs")
    assert page.status_code == 200
    assert "//" not in page.text.replace("<!doctype html>", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 5
    for name in loaded:
        asset = httpx.get(urljoin(f"{service}/docs", name))
        assert asset.status_code == 200, name
        assert asset.headers["content-type"].split(";")[0] in ("text/javascript", "text/css", "image/png")
        assert asset.content
    start = httpx.get(urljoin(f"{service}/docs", "docs/start.js")).text
    assert "validatorUrl: null" in start
    (url,) = re.findall(r'url: "([^"]+)"', start)
    assert httpx.get(urljoin(f"{service}/docs", url)).json() == document
    assert httpx.get(f"{service}/docs/../../etc/passwd").status_code == 404
    assert httpx.get(f"{service}/docs/nothing.js").json()["error"]["code"] == "no_such_route"
