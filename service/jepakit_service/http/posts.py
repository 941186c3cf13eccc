"""Handlers of the POSTs that carry images: from the body's bytes to the answer's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pydantic_core import to_json

from jepakit.errors import ImageError
from jepakit_service.faults import ApiError, bad_image
from jepakit_service.http import dialects, oip, routes, wire
from jepakit_service.http.media import JSON, OCTETS, media_type
from jepakit_service.http.wire import Ask, Computed
from jepakit_service.replica import Replica

_LONG_BODY, _LONG_ANSWER = 1 << 18, 20_000
"""Bodies of this many bytes and answers of this many numbers go to a thread, to keep the event loop free."""


class Call(NamedTuple):
    """What a handler needs to know about a POST. Header names are in lower case."""

    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[bytes, bytes]
    body: bytes
    request_id: str

    def header(self, name: str) -> str:
        """A header's value, or an empty string."""
        return self.headers.get(name.encode("ascii"), b"").decode("latin-1")

    @property
    def partial(self) -> bool:
        """Whether the query asks for `partial`: images that cannot be read do not fail the others."""
        value = self.query.get("partial", ["false"])[0].lower()
        if value not in ("true", "1", "false", "0"):
            raise ApiError(400, "invalid_request", f"partial = {value[:20]!r}: give true or false", param="partial")
        return value in ("true", "1")


class Reply(NamedTuple):
    """A successful answer, without its status, length and request id."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]


_T = TypeVar("_T")
_Asked = TypeVar("_Asked", Ask, oip.Inference)
Handler = Callable[[Call], Coroutine[Any, Any, Reply]]


class Posts:
    """Handlers of the routes that take images."""

    def __init__(self, replica: Replica) -> None:
        self._registry, self._engine = replica.registry, replica.engine
        self._max_images = replica.settings.max_images
        self._by_path: dict[str, Handler] = {
            routes.EMBEDDINGS: self._embeddings,
            routes.VOYAGE: partial(self._json_only, dialects.read_voyage, dialects.write_voyage),
            routes.COHERE: partial(self._json_only, dialects.read_cohere, dialects.write_cohere),
        }

    def handler(self, path: str) -> Handler | None:
        """The handler of a POST to `path`; None if FastAPI handles it."""
        if path in self._by_path:
            return self._by_path[path]
        asked = routes.model_of_inference(path)
        return None if asked is None else partial(self._infer, asked)

    async def _embeddings(self, call: Call) -> Reply:
        content_type = call.header("content-type")
        is_json = media_type(content_type)[0] == JSON
        read = dialects.read_openai if is_json else partial(wire.read_binary, content_type)
        ask = await _read(call, read, self._max_images)
        computed = await self._compute(ask, call)
        if not call.partial and (raw := wire.write_raw(computed.vectors, call.header("accept"))):
            return Reply(raw.body, raw.content_type, _facts(computed))
        return await _json(computed, lambda: dialects.write_openai(ask, computed))

    async def _json_only(
        self, read: Callable[[bytes, int], Ask], write: Callable[[Ask, Computed], Mapping[str, Any]], call: Call
    ) -> Reply:
        """Any dialect whose requests and answers are JSON alone."""
        _check_json(call)
        ask = await _read(call, read, self._max_images)
        computed = await self._compute(ask, call)
        return await _json(computed, lambda: write(ask, computed))

    async def _infer(self, asked: str, call: Call) -> Reply:
        length = call.header(oip.JSON_LENGTH.lower()) or None
        inference = await _read(call, lambda body, most: oip.read(body, length, asked, most), self._max_images)
        computed = await self._compute(inference.ask, call)
        written = await _write(computed, lambda: oip.write(inference, computed))
        if written.json_length is None:
            return Reply(written.body, JSON, _facts(computed))
        headers = {**_facts(computed), oip.JSON_LENGTH: str(written.json_length)}
        return Reply(written.body, OCTETS, headers)

    async def _compute(self, ask: Ask, call: Call) -> Computed:
        """The vectors. ApiError for a wrong model or space, overload or (unless partial) the first bad image."""
        allow_partial = call.partial
        model = self._registry.find(_model_asked(ask, call))
        dialects.check_space(ask, model.manifest)
        answer = await self._engine.answer(model, ask.images)
        if not allow_partial:
            for index, result in enumerate(answer.results):
                if isinstance(result, ImageError):
                    raise bad_image(result, f"{ask.field}[{index}]")
        return Computed(model.manifest, model.precision, model.provider, answer.results, answer.pixels, call.request_id)


def _model_asked(ask: Ask, call: Call) -> str | None:
    """The model that the body or the query names; both may, if they agree."""
    in_query = call.query.get("model", [""])[0]
    if ask.model and in_query and ask.model != in_query:
        raise ApiError(
            400,
            "invalid_request",
            f"model is {ask.model[:40]!r} in the body and {in_query[:40]!r} in the query: name it once",
            param="model",
        )
    return ask.model or in_query or None


async def _read(call: Call, read: Callable[[bytes, int], _Asked], max_images: int) -> _Asked:
    """Parse a body, on a thread if it is long."""
    if len(call.body) < _LONG_BODY:
        return read(call.body, max_images)
    return await asyncio.to_thread(read, call.body, max_images)


async def _write(computed: Computed, write: Callable[[], _T]) -> _T:
    """Call `write`, on a thread if the answer is long."""
    if len(computed.results) * computed.manifest.embedding.dim < _LONG_ANSWER:
        return write()
    return await asyncio.to_thread(write)


async def _json(computed: Computed, write: Callable[[], Mapping[str, Any]]) -> Reply:
    return Reply(await _write(computed, lambda: to_json(write())), JSON, _facts(computed))


def _facts(computed: Computed) -> dict[str, str]:
    """The headers of every successful answer."""
    manifest = computed.manifest
    return {
        "x-model-id": manifest.model_id,
        "x-embedding-shape": f"{len(computed.results)},{manifest.embedding.dim}",
        "x-embedding-dtype": "float32",
        "x-precision": computed.precision,
        "x-provider": computed.provider,
    }


def _check_json(call: Call) -> None:
    media = media_type(call.header("content-type"))[0]
    if media not in ("", JSON):  # LiteLLM names none
        raise ApiError(
            415,
            "unsupported_media_type",
            f"content type {media[:100]} is not read at {call.path}: send application/json",
        )
