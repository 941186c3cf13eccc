"""Malicious requests: each is refused with the right status, none causes a fault, and the service is unaffected."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from jepakit_service import single
from jepakit_service.faults import ApiError
from jepakit_service.http import oip, wire
from jepakit_service.http.api import build_app
from jepakit_service.http.dialects import read_openai
from jepakit_service.http.wire import Ask
from jepakit_service.listeners import free_port
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry import logs
from tests.files import encoded, png_chunk

from .conftest import picture, running
from .load import is_ready

MEGABYTE = 1 << 20
_LIMITS = ("max_images=64", "max_body_mb=16", "body_timeout_s=2", "max_pixels=4000000", "threads=1")
LIMITS = [word for limit in _LIMITS for word in ("--set", limit)]


class Victim:
    """`jepakit serve --no-ray` as it ships, in its own process, so that its memory and files can be inspected."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self._process = url, Path(f"/proc/{pid}")

    def resident_mb(self) -> float:
        for line in (self._process / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def open_files(self) -> set[str]:
        """What its descriptors point to, including deleted files; without sockets and pipes."""
        found = set()
        for descriptor in (self._process / "fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except FileNotFoundError:
                continue
            if target.startswith("/") and not target.startswith("/dev/"):
                found.add(target)
        return found


@pytest.fixture(scope="module")
def victim(bundle: Path) -> Iterator[Victim]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "jepakit", "serve", str(bundle), "--no-ray", "--port", str(port), *LIMITS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not is_ready(url):
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.2)
        yield Victim(url, process.pid)
    finally:
        process.terminate()
        process.wait(30)


# --- images ---------------------------------------------------------------------------------------------------------


def noise(mode: str, size: tuple[int, int] = (48, 40)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    if bands == 1:
        return Image.fromarray(pixels[..., 0]).convert(mode)
    return Image.frombytes(mode, size, pixels.tobytes())


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def png_text_bomb() -> bytes:
    """64 MB of text behind a compressed chunk of 64 kB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "a" * (64 * MEGABYTE), zip=True)
    return encoded(noise("RGB"), "PNG", pnginfo=info)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise("RGB"), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff_of(dtype: Any) -> bytes:
    return encoded(Image.fromarray((np.random.default_rng(0).random((40, 48)) * 60_000).astype(dtype)), "TIFF")


def animated(kind: str) -> bytes:
    frames = [noise("RGB", (48, 40)).rotate(90 * turn) for turn in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


IMAGES: dict[str, tuple[Callable[[], bytes], set[int]]] = {
    "no bytes": (lambda: b"", {415}),
    "zero bytes": (lambda: b"\0" * 10_000, {415}),
    "one byte": (lambda: b"\x89", {415}),
    "a page": (lambda: b"<html><body>hello</body></html>", {415}),
    "a script in an SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", {415}),
    "a PDF": (lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", {415}),
    "a ZIP": (lambda: b"PK\x03\x04" + b"\0" * 100, {422}),
    "an EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nsystem\n", {415}),
    "an ELF": (lambda: Path(sys.executable).resolve().read_bytes()[:100_000], {415}),
    "a GIF": (lambda: encoded(noise("RGB"), "GIF"), {415}),
    "an animated GIF": (lambda: animated("GIF"), {415}),
    "an animated PNG": (lambda: animated("PNG"), {422}),
    "an animated WebP": (lambda: animated("WEBP"), {422}),
    "a TIFF of several pages": (lambda: animated("TIFF"), {422}),
    "a cut PNG": (lambda: picture(0)[:-200], {422}),
    "half a PNG": (lambda: picture(0)[: len(picture(0)) // 2], {422}),
    "a cut JPEG": (lambda: encoded(noise("RGB"), "JPEG")[:-200], {422}),
    "a PNG's signature": (lambda: b"\x89PNG\r\n\x1a\n", {415}),
    "a JPEG's first bytes": (lambda: b"\xff\xd8\xff\xe0", {415}),
    "a PNG of 1 x 1": (lambda: picture(0, (1, 1)), {422}),
    "a PNG of 1 x 3000": (lambda: picture(0, (1, 3000)), {422}),
    "a long thin PNG": (lambda: picture(0, (8, 100_000)), {413}),
    "one colour": (lambda: encoded(Image.new("RGB", (48, 40), "red"), "PNG"), {422}),
    "a PNG of 2 thousand million pixels a side": (lambda: png_claiming(2**31 - 1, 2**31 - 1), {413}),
    "a PNG of 100 000 x 100 000": (lambda: png_claiming(100_000, 100_000), {413}),
    "a PNG just over the limit": (lambda: png_claiming(2001, 2000), {413}),
    "a PNG of 0 x 0": (lambda: png_claiming(0, 0), {415}),
    "a JPEG of 65 000 x 65 000": (lambda: jpeg_claiming(65_000, 65_000), {413}),
    "a PNG's text chunk of 64 MB": (png_text_bomb, {415}),
    "a PNG with a wrong sum": (lambda: picture(0).replace(b"IDAT", b"IDAU", 1), {415}),
    "a 16-bit PNG": (lambda: encoded(Image.fromarray(np.full((40, 48), 40_000, np.uint16)), "PNG"), {422}),
    "a 16-bit TIFF": (lambda: tiff_of(np.uint16), {422}),
    "a float TIFF": (lambda: tiff_of(np.float32), {422}),
    "a TIFF whose offsets lead nowhere": (lambda: b"II*\0" + struct.pack("<I", 2**32 - 9) + b"\0" * 64, {422}),
    "a TIFF that points at itself": (lambda: b"II*\0" + struct.pack("<IHI", 8, 0, 8) + b"\0" * 8, {422}),
    "CMYK": (lambda: encoded(noise("CMYK"), "JPEG"), {200}),
    "RGBA": (lambda: encoded(noise("RGBA"), "PNG"), {200}),
    "grey": (lambda: encoded(noise("L"), "PNG"), {200}),
    "a palette": (lambda: encoded(noise("RGB").convert("P"), "PNG"), {200}),
    "one bit": (lambda: encoded(noise("1"), "PNG"), {200}),
    "rubbish behind the image": (lambda: picture(0) + os.urandom(10_000), {200}),
    "a JPEG named PNG": (lambda: encoded(noise("RGB"), "JPEG"), {200}),
    "DICOM's preamble alone": (lambda: b"\0" * 128 + b"DICM", {422}),
    "DICOM cut short": (lambda: b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0\xff\xff\xff\xff", {422}),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images(victim: Victim, name: str) -> None:
    make, due = IMAGES[name]
    data = make()
    answer = httpx.post(f"{victim.url}/v1/embeddings", content=data, headers={"Content-Type": "image/png"}, timeout=60)
    assert answer.status_code in due, answer.text
    # The same in JSON, beside a good one, which is answered.
    items = [base64.b64encode(each).decode() for each in (picture(0), data)]
    rows = httpx.post(f"{victim.url}/v1/embeddings?partial=true", json={"input": items}, timeout=60).json()["data"]
    assert len(rows[0]["embedding"]) > 0
    assert ("embedding" in rows[1]) == (answer.status_code == 200)


# --- bodies ---------------------------------------------------------------------------------------------------------


def npy_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    header = text.encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(header) & 0xFFFF)
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def npy_of(descr: str, shape: str, data: bytes = b"\x07" * 4800) -> bytes:
    return npy_header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n", data)


def form(*parts: bytes, boundary: bytes = b"x") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


FILE = b'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
JSON, FORM, NPY = "application/json", "multipart/form-data; boundary=x", "application/x-npy"
B64 = base64.b64encode(picture(0))

BODIES: dict[str, tuple[str, Callable[[], bytes], set[int]]] = {
    "lists 100 000 deep": (JSON, lambda: b'{"input":' + b"[" * 100_000, {400}),
    "closed lists 1000 deep": (JSON, lambda: b'{"input":' + b"[" * 1000 + b"]" * 1000 + b"}", {400}),
    "objects 1000 deep": (JSON, lambda: b'{"input":' + b'{"a":' * 1000 + b"1" + b"}" * 1001, {400}),
    "a million strings": (JSON, lambda: b'{"input":[' + b'"",' * 1_000_000 + b'""]}', {413}),
    "five million empty lists": (JSON, lambda: b'{"input":[' + b"[]," * 5_000_000 + b"[]]}", {413}),
    "a million fields": (JSON, lambda: b'{"input":"aGk="' + b',"a":1' * 1_000_000 + b"}", {413}),
    "a huge integer": (JSON, lambda: b'{"input":"aGk=","dimensions":' + b"9" * 100_000 + b"}", {400}),
    "a huge exponent": (JSON, lambda: b'{"input":"aGk=","dimensions":1e999999}', {400}),
    "NaN": (JSON, lambda: b'{"input":"aGk=","dimensions":NaN}', {400}),
    "NaN in place of an image": (JSON, lambda: b'{"input":[NaN,Infinity]}', {400}),
    "a field twice": (JSON, lambda: b'{"input":"http://x","input":["%s"]}' % B64, {200}),
    "bytes that are not UTF-8": (JSON, lambda: b'{"input":"\xff\xfe"}', {400}),
    "half a surrogate": (JSON, lambda: b'{"input":"\\ud800"}', {400}),
    "half a surrogate as a model": (JSON, lambda: b'{"input":"%s","model":"\\udfff"}' % B64, {400, 404}),
    "a zero byte as a model": (JSON, lambda: b'{"input":"%s","model":"tiny\\u0000"}' % B64, {404}),
    "a path as a model": (JSON, lambda: b'{"input":"%s","model":"../../../etc/passwd"}' % B64, {404}),
    "a model of a megabyte": (JSON, lambda: b'{"input":"%s","model":"%s"}' % (B64, b"m" * MEGABYTE), {404}),
    "UTF-16": (JSON, lambda: '{"input":"aGk="}'.encode("utf-16"), {400}),
    "a byte order mark": (JSON, lambda: b'\xef\xbb\xbf{"input":"%s"}' % B64, {400}),
    "null": (JSON, lambda: b"null", {400}),
    "nothing": (JSON, lambda: b"", {400}),
    "two documents": (JSON, lambda: b'{"input":"%s"}{}' % B64, {400}),
    "base64 in lines": (JSON, lambda: json.dumps({"input": base64.encodebytes(picture(0)).decode()}).encode(), {200}),
    "base64 with spaces": (JSON, lambda: b'{"input":" %s "}' % B64, {200}),
    "base64 without its end": (JSON, lambda: b'{"input":"%s"}' % B64[:-3], {400}),
    "base64 of URLs": (JSON, lambda: json.dumps({"input": "-_-_" * 9}).encode(), {400}),
    "base64 with letters of elsewhere": (JSON, lambda: json.dumps({"input": "aGk\u0131"}).encode(), {400}),
    "a data URI that is empty": (JSON, lambda: b'{"input":"data:image/png;base64,"}', {415}),
    "a data URI without data": (JSON, lambda: b'{"input":"data:"}', {400}),
    "a file's URL": (JSON, lambda: b'{"input":"file:///etc/passwd"}', {400}),
    "a URL in capitals": (JSON, lambda: b'{"input":"HTTPS://127.0.0.1/"}', {400}),
    "100 000 headers in a part": (FORM, lambda: form(b"A: b\r\n" * 100_000 + b"\r\n"), {400}),
    "a part's header of a megabyte": (FORM, lambda: form(b"A: " + b"b" * MEGABYTE + b"\r\n\r\n"), {400}),
    "100 000 parts": (FORM, lambda: form(*[FILE + b"x"] * 100_000), {413}),
    "100 000 fields": (FORM, lambda: form(*[b'Content-Disposition: form-data; name="a"\r\n\r\nx'] * 100_000), {413}),
    "parts without headers": (FORM, lambda: form(b"\r\nx"), {400}),
    "no end": (FORM, lambda: b"--x\r\n" + FILE + picture(0), {400}),
    "a third file cut off": (FORM, lambda: form(*[FILE + picture(0)] * 3)[: -len(picture(0)) // 2], {400}),
    "the last boundary cut off": (FORM, lambda: form(FILE + picture(0))[:-3], {400}),
    "the last line end cut off": (FORM, lambda: form(FILE + picture(0))[:-2], {200}),
    "no beginning": (FORM, lambda: FILE + picture(0), {400}),
    "zero bytes as a form": (FORM, lambda: b"\0" * 1000, {400}),
    "a path as a file's name": (FORM, lambda: form(FILE.replace(b'"a"', b'"../../etc/passwd"') + picture(0)), {200}),
    "an encoded name": (FORM, lambda: form(FILE.replace(b'filename="a"', b"filename*=UTF-8''%ff%00") + picture(0)), {200, 400}),
    "a model that is not UTF-8": (FORM, lambda: form(FILE + picture(0), b'Content-Disposition: form-data; name="model"\r\n\r\n\xff\xfe'), {404}),
    "a boundary of a thousand letters": ("multipart/form-data; boundary=" + "b" * 1000, lambda: b"x", {400}),
    "an empty boundary": ("multipart/form-data; boundary=", lambda: b"x", {400}),
    "an odd boundary": ('multipart/form-data; boundary="\\', lambda: b"x", {400}),
    "an array that claims more": (NPY, lambda: npy_of("|u1", "(64, 4000, 4000, 3)"), {400}),
    "an array of 2^64 values": (NPY, lambda: npy_of("|u1", "(4294967296, 4294967296, 1)", b""), {400}),
    "an array of no values": (NPY, lambda: npy_of("|u1", "(0, 40, 40, 3)", b""), {400}),
    "a negative shape": (NPY, lambda: npy_of("|u1", "(-1, 40, 40, 3)"), {400}),
    "a twice negative shape": (NPY, lambda: npy_of("|u1", "(-1, -40, 40, 3)"), {400}),
    "an array of very many sides": (NPY, lambda: npy_of("|u1", f"({'1, ' * 3000})"), {400}),
    "such an array as a file": ("application/octet-stream", lambda: npy_of("|u1", f"({'1, ' * 3000})"), {422}),
    "a shape of Python 2": (NPY, lambda: npy_of("|u1", "(40L, 40L, 4L)"), {400}),
    "objects": (NPY, lambda: npy_of("|O", "(40, 40, 3)"), {400}),
    "dates": (NPY, lambda: npy_of("<M8[s]", "(40, 15)"), {400}),
    "big-endian": (NPY, lambda: npy_of(">u2", "(40, 20, 3)"), {400}),
    "in Fortran's order": (NPY, lambda: npy_of("|u1", "(40, 40, 3)").replace(b"False", b"True "), {400}),
    "a call in the header": (NPY, lambda: npy_header("__import__('os').system('true')"), {400}),
    "a header of signs": (NPY, lambda: npy_header("-" * 9000 + "1"), {400}),
    "a header of brackets": (NPY, lambda: npy_header("(" * 60_000), {400}),
    "a header that claims 4 GB": (NPY, lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", {400}),
    "a version of the future": (NPY, lambda: npy_header("{}", version=9), {400}),
    "a magic word alone": (NPY, lambda: b"\x93NUMPY", {400}),
    "pixels of one value": (NPY, lambda: npy_of("|u1", "(1, 40, 40, 3)"), {422}),
    "NaN pixels": (NPY, lambda: npy_of("<f4", "(1, 20, 20, 3)", np.full(1200, np.nan, "<f4").tobytes()), {422}),
    "a pixel": (NPY, lambda: npy_of("|u1", "(1, 1, 1, 3)", b"\x01\x02\x03"), {422}),
    "another type": ("text/html", lambda: b"x", {415}),
    "no type": ("", lambda: picture(0), {415}),
    "a type of nonsense": ("\xff/;;;=,", lambda: b"x", {415}),
    "a video": ("video/mp4", lambda: b"x", {415}),
    "over the limit": ("image/png", lambda: b"\0" * (17 * MEGABYTE), {413}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies(victim: Victim, name: str) -> None:
    content_type, make, due = BODIES[name]
    headers = [(b"Content-Type", content_type.encode("latin-1"))]
    answer = httpx.post(f"{victim.url}/v1/embeddings", content=make(), headers=headers, timeout=60)
    assert answer.status_code in due, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["request_id"] == answer.headers["x-request-id"]
        assert len(error["message"]) < 1000
    good = httpx.post(f"{victim.url}/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
    assert good.status_code == 200


@pytest.mark.parametrize("name", [name for name in BODIES if BODIES[name][0] == JSON])
@pytest.mark.parametrize("path", ["/v1/multimodalembeddings", "/v2/embed", "/v2/models/tiny/infer"])
def test_hostile_json_elsewhere(victim: Victim, name: str, path: str) -> None:
    field = {"/v2/embed": b'"images"'}.get(path, b'"inputs"')
    body = BODIES[name][1]().replace(b'"input"', field)
    answer = httpx.post(f"{victim.url}{path}", content=body, headers={"Content-Type": JSON}, timeout=60)
    assert answer.status_code in {200, 400, 404, 413, 415}, answer.text


def test_spaces_in_base64_take_no_memory_of_their_own() -> None:
    text = "AA " * (1 << 20)
    tracemalloc.start()
    try:
        assert len(wire._read_broken_lines(text, "input[0]")) == 3 << 19
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


def test_compressed_bodies_are_refused(victim: Victim) -> None:
    bomb = zlib.compress(b"\0" * (16 * MEGABYTE))
    for encoding in ("gzip", "deflate", "br"):
        headers = {"Content-Type": "image/png", "Content-Encoding": encoding}
        answer = httpx.post(f"{victim.url}/v1/embeddings", content=bomb, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_encoding")


# --- connections ----------------------------------------------------------------------------------------------------


def connected(url: str, *, timeout_s: float | None = 20) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def talk(url: str, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send raw pieces of a request, then read until the service closes the connection or falls silent."""
    with connected(url) as connection:
        with contextlib.suppress(ConnectionError):  # the service may answer and close before all is sent
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        connection.settimeout(10)
        return connection.recv(65536)


def answered(connection: socket.socket) -> int:
    """The status of an answer, read to its end and no further."""
    answer = HTTPResponse(connection)
    answer.begin()
    assert answer.getheader("connection") == "close"
    answer.read()
    return answer.status


def head(*headers: str) -> bytes:
    lines = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: image/png", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answers_to_two_lengths(url: str) -> bytes:
    """All answers to a request whose body ends, by its chunks, before another request, and by its length after it."""
    hidden = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answers = b""
    with connected(url) as connection:
        connection.sendall(head(f"Content-Length: {len(hidden)}", "Transfer-Encoding: chunked") + hidden)
        connection.settimeout(5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(65536):
                answers += part
    return answers


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "+5", "9" * 400, "0x10"])
def test_a_length_that_is_none_is_refused(victim: Victim, length: str) -> None:
    answer = talk(victim.url, head(f"Content-Length: {length}"), b"abc")
    assert answer.split(b" ")[1] in (b"400", b"413"), answer


def test_a_body_shorter_than_its_length_times_out(victim: Victim) -> None:
    start = time.monotonic()
    answer = talk(victim.url, head("Content-Length: 1000"), b"abc")
    assert answer.split(b" ")[1] == b"408"
    assert time.monotonic() - start < 8


def test_a_body_in_drops_times_out(victim: Victim) -> None:
    data = picture(0)
    drops = [data[at : at + 1] for at in range(10)]
    answer = talk(victim.url, head(f"Content-Length: {len(data)}"), *drops, pause_s=0.4)
    assert answer.split(b" ")[1] == b"408"


@pytest.mark.parametrize("path", ["/healthz", "/docs/swagger-ui.css", "/v2/health/ready"])
@pytest.mark.parametrize("declared", ["Content-Length: 16000000", "Transfer-Encoding: chunked"])
def test_no_body_is_read_where_no_key_is_asked_for(victim: Victim, path: str, declared: str) -> None:
    lines = head(declared).replace(b"/v1/embeddings", path.encode())
    answer = talk(victim.url, lines, b"a")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    ("path", "declared", "size"),
    [
        ("/v1/embeddings", "Content-Length: {size}", 17 * MEGABYTE),
        ("/healthz", "Content-Length: {size}", MEGABYTE),
        ("/healthz", "Transfer-Encoding: chunked", MEGABYTE),
    ],
)
def test_a_refused_body_passes_by_for_a_while_before_the_connection_ends(
    victim: Victim, path: str, declared: str, size: int
) -> None:
    """A connection that is closed while bytes arrive is reset, and clients that read last lose the answer."""
    with connected(victim.url) as connection:
        connection.sendall(head(declared.format(size=size)).replace(b"/v1/embeddings", path.encode()))
        if "chunked" in declared:
            connection.sendall(b"%x\r\n" % size)
        assert answered(connection) == 413
        connection.sendall(bytes(size) + (b"\r\n0\r\n\r\n" if "chunked" in declared else b""))
        assert connection.recv(1) == b"", "ended, not reset"


def test_a_refused_body_that_never_comes_is_not_waited_for_long(victim: Victim) -> None:
    start = time.monotonic()
    with connected(victim.url) as connection:
        connection.sendall(head(f"Content-Length: {17 * MEGABYTE}"))
        assert answered(connection) == 413
        assert time.monotonic() - start < 3
        assert connection.recv(1) == b""
    assert time.monotonic() - start < 15


def test_strangers_take_no_room_from_those_with_a_key(bundle: Path) -> None:
    settings = ServeSettings(bundles=(str(bundle),), port=1, max_body_mb=8, max_bodies_mb=8)
    with running(settings) as url, contextlib.ExitStack() as held:
        for _ in range(4):
            connection = held.enter_context(connected(url))
            connection.sendall(head(f"Content-Length: {8 * MEGABYTE}").replace(b"/v1/embeddings", b"/healthz") + b"a")
            assert connection.recv(12) == b"HTTP/1.1 413"
        answer = httpx.post(f"{url}/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
        assert answer.status_code == 200


def test_a_websocket_is_refused(service: str, bundle: Path) -> None:
    """Ray passes them on; without it they are requests like others."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    gate = build_app(ServeSettings(bundles=(str(bundle),), port=1))
    asyncio.run(gate({"type": "websocket", "path": "/v1/embeddings"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close"}]
    lines = ["GET /v1/embeddings HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket"]
    key = ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    answer = talk(service, ("\r\n".join([*lines, *key]) + "\r\n\r\n").encode())
    assert answer.startswith(b"HTTP/1.1 405")


@contextlib.contextmanager
def alone(bundle: Path) -> Iterator[str]:
    """The URL of a service as `--no-ray` runs it, with its log as JSON."""
    port = free_port()
    options = ServeSettings(bundles=(str(bundle),), port=port, log_format="json")
    logs.configure(options)
    server = uvicorn.Server(single.config(build_app(options), options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        logs.silence()
    assert not thread.is_alive(), "the service did not stop"


def test_strangers_write_nothing_into_the_log_and_uvicorn_writes_json(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upgrade = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with alone(bundle) as url:
        assert talk(url, b"rubbish\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert talk(url, upgrade).startswith(b"HTTP/1.1 404")
        text = httpx.get(f"{url}/metrics").text
        try:
            raise ValueError("what was sent")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    assert re.search(r'jepakit_requests_total\{[^}]*route="other",status="404"\} 1.0', text)
    assert not re.search(r'jepakit_request_seconds_count\{[^}]*route="other"', text), "strangers change no times"
    request, failure = map(json.loads, capfd.readouterr().err.splitlines())
    assert request["status"] == 404
    assert (failure["level"], failure["exception"]) == ("error", "ValueError")
    assert "what was sent" not in str(failure)


def test_length_and_chunks_together_smuggle_nothing(victim: Victim) -> None:
    answer = answers_to_two_lengths(victim.url)
    assert answer.split(b" ")[1] in (b"400", b"415"), answer
    assert answer.count(b"HTTP/1.1 ") == 1, answer


def test_heads_and_what_ends_a_chunked_body_are_not_endless(victim: Victim) -> None:
    """One field, many fields, a path, and fields that trail a body: without a limit a stranger fills the memory with them."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    for start, more, most in [
        (head + b"X-Long: ", b"a" * 8192, b"65536 bytes"),
        (head, b"X-Many: a\r\n" * 800, b"256 fields"),
        (b"GET /", b"a" * 8192, b"65536 bytes"),
        (chunked + b"0\r\n", b"X-Many: a\r\n" * 800, b"256 fields"),
        (chunked + b"1;", b"a" * 8192, b"65536 bytes"),
    ]:
        answer = talk(victim.url, start, *[more] * 12, pause_s=0.02)
        assert answer.startswith(b"HTTP/1.1 400"), answer
        assert b"more than " + most in answer, answer
    long = head + b"X-Long: " + b"a" * 32768 + b"\r\nContent-Length: 0\r\n\r\n"
    assert talk(victim.url, long).startswith(b"HTTP/1.1 415"), "no more than empty"


def test_fields_that_trail_a_body_are_none_of_the_requests(victim: Victim) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    image = picture(0)
    body = b"%x\r\n%s\r\n0\r\nAccept: application/x-npy\r\n\r\n" % (len(image), image)
    answer = talk(victim.url, head + body)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"content-type: application/json" in answer


def test_clients_that_leave_in_the_middle_hurt_nobody(victim: Victim) -> None:
    for cut in (1, 100, 1000):
        with connected(victim.url, timeout_s=None) as connection:
            connection.sendall(head("Content-Length: 5000") + b"x" * cut)
    assert is_ready(victim.url)


# --- files and memory -----------------------------------------------------------------------------------------------


def test_large_parts_of_a_form_stay_in_memory(victim: Victim) -> None:
    """While a form of 8 MB parts arrives and is read, the service opens no file, not even a deleted one."""
    body = form(FILE + b"\0" * (8 * MEGABYTE - 1024), FILE + picture(0))
    headers = {"Content-Type": FORM}
    # Pillow loads its readers of formats when first they are asked.
    assert httpx.post(f"{victim.url}/v1/embeddings", content=body, headers=headers).status_code == 415
    before, seen = victim.open_files(), set[str]()
    with connected(victim.url, timeout_s=30) as connection:
        lines = f"POST /v1/embeddings?partial=true HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(lines.encode())
        for at in range(0, len(body), MEGABYTE):
            connection.sendall(body[at : at + MEGABYTE])
            seen |= victim.open_files()
        connection.settimeout(0.01)
        answer = b""
        while not answer:
            seen |= victim.open_files()
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 200")
    assert seen <= before, seen - before


def test_after_all_that_the_service_answers_and_has_not_grown(victim: Victim) -> None:
    bodies = [(content_type.encode("latin-1"), make(), due) for content_type, make, due in BODIES.values()]
    bodies += [(b"image/png", make(), due) for make, due in IMAGES.values()]

    def all_of_it() -> None:
        for content_type, body, due in bodies:
            headers = [(b"Content-Type", content_type)]
            answer = httpx.post(f"{victim.url}/v1/embeddings", content=body, headers=headers, timeout=60)
            assert answer.status_code in due

    all_of_it()
    before = victim.resident_mb()
    all_of_it()
    assert victim.resident_mb() - before < 64, "MB more after the same requests again"
    assert is_ready(victim.url)


# --- parsers, on whatever bytes -------------------------------------------------------------------------------------

examples = settings(max_examples=100, derandomize=True, database=None, deadline=None)


@examples
@given(st.one_of(st.binary(), st.binary().map(lambda data: form(FILE + data)), st.lists(st.sampled_from([b"--x", b"\r\n", b"--", FILE, b"a: b", b"\0"])).map(b"".join)))  # fmt: skip
def test_any_form_is_an_ask_or_an_error(body: bytes) -> None:
    assert_ask(lambda: wire.read_binary(FORM, body, 4))


@examples
@given(st.one_of(st.binary(), st.tuples(st.text("()[]{}'|<u12i4f: ,descrshapefortran_orderTrueFalse", max_size=80), st.binary(max_size=50)).map(lambda pair: npy_header(*pair))))  # fmt: skip
def test_any_array_is_an_ask_or_an_error(body: bytes) -> None:
    assert_ask(lambda: wire.read_binary(NPY, body, 4))


@examples
@given(st.text(), st.binary(max_size=20))
def test_any_content_type_is_an_ask_or_an_error(content_type: str, body: bytes) -> None:
    assert_ask(lambda: wire.read_binary(content_type.encode("utf-8").decode("latin-1"), body, 4))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
items = st.dictionaries(st.sampled_from(["image", "image_url", "image_base64", "text", "content", "type"]), values)


@examples
@given(st.one_of(values, st.lists(items, max_size=3)))
def test_any_json_is_an_ask_or_an_error(value: Any) -> None:
    assert_ask(lambda: read_openai(json.dumps({"input": value}).encode(), 4))


@examples
@given(
    st.sampled_from(["image", "images", "x"]),
    st.lists(st.integers(-2, 2**70), max_size=5),
    st.sampled_from(["BYTES", "UINT8", "FP32", "INT32", "x"]),
    st.one_of(st.none(), st.lists(values, max_size=4)),
    st.one_of(st.none(), st.integers(-1, 40)),
    st.binary(max_size=40),
    st.one_of(st.none(), st.text(max_size=5)),
)
def test_any_tensor_is_an_ask_or_an_error(
    name: str, shape: list[int], datatype: str, data: Any, size: int | None, tensor: bytes, length: str | None
) -> None:
    one = {"name": name, "shape": shape, "datatype": datatype, "data": data, "parameters": {"binary_data_size": size}}
    body = json.dumps({"inputs": [one]}).encode()
    for told in (str(len(body)), length):
        assert_ask(partial(oip.read, body + tensor, told, "tiny", 4))


def assert_ask(read: Callable[[], Ask | oip.Inference]) -> None:
    try:
        made = read()
    except ApiError as refused:
        status = refused.status
    else:
        status = 200
    if status != 200:
        assert 400 <= status < 500
        return
    ask = made.ask if isinstance(made, oip.Inference) else made
    assert 1 <= len(ask.images) <= 4
    assert all(isinstance(image, bytes | np.ndarray) for image in ask.images)


def test_a_slow_body_is_told_how_long_it_may_take(bundle: Path) -> None:
    with running(ServeSettings(bundles=(str(bundle),), port=1, body_timeout_s=0.3)) as url:
        answer = talk(url, head("Content-Length: 1000"), b"abc")
    assert answer.split(b" ")[1] == b"408"
    assert b"0.3 s" in answer
    assert b"connection: close" in answer.lower()
