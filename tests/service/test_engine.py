"""How many images are let in: never more than can be answered in time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jepakit.errors import ImageError, InferenceError
from jepakit_service.faults import ApiError
from jepakit_service.models.batcher import Answer, ImageData
from jepakit_service.models.engine import Engine
from jepakit_service.settings import ServeSettings


class Slow:
    """A model with a given rate of images per second; `go` lets it answer."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.metrics = SimpleNamespace(answered=lambda good, bad: None)
        self.inside = 0
        self.go = asyncio.Event()

    async def embed(self, images: Sequence[ImageData], timeout_s: float) -> Answer:
        await self.go.wait()
        return Answer([np.zeros(2, np.float32)] * len(images), 0)


@pytest.mark.parametrize(("rate", "most"), [(10.0, 20), (1000.0, 50)], ids=["the model's speed", "max_waiting"])
def test_no_more_is_let_in_than_is_answered_in_time(rate: float, most: int) -> None:
    async def ask() -> None:
        engine = Engine(ServeSettings(bundles=("x",), request_timeout_s=4, max_waiting=50))
        model: Any = Slow(rate)
        first = asyncio.create_task(engine.answer(model, [b""] * (most - 1)))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many images") as refused:
            await engine.answer(model, [b""] * 2)
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
        second = asyncio.create_task(engine.answer(model, [b""]))
        await asyncio.sleep(0)
        model.go.set()
        assert [len((await task).results) for task in (first, second)] == [most - 1, 1]

        model.go.clear()
        alone = asyncio.create_task(engine.answer(model, [b""] * 3 * most))  # nobody waits: it is tried
        await asyncio.sleep(0)
        model.go.set()
        assert len((await alone).results) == 3 * most

    asyncio.run(ask())


def test_a_busy_model_keeps_no_request_from_another() -> None:
    async def ask() -> None:
        engine = Engine(ServeSettings(bundles=("x",), request_timeout_s=4, max_waiting=50))
        fast: Any = Slow(1000.0)
        slow: Any = Slow(2.0)  # 4 images in time
        busy = asyncio.create_task(engine.answer(fast, [b""] * 40))
        await asyncio.sleep(0)
        answered = asyncio.create_task(engine.answer(slow, [b""] * 4))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many images"):
            await engine.answer(slow, [b""])
        fast.go.set()
        slow.go.set()
        assert [len((await task).results) for task in (busy, answered)] == [40, 4]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InferenceError("no room on the GPU for a batch"), "out_of_memory", "no room on the GPU for a batch"),
        (TimeoutError(), "timeout", "no answer within 4 s"),
    ],
)
def test_a_request_that_is_not_answered_is_told_why_and_counts_nobody_as_waiting(
    error: Exception, code: str, told: str
) -> None:
    class Full(Slow):
        async def embed(self, images: Sequence[ImageData], timeout_s: float) -> Answer:
            assert timeout_s == 4
            raise error

    engine = Engine(ServeSettings(bundles=("x",), request_timeout_s=4, max_waiting=50))
    model: Any = Full(1000.0)
    with pytest.raises(ApiError, match=told) as refused:
        asyncio.run(engine.answer(model, [b""] * 40))
    assert (refused.value.status, refused.value.code) == (503, code)
    assert refused.value.headers["Retry-After"] == "1"
    assert model.inside == engine._inside == 0


def test_a_vector_that_is_not_finite_is_no_answer_and_spoils_no_other() -> None:
    class Broken(Slow):
        async def embed(self, images: Sequence[ImageData], timeout_s: float) -> Answer:
            return Answer([np.zeros(2, np.float32), np.array([0, np.nan], np.float32)], 0)

    model: Any = Broken(1000.0)
    counted: list[tuple[int, int]] = []
    model.metrics = SimpleNamespace(answered=lambda good, bad: counted.append((good, bad)))
    good, bad = asyncio.run(Engine(ServeSettings(bundles=("x",))).answer(model, [b""] * 2)).results
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, ImageError)
    assert bad.code == "not_finite"
    assert counted == [(1, 1)]
