"""A model's name on its way into an address."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

import jepakit
from jepakit.errors import NotFoundError


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tiny", "/v1/models/tiny"), ("tiny@00aa", "/v1/models/tiny%4000aa"), ("a/../b?c#d", "/v1/models/a%2F..%2Fb%3Fc%23d"),
        ("50%", "/v1/models/50%25"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_name_is_one_part_of_the_path_whatever_is_in_it(kind: type[Any], name: str, path: str) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return httpx.Response(404, json={"error": {"code": "model_not_found", "message": "no such model"}})

    url, transport = "http://127.0.0.1:1", httpx.MockTransport(answer)
    client = kind(url)
    http = httpx.Client if kind is jepakit.Client else httpx.AsyncClient
    client._http = http(base_url=url, transport=transport)
    with pytest.raises(NotFoundError):
        client.model(name) if kind is jepakit.Client else asyncio.run(client.model(name))
    assert asked == [path]
