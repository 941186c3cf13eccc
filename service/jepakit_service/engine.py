"""The models of one replica: verified at load, fed through one preprocess and one batcher each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepakit import golden
from jepakit.bundle import GOLDEN, MANIFEST, Bundle, open_bundle
from jepakit.errors import BundleError, DataError, ImageError, MissingExtraError
from jepakit.images import Pixels, preprocess
from jepakit.readers import Limits
from jepakit.session import Session
from jepakit_service.batcher import MicroBatcher
from jepakit_service.settings import ServeSettings
from jepakit_service.wire import Encoded

_BATCHES_TO_TRY = (1, 2, 4, 8, 16, 32)
_WORTHWHILE = 1.05


class OverloadedError(Exception):
    """More images are waiting than the settings allow."""


class LoadedModel:
    """One bundle, its golden vectors reproduced, ready to embed."""

    def __init__(self, bundle: Bundle, settings: ServeSettings) -> None:
        self.manifest = bundle.manifest
        self.session = Session.open(
            bundle, provider=settings.provider, threads=settings.threads, arithmetic=settings.arithmetic
        )
        self.max_batch = settings.max_batch or _best_batch(
            self.session, golden.unpack(bundle.read(GOLDEN)).inputs(self.manifest.preprocess)
        )
        self.batcher = MicroBatcher(self.session.run, self.max_batch)

    @property
    def provider(self) -> str:
        """What really runs: cpu, cuda, tensorrt or openvino."""
        return self.session.provider

    @property
    def precision(self) -> str:
        """What is really computed: fp32, fp16, int8 or bf16."""
        return self.session.precision


class Engine:
    """All models of the service. Raises BundleError at construction unless every one of them is right."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.models: dict[str, LoadedModel] = {}
        for bundle in find_bundles(settings):
            self.models[bundle.manifest.name] = LoadedModel(bundle, settings)
        self._decoders = ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")
        self._inside = 0

    async def embed(self, model: LoadedModel, images: Sequence[Encoded]) -> list[NDArray[np.float32] | ImageError]:
        """A vector [D] for each image, or the reason why it cannot be read; one bad image spoils no other.

        Raises OverloadedError before anything is decoded when too many images are waiting.
        """
        if self._inside and self._inside + len(images) > self._settings.max_waiting:
            raise OverloadedError
        self._inside += len(images)
        try:
            return await asyncio.gather(*(self._embed_one(model, image) for image in images))
        finally:
            self._inside -= len(images)

    async def _embed_one(self, model: LoadedModel, image: Encoded) -> NDArray[np.float32] | ImageError:
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(self._decoders, self._preprocess, model, image)
        except ImageError as error:
            return error
        return await model.batcher.embed(pixels)

    def _preprocess(self, model: LoadedModel, image: Encoded) -> Pixels:
        limits = Limits(max_pixels=self._settings.max_pixels, max_decoded_bytes=8 * self._settings.max_pixels)
        try:
            return preprocess(image, model.manifest.preprocess, limits=limits)
        except MissingExtraError as error:  # what is not installed here is the sender's to know
            raise ImageError(str(error), code="unsupported_format") from None

    def close(self) -> None:
        """Let go of threads."""
        self._decoders.shutdown(wait=False)
        for model in self.models.values():
            model.batcher.close()


def find_bundles(settings: ServeSettings) -> list[Bundle]:
    """The bundles that the settings name, manifests checked, pinned digests honoured, names unique."""
    bundles = [open_bundle(path) for given in settings.bundles for path in _bundle_folders(Path(given))]
    by_name: dict[str, Bundle] = {}
    for bundle in bundles:
        if settings.expect and bundle.digest not in settings.expect:
            raise BundleError(
                f"{bundle.path} has digest {bundle.digest}, which is not the expected one: "
                "it is another bundle than the one you pinned"
            )
        other = by_name.setdefault(bundle.manifest.name, bundle)
        if other is not bundle:
            raise BundleError(
                f"{other.path} and {bundle.path} are both named {bundle.manifest.name!r}: export one with another --name"
            )
    return bundles


def _bundle_folders(path: Path) -> list[Path]:
    if (path / MANIFEST).exists() or not path.is_dir():
        return [path]
    folders = sorted(folder for folder in path.iterdir() if (folder / MANIFEST).is_file())
    if not folders:
        raise DataError(f"{path} holds no bundle: make one with `jepakit export … --out {path / 'NAME'}`")
    return folders


def _best_batch(session: Session, images: Pixels) -> int:
    """The smallest batch whose throughput no larger one beats by 5 %: on a CPU large batches are slower."""
    best, best_rate = 1, 0.0
    for size in _BATCHES_TO_TRY:
        batch = images[np.arange(size) % len(images)]
        session.run(batch)
        start = time.perf_counter()
        session.run(batch)
        rate = size / (time.perf_counter() - start)
        if best_rate and rate < best_rate / 2:
            break
        if rate > best_rate * _WORTHWHILE:
            best, best_rate = size, rate
    return best


def describe(model: LoadedModel, settings: ServeSettings) -> dict[str, Any]:
    """What a client needs to know of a model: `/v1/models/{name}`."""
    manifest = model.manifest
    return {
        "id": manifest.name,
        "object": "model",
        "owned_by": "jepakit",
        "model_id": manifest.model_id,
        "digest": manifest.digest,
        "dim": manifest.embedding.dim,
        "precision": model.precision,
        "provider": model.provider,
        "backbone": manifest.backbone.name,
        "license": manifest.backbone.start.license,
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "embedding": manifest.embedding.model_dump(mode="json", exclude={"center", "scale"}),
        "verdict": None if manifest.comparison is None else manifest.comparison.verdict.word,
        "max_batch": model.max_batch,
        "limits": {
            "max_body_mb": settings.max_body_mb,
            "max_images": settings.max_images,
            "max_pixels": settings.max_pixels,
        },
    }
