"""The HTTP surface behind the gate. Knows nothing about Ray.

POSTs that carry images go straight to their handlers: FastAPI's routing would cost each as much time as a small model
takes. FastAPI handles everything else, and the OpenAPI document of all routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import jepakit
from jepakit._messages import did_you_mean
from jepakit_service.faults import ApiError, fault
from jepakit_service.http import oip_routes, openapi, operations
from jepakit_service.http.answers import error_body, send_whole
from jepakit_service.http.gate import Gate
from jepakit_service.http.media import JSON
from jepakit_service.http.openapi_posts import POSTS
from jepakit_service.http.posts import Call, Posts, Reply
from jepakit_service.http.routes import ROUTES
from jepakit_service.replica import AskAll, Replica
from jepakit_service.settings import ServeSettings
from jepakit_service.tasks import is_cancelled

_QUERY = {post.path: [one.name for one in post.parameters if one.place == "query"] for post in POSTS}
"""The query parameters that each route accepts. Inference routes name the model in their path."""

_ABOUT = (
    "Image embeddings from your own machine. Start with `GET /v1/models`, then send a file's bytes to `POST /v1/embeddings`. "
    "In an error, `code` is stable, and `message` is meant for people. Every route is described in jepakit's docs/http.md."
)


def build_app(settings: ServeSettings, ask_all: AskAll | None = None) -> Gate:
    """Load and check every model, and return the application that serves them. Raises BundleError if a check fails.

    ask_all  gives the reports of all replicas of the deployment; None: this is the only replica
    """
    replica = Replica(settings, ask_all)
    return Gate(Api(replica), replica)


class Api:
    """The ASGI application behind the gate: `Posts` handles image POSTs, FastAPI the rest; the gate answers errors."""

    def __init__(self, replica: Replica) -> None:
        self._posts = Posts(replica)
        self._rest = _rest(replica)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._posts.handler(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            # HEAD is answered like GET; the server leaves out the body.
            await self._rest({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)
            return
        call = await _read_call(scope, receive)
        reply = await _while_wanted(handler(call), receive)
        await send_whole(send, 200, *reply)


async def _read_call(scope: Scope, receive: Receive) -> Call:
    """Read the request; the gate hands over the whole body in one message."""
    if scope["method"] != "POST":
        raise ApiError(
            405, "method_not_allowed", f"{scope['method']} {scope['path']}: send POST", headers={"Allow": "POST"}
        )
    headers: dict[bytes, bytes] = dict(scope["headers"])
    headers[b"accept"] = b",".join(value for name, value in scope["headers"] if name == b"accept")
    if headers.get(b"content-encoding", b"").lower() not in (b"", b"identity"):
        raise ApiError(
            415,
            "unsupported_content_encoding",
            "compressed bodies are not read: image files are compressed already",
            headers={"Accept-Encoding": "identity"},
        )
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True) if scope["query_string"] else {}
    _check_query(query, _QUERY.get(scope["path"], ()))
    body = (await receive())["body"]
    return Call(scope["path"], query, headers, body, scope["state"]["request_id"])


def _check_query(query: Mapping[str, Sequence[str]], known: Sequence[str]) -> None:
    """Refuse unknown and repeated parameters by name: a mistyped `model` must not select some other model."""
    for name, values in query.items():
        if name not in known:
            raise ApiError(
                400,
                "invalid_request",
                f"unknown parameter {name[:40]!r} in the query{did_you_mean(name[:40], known)}",
                param=name[:40],
            )
        if len(values) > 1:
            raise ApiError(
                400, "invalid_request", f"{name} is in the query {len(values)} times: give it once", param=name
            )


async def _while_wanted(answering: Coroutine[Any, Any, Reply], receive: Receive) -> Reply:
    """Await the answer, cancelling it as soon as the client leaves: pending decoding and embedding is dropped.

    Raises ApiError 499 if the client left first. A finished answer is returned even if the client has left meanwhile.
    """
    # The answer has its own task: cancelling the request's task could take effect later, while it is sending.
    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(receive())
    leaving.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if not leaving.done() or is_cancelled():  # by the server, once it has waited for `drain_s`
            raise
        raise ApiError(499, "disconnected", "the client left before its answer") from None
    finally:
        leaving.cancel()


def _rest(replica: Replica) -> ASGIApp:
    """Everything but the image POSTs, as a FastAPI application."""
    app = FastAPI(
        title="jepakit",
        version=jepakit.__version__,
        description=_ABOUT,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,  # names the methods of generated clients
    )
    app.include_router(operations.router(replica))
    app.include_router(oip_routes.router(replica))
    app.include_router(openapi.docs_router())
    _answer_errors_in_one_shape(app)
    described = to_json(openapi.document(app, POSTS, keyed=replica.settings.api_key_file is not None))

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        return Response(described, media_type=JSON)

    return app


def _answer_errors_in_one_shape(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        request.scope["state"]["code"] = error.code  # for the gate's record
        return Response(error_body(error, request.scope), error.status, error.headers, media_type=JSON)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        path = request.url.path[:200]
        message = f"{request.method} {path}: {error.detail}"
        if error.status_code == 404:
            message += did_you_mean(path, ROUTES) or "; the routes are listed at /docs"
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"
        return await on_api_error(request, ApiError(error.status_code, code, message, headers=headers))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return await on_api_error(request, fault(error))
