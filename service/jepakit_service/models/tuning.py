"""How a model runs best on this machine, measured when it is loaded: threads per inference, lanes, batch size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jepakit.bundles.bundle import DATA, GRAPH, Bundle
from jepakit.errors import InferenceError
from jepakit.images import Pixels
from jepakit.inference.runtime import ON_GPU, Provider
from jepakit.inference.session import Session
from jepakit_service.settings import ServeSettings

_BATCHES = (1, 2, 4, 8, 16, 32)
_GPU_BATCHES = (*_BATCHES, 64)
_LONGEST_BATCH_S = 0.25
"""Longer batches make everybody wait, and are no faster on a CPU."""
_NEARLY = 0.97
"""The smallest batch within this share of the best rate is chosen: images of a larger one wait for each other."""
_BETTER = 1.1
"""All cores together must be this much faster than lanes to be chosen for a backlog too: timings vary."""
_PASSES, _LEAST_S = 3, 0.05


class Plan(NamedTuple):
    """How the batcher runs a model: on a backlog, and on a few images with nothing else to do."""

    threads: int
    """Threads of one inference while others run beside it."""
    lanes: int
    """Inferences at a time."""
    max_batch: int
    """Most images in one inference."""
    rate: float
    """Images per second, as measured."""
    few: int
    """Up to this many images are answered sooner by all cores together than by lanes; 0: always lanes, or only one."""

    @property
    def batch_s(self) -> float:
        """Seconds per full batch while every lane runs one."""
        return self.max_batch * self.lanes / self.rate


class Tuned(NamedTuple):
    """A model's plan, the session that its lanes share, and the one that uses all cores for up to `plan.few` images."""

    plan: Plan
    session: Session
    whole: Session


def tune(session: Session, bundle: Bundle, images: Pixels, settings: ServeSettings) -> Tuned:
    """Find out how to run a bundle that `session` has open with all threads. images: inputs for it.

    On a CPU most models answer more images when each core runs a batch of its own, but a lone image sooner when all
    cores share it. Where both hold, the model is opened both ways; its vectors are the same. On a GPU one batch can be
    transferred while another is computed: two lanes share the session.
    """
    whole, on_gpu = _Way(session, settings.threads, 1), session.provider in ON_GPU
    ways = [whole, *(_splits(bundle, settings) if session.provider == "cpu" else ())]
    if on_gpu:
        ways.append(_Way(session, settings.threads, 2))
    sizes = (1, settings.max_batch) if settings.max_batch else _GPU_BATCHES if on_gpu else _BATCHES
    # In turns, keeping the shortest times: a slow moment of the machine must not decide between them.
    for _ in range(_PASSES):
        for way in ways:
            way.measure(images, sizes, least=settings.max_batch or 1)
    plans = {way: way.plan(settings.max_batch) for way in ways}
    best = max(ways, key=lambda way: plans[way].rate * (_BETTER if way is not whole else 1))
    few = whole.few_beside(best)
    return Tuned(plans[best]._replace(few=few), best.session, whole.session if few else best.session)


def most_sessions(provider: Provider, threads: int) -> int:
    """The most sessions that `tune` has open at a time, including the given one."""
    return 1 + (len(_split_threads(threads)) if provider in ("auto", "cpu") else 0)


def _splits(bundle: Bundle, settings: ServeSettings) -> Iterator[_Way]:
    """The model again, with fewer threads per inference; the bytes have been verified."""
    data = bundle.read(DATA) if DATA in bundle.manifest.files else None
    graph = bundle.read(GRAPH)
    for threads in _split_threads(settings.threads):
        session = Session(graph, bundle.manifest, provider="cpu", threads=threads, data=data)
        yield _Way(session, threads, settings.threads // threads)


def _split_threads(threads: int) -> list[int]:
    return [fewer for fewer in (4, 1) if fewer < threads]


class _Way:
    """One way to run a model, and the shortest times so far."""

    def __init__(self, session: Session, threads: int, lanes: int) -> None:
        self.session, self._threads, self._lanes = session, threads, lanes
        self._alone = math.inf
        """Seconds for a lone image."""
        self._seconds: dict[int, float] = {}
        """Seconds per batch, by its size, while every lane runs."""
        self._too_large = math.inf
        """The smallest size for which there was not enough memory."""

    def measure(self, images: Pixels, sizes: Iterable[int], least: int) -> None:
        """Time once more a lone image, and batches of every size up to the first that takes too long or does not fit.

        Raises InferenceError if a batch of at most `least` images cannot be run.
        """
        self._alone = min(self._alone, _pass(self.session, images[:1], 1))
        for size in (size for size in sizes if size < self._too_large):
            try:
                seconds = _pass(self.session, images[np.arange(size) % len(images)], self._lanes)
            except InferenceError:
                if size <= least:
                    raise
                self._too_large = size
                self._seconds.pop(size, None)
                break
            self._seconds[size] = min(seconds, self._seconds.get(size, math.inf))
            if self._seconds[size] > _LONGEST_BATCH_S:
                break

    def plan(self, max_batch: int | None) -> Plan:
        """The plan with the smallest batch that is nearly the fastest, or with the one asked for."""
        rates = {size: size * self._lanes / seconds for size, seconds in self._seconds.items()}
        size = next(size for size, rate in rates.items() if rate >= _NEARLY * max(rates.values()))
        return Plan(self._threads, self._lanes, max_batch or size, rates[size], 0)

    def few_beside(self, lanes: _Way) -> int:
        """The most images that all cores answer sooner as one batch than lanes do with one image each."""
        if lanes.session is self.session or lanes._alone <= self._alone:
            return 0
        return max([1, *(size for size, seconds in self._seconds.items() if seconds <= lanes._seconds[1])])


def _pass(session: Session, batch: Pixels, lanes: int) -> float:
    """Seconds per batch while every lane runs, averaged over a moment."""
    session.run(batch)
    rounds = [0] * lanes
    start = time.perf_counter()

    def repeat(lane: int) -> None:
        while rounds[lane] == 0 or time.perf_counter() - start < _LEAST_S:
            session.run(batch)
            rounds[lane] += 1

    with ThreadPoolExecutor(lanes) as threads:
        list(threads.map(repeat, range(lanes)))  # raises what one of them raised
    return (time.perf_counter() - start) * lanes / sum(rounds)
