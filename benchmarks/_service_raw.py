"""The limit to which benchmarks/service.py compares servers: decode, preprocess and ONNX Runtime, no HTTP.

Reads orders from stdin, one JSON object per line, and answers each with another.

    python _service_raw.py BUNDLE IMAGE PROVIDER

    {"do": "choose", "seconds": 0.3}   tries ways to spread the work over the cores and keeps the fastest
    {"do": "loop", "seconds": 2.0}     images, seconds and CPU seconds of the fastest way
    {"do": "call", "seconds": 1.0}     milliseconds of single images, one after the other, with all threads
    {"do": "vector"}                   the image's vector
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepakit._machine import usable_cpus
from jepakit.bundles.bundle import open_bundle
from jepakit.images import preprocess
from jepakit.inference.runtime import Provider
from jepakit.inference.session import Session

BATCHES = (1, 2, 4, 8, 16, 32)
_PASSES = 3  # the first warms up, and a neighbour's burst rarely hits one way in all of them


class Way(NamedTuple):
    """A number of workers, each decoding a batch and running it on some threads; one decodes while another runs."""

    workers: int
    threads: int
    batch: int


class RawEngine:
    """One bundle and one image's bytes. One session per number of threads."""

    def __init__(self, bundle: str, image: bytes, provider: Provider) -> None:
        cores = usable_cpus()
        opened = open_bundle(bundle)
        self._image, self._spec = image, opened.manifest.preprocess
        # On a GPU an inference has no threads to spread, so only the workers vary.
        self._spread = (
            {(cores, 1), (2 * cores, 1), (1, cores), (2, cores)}
            if provider == "cpu"
            else {(1, cores), (2, cores), (4, cores), (cores, cores)}
        )
        self._sessions = {
            threads: Session.open(opened, provider=provider, threads=threads)
            for threads in {threads for _, threads in self._spread}
        }
        self._cores, self._way = cores, Way(1, cores, 1)
        self._pool = ThreadPoolExecutor(2 * cores)

    def choose(self, seconds: float) -> dict[str, Any]:
        """Images/s of every way, as the best of three passes; and the fastest way, which `loop` uses from now on."""
        ways = [Way(workers, threads, batch) for workers, threads in sorted(self._spread) for batch in BATCHES]
        rates = dict.fromkeys(ways, 0.0)
        for _ in range(_PASSES):
            for way in ways:
                rates[way] = max(rates[way], self._rate(way, seconds))
        self._way = max(rates, key=lambda way: rates[way])
        return {"way": self._way, "rates": [(*way, rate) for way, rate in rates.items()]}

    def loop(self, seconds: float) -> dict[str, Any]:
        """Run the fastest way for `seconds`."""
        start, cpu, deadline = time.perf_counter(), time.process_time(), time.perf_counter() + seconds
        workers = [self._pool.submit(self._work, self._way, deadline) for _ in range(self._way.workers)]
        images = sum(worker.result() for worker in workers)
        return {"images": images, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}

    def call(self, seconds: float) -> dict[str, Any]:
        """How long one caller waits for one image."""
        deadline, latencies_ms = time.perf_counter() + seconds, []
        while (start := time.perf_counter()) < deadline:
            self._embed(1, self._cores)
            latencies_ms.append(1000 * (time.perf_counter() - start))
        return {"latencies_ms": latencies_ms}

    def vector(self) -> list[float]:
        """The image's vector."""
        found: list[float] = self._embed(1, self._cores)[0].tolist()
        return found

    def _embed(self, batch: int, threads: int) -> Any:
        pixels = [preprocess(self._image, self._spec) for _ in range(batch)]
        return self._sessions[threads].run(np.stack(pixels))

    def _work(self, way: Way, deadline: float) -> int:
        done = 0
        while time.perf_counter() < deadline:
            self._embed(way.batch, way.threads)
            done += way.batch
        return done

    def _rate(self, way: Way, seconds: float) -> float:
        before, self._way = self._way, way
        found = self.loop(seconds)
        self._way = before
        return float(found["images"] / found["seconds"])


def main() -> None:
    bundle, image, provider = sys.argv[1:]
    engine = RawEngine(bundle, Path(image).read_bytes(), provider)  # type: ignore[arg-type]
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(engine, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
