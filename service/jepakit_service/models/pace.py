"""How fast a model answers: inference as measured at its start, and decoding as lately seen."""

from __future__ import annotations

from collections.abc import Sequence

from jepakit_service.models.batcher import Observer

_LATEST = 0.02
"""Weight of the latest image in the mean: the last fifty or so count."""


class Pace:
    """Observes the batcher, and passes its events on to `observer`.

    rate     images per second that the model infers
    threads  how many decode at a time
    beside   whether decoding takes none of inference's time, which runs on a GPU
    """

    def __init__(self, rate: float, threads: int, observer: Observer, *, beside: bool) -> None:
        self._rate, self._threads, self._observer, self._beside = rate, threads, observer, beside
        self._decode_s = 0.0
        """Mean seconds to decode an image."""

    @property
    def rate(self) -> float:
        """Images per second, decoding included."""
        inference_s, decode_s = 1 / self._rate, self._decode_s / self._threads
        return 1 / (max(inference_s, decode_s) if self._beside else inference_s + decode_s)

    def decoded(self, seconds: float) -> None:
        """Called by the batcher."""
        self._decode_s += _LATEST * (seconds - self._decode_s)
        self._observer.decoded(seconds)

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        """Called by the batcher."""
        self._observer.ran(size, queued, seconds)
