"""How a model runs best on this machine, measured at its start: threads of an inference, inferences at a time, batch size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
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
    """Threads of one inference, inferences at a time, images of one inference."""

    threads: int
    lanes: int
    max_batch: int


def tuned(session: Session, bundle: Bundle, images: Pixels, settings: ServeSettings) -> tuple[Session, Plan]:
    """How to run a bundle that `session` has open with all threads; perhaps by another session. images: what it takes.

    On a CPU small models answer more when each core runs a batch of its own, large ones sooner when all cores share
    one. A split is taken whose throughput outweighs what a lone image waits longer.
    """
    best, rate, alone = _measured(session, images, settings.threads, 1, settings.max_batch)
    if session.provider != "cpu":
        return session, best
    for other in _splits(bundle, settings):
        plan, other_rate, other_alone = _measured(
            other, images, threads := other.threads, settings.threads // threads, settings.max_batch
        )
        slower = max(1.0, other_alone / alone)
        if slower < _SLOWEST_ALONE and other_rate > rate * slower**_PRICE:
            session, best, rate = other, plan, other_rate
    return session, best


def _splits(bundle: Bundle, settings: ServeSettings) -> Iterator[Session]:
    """The model again, with fewer threads an inference; the bytes have been verified."""
    data = bundle.read(DATA) if DATA in bundle.manifest.files else None
    graph = bundle.read(GRAPH)
    for threads in (4, 1):
        if threads < settings.threads:
            yield Session(graph, bundle.manifest, provider="cpu", threads=threads, data=data)


def _measured(
    session: Session, images: Pixels, threads: int, lanes: int, max_batch: int | None
) -> tuple[Plan, float, float]:
    """The best batch for so many lanes, its images a second, and the seconds of a lone image."""
    alone = _seconds(session, images[:1], 1)
    rates: dict[int, float] = {}
    for size in (max_batch,) if max_batch else _BATCHES:
        seconds = _seconds(session, images[np.arange(size) % len(images)], lanes)
        rates[size] = size * lanes / seconds
        if seconds > _LONGEST_BATCH_S:
            break
    size = next(size for size, rate in rates.items() if rate >= _NEARLY * max(rates.values()))
    return Plan(threads, lanes, size), rates[size], alone


def _seconds(session: Session, batch: Pixels, lanes: int) -> float:
    """Seconds of one batch while every lane runs: the shortest of three passes, since others use the machine too."""
    session.run(batch)
    return min(_pass(session, batch, lanes) for _ in range(_PASSES))


def _pass(session: Session, batch: Pixels, lanes: int) -> float:
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
