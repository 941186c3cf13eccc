"""What reads HTTP for `--no-ray`, against a small application: whatever way the bytes come, the answers are the same."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from jepakit_service.connection import Connection

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
CLOSE = b"Connection: close\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the request's method, path and body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = f"{scope['method']} {scope['path']} ".encode() + body
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


@contextlib.asynccontextmanager
async def serving(app: Any = echo) -> AsyncIterator[int]:
    """The port of the application behind `Connection`."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Connection, lifespan="off", log_level="critical"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def sent(port: int, pieces: list[bytes]) -> bytes:
    """All that comes back for these pieces, until the other end closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return b"\r\n".join(line for line in answer.split(b"\r\n") if not line.startswith((b"date:", b"server:")))


def said(*pieces: bytes) -> bytes:
    async def go() -> bytes:
        async with serving() as port:
            return await sent(port, list(pieces))

    return asyncio.run(go())


def request(method: bytes, number: int, headers: bytes, body: bytes, *, chunked: bool) -> bytes:
    framing = b"Content-Length: %d\r\n" % len(body)
    if chunked:
        framing = b"Transfer-Encoding: chunked\r\n"
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part) + b"0\r\n\r\n"
    return b"%s /%d HTTP/1.1\r\nHost: localhost\r\n%s%s\r\n%s" % (method, number, headers, framing, body)


def test_offers_change_no_answer_wherever_the_bytes_are_split() -> None:
    drawn = random.Random(0)

    def stream(offered: list[bool]) -> bytes:
        parts = []
        for number, offers in enumerate(offered):
            body = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n" * (number % 3)
            headers = (OFFER if offers else b"") + (CLOSE if number == len(offered) - 1 else b"")
            parts.append(request(b"POST", number, headers, body, chunked=number % 2 == 1))
        return b"".join(parts)

    async def go() -> None:
        async with serving() as port:
            for _ in range(60):
                offered = [drawn.random() < 0.5 for _ in range(drawn.randint(1, 6))]
                data = stream(offered)
                places = sorted(drawn.randrange(len(data)) for _ in range(drawn.randint(0, 12)))
                pieces = [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
                plain = await sent(port, [stream([False] * len(offered))])
                assert plain.count(b"HTTP/1.1 200") == len(offered)
                assert await sent(port, pieces) == plain

    asyncio.run(go())


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_an_offer_on_a_connection_that_closes_is_answered(version: bytes) -> None:
    head = (
        b"POST /a HTTP/%s\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n"
        % version
    )
    assert said(head, b"hi").endswith(b"\r\nPOST /a hi")


@pytest.mark.parametrize("offer", [b"", OFFER])
def test_this_is_no_proxy(offer: bytes) -> None:
    before = request(b"POST", 1, OFFER, b"one", chunked=False)
    for start in (b"", before):
        answer = said(start + b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\n")
        assert answer.count(b"POST /1 one") == bool(start)
        assert answer.startswith(b"HTTP/1.1 200" if start else b"HTTP/1.1 400")


def test_rubbish_behind_a_request_costs_it_no_answer() -> None:
    assert said(request(b"POST", 1, b"", b"one", chunked=False) + b"\0rubbish\r\n\r\n").endswith(b"POST /1 one")


def test_half_a_request_and_rubbish_is_refused() -> None:
    assert said(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\nrubbish").startswith(
        b"HTTP/1.1 400"
    )


@pytest.mark.parametrize(
    ("start", "fields", "why"),
    [
        (b"GET / HTTP/1.1", b"", b"one Host"),
        (b"GET / HTTP/1.1", b"Host: a\r\nhost: b\r\n", b"one Host"),
        (b"GET / HTTP/0.9", b"Host: a\r\n", b"neither HTTP/1.1"),
        (b"rubbish", b"Host: a\r\n", b"Invalid"),
        (b"GET / HTTP/1.1", b"Host: a\r\n" + b"a:\r\n" * 256, b"more than 256 fields"),
    ],
)
def test_what_is_no_request_is_told_so(start: bytes, fields: bytes, why: bytes) -> None:
    answer = said(start + b"\r\n" + fields + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert why in answer


def test_a_body_that_goes_wrong_after_its_answer_began_gets_no_second_one() -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no", "more_body": True})
        await receive()

    async def go() -> bytes:
        async with serving(refusing) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n")
            answer = await reader.readuntil(b"no\r\n")
            writer.write(b"onerubbish\r\n\r\n")
            answer += await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

    assert asyncio.run(go()).count(b"HTTP/1.1 ") == 1


def test_blanks_behind_a_field_are_not_its_value() -> None:
    head = b"POST /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\nExpect: 100-continue \t\r\n\r\n"
    assert said(head, b"one").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


def test_an_endless_row_of_requests_is_read_until_64_wait() -> None:
    """One of them is answered at a time, so all others would be kept."""
    answer = said(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200") == 65


def test_an_endless_head_behind_a_request_that_waits_for_its_answer_is_not_kept() -> None:
    async def go() -> int:
        released = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await released.wait()
            await echo(scope, receive, send)

        async with serving(slow) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(b"POST", 1, b"", b"one", chunked=False) + b"GET / HTTP/1.1\r\nX-Long: ")
            piece = b"a" * 65536
            tracemalloc.start()
            for _ in range(128):
                writer.write(piece)
                await writer.drain()
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            released.set()
            writer.close()
            return kept

    assert asyncio.run(go()) < 1 << 20
