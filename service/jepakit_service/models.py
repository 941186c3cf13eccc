"""Bundles that the settings name, and models loaded from them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jepakit import golden
from jepakit._machine import trim_heap
from jepakit.bundle import GOLDEN, Bundle, bundles_inside, is_bundle, open_bundle
from jepakit.errors import BundleError, DataError, ImageError, MissingExtraError
from jepakit.images import fit, read_image
from jepakit.readers import Limits
from jepakit.runtime import ON_GPU, Provider
from jepakit.session import Session
from jepakit_service.batcher import Batcher, Decoded, Result
from jepakit_service.metrics import Metrics
from jepakit_service.settings import ServeSettings
from jepakit_service.sharing import Shared
from jepakit_service.tuning import tuned
from jepakit_service.wire import Encoded

_FRESH_S, _RIGHT_S = 5.0, 60.0
_HEARTBEAT_S = 10.0
_PATIENCE_S = 0.5
"""For a heartbeat, of who asks: probes give up after some seconds."""


class LoadedModel:
    """One bundle, verified, its golden vectors reproduced, ready to embed. Raises BundleError when it is not right."""

    def __init__(self, bundle: Bundle, settings: ServeSettings, metrics: Metrics) -> None:
        self.manifest = bundle.manifest
        session = Session.open(
            bundle, provider=settings.provider, threads=settings.threads, arithmetic=settings.arithmetic
        )
        self._golden = golden.unpack(bundle.read(GOLDEN))
        inputs = self._golden.inputs(self.manifest.preprocess)
        self.plan, self._session, whole = tuned(session, bundle, inputs, settings)
        trim_heap()  # opening a session leaves as much free memory behind as its graph is large
        self._limits = Limits(max_pixels=settings.max_pixels, max_decoded_bytes=8 * settings.max_pixels)
        self._warm_up()
        self._beaten = self._right = self._decoded = time.monotonic()
        """When a batch ran, when its numbers were those of the golden vectors, and when an image was decoded."""
        self._fault: str | None = None
        """What the last heartbeat found."""
        self.counted = metrics.of_model(self.manifest.name)
        self.inside = 0
        """Images of requests that the engine has let in."""
        self._beat = Shared(self._heartbeat)
        self._batcher = Batcher(
            self._decode, self._session.run, max_batch=self.plan.max_batch, lanes=self.plan.lanes,
            whole=whole.run, few=self.plan.few, cores=settings.threads,
            lane_cores=0 if self.provider in ON_GPU else self.plan.threads, observer=self,
        )  # fmt: skip

    @property
    def provider(self) -> Provider:
        """What really runs: cpu, cuda, tensorrt or openvino."""
        return self._session.provider

    @property
    def precision(self) -> str:
        """What is really computed: fp32, fp16, int8 or bf16."""
        return self._session.precision

    @property
    def digest(self) -> str:
        """The bundle's."""
        return self.manifest.digest

    async def embed(self, images: Sequence[Encoded], timeout_s: float) -> tuple[list[Result], int]:
        """A vector [D] for each image or why it cannot be read, in order, and the pixels of those decoded.

        Raises TimeoutError.
        """
        self.counted.waiting.inc(len(images))
        try:
            return await self._batcher.embed(images, timeout_s)
        finally:
            self.counted.waiting.dec(len(images))

    async def heartbeat(self) -> str | None:
        """Why this model does not answer rightly; None when it does, as far as half a second shows.

        A batch that ran within 5 s and golden vectors reproduced within a minute are proof enough, else a golden image
        goes through the same queue as everybody's: one at a time, however many ask. While it takes longer, what the one
        before it found is told.
        """
        if not self._is_proven():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._beat()
        return self._fault

    def _is_proven(self) -> bool:
        return self._fault is None and self._is_fresh() and time.monotonic() - self._right < _RIGHT_S

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._beaten < _FRESH_S

    async def _heartbeat(self) -> None:
        name = self.manifest.name
        try:
            (vector,), _ = await self.embed([self._golden.images[0]], _HEARTBEAT_S)
        except TimeoutError:
            # The image still waits behind others: large ones may take longer to decode than a batch of them to run. None is
            # decoded for long behind a batch that hangs.
            busy = time.monotonic() - max(self._beaten, self._decoded) < _FRESH_S
            self._fault = None if busy else f"{name} has run no batch for {time.monotonic() - self._beaten:.0f} s"
        except Exception as error:
            self._fault = f"{name} fails ({type(error).__name__})"
        else:
            self._fault, self._right = self._wrong(vector), time.monotonic()

    def _wrong(self, vector: Result) -> str | None:
        """What is wrong with the first golden image's vector."""
        if isinstance(vector, ImageError):
            return f"{self.manifest.name} cannot read its own golden image"
        limit = golden.TOLERANCES[self.precision, self.provider].relative
        wrong = golden.relative_error(vector, self._golden.vectors[0])
        # Where the table judges by cosines, one vector tells no more than that its numbers are numbers.
        if not wrong <= (limit or 1.0):
            return f"{self.manifest.name} no longer gives its golden vectors (relative error {wrong:.2g})"
        return None

    def close(self) -> None:
        """Answer what waits, then let go of the threads."""
        self._batcher.close()

    def decoded(self, seconds: float) -> None:
        """For the batcher."""
        self._decoded = time.monotonic()
        self.counted.decoded(seconds)

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        """For the batcher: a sign of life."""
        self._beaten = time.monotonic()
        self.counted.ran(size, queued, seconds)

    def _warm_up(self) -> None:
        """Decode once, so that no client pays for the imports; the image itself need not suit the model."""
        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
        with contextlib.suppress(ImageError):
            self._decode(jpeg.getvalue())

    def _decode(self, image: Encoded) -> Decoded:
        spec = self.manifest.preprocess
        try:
            pixels = read_image(image, spec, limits=self._limits)
        except MissingExtraError as error:  # what is not installed here is the sender's to know
            raise ImageError(str(error), code="unsupported_format") from None
        return Decoded(np.ascontiguousarray(fit(pixels, spec, limits=self._limits)), pixels.shape[0] * pixels.shape[1])


def find_bundles(settings: ServeSettings) -> list[Bundle]:
    """The bundles that the settings name, manifests checked, pinned digests honoured, names unique."""
    by_name: dict[str, Bundle] = {}
    for path in (path for given in settings.bundles for path in bundle_folders(Path(given))):
        bundle = open_bundle(path)
        check_expected(bundle, settings)
        other = by_name.setdefault(bundle.manifest.name, bundle)
        if other is not bundle:
            raise BundleError(
                f"{other.path} and {bundle.path} are both named {bundle.manifest.name!r}: export one with another --name"
            )
    return list(by_name.values())


def check_expected(bundle: Bundle, settings: ServeSettings) -> None:
    """Raise BundleError for a bundle whose digest is none of those that were pinned."""
    if settings.expect and bundle.digest not in settings.expect:
        raise BundleError(
            f"{bundle.path} has digest {bundle.digest}, which is not the expected one: "
            "it is another bundle than the one you pinned"
        )


def bundle_folders(given: Path) -> list[Path]:
    """The bundles that one path of the settings names: itself, or those in it. DataError for a folder without any."""
    if is_bundle(given) or not given.is_dir():
        return [given]
    inside = bundles_inside(given)
    if not inside:
        raise DataError(f"{given} holds no bundle: make one with `jepakit export … --out {given / 'NAME'}`")
    return inside
