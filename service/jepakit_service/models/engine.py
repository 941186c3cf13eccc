"""Answers requests with the models of this replica, within limits on number and time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepakit.errors import ImageError, InferenceError
from jepakit.inference.session import NOT_FINITE
from jepakit_service.faults import unavailable
from jepakit_service.models.batcher import Answer, ImageData, Result
from jepakit_service.models.model import LoadedModel
from jepakit_service.settings import ServeSettings


def max_images_in_time(model: LoadedModel, settings: ServeSettings) -> int:
    """How many images a model answers in half of `request_timeout_s`, at its present pace; at least one."""
    return max(1, round(model.rate * settings.request_timeout_s / 2))


class Engine:
    """Arrays and encoded images in, vectors out."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._inside = 0

    async def answer(self, model: LoadedModel, images: Sequence[ImageData]) -> Answer:
        """Embed a request's images; a bad image does not affect the others.

        Raises ApiError: 429 before anything is decoded if too many images wait,
        503 if there is no answer in time or not enough memory.
        """
        if self._is_full(model, len(images)):
            raise unavailable("overloaded", "too many images are waiting: try again shortly", 429)
        self._inside += len(images)
        model.inside += len(images)
        try:
            answer = await model.embed(images, self._settings.request_timeout_s)
        except TimeoutError:
            seconds = self._settings.request_timeout_s
            raise unavailable("timeout", f"no answer within {seconds:g} s: try again") from None
        except InferenceError as error:
            raise unavailable("out_of_memory", f"{error} (--set max_batch=N)") from None
        except MemoryError:
            raise unavailable("out_of_memory", "not enough memory for the images: try again") from None
        finally:
            self._inside -= len(images)
            model.inside -= len(images)
        results = [_finite(result) for result in answer.results]
        bad = sum(isinstance(result, ImageError) for result in results)
        model.metrics.answered(len(results) - bad, bad)
        return answer._replace(results=results)

    def _is_full(self, model: LoadedModel, more: int) -> bool:
        """Whether `more` images are too many for this replica, or for the model to answer in half of the timeout.

        All requests wait together, so if the queue were too long for the timeout, all would fail, not only the last.
        A request that is alone is always let in.
        """
        limits = (
            (self._inside, self._settings.max_waiting),
            (model.inside, max_images_in_time(model, self._settings)),
        )
        return any(inside and inside + more > most for inside, most in limits)


def _finite(result: Result) -> Result:
    """The vector if it is finite, else an ImageError."""
    if isinstance(result, ImageError) or np.isfinite(result).all():
        return result
    return ImageError(NOT_FINITE, code="not_finite")
