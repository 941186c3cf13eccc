"""The OpenAPI document, generated from the models that validate requests, and its page, served from this machine only.

The document is OpenAPI 3.0: the Swagger page packaged on PyPI shows nothing later.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from swagger_ui_bundle import swagger_ui_path
from typing_extensions import TypedDict

from jepakit_service.http import routes
from jepakit_service.http.media import JSON
from jepakit_service.http.oip import OipError

_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "index.css", "favicon-32x32.png")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>jepakit</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="stylesheet" href="docs/index.css">
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without `validatorUrl: null` the page sends the document's address to one of Swagger's hosts.
_START = """window.ui = SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", validatorUrl: null, deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout"
});
"""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REASONS = {
    400: "the request is wrong, and `code` says how",
    401: "an API key is missing or unknown",
    403: "the service has no API keys, and the request names another host or comes from a page of another site",
    404: "there is no such model or route",
    405: "the route does not take this method",
    408: "the body took too long to arrive",
    413: "the body or an image is too large, or there are too many images",
    415: "the format is not supported",
    422: "an image cannot be read correctly",
    429: "too much work is waiting: try again after Retry-After seconds",
    500: "a fault in the service",
    503: "the service is not ready, stopping, too slow or out of memory: try again after Retry-After seconds",
}
_ERROR_HEADERS = {"X-Request-Id": "the request's own id, or a new one: the operator finds it in the log"}
_PASSING_HEADERS = {**_ERROR_HEADERS, "Retry-After": "after how many seconds to try again"}
_OF_GET = (400, 401, 403, 404, 405, 500, 503)
_OF_OPEN_GET = tuple(status for status in _OF_GET if status not in (401, 403))


class ErrorDetail(TypedDict):
    """What went wrong: `code` is stable, `message` is for people, and `request_id` is for the operator."""

    message: str
    type: str
    code: str
    param: str | None
    request_id: str


class ErrorAnswer(TypedDict):
    """An error, in OpenAI's shape. `detail` (on OpenAI's, Jina's and Voyage's routes) and `message` (on Cohere's) repeat its message."""

    error: ErrorDetail
    detail: NotRequired[str]
    message: NotRequired[str]


@dataclass(frozen=True)
class Parameter:
    """A parameter in the path, the query or a header."""

    name: str
    place: str
    about: str
    schema: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """The parameter in OpenAPI's form."""
        required = {"required": True} if self.place == "path" else {}
        return {"name": self.name, "in": self.place, "description": self.about, "schema": dict(self.schema), **required}


BINARY: Mapping[str, Any] = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Post:
    """A route that takes images. `takes` and `gives` map media types to a model, or to a schema as it is."""

    path: str
    name: str
    about: str
    tag: str
    takes: Mapping[str, Any]
    gives: Mapping[str, Any]
    parameters: Sequence[Parameter]
    answer_headers: Mapping[str, str]


def document(app: FastAPI, posts: Sequence[Post], *, keyed: bool) -> dict[str, Any]:
    """The OpenAPI document of FastAPI's own routes and of `posts`. `keyed`: an API key is required."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in made["paths"].items():
        is_open = routes.is_open(path)
        for operation in operations.values():
            operation["responses"].pop("422", None)
            # FastAPI makes summaries of functions' names.
            operation["summary"], _, more = operation.pop("description").partition("\n")
            if more.strip():
                operation["description"] = more.strip()
            _add_errors(operation, path, _OF_OPEN_GET if is_open else _OF_GET, schemas)
            if keyed and is_open:
                operation["security"] = []
    for post in posts:
        made["paths"][post.path] = {"post": _operation(post, schemas)}
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return {**made, **{part: _lower(made[part]) for part in ("paths", "components")}, "openapi": "3.0.3"}


def docs_router() -> APIRouter:
    """`/docs` and what it loads, kept in memory."""
    router = APIRouter(include_in_schema=False)
    assets = {name: (swagger_ui_path / name).read_bytes() for name in _ASSETS}
    assets["start.js"] = _START.encode()

    @router.get("/")
    async def front() -> Response:
        return RedirectResponse("docs")

    @router.get("/docs")
    async def page() -> Response:
        return Response(_PAGE, media_type="text/html", headers=_guarded())

    @router.get("/docs/{name}")
    async def asset(name: str) -> Response:
        if name not in assets:
            raise HTTPException(404, "no such file")
        return Response(assets[name], media_type=mimetypes.guess_type(name)[0], headers=_guarded())

    return router


def _guarded() -> dict[str, str]:
    return {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def _operation(post: Post, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": post.name,
        "summary": post.about,
        "tags": [post.tag],
        "parameters": [parameter.describe() for parameter in post.parameters],
        "requestBody": {"required": True, "content": _content(post.takes, schemas, "validation")},
        "responses": {
            "200": {
                "description": "the vectors",
                "content": _content(post.gives, schemas, "serialization"),
                "headers": _headers(post.answer_headers),
            }
        },
    }
    _add_errors(operation, post.path, tuple(_REASONS), schemas)
    return operation


def _add_errors(operation: dict[str, Any], path: str, statuses: Sequence[int], schemas: dict[str, Any]) -> None:
    shape: Any = OipError if routes.is_oip(path) else ErrorAnswer
    for status in statuses:
        if str(status) not in operation["responses"]:
            operation["responses"][str(status)] = {
                "description": _REASONS[status],
                "content": _content({JSON: shape}, schemas, "serialization"),
                "headers": _headers(_PASSING_HEADERS if status in (429, 503) else _ERROR_HEADERS, required=True),
            }


def _headers(about: Mapping[str, str], *, required: bool = False) -> dict[str, Any]:
    always = {"required": True} if required else {}
    return {name: {"description": text, "schema": {"type": "string"}, **always} for name, text in about.items()}


def _content(kinds: Mapping[str, Any], schemas: dict[str, Any], mode: Any) -> dict[str, Any]:
    return {media: {"schema": _schema(kind, schemas, mode)} for media, kind in kinds.items()}


def _schema(kind: Any, schemas: dict[str, Any], mode: Any) -> dict[str, Any]:
    """A schema as it is, or a reference to a model's, which is added to `schemas` with everything it refers to."""
    if isinstance(kind, Mapping):
        return dict(kind)
    made = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    schemas.update(made.pop("$defs", {}))
    schemas[kind.__name__] = made
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


_NULL = {"type": "object", "nullable": True, "enum": [None]}


def _lower(node: Any) -> Any:
    """Translate pydantic's JSON Schema to OpenAPI 3.0, without null defaults and titles, which mislead client generators.

    Generators take a field with a default, even null, for one that is always there, and name nested types by their title,
    which pydantic derives from the field's name.
    """
    if isinstance(node, list):
        return [_lower(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: {name: _lower(one) for name, one in value.items()} if key == "properties" else _lower(value)
        for key, value in node.items()
        if key not in ("propertyNames", "title") and (key, value) != ("default", None)
    }
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if {"type": "null"} in node.get("anyOf", []):
        forms = [form for form in node.pop("anyOf") if form != {"type": "null"}]
        if len(forms) == 1 and "type" in forms[0]:
            node = {**forms[0], **node, "nullable": True}
        else:  # `nullable` widens only the `type` that it stands beside
            node["anyOf"] = [*forms, _NULL]
        if "enum" in node:
            node["enum"] = [*node["enum"], None]
    if "$ref" in node and len(node) > 1:  # keys beside a reference are ignored
        node["allOf"] = [{"$ref": node.pop("$ref")}]
    return node
