"""The batcher: full batches, fair turns, a bad image affects no other, and nothing is lost when it is closed."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from jepakit.errors import ImageError
from jepakit_service.models.batcher import Batcher, Capacity, Decoded, RunBatch, State, decide

from .load import wait_until

SHAPE = (2, 2, 1)


class Recorder:
    """A model whose vector is the image's first byte, and an observer; `gate` holds its batches back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.sizes: list[int] = []
        self.decodes = 0
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, image: Any) -> Decoded:
        if image == b"bad":
            raise ImageError("bad", code="unreadable")
        if image == b"fault":
            raise OSError("disk on fire")
        return Decoded(np.full(SHAPE, image[0], np.uint8), 4)

    def run(self, images: Any) -> Any:
        assert self.gate.wait(10)
        values = images[:, 0, 0, 0]
        if 255 in values:
            raise RuntimeError("the runtime failed")
        self.batches.append(values.tolist())
        return values[:, None].astype(np.float32)

    def decoded(self, seconds: float) -> None:
        assert seconds >= 0
        self.decodes += 1

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        assert len(queued) == size
        assert all(0 <= seconds < 600 for seconds in queued)
        self.sizes.append(size)


async def embed(packed: Batcher, images: list[bytes]) -> tuple[list[Any], int]:
    return await packed.embed(images, 10.0)


def batcher(
    model: Recorder,
    *,
    max_batch: int = 4,
    lanes: int = 1,
    whole: Recorder | None = None,
    few: int = 0,
    cores: int = 1,
    batch_s: float = 60.0,
) -> Batcher:
    capacity = Capacity(max_batch, lanes, few, cores, lane_cores=cores // lanes, batch_s=batch_s)
    return Batcher(model.decode, model.run, (whole or model).run, capacity, model)


async def until(reached: Callable[[], bool]) -> None:
    """Let the batcher's threads work until the condition holds; TimeoutError if that takes too long."""
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.001)


def test_many_requests_get_their_own_vectors_in_order() -> None:
    model = Recorder()
    packed = batcher(model, lanes=2, cores=3)

    async def ask_all() -> list[tuple[list[Any], int]]:
        return await asyncio.gather(*(embed(packed, [bytes([n]), bytes([n + 100])]) for n in range(50)))

    for n, (results, area) in enumerate(asyncio.run(ask_all())):
        assert [vector[0] for vector in results] == [n, n + 100]
        assert area == 8
    assert model.decodes == 100 == sum(model.sizes)


def test_a_backlog_fills_the_batches_and_a_lone_image_waits_for_nobody() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=4)

    async def ask() -> None:
        await embed(packed, [b"\1"])
        model.gate.clear()
        first = asyncio.create_task(embed(packed, [b"\2"]))
        await until(lambda: packed._running > 0)
        others = [asyncio.create_task(embed(packed, [bytes([n])])) for n in range(10, 18)]
        await asyncio.sleep(0.1)
        model.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(ask())
    assert model.batches[:2] == [[1], [2]]
    assert [len(batch) for batch in model.batches[2:]] == [4, 4]


def test_a_request_of_hundreds_does_not_hold_up_one_of_one() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=2)

    async def ask() -> None:
        model.gate.clear()
        big = asyncio.create_task(embed(packed, [b"\7"] * 400))
        await asyncio.sleep(0.05)
        small = asyncio.create_task(embed(packed, [b"\1"]))
        await asyncio.sleep(0.05)
        model.gate.set()
        await asyncio.gather(big, small)

    asyncio.run(ask())
    turn = next(turn for turn, batch in enumerate(model.batches) if 1 in batch)
    assert turn < 10, "of 200 batches"


def test_an_image_does_not_wait_for_a_batch_of_others_to_be_decoded() -> None:
    class Large(Recorder):
        def decode(self, image: Any) -> Decoded:
            time.sleep(0.02)
            return super().decode(image)

    model = Large()
    packed = batcher(model, max_batch=128, cores=2, batch_s=0.01)

    async def ask() -> None:
        large = asyncio.create_task(embed(packed, [b"\7"] * 64))
        await until(lambda: bool(packed._requests))
        await embed(packed, [b"\1"])
        assert model.decodes < 60, "of 65"
        await large

    asyncio.run(ask())


class Lanes(Recorder):
    """A model whose batches run two at a time or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def run(self, images: Any) -> Any:
        self.both.wait(10)
        return super().run(images)


class OneIsLarge(Recorder):
    """A model whose image 1 is decoded only once `may_end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()

    def decode(self, image: Any) -> Decoded:
        assert image != b"\1" or self.may_end.wait(10)
        return super().decode(image)


def test_an_image_does_not_wait_for_ever_while_every_core_decodes() -> None:
    model = OneIsLarge()
    packed = batcher(model, batch_s=0.05)

    async def ask() -> None:
        first = asyncio.create_task(embed(packed, [b"\1"]))
        await until(lambda: packed._decoding > 0)
        await packed.embed([b"\2"], 5.0)
        assert not first.done()
        model.may_end.set()
        await first

    asyncio.run(ask())
    assert model.batches == [[2], [1]]


def test_an_image_does_not_wait_for_a_decoding_that_begins_while_it_waits() -> None:
    model = OneIsLarge()
    packed = batcher(model, cores=2, lanes=2, batch_s=0.3)

    async def ask() -> None:
        large = [asyncio.create_task(embed(packed, [b"\1"])) for _ in range(2)]
        await until(lambda: packed._decoding == 2)
        small = asyncio.create_task(packed.embed([b"\2"], 5.0))
        await until(lambda: bool(packed._ready))
        large.append(asyncio.create_task(embed(packed, [b"\1"])))
        await small
        assert not model.may_end.is_set()
        model.may_end.set()
        await asyncio.gather(*large)

    asyncio.run(ask())
    assert model.batches[0] == [2]


def test_all_places_that_a_batch_frees_are_used_at_once() -> None:
    model, held = Recorder(), threading.Event()
    held.set()
    decode = model.decode

    def waiting(image: Any) -> Decoded:
        assert held.wait(10)
        return decode(image)

    model.decode = waiting  # type: ignore[method-assign]
    model.gate.clear()
    packed = batcher(model, cores=8)

    async def ask() -> None:
        asked = asyncio.create_task(embed(packed, [b"\1"] * 20))
        await until(
            lambda: len(packed._ready) == 8 and not packed._decoding
        )  # as many as are kept ready, one batch at work
        held.clear()
        model.gate.set()
        await until(lambda: packed._decoding == 8)
        held.set()
        await asked

    asyncio.run(ask())


def test_a_few_images_go_to_all_cores_while_nothing_else_is_there() -> None:
    lanes, whole = Lanes(), Recorder()
    packed = batcher(lanes, max_batch=4, lanes=2, whole=whole, few=1)

    async def ask() -> None:
        await embed(packed, [b"\1"])
        whole.gate.clear()
        alone = asyncio.create_task(embed(packed, [b"\2"]))
        await until(lambda: lanes.decodes >= 2)
        backlog = asyncio.create_task(embed(packed, [bytes([n]) for n in range(10, 14)]))
        await until(lambda: len(packed._ready) >= 4)
        assert lanes.batches == [], "no lane beside all cores"
        whole.gate.set()
        await asyncio.gather(alone, backlog)
        assert sorted(lanes.batches) == [[10, 11], [12, 13]], "each lane takes its part"
        await embed(packed, [b"\3"])

    asyncio.run(ask())
    assert whole.batches == [[1], [2], [3]]


def test_without_a_backlog_lanes_share_alike_with_those_that_run() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=8, lanes=2)

    async def ask() -> None:
        model.gate.clear()
        first = asyncio.create_task(embed(packed, [b"\1", b"\2"]))
        await until(lambda: packed._at_work >= 2)  # each of them in a lane, or both in one
        others = asyncio.create_task(embed(packed, [bytes([n]) for n in range(10, 16)]))
        await until(lambda: packed._at_work + len(packed._ready) >= 8)
        model.gate.set()
        await asyncio.gather(first, others)

    asyncio.run(ask())
    assert max(map(len, model.batches)) <= 4, "of eight images that two lanes had to do"


def test_one_bad_image_spoils_no_other() -> None:
    packed = batcher(Recorder())
    results, area = asyncio.run(embed(packed, [b"\1", b"bad", b"\3"]))
    assert isinstance(results[1], ImageError)
    assert [float(vector[0]) for vector in (results[0], results[2])] == [1.0, 3.0]
    assert area == 8


@pytest.mark.parametrize(("image", "error"), [(b"fault", OSError), (b"\xff", RuntimeError)])
def test_a_fault_reaches_its_request_and_the_next_one_is_answered(image: bytes, error: type[Exception]) -> None:
    packed = batcher(Recorder())

    async def ask() -> None:
        with pytest.raises(error):
            await embed(packed, [image])
        results, _ = await embed(packed, [b"\5"])
        assert float(results[0][0]) == 5.0

    asyncio.run(ask())


def test_what_a_client_that_left_had_asked_for_is_not_computed() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=1)

    async def ask() -> None:
        model.gate.clear()
        running = asyncio.create_task(embed(packed, [b"\1"]))
        await until(lambda: model.decodes >= 1)
        left = asyncio.create_task(embed(packed, [b"\2"] * 20))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.sleep(0)
        stays = asyncio.create_task(embed(packed, [b"\3"]))
        model.gate.set()
        await asyncio.gather(running, stays)

    asyncio.run(ask())
    assert model.batches == [[1], [3]]


@pytest.mark.parametrize(
    ("lanes", "cores", "images"), [(2, 4, 9), (1, 16, 1)], ids=["a backlog", "more threads than images"]
)
def test_closing_answers_what_was_taken_in_and_ends_the_threads(lanes: int, cores: int, images: int) -> None:
    model = Recorder()
    before = set(threading.enumerate())
    packed = batcher(model, lanes=lanes, cores=cores)
    own = set(threading.enumerate()) - before

    async def ask() -> None:
        model.gate.clear()
        waiting = asyncio.create_task(embed(packed, [b"\1"] * images))
        await asyncio.sleep(0.05)
        packed.close()
        model.gate.set()
        results, _ = await waiting
        assert len(results) == images
        with pytest.raises(RuntimeError):
            await embed(packed, [b"\1"])

    asyncio.run(ask())
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in own):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_whose_loop_ended_while_its_batch_ran_costs_no_thread() -> None:
    model = Recorder()
    packed = batcher(model)

    async def leave() -> None:
        model.gate.clear()
        waiting = asyncio.create_task(embed(packed, [b"\1"]))
        await until(lambda: packed._running > 0)
        assert not waiting.done()

    asyncio.run(leave())  # which cancels what still waits
    model.gate.set()
    results, _ = asyncio.run(embed(packed, [b"\2"]))
    assert results[0][0] == 2
    wait_until(lambda: packed._running == 0, "a batch is lost")
    assert all(thread.is_alive() for thread in packed._threads)


def test_a_loop_that_was_closed_with_a_request_pending_costs_no_thread() -> None:
    model = Recorder()
    packed = batcher(model)
    model.gate.clear()
    loop = asyncio.new_event_loop()
    left = loop.create_task(embed(packed, [b"\1"]))
    loop.run_until_complete(until(lambda: packed._running > 0))
    loop.close()
    model.gate.set()
    results, _ = asyncio.run(embed(packed, [b"\2"]))
    assert results[0][0] == 2
    wait_until(lambda: packed._running == 0, "a batch is lost")
    assert all(thread.is_alive() for thread in packed._threads)
    assert not left.done()
    coroutine = left.get_coro()
    assert coroutine is not None
    coroutine.close()  # so that nothing complains of it later


class Held(Recorder):
    """A model whose images are decoded only when a test permits."""

    def __init__(self) -> None:
        super().__init__()
        self.started: set[bytes] = set()
        self.released = {image: threading.Event() for image in (b"\1", b"\2")}

    def decode(self, image: Any) -> Decoded:
        self.started.add(image)
        assert self.released[image].wait(10)
        return super().decode(image)


def test_an_image_that_is_ready_does_not_wait_for_those_whose_client_left() -> None:
    model = Held()
    packed = batcher(model, cores=2)

    async def ask() -> None:
        slow, image = (asyncio.create_task(embed(packed, [image])) for image in model.released)
        await until(lambda: len(model.started) >= 2)
        left = asyncio.create_task(embed(packed, [b"\3"]))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        model.released[b"\2"].set()
        done, _ = await asyncio.wait({image}, timeout=5)
        model.released[b"\1"].set()
        assert done, "it waits for another's decoding"
        await slow

    asyncio.run(ask())
    assert model.batches == [[2], [1]]


def test_closing_with_an_image_behind_a_busy_lane_ends_every_thread() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=1, cores=4)

    async def ask() -> None:
        model.gate.clear()
        asked = asyncio.create_task(embed(packed, [b"\1", b"\2"]))
        await until(lambda: packed._running == len(packed._ready) == 1)
        packed.close()
        await asyncio.sleep(0.1)
        model.gate.set()
        await asked

    asyncio.run(ask())
    for thread in packed._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_what_is_done_counts_as_work_no_longer() -> None:
    model = Recorder()
    packed = batcher(model)
    asyncio.run(embed(packed, [b"\1", b"bad", *[b"\2"] * 9]))
    packed.close()
    for thread in packed._threads:
        thread.join(10)
    assert packed._state() == State(0, 0, 0, 0, 0, 0.0, closed=True)


IDLE = State(requests=0, decoding=0, ready=0, running=0, at_work=0, waited_s=0, closed=False)


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ({}, "wait"),
        ({"closed": True}, "stop"),
        ({"closed": True, "decoding": 1}, "wait"),
        ({"closed": True, "ready": 1}, RunBatch(1, 2, whole=True)),
        ({"requests": 1}, "decode"),
        ({"ready": 1}, RunBatch(1, 2, whole=True)),
        ({"ready": 1, "decoding": 1}, RunBatch(1, 1, whole=False)),
        ({"ready": 1, "running": 2, "at_work": 1}, "wait"),
        ({"ready": 1, "running": 1, "at_work": 5}, RunBatch(3, 1, whole=False)),
        ({"ready": 3}, RunBatch(2, 1, whole=False)),
        ({"ready": 9}, RunBatch(4, 1, whole=False)),
        ({"ready": 1, "decoding": 2}, "wait"),
        ({"ready": 1, "running": 1, "at_work": 5, "decoding": 1}, "wait"),
        ({"ready": 4, "running": 1, "at_work": 5, "decoding": 1}, RunBatch(4, 1, whole=False)),
        ({"ready": 3, "requests": 1}, "decode"),
        ({"ready": 3, "requests": 1, "decoding": 2}, "wait"),
        ({"ready": 3, "requests": 1, "decoding": 2, "running": 2, "at_work": 2}, "decode"),
        ({"ready": 4, "requests": 1}, RunBatch(4, 1, whole=False)),
        ({"ready": 4, "requests": 1, "running": 2, "at_work": 8}, "decode"),
        ({"ready": 12, "requests": 1, "running": 2, "at_work": 8, "decoding": 4}, "wait"),
        ({"ready": 3, "requests": 1, "waited_s": 1.1}, RunBatch(4, 1, whole=False)),
        ({"ready": 1, "decoding": 2, "waited_s": 1.1}, RunBatch(1, 1, whole=False)),
        ({"ready": 1, "running": 2, "at_work": 4, "waited_s": 1.1}, "wait"),
    ],
    ids=str,
)
def test_what_is_most_useful_next(now: dict[str, Any], due: object) -> None:
    assert decide(IDLE._replace(**now), Capacity(4, lanes=2, few=1, cores=2, lane_cores=1, batch_s=1)) == due


def test_cores_busy_decoding_are_nothing_to_a_gpu_that_computes() -> None:
    now = IDLE._replace(ready=1, running=1, at_work=5, decoding=1)
    assert decide(now, Capacity(4, lanes=2, few=0, cores=2, lane_cores=0, batch_s=1)) == RunBatch(3, 1, whole=False)


def test_too_late_is_told_and_drops_what_waits() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=1)

    async def ask() -> None:
        model.gate.clear()
        with pytest.raises(TimeoutError):
            await packed.embed([b"\1"] * 9, 0.1)
        model.gate.set()
        await embed(packed, [b"\5"])

    asyncio.run(ask())
    assert model.batches == [[1], [5]]


class Image(list[int]):
    """A body that can be watched."""


def test_nothing_is_kept_of_a_request_that_nobody_waits_for() -> None:
    model = Recorder()
    packed = batcher(model, max_batch=1)

    async def ask() -> None:
        await embed(packed, [b"\5"])
        model.gate.clear()
        first = asyncio.create_task(embed(packed, [b"\1"]))
        await until(lambda: model.decodes >= 2)
        images: Any = [Image([n]) for n in range(2, 9)]
        left = asyncio.create_task(embed(packed, images))
        await until(lambda: len(packed._ready) >= 2)
        watched = [weakref.ref(image) for image in images]
        del images
        left.cancel()
        await asyncio.wait([left])
        assert left.cancelled()
        del left
        gc.collect()
        assert [image for image in watched if image() is not None] == []
        assert not packed._ready
        model.gate.set()
        await first

    asyncio.run(ask())
    assert model.batches == [[5], [1]]


def test_a_closed_batcher_holds_the_model_no_longer() -> None:
    model, observer = Recorder(), Recorder()
    capacity = Capacity(1, lanes=1, few=0, cores=2, lane_cores=1, batch_s=1)
    packed = Batcher(observer.decode, model.run, model.run, capacity, observer)
    asyncio.run(embed(packed, [b"\1"]))
    held = weakref.ref(model)
    packed.close()
    gc.disable()
    try:
        del model
        for thread in packed._threads:
            thread.join(10)
        assert held() is None
    finally:
        gc.enable()
