"""Sends answers: complete bodies, at the client's pace; errors in the shape of the route's API (OpenAI's, Cohere's, the protocol's)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Scope, Send

from jepakit_service.faults import ApiError
from jepakit_service.http import oip, routes
from jepakit_service.http.media import JSON

_SLICE, _TAKEN_S = 1 << 16, 60.0
"""Bytes of an answer sent at a time, and seconds that a client may take to make room for them."""


def error_body(error: ApiError, scope: Scope) -> bytes:
    """The body of an error, in the shape of the route's API."""
    if routes.is_oip(scope["path"]):
        return oip.write_error(error)
    return error.body(scope["state"]["request_id"], routes.REPEATED_AS.get(scope["path"]))


async def send_error(send: Send, error: ApiError, scope: Scope, *, ended: bool = True) -> None:
    """Send an error in the shape of the route's API. If not `ended` (see `send_whole`), the connection is closed afterwards."""
    headers = error.headers if ended else {**error.headers, "Connection": "close"}
    await send_whole(send, error.status, error_body(error, scope), JSON, headers, ended=ended)


async def send_whole(
    send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str], *, ended: bool = True
) -> None:
    """Send a complete body; if not `ended`, an empty message must follow. Header names are lowercased."""
    headers = {"content-type": content_type, "content-length": str(len(body)), **headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    # In slices, so that a shutdown waits for a slow reader, but not forever.
    for start in range(0, max(1, len(body)), _SLICE):
        more = not ended or start + _SLICE < len(body)
        async with asyncio.timeout(_TAKEN_S):
            await send({"type": "http.response.body", "body": body[start : start + _SLICE], "more_body": more})
