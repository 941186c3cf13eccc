"""The malicious requests of test_hostile.py, sent to the service on Ray behind either proxy: two more parsers of HTTP."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.test_pipeline import serving

from .conftest import picture
from .load import is_ready, processes
from .test_hostile import BODIES, IMAGES, LIMITS, MEGABYTE, answers_to_two_lengths, connected, head, talk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["haproxy", "python"])
def url(bundle: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(bundle, *LIMITS, "--proxy", request.param) as url:
        yield url


def serving_pids() -> set[int]:
    """The processes that requests pass through."""
    titles = ("ray::ServeReplica", "ray::ProxyActor", "ray::HAProxyManager", "haproxy")
    return {process.pid for title in titles for process in processes(title)}


@pytest.fixture(autouse=True)
def unharmed(url: str) -> Iterator[None]:
    """Whatever a test sends, the same processes answer afterwards."""
    before = serving_pids()
    yield
    assert is_ready(url)
    assert serving_pids() == before
    answer = httpx.post(f"{url}/v1/embeddings", content=picture(0), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200


def test_every_hostile_image_and_body_gets_the_status_it_gets_without_ray(url: str) -> None:
    sent = {name: ("image/png", make, due) for name, (make, due) in IMAGES.items()} | BODIES
    wrong = {}
    with httpx.Client(timeout=60) as http:
        for name, (content_type, make, due) in sent.items():
            headers = [(b"Content-Type", content_type.encode("latin-1"))]
            answer = http.post(f"{url}/v1/embeddings", content=make(), headers=headers)
            if answer.status_code not in due:
                wrong[name] = (answer.status_code, answer.text[:200])
    assert wrong == {}


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "+5", "9" * 400, "0x10"])
def test_a_length_that_is_none_is_refused(url: str, length: str) -> None:
    assert status(talk(url, head(f"Content-Length: {length}"), b"abc")) in (400, 413)


def test_length_and_chunks_together_smuggle_nothing(url: str) -> None:
    answer = answers_to_two_lengths(url)
    assert status(answer) in (400, 415)
    assert answer.count(b"HTTP/1.1 ") == 1, answer


@pytest.mark.parametrize(
    "sent", [(b"abc",), tuple(picture(0)[at : at + 1] for at in range(10))], ids=["short", "drops"]
)
def test_a_body_that_does_not_come_times_out(url: str, sent: tuple[bytes, ...]) -> None:
    assert status(talk(url, head("Content-Length: 1000"), *sent, pause_s=0.4)) == 408


def test_compressed_bodies_are_refused(url: str) -> None:
    bomb = zlib.compress(b"\0" * (16 * MEGABYTE))
    headers = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    assert httpx.post(f"{url}/v1/embeddings", content=bomb, headers=headers).status_code == 415


def test_rubbish_and_clients_that_leave_in_the_middle_hurt_nobody(url: str) -> None:
    assert status(talk(url, b"rubbish\r\n\r\n")) == 400
    for cut in (1, 100, 1000):
        with connected(url) as connection:
            connection.sendall(head("Content-Length: 5000") + b"x" * cut)


def status(answer: bytes) -> int:
    """The status of an answer's first line; 0 if there is none."""
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0
