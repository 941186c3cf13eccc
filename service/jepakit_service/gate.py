"""What every request passes first, as plain ASGI: request id, API key, size and pace of the body, drain.

The key is judged before a byte of the body is read. The body is read here, counted and timed, so that the
application behind it only ever sees whole, small enough ones.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jepakit_service.keys import KeyFile
from jepakit_service.settings import ServeSettings
from jepakit_service.wire import ApiError

_log = logging.getLogger("jepakit.service")
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


class Gate:
    """Wraps the application; `drain()` makes it refuse new requests, `in_flight` counts those inside."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = KeyFile(Path(settings.api_key_file)) if settings.api_key_file else None
        self.in_flight = 0
        self.draining = False

    def drain(self) -> None:
        """Answer 503 to new requests from now on."""
        self.draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        _state(scope)["request_id"] = request_id
        is_open = scope["path"] in OPEN_PATHS
        self.in_flight += not is_open
        try:
            if not is_open:
                self._check_key(headers)
                if self.draining:
                    raise ApiError(
                        503,
                        "draining",
                        "the service is stopping: try again shortly",
                        headers={"Retry-After": "1"},
                    )
            body = await self._read_body(headers, receive)
            await self._app(scope, _replay(body, receive), _with_header(send, request_id))
        except ApiError as error:
            # The body may be unread: the connection cannot be used again.
            await send_error(send, error, request_id, close=True)
        except Exception as error:  # answered 500 by the application; its text may hold what was sent
            _log.error("request %s failed: %s", request_id, type(error).__name__)
        finally:
            self.in_flight -= not is_open

    def _check_key(self, headers: Headers) -> None:
        if self._keys is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(
                401,
                "missing_api_key",
                "send an API key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not self._keys.accepts(key.strip()):
            raise ApiError(
                401,
                "invalid_api_key",
                "this API key is not known here",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._settings.max_body_mb << 20
        too_large = ApiError(
            413,
            "body_too_large",
            f"the body is larger than {self._settings.max_body_mb} MB: send fewer images a request",
        )
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ApiError(400, "disconnected", "the client left before its body had arrived")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408,
                "body_timeout",
                f"the body took longer than {self._settings.body_timeout_s:g} s to arrive",
            ) from None


async def send_error(send: Send, error: ApiError, request_id: str, *, close: bool = False) -> None:
    """Answer with an error in the one shape."""
    body = error.body(request_id)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
        **error.headers,
    }
    if close:
        headers["connection"] = "close"
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_header(send: Send, request_id: str) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Request-Id"] = request_id
        await send(message)

    return send_with_header


def _state(scope: Scope) -> MutableMapping[str, Any]:
    state: MutableMapping[str, Any] = scope.setdefault("state", {})
    return state
