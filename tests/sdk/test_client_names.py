"""Names that clients use: of models in URLs, and their own."""

from __future__ import annotations

import asyncio
import copy
import pickle
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


@pytest.mark.parametrize("kind", [jepakit.Client, jepakit.AsyncClient])
def test_a_client_tells_its_service_and_that_no_other_process_can_have_it(kind: type[Any]) -> None:
    client = kind("http://127.0.0.1:8000/", api_key="jk_secret")
    assert repr(client) == f"<{kind.__name__} of http://127.0.0.1:8000>"
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=rf"this {kind.__name__} cannot be copied or sent .*: make one there"):
            send(client)
