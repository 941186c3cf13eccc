"""What every request passes first, as plain ASGI: request id, API key, size and pace of the body, drain, log, metrics.

The key (without keys, the sender) is checked before any of the body is read. The body is read here, with limits on size
and time, so that the application behind only ever sees complete bodies that are not too large.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from http import HTTPMethod
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jepakit._loopback import is_loopback
from jepakit_service.faults import ApiError, fault, unavailable
from jepakit_service.http import routes
from jepakit_service.http.answers import send_error
from jepakit_service.http.keys import KeyFile
from jepakit_service.replica import Replica
from jepakit_service.telemetry import logs, tracing

_log = logging.getLogger("jepakit.service")
_UNADMITTED = (401, 403, 404)
"""Answers to requests that were not let in. They are left out of the times: any stranger can cause many, all of them quick."""
_COME_BACK, _PATIENCE_S = (429, 503), 5.0
_METHODS = frozenset(HTTPMethod)
_OTHER_SITES = ("same-site", "cross-site")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


class Gate:
    """Wraps the application; `drain()` makes it refuse new requests, `in_flight` counts those inside.

    Neither open paths nor /metrics are counted: the latter would always count itself.
    """

    def __init__(self, app: ASGIApp, replica: Replica) -> None:
        self._app, self.replica = app, replica
        self._settings, self._metrics = replica.settings, replica.metrics
        self._keys = KeyFile(Path(self._settings.api_key_file)) if self._settings.api_key_file else None
        self._tracer = tracing.Tracer() if tracing.wanted() else None
        self._bodies = _Room(self._settings.max_bodies_mb << 20)
        self.in_flight = 0

    def drain(self) -> None:
        """Answer 503 to new requests from now on."""
        self.replica.draining = True

    async def flush(self) -> None:
        """Send the remaining traces, for a server that ends without the lifespan's shutdown."""
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.flush)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._record(scope, receive, send)
            if _state(scope).get("unread"):
                # Closing now would reset the connection while the client is still sending, and lose the answer.
                await _discard(receive)
                await send({"type": "http.response.body"})
        else:
            await send({"type": "websocket.close"})

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name, time, trace and log one request; `_answer` does the work."""
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        state = _state(scope)
        state["request_id"] = request_id
        method, route = _method(scope), routes.label(scope["path"])
        start = time.perf_counter()

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        trace = self._tracer.request(method, route, headers) if self._tracer else contextlib.nullcontext()
        with trace as span:
            try:
                await self._answer(scope, headers, receive, counted_send)
            except asyncio.CancelledError:  # how Ray reports that the client left
                state.setdefault("status", 499)
                state.setdefault("code", "disconnected")
                raise
            finally:
                self._log_and_count(scope, route, state.get("status", 500), time.perf_counter() - start, span)

    def _log_and_count(self, scope: Scope, route: str, status: int, seconds: float, span: Any) -> None:
        """Log and count a finished request."""
        state = _state(scope)
        trace = {} if span is None else {"trace_id": tracing.answered(span, status, state["request_id"])}
        if "code" in state:
            self._metrics.refused.labels(state["code"]).inc()
        self._metrics.requests.labels(route, status).inc()
        if status not in _UNADMITTED:
            self._metrics.request_seconds.labels(route).observe(seconds)
        if not routes.is_open(scope["path"]) or status >= 500:
            fields = {
                "request_id": state["request_id"],
                **trace,
                "method": _method(scope),
                "route": route,
                "status": status,
                "ms": round(1000 * seconds, 1),
                "bytes": state.get("bytes", 0),
                "key": state.get("key"),
                "code": state.get("code"),
            }
            logs.access(self._settings.access_log, status=status, fields=fields)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        is_open, state = routes.is_open(scope["path"]), _state(scope)
        counts = not is_open and scope["path"] != routes.METRICS
        self.in_flight += counts
        self._metrics.in_flight.set(self.in_flight)
        held = _Held(self._bodies)
        try:
            if not is_open:
                state["key"] = self._check_key(headers)
                if self.replica.draining:
                    raise _stopping()
            held.grow_to(self._declared(headers, is_open=is_open))
            body = await self._read_body(receive, held)
            state["bytes"] = len(body)
            await self._app(scope, _replay(body, receive), send)
        except ApiError as error:
            state["code"] = error.code
            error.__traceback__ = None  # it would keep the part of the body that has been read in memory
            held.give_back()
            # While its body is unread, a connection cannot be used again.
            state["unread"] = not ("bytes" in state or (error.status in _COME_BACK and await _discard(receive)))
            await send_error(send, error, scope, ended=not state["unread"])
        except asyncio.CancelledError:  # by the server, once it has waited for `drain_s`
            if not self.replica.draining:
                raise
            state["code"] = "draining"
            if "status" in state:  # one answer is already under way
                raise
            await send_error(send, _stopping(), scope)
        except Exception as error:  # not its text, which may contain what was sent
            known = {"request_id": state["request_id"], "exception": type(error).__name__}
            _log.error("request failed", extra={"fields": known})
            if "status" not in state:
                failure = fault(error)
                state["code"] = failure.code
                await send_error(send, failure, scope)
        finally:
            self.in_flight -= counts
            held.give_back()
            self._metrics.in_flight.set(self.in_flight)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.replica.watch()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        await send({"type": "lifespan.shutdown.complete"})

    def _check_key(self, headers: Headers) -> str | None:
        """Check the API key and return its name; if the service has no keys, check the sender and return None."""
        if self._keys is None:
            _refuse_other_sites(headers)
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        challenge = {"WWW-Authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "missing_api_key", "send an API key: Authorization: Bearer KEY", headers=challenge)
        name = self._keys.name_of(key.strip())
        if name is None:
            raise ApiError(401, "invalid_api_key", "this API key is not known here", headers=challenge)
        return name

    def _declared(self, headers: Headers, *, is_open: bool) -> int:
        """The declared size of a body, checked; 0 if there is none, or if it is chunked.

        Open paths, which need no key, take no body.
        """
        chunked = "transfer-encoding" in headers  # whatever length is declared as well
        declared = headers.get("content-length", "")
        # 19 digits are more than any limit, and int() refuses numbers of thousands of digits.
        size = int(declared.lstrip("0")[:19] or 0) if declared.isascii() and declared.isdigit() else 0
        if is_open and (size or chunked):
            raise ApiError(413, "body_too_large", "no body is read here: send GET without one")
        if chunked:
            return 0
        if size > self._settings.max_body_mb << 20:
            raise self._too_large()
        return size

    async def _read_body(self, receive: Receive, held: _Held) -> bytes:
        limit = self._settings.max_body_mb << 20
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
                        raise self._too_large()
                    held.grow_to(size)
                    if not message.get("more_body", False):
                        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, "body_timeout", f"the body took longer than {self._settings.body_timeout_s:g} s to arrive"
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"the body is larger than {self._settings.max_body_mb} MB: send fewer images a request",
        )


@dataclass
class _Room:
    """Memory for all bodies together, in bytes: the most that they may take, and what they take now. A body counts until answered."""

    most: int
    taken: int = 0


class _Held:
    """One body's share of the room: its declared length at once, a chunked body's as it arrives."""

    def __init__(self, room: _Room) -> None:
        self._room, self._size = room, 0

    def grow_to(self, size: int) -> None:
        """Take room for `size` bytes in all. A body alone always has room; otherwise, ApiError 429 where it runs out."""
        more = max(0, size - self._size)
        if more and self._room.taken > self._size and self._room.taken + more > self._room.most:
            raise unavailable("overloaded", "too many bodies are being read or answered: try again shortly", 429)
        self._room.taken += more
        self._size += more

    def give_back(self) -> None:
        """The body is no longer held: it has been answered or refused."""
        self._room.taken -= self._size
        self._size = 0


def _refuse_other_sites(headers: Headers) -> None:
    """Refuse what another site's page makes the user's browser send.

    Such a page uses a host name of its own that resolves to this machine (DNS rebinding), or sends cross-site requests, which
    browsers mark with Sec-Fetch-Site and Origin.
    """
    host = headers.get("host", "")
    if host and not is_loopback(_parsed(f"//{host}").hostname or ""):
        raise ApiError(
            403,
            "other_site",
            "without API keys, only programs and pages on this machine are answered, at its own address such as 127.0.0.1: start "
            "the service with --api-key-file",
        )
    if _parsed(headers.get("origin") or f"//{host}").netloc != host or headers.get("sec-fetch-site") in _OTHER_SITES:
        raise ApiError(
            403,
            "other_site",
            "a page of another origin, even of another port, is not answered: have its server ask, or put page and service behind "
            "one proxy",
        )


def _parsed(url: str) -> SplitResult:
    """The URL in parts; empty ones if it cannot be parsed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _stopping() -> ApiError:
    error = unavailable("draining", "the service is stopping: try again shortly")
    error.headers["Connection"] = "close"
    return error


async def _discard(receive: Receive) -> bool:
    """Read and drop a body, so that a client still sending gets to read the answer; False if it never completes."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return bool(message["type"] == "http.request")
    except (TimeoutError, asyncio.CancelledError):  # the latter when the server ends: the answer goes out at once
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _method(scope: Scope) -> str:
    """The request's method; `other` for one that is not registered: a client may send kilobytes of anything."""
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def _state(scope: Scope) -> MutableMapping[str, Any]:
    state: MutableMapping[str, Any] = scope.setdefault("state", {})
    return state
