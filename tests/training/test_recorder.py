"""What a run says while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from jepakit_training.run.recorder import Clock, describe

VALUES = {
    "loss": 0.4321,
    "prediction": 0.1,
    "sigreg": 4.25,
    "images_per_s": 81.4,
    "data_wait": 0.083,
    "peak_memory_gb": 3.21,
}


def test_values_in_the_words_of_the_docs() -> None:
    assert describe(VALUES) == (
        "loss 0.4321  prediction 0.1000  sigreg 4.25 (floor 1.05)  81 images/s  data wait 8%  peak memory 3.2 GB"
    )


def test_the_clock_tells_waiting_from_working_and_starts_anew_with_each_report(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("jepakit_training.run.recorder.time.perf_counter", lambda: now[0])

    def loader() -> Iterator[int]:
        for number in itertools.count():
            now[0] += 3
            yield number

    clock = Clock()
    batches = clock.waiting(loader())
    for images in (8, 4):
        next(batches)
        now[0] += 1  # the step
        clock.step(images)
    assert clock.rates() == {"images_per_s": 12 / 8, "data_wait": 6 / 8}
    now[0] += 5  # a step of a batch that had been waited for before
    clock.step(10)
    assert clock.rates() == {"images_per_s": 2.0, "data_wait": 0.0}
    assert list(clock.waiting(iter("ab"))) == ["a", "b"]
