"""A model in memory: loaded from its bundle, checked, ready to embed."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jepakit._machine import trim_heap
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, Bundle
from jepakit.bundles.manifest import Described
from jepakit.errors import DECODER_MISSING, ImageError, MissingExtraError
from jepakit.images import fit, read_image
from jepakit.inference.runtime import ON_GPU
from jepakit.inference.session import Session
from jepakit.readers import Limits
from jepakit_service.models.batcher import Answer, Batcher, Capacity, Decoded, ImageData, Result
from jepakit_service.models.heartbeat import Heartbeat
from jepakit_service.models.tuning import tune
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry.metrics import Metrics

_BYTES_A_PIXEL = 8
"""A decoded image may take this many bytes times `max_pixels`."""
_LATEST = 0.02
"""Weight of the latest image in the mean of what decoding takes: the last fifty or so count."""


class LoadedModel(Described):
    """A verified bundle whose golden vectors were reproduced, ready to embed. Raises BundleError if a check fails."""

    def __init__(self, bundle: Bundle, settings: ServeSettings, metrics: Metrics) -> None:
        self.manifest = bundle.manifest
        session = Session.open(
            bundle, provider=settings.provider, threads=settings.threads, arithmetic=settings.arithmetic
        )
        expected = golden.unpack(bundle.read(GOLDEN))
        self._golden_image = expected.images[0]
        inputs = expected.inputs(self.manifest.preprocess)
        self.provider = session.provider
        """The provider actually used: cpu, cuda, tensorrt or openvino."""
        self.precision = session.precision
        """The precision actually used: fp32, fp16, int8 or bf16."""
        self.plan, session, whole = tune(session, bundle, inputs, settings)
        trim_heap()  # opening a session leaves freed memory the size of its graph behind
        self._limits = Limits(
            max_pixels=settings.max_pixels,
            max_decoded_bytes=_BYTES_A_PIXEL * settings.max_pixels,
            set_by="the service's setting max_pixels",
        )
        self._threads, self._decode_s = settings.threads, 0.0
        """How many threads decode, and the mean seconds of a core that an image took lately."""
        self._warm_up()
        self.metrics = metrics.of_model(self.name)
        self.inside = 0
        """Images of requests that the engine has let in."""
        # Where the table has only tolerances of cosines over many vectors, a single vector is held to this wide limit.
        limit = golden.TOLERANCES[self.precision, self.provider].relative or 1.0
        self.heartbeat = Heartbeat(
            self.name, self._embed_golden, expected.vectors[0], limit, self.plan.batch_s, self.metrics
        )
        capacity = Capacity(
            self.plan.max_batch,
            self.plan.lanes,
            self.plan.few,
            cores=settings.threads,
            lane_cores=0 if self.provider in ON_GPU else self.plan.threads,
            batch_s=self.plan.batch_s,
        )
        # Only the batcher holds the sessions, and it releases them once it is closed and empty.
        self._batcher = Batcher(self._decode, session.run, whole.run, capacity, self.heartbeat)

    @property
    def rate(self) -> float:
        """Images per second: inference as measured at the start, and decoding as lately seen, which on a CPU takes the same cores."""
        inference_s, decode_s = 1 / self.plan.rate, self._decode_s / self._threads
        return 1 / (max(inference_s, decode_s) if self.provider in ON_GPU else inference_s + decode_s)

    async def embed(self, images: Sequence[ImageData], timeout_s: float) -> Answer:
        """The vectors of a request's images. Raises TimeoutError."""
        self.metrics.waiting.inc(len(images))
        try:
            return await self._batcher.embed(images, timeout_s)
        finally:
            self.metrics.waiting.dec(len(images))

    def close(self) -> None:
        """Answer the waiting requests, then release the threads and the graph's memory."""
        self._batcher.close()

    async def _embed_golden(self, timeout_s: float) -> Result:
        (vector,), _ = await self.embed([self._golden_image], timeout_s)
        return vector

    def _warm_up(self) -> None:
        """Decode once, so that no client pays for the imports; the image itself need not suit the model."""
        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
        with contextlib.suppress(ImageError):
            self._decode(jpeg.getvalue())

    def _decode(self, image: ImageData) -> Decoded:
        spec, began = self.manifest.preprocess, time.thread_time()
        try:
            pixels = read_image(image, spec, limits=self._limits)
        except MissingExtraError as error:
            raise ImageError(f"{error}, where the service runs", code=DECODER_MISSING) from None
        ready = np.ascontiguousarray(fit(pixels, spec, limits=self._limits))
        if image is not self._golden_image:
            self._decode_s += _LATEST * (time.thread_time() - began - self._decode_s)
        return Decoded(ready, pixels.shape[0] * pixels.shape[1])
