"""How a model runs best on this machine, measured at its start: threads of an inference, inferences at a time, batch size."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jepakit.bundle import DATA, GRAPH, Bundle
from jepakit.images import Pixels
from jepakit.session import Session
from jepakit_service.settings import ServeSettings

_BATCHES = (1, 2, 4, 8, 16, 32)
_LONGEST_BATCH_S = 0.25
"""Longer batches make everybody wait, and are no faster on a CPU."""
_NEARLY = 0.9
"""The smallest batch is taken that is nearly the fastest: while a large one is gathered, cores wait."""
_SLOWEST_ALONE, _PRICE = 2.0, 0.5
"""A split may double a lone image's time, and must gain its square root in throughput: 41 % for that, 12 % for a quarter more."""
_PASSES, _LEAST_S = 3, 0.05


class Plan(NamedTuple):
    """Threads of one inference, inferences at a time, images of one inference; images a second that this gave."""

    threads: int
    lanes: int
    max_batch: int
    rate: float


def tuned(session: Session, bundle: Bundle, images: Pixels, settings: ServeSettings) -> tuple[Session, Plan]:
    """How to run a bundle that `session` has open with all threads; perhaps by another session. images: what it takes.

    On a CPU small models answer more when each core runs a batch of its own, large ones sooner when all cores share
    one. A split is taken whose throughput outweighs what a lone image waits longer.
    """
    whole = _Way(session, settings.threads, 1)
    ways = [whole, *(_splits(bundle, settings) if session.provider == "cpu" else ())]
    # In turns, and the shortest of all: a slow moment of the machine must not decide between them.
    for _ in range(_PASSES):
        for way in ways:
            way.measure(images, (settings.max_batch,) if settings.max_batch else _BATCHES)
    best = whole
    for way in ways[1:]:
        slower = max(1.0, way.alone / whole.alone)
        if slower < _SLOWEST_ALONE and way.plan.rate > best.plan.rate * slower**_PRICE:
            best = way
    return best.session, best.plan


def _splits(bundle: Bundle, settings: ServeSettings) -> Iterator[_Way]:
    """The model again, with fewer threads an inference; the bytes have been verified."""
    data = bundle.read(DATA) if DATA in bundle.manifest.files else None
    graph = bundle.read(GRAPH)
    for threads in (4, 1):
        if threads < settings.threads:
            session = Session(graph, bundle.manifest, provider="cpu", threads=threads, data=data)
            yield _Way(session, threads, settings.threads // threads)


class _Way:
    """One way to run a model, and the shortest times so far."""

    def __init__(self, session: Session, threads: int, lanes: int) -> None:
        self.session, self._threads, self._lanes = session, threads, lanes
        self.alone = math.inf
        """Seconds of a lone image."""
        self._seconds: dict[int, float] = {}
        """Of one batch of each size while every lane runs."""

    def measure(self, images: Pixels, sizes: Sequence[int]) -> None:
        """Once more: a lone image, and batches of every size up to the first that takes too long."""
        self.alone = min(self.alone, _pass(self.session, images[:1], 1))
        for size in sizes:
            seconds = _pass(self.session, images[np.arange(size) % len(images)], self._lanes)
            self._seconds[size] = min(seconds, self._seconds.get(size, math.inf))
            if self._seconds[size] > _LONGEST_BATCH_S:
                break

    @property
    def plan(self) -> Plan:
        """With the smallest batch that is nearly the fastest."""
        rates = {size: size * self._lanes / seconds for size, seconds in self._seconds.items()}
        size = next(size for size, rate in rates.items() if rate >= _NEARLY * max(rates.values()))
        return Plan(self._threads, self._lanes, size, rates[size])


def _pass(session: Session, batch: Pixels, lanes: int) -> float:
    """Seconds of one batch while every lane runs, over a moment."""
    session.run(batch)
    rounds = [0] * lanes
    start = time.perf_counter()

    def repeat(lane: int) -> None:
        while rounds[lane] == 0 or time.perf_counter() - start < _LEAST_S:
            session.run(batch)
            rounds[lane] += 1

    others = [threading.Thread(target=repeat, args=(lane,)) for lane in range(1, lanes)]
    for thread in others:
        thread.start()
    repeat(0)
    for thread in others:
        thread.join()
    return (time.perf_counter() - start) * lanes / sum(rounds)
