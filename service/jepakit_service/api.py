"""The HTTP surface behind the gate. Knows nothing of Ray.

POSTs that carry images go straight to their handlers: FastAPI's routing would cost each as much as a small
model does. Everything else, and the OpenAPI document of it all, is FastAPI's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import jepakit
from jepakit._messages import did_you_mean
from jepakit.errors import ImageError
from jepakit_service import dialects, oip, openapi, operations, routes, wire
from jepakit_service.gate import Gate, error_body, send_whole
from jepakit_service.openapi import BINARY, Parameter, Post
from jepakit_service.replica import AskAll, Replica
from jepakit_service.settings import ServeSettings
from jepakit_service.wire import ApiError, Ask, Computed, unavailable

_log = logging.getLogger("jepakit.service")
_JSON, _OCTETS, _NPY = "application/json", "application/octet-stream", "application/x-npy"
_OIP = "Open Inference Protocol v2"
_LONG_BODY, _LONG_ANSWER = 1 << 18, 20_000
"""Bytes that are read, and numbers that are written, on a thread: everybody else waits for the event loop."""
_QUERY = ("model", "partial")


def build_app(settings: ServeSettings, ask_all: AskAll | None = None) -> Gate:
    """Load every model, check it, and return the application that serves them. Raises BundleError otherwise.

    ask_all  the reports of all replicas of the deployment; None: this is the only one
    """
    replica = Replica(settings, ask_all)
    return Gate(Api(replica), replica)


class Call(NamedTuple):
    """One POST: what its handler needs of it. Header names are in lower case."""

    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[bytes, bytes]
    body: bytes
    request_id: str

    def header(self, name: str) -> str:
        """A header's value, or an empty string."""
        return self.headers.get(name.encode("ascii"), b"").decode("latin-1")

    def wants(self, name: str) -> bool:
        """Whether the query switches `name` on."""
        value = self.query.get(name, ["false"])[-1].lower()
        if value not in ("true", "1", "false", "0"):
            raise ApiError(400, "invalid_request", f"{name} = {value[:20]!r}: give true or false", param=name)
        return value in ("true", "1")


class Reply(NamedTuple):
    """A good answer, but for its status, length and request id."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]


_T = TypeVar("_T")
_Asked = TypeVar("_Asked", Ask, oip.Inference)
_Handler = Callable[[Call], Coroutine[Any, Any, Reply]]


class Api:
    """The ASGI application behind the gate: `POST` of images by `_Posts`, everything else by FastAPI."""

    def __init__(self, replica: Replica) -> None:
        self._posts = _Posts(replica)
        self._rest = _rest(replica)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._posts.handler(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await self._rest(scope, receive, send)
            return
        try:
            call = await _read_call(scope, receive)
            status, reply = 200, await _while_wanted(handler(call), receive)
        except ApiError as error:
            status, reply = error.status, _failure(error, scope)
        except Exception as error:  # its text may hold what was sent
            _log.error("request %s failed: %s", scope["state"]["request_id"], type(error).__name__)
            status, reply = 500, _failure(_fault(error), scope)
        await send_whole(send, status, *reply)


class _Posts:
    """Handlers of the routes that take images."""

    def __init__(self, replica: Replica) -> None:
        self._registry, self._engine = replica.registry, replica.engine
        self._max_images = replica.settings.max_images
        self._by_path: dict[str, _Handler] = {
            routes.EMBEDDINGS: self._embeddings,
            routes.VOYAGE: self._voyage,
            routes.COHERE: self._cohere,
        }

    def handler(self, path: str) -> _Handler | None:
        """What answers a POST to `path`; None where FastAPI does."""
        return self._by_path.get(path) or (self._infer if routes.model_of_inference(path) else None)

    async def _embeddings(self, call: Call) -> Reply:
        content_type = call.header("content-type")
        if wire.media_type(content_type)[0] == _JSON:
            ask = await _read(call, dialects.read_openai, self._max_images)
        else:
            ask = await _read(call, partial(wire.read_binary, content_type), self._max_images)
        computed = await self._compute(ask, call)
        vectors = [result for result in computed.results if not isinstance(result, ImageError)]
        if not call.wants("partial") and (raw := wire.write_raw(vectors, call.header("accept"))):
            return Reply(raw.body, raw.content_type, _facts(computed))
        return await _json(computed, lambda: dialects.write_openai(ask, computed))

    async def _voyage(self, call: Call) -> Reply:
        _only_json(call)
        ask = await _read(call, dialects.read_voyage, self._max_images)
        computed = await self._compute(ask, call)
        return await _json(computed, lambda: dialects.write_voyage(ask, computed))

    async def _cohere(self, call: Call) -> Reply:
        _only_json(call)
        ask = await _read(call, dialects.read_cohere, self._max_images)
        computed = await self._compute(ask, call, all_or_nothing=True)
        return await _json(computed, lambda: dialects.write_cohere(ask, computed))

    async def _infer(self, call: Call) -> Reply:
        asked = routes.model_of_inference(call.path)
        assert asked is not None
        length = call.header(oip.JSON_LENGTH.lower()) or None
        inference = await _read(call, lambda body, most: oip.read(body, length, asked, most), self._max_images)
        computed = await self._compute(inference.ask, call, all_or_nothing=True)
        written = await _write(computed, lambda: oip.write(inference, computed))
        if written.json_length is None:
            return Reply(written.body, _JSON, _facts(computed))
        headers = {**_facts(computed), oip.JSON_LENGTH: str(written.json_length)}
        return Reply(written.body, _OCTETS, headers)

    async def _compute(self, ask: Ask, call: Call, *, all_or_nothing: bool = False) -> Computed:
        """The vectors; ApiError for a wrong model or space, overload, and (unless partial) the first bad image."""
        allow_partial = not all_or_nothing and call.wants("partial")
        asked = ask.model or call.query.get("model", [""])[-1] or None
        model = self._registry.find(asked)
        dialects.check_space(ask, model.manifest)
        answer = await self._engine.answer(model, ask.images)
        if not allow_partial:
            for index, result in enumerate(answer.results):
                if isinstance(result, ImageError):
                    raise wire.bad_image(result, f"{ask.field}[{index}]")
        return Computed(model.manifest, model.precision, model.provider, answer.results, answer.pixels, call.request_id)


async def _read(call: Call, read: Callable[[bytes, int], _Asked], max_images: int) -> _Asked:
    """Parse a body."""
    if len(call.body) < _LONG_BODY:
        return read(call.body, max_images)
    return await asyncio.to_thread(read, call.body, max_images)


async def _write(computed: Computed, write: Callable[[], _T]) -> _T:
    """What `write` makes of the vectors."""
    if len(computed.results) * computed.manifest.embedding.dim < _LONG_ANSWER:
        return write()
    return await asyncio.to_thread(write)


async def _json(computed: Computed, write: Callable[[], Mapping[str, Any]]) -> Reply:
    return Reply(await _write(computed, lambda: to_json(write())), _JSON, _facts(computed))


def _facts(computed: Computed) -> dict[str, str]:
    """What every good answer says in its headers."""
    manifest = computed.manifest
    return {
        "x-model-id": manifest.model_id,
        "x-embedding-shape": f"{len(computed.results)},{manifest.embedding.dim}",
        "x-embedding-dtype": "float32",
        "x-precision": computed.precision,
        "x-provider": computed.provider,
    }


def _only_json(call: Call) -> None:
    media = wire.media_type(call.header("content-type"))[0]
    if media != _JSON:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"content type {media[:100] or 'none'} is not read at {call.path}: send application/json",
        )


async def _read_call(scope: Scope, receive: Receive) -> Call:
    """The request behind the gate, which hands its whole body over in one message."""
    if scope["method"] != "POST":
        raise ApiError(
            405, "method_not_allowed", f"{scope['method']} {scope['path']}: send POST", headers={"Allow": "POST"}
        )
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(
            415, "unsupported_content_encoding", "compressed bodies are not read: image files are compressed already"
        )
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True) if scope["query_string"] else {}
    for name in query:
        if name not in _QUERY:
            raise ApiError(
                400, "invalid_request", f"unknown parameter {name[:40]!r} in the query{did_you_mean(name[:40], _QUERY)}",
                param=name[:40],
            )  # fmt: skip
    body = (await receive())["body"]
    return Call(scope["path"], query, headers, body, scope["state"]["request_id"])


async def _while_wanted(answering: Coroutine[Any, Any, Reply], receive: Receive) -> Reply:
    """The answer, given up as soon as the client leaves: what it still had to decode and embed is dropped.

    Raises ApiError 499 where the client left first. An answer that is done is given, whoever left meanwhile.
    """
    # The answer has a task of its own: to cancel the request's could strike it later, while it sends.
    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(receive())
    leaving.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if not leaving.done() or _is_cancelled():
            raise
        raise ApiError(499, "disconnected", "the client left before its answer") from None
    finally:
        leaving.cancel()


def _is_cancelled() -> bool:
    """Whether somebody wants this request itself to end: the server, once it has waited for `drain_s`."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _failure(error: ApiError, scope: Scope) -> Reply:
    """An error in the shape of the route's family."""
    scope["state"]["code"] = error.code  # for the gate's record
    return Reply(error_body(error, scope), _JSON, error.headers)


def _fault(error: Exception) -> ApiError:
    return ApiError(500, "internal_error", f"the service failed ({type(error).__name__}); the fault is ours")


def _rest(replica: Replica) -> ASGIApp:
    """Everything but the POSTs, as FastAPI has it."""
    app = FastAPI(
        title="jepakit",
        version=jepakit.__version__,
        description="Image embeddings from your own machine.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(operations.router(replica))
    app.include_router(_oip_router(replica))
    app.include_router(openapi.docs_router())
    _answer_errors_in_one_shape(app)
    described = to_json(openapi.document(app, POSTS, keyed=replica.settings.api_key_file is not None))

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        return Response(described, media_type=_JSON)

    return app


def _answer_errors_in_one_shape(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        reply = _failure(error, request.scope)
        return Response(reply.body, error.status, reply.headers, media_type=_JSON)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return await on_api_error(request, ApiError(error.status_code, code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return await on_api_error(request, _fault(error))


def _oip_router(replica: Replica) -> APIRouter:
    """What the Open Inference Protocol asks besides inference."""
    router = APIRouter(prefix="/v2", tags=[_OIP])

    @router.get("")
    async def server() -> oip.ServerMetadata:
        """What this server is."""
        return {"name": "jepakit", "version": jepakit.__version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live")
    async def server_live() -> oip.Live:
        """Whether the process that answers is alive."""
        return {"live": True}

    @router.get("/health/ready")
    async def server_ready() -> oip.Ready:
        """Whether some replica answers rightly; 503 otherwise."""
        if replica.draining or all(report.faults for report in await replica.reports()):
            raise unavailable("not_ready", "no replica takes requests")
        return {"ready": True}

    @router.get("/models/{name}")
    async def model(name: str) -> oip.ModelMetadata:
        """What a model takes and gives."""
        return oip.describe(replica.registry.find(name).manifest)

    @router.get("/models/{name}/versions/{version}")
    async def model_version(name: str, version: str) -> oip.ModelMetadata:
        """What a version of a model takes and gives."""
        return oip.describe(replica.registry.find(f"{name}@{version}").manifest)

    @router.get("/models/{name}/ready")
    async def model_ready(name: str) -> oip.ModelReady:
        """Whether a model answers rightly; 503 otherwise."""
        return await _ready(replica, name)

    @router.get("/models/{name}/versions/{version}/ready")
    async def model_version_ready(name: str, version: str) -> oip.ModelReady:
        """Whether a version of a model answers rightly; 503 otherwise."""
        return await _ready(replica, f"{name}@{version}")

    return router


async def _ready(replica: Replica, asked: str) -> oip.ModelReady:
    model = replica.registry.find(asked)
    if fault := await model.heartbeat():
        raise unavailable("not_ready", fault)
    return {"name": model.manifest.name, "ready": True}


_WORD: Mapping[str, Any] = {"type": "string"}
_FACTS = {
    "X-Model-Id": "the vector space",
    "X-Embedding-Shape": "images,length",
    "X-Embedding-Dtype": "float32",
    "X-Precision": "fp32, fp16, int8 or bf16: what was computed",
    "X-Provider": "cpu, cuda, tensorrt or openvino: what computed it",
    "X-Request-Id": "the request's own, or a new one",
}
_MODEL = Parameter("model", "query", dialects.MODEL, _WORD)
_PARTIAL = Parameter(
    "partial", "query", "true: an image that cannot be read is a row with `error`, and the others are answered",
    {"type": "boolean", "default": False},
)  # fmt: skip
_NAME = Parameter("name", "path", "the model", _WORD)
_VERSION = Parameter("version", "path", "its `model_id`", _WORD)
_LENGTH = Parameter(oip.JSON_LENGTH, "header", "bytes of JSON, where tensors follow", {"type": "integer"})
_ARRAY = {"type": "string", "format": "binary", "description": "numpy.save of [N, H, W, C], [H, W, C] or [H, W]"}
_FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {"files": {"type": "array", "items": dict(BINARY)}, "model": dict(_WORD)},
}


def _infer_post(path: str, name: str, parameters: tuple[Parameter, ...]) -> Post:
    return Post(
        path,
        name,
        "Embed images, as the Open Inference Protocol v2 has it.",
        _OIP,
        takes={_JSON: oip.InferRequest, _OCTETS: BINARY},
        gives={_JSON: oip.InferAnswer, _OCTETS: BINARY},
        parameters=(*parameters, _LENGTH),
        answer_headers={**_FACTS, oip.JSON_LENGTH: "bytes of JSON, where the tensor follows"},
    )


POSTS = (
    Post(
        routes.EMBEDDINGS,
        "embed",
        "Embed images: OpenAI's or Jina's JSON, one file's bytes, many files in a form, or an array.",
        "embeddings",
        takes={
            _JSON: dialects.EmbeddingRequest,
            "image/*": BINARY,
            "application/dicom": BINARY,
            _OCTETS: BINARY,
            "multipart/form-data": _FORM,
            _NPY: _ARRAY,
        },
        gives={_JSON: dialects.EmbeddingAnswer, _OCTETS: BINARY, _NPY: BINARY},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.VOYAGE,
        "embed_voyage",
        "Embed images, as Voyage has it.",
        "embeddings",
        takes={_JSON: dialects.VoyageRequest},
        gives={_JSON: dialects.VoyageAnswer},
        parameters=(_MODEL, _PARTIAL),
        answer_headers=_FACTS,
    ),
    Post(
        routes.COHERE,
        "embed_cohere",
        "Embed images, as Cohere has it. All or nothing.",
        "embeddings",
        takes={_JSON: dialects.CohereRequest},
        gives={_JSON: dialects.CohereAnswer},
        parameters=(_MODEL,),
        answer_headers=_FACTS,
    ),
    _infer_post(routes.INFER, "infer", (_NAME,)),
    _infer_post(routes.INFER_VERSION, "infer_version", (_NAME, _VERSION)),
)
