"""Opens a bundle's verified model.onnx in ONNX Runtime: arrays in, arrays out.

The service's models and the export's verification run on `Session`; `load(bundle)` wraps one in the client's `embed`,
without a service.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from jepakit._checks import is_whole
from jepakit._machine import usable_cpus
from jepakit._messages import lines_of
from jepakit._progress import Steps
from jepakit._threads import work_ahead
from jepakit.bundles import golden
from jepakit.bundles.bundle import DATA, GOLDEN, GRAPH, Bundle, open_bundle
from jepakit.bundles.manifest import Described, Manifest, Preprocess
from jepakit.embedding.results import Results
from jepakit.embedding.skipped import OnSkipped, check_skipping
from jepakit.embeddings import Embeddings
from jepakit.errors import BundleError, ConfigError, ImageError, InferenceError
from jepakit.images import Pixels, check_tile, preprocess
from jepakit.inference.runtime import ON_GPU, Arithmetic, Provider, open_runtime
from jepakit.sources import ImageList, gather

# A decoder may hold a whole scene in memory, so 64 cores do not get one each.
_MOST_DECODERS = 8
_BATCHES_AHEAD = 2
NOT_FINITE = "the model's vector for this image is not finite: export the model in fp32"
"""Half precision can overflow."""


class Session:
    """One model, open on a provider. Raises InferenceError if a provider asked for by name does not work: no fallback to the CPU.

    graph       the bytes of model.onnx
    manifest    the manifest of the bundle that the bytes came from
    provider    `auto` uses CUDA if it works, else the CPU
    threads     threads per inference; None: one per core that this process may use, within its container's quota
    arithmetic  `model` computes as the graph says; `bf16` needs OpenVINO
    data        the bytes of model.safetensors, where a large model's graph keeps its tensors
    """

    def __init__(
        self,
        graph: bytes,
        manifest: Manifest,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        arithmetic: Arithmetic = "model",
        data: bytes | None = None,
    ) -> None:
        assert manifest.graph is not None or arithmetic == "model"
        self.manifest = manifest
        self.threads = threads or usable_cpus()
        self._runtime = open_runtime(graph, provider, self.threads, arithmetic, data)
        self.provider = self._runtime.provider
        self._arithmetic = arithmetic

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        arithmetic: Arithmetic = "model",
    ) -> Session:
        """Verify the whole bundle, open its graph, and check that it reproduces the golden inputs.

        Raises BundleError for a bundle that is not exported, is damaged, or computes other vectors here than torch did;
        ConfigError for an unknown provider or arithmetic; InferenceError for a provider that does not work here;
        MissingExtraError when its package is not installed.
        """
        if threads is not None and (not is_whole(threads) or threads < 1):
            raise ConfigError(f"threads = {threads!r}: give a whole number, 1 or more, or None for one a core")
        bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        for name in (GRAPH, GOLDEN):
            bundle.require(name)
        files = bundle.read_all()
        expected = golden.unpack(files[GOLDEN])
        expected.check(bundle.manifest.preprocess, bundle.manifest.embedding.dim)
        session = cls(
            files.pop(GRAPH),
            bundle.manifest,
            provider=provider,
            threads=threads,
            arithmetic=arithmetic,
            data=files.pop(DATA, None),
        )
        session.check_golden(expected)
        return session

    @property
    def precision(self) -> str:
        """The graph's precision, fp32, fp16 or int8, or bf16 by `arithmetic`. On a CPU, ONNX Runtime computes fp16 in fp32."""
        assert self.manifest.graph is not None
        return self.manifest.graph.precision if self._arithmetic == "model" else self._arithmetic

    def run(self, images: Pixels) -> NDArray[np.float32]:
        """Embed preprocessed images: [B, size, size, C], uint8 or raw float32 → float32 [B, D].

        Raises ImageError for a shape or dtype that the graph does not take, InferenceError when there is not enough
        memory for the batch. Safe to call from several threads.
        """
        return self.run_all(images)[0]

    def run_all(self, images: Pixels) -> list[NDArray[np.float32]]:
        """Embeddings [B, D] and, if the graph has them, patch tokens [B, N, E]."""
        self._check_kind(images)
        buckets = self._runtime.buckets
        try:
            return self._runtime.run(images) if buckets is None else _by_buckets(self._runtime.run, images, buckets)
        except Exception as error:
            height, width = images.shape[1:3]
            # ONNX Runtime's own class for what does not fit a graph; a fault has another one.
            if type(error).__name__ != "InvalidArgument" or min(height, width) >= self.manifest.preprocess.size:
                raise
            raise ImageError(
                f"{self.manifest.name} cannot compute images of {height} × {width} px, which may be too small for it "
                f"({_reason(error)}): take larger ones",
                code="wrong_shape",
            ) from None

    @property
    def batch(self) -> int:
        """How many images to run at once when there are many: on a CPU, large batches do not fit the caches."""
        return 64 if self.provider in ON_GPU else 4

    def _check_kind(self, images: Pixels) -> None:
        """Raise ImageError for a shape or dtype that the graph does not take; OpenVINO would compute on any of them."""
        spec, graph = self.manifest.preprocess, self.manifest.graph
        side = spec.size
        fits = images.ndim == 4 and images.shape[3] == spec.bands and images.dtype == spec.dtype
        if fits and images.shape[1:3] == (side, side):
            return
        if not fits or graph is None or not graph.dynamic_size:
            raise ImageError(
                f"{self.manifest.name} takes {spec.dtype} [B, {side}, {side}, {spec.bands}], not {images.dtype} "
                f"{list(images.shape)}: preprocess the images first",
                code="wrong_shape",
            )
        height, width = images.shape[1:3]
        if height % graph.size_multiple or width % graph.size_multiple:
            raise ImageError(
                f"{self.manifest.name} takes images whose height and width are multiples of {graph.size_multiple} px, not "
                f"{height} × {width}: crop or resize them to such a size first",
                code="wrong_shape",
            )

    def check_golden(self, expected: golden.Golden) -> golden.Agreement:
        """How well the golden inputs' vectors agree with torch's; BundleError if outside the tolerance table, or if the
        graph does not take them."""
        try:
            vectors = self.run(expected.inputs(self.manifest.preprocess))
        except (InferenceError, MemoryError):
            raise
        except Exception as error:  # the runtimes' exceptions have no common base worth naming
            remedy = "do not use this bundle, jepakit did not make it" if self.provider == "cpu" else "use provider cpu"
            raise BundleError(
                f"{self.manifest.name} cannot compute its own golden inputs on {self.provider} ({_reason(error)}): {remedy}"
            ) from None
        found = golden.agreement(vectors, expected.vectors)
        if missed := found.misses(golden.TOLERANCES[self.precision, self.provider]):
            raise BundleError(
                f"{self.manifest.name} computes other vectors here than torch did at export: {missed} on {self.provider}; "
                f"{self._remedy()}"
            )
        return found

    def _remedy(self) -> str:
        """What to do if vectors differ from torch's. Exports are verified on a CPU, so exporting again changes nothing on a GPU."""
        if self.provider not in ON_GPU:
            if self.precision == "int8":  # refused by an export on a CPU without VNNI, too
                return (
                    "int8 needs a CPU with VNNI instructions: serve it on one, or export it again with precision=fp32"
                )
            return "export the bundle again on this machine"
        lower = "" if self.precision == "fp32" else ", or export it again with precision=fp32"
        return f"use provider cpu{lower}"


def _reason(error: Exception) -> str:
    """A runtime's error message, in one line of at most 300 characters."""
    return " ".join(lines_of(error))[:300]


def _by_buckets(
    run: Callable[[Pixels], list[NDArray[np.float32]]], images: Pixels, buckets: tuple[int, ...]
) -> list[NDArray[np.float32]]:
    """Run only batches of the sizes in `buckets`, padding the last one with zeros."""
    parts = []
    for first in range(
        0, max(1, len(images)), buckets[-1]
    ):  # without images, run one empty part: the outputs keep their shapes
        part = images[first : first + buckets[-1]]
        size = next(bucket for bucket in buckets if bucket >= len(part))
        filled = np.zeros((size, *images.shape[1:]), images.dtype)
        filled[: len(part)] = part
        parts.append([output[: len(part)] for output in run(filled)])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


class Model(Described):
    """A bundle loaded in this process, with the client's `embed`: no service, no network."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.manifest = session.manifest

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: vectors of {self.dim} numbers, model_id={self.model_id!r}, on {self.provider}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Model cannot be copied or sent to another process, as its runtime cannot: load the bundle there"
        )

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.manifest.embedding.dim

    @property
    def precision(self) -> str:
        """The precision computed in: fp32, fp16, int8 or bf16."""
        return self._session.precision

    @property
    def provider(self) -> str:
        """What computes: cpu, cuda, tensorrt or openvino."""
        return self._session.provider

    def embed(
        self,
        images: Any,
        *,
        labels: str | Path = "auto",
        tile: int | None = None,
        overlap: int = 0,
        min_valid: float = 0.5,
        frame: int | Literal["each"] | None = None,
        progress: bool = True,
        most_skipped: float = 0.0,
        on_skipped: OnSkipped | None = None,
        resume: str | Path | None = None,
    ) -> Embeddings:
        """Embed images, keeping their order; the arguments are those of `Client.embed` without `model`.

        Raises ImageError naming an image that cannot be embedded, once there are more of them than `most_skipped`
        allows; ConfigError for a wrong argument, DataError when there are no images or they do not exist, SpaceError when
        `resume` keeps vectors of another model, WriteError when it cannot be written, and InferenceError when there is no
        room for a single image.
        """
        check_tile(tile, self.manifest.preprocess)
        check_skipping(most_skipped, on_skipped)
        listed = gather(
            images,
            labels,
            tile=tile,
            overlap=overlap,
            min_valid=min_valid,
            frame=frame,
            chosen_range=self.manifest.preprocess.chosen_range,
            progress=progress,
            most_skipped=most_skipped,
        )
        with Results(listed, most_skipped, resume, progress=progress) as results:
            results.take_kept()
            results.check(self.model_id)
            with (
                Steps(len(listed), first=results.done, what="embed", progress=progress) as bar,
                closing(_batches(listed, self.manifest.preprocess, self._session.batch, results)) as batches,
            ):
                for places, pixels in batches:
                    found = self._vectors(pixels)
                    finite = np.isfinite(found).all(axis=1)
                    for place in places[~finite].tolist():
                        results.skipped.add(place, ImageError(f"{listed.ids[place]}: {NOT_FINITE}", code="not_finite"))
                    results.add(int(places[-1]) + 1, found[finite], self.model_id)
                    bar.update(results.done)
        results.skipped.tell(on_skipped, progress=progress)
        return results.embeddings()

    def _vectors(self, pixels: Pixels) -> NDArray[np.float32]:
        """The vectors of a batch, halved until it fits in memory; InferenceError if a single image does not."""
        try:
            return self._session.run(pixels)
        except InferenceError:
            if len(pixels) == 1:
                raise
            half = len(pixels) // 2
            return np.concatenate([self._vectors(pixels[:half]), self._vectors(pixels[half:])])


def _batches(
    listed: ImageList, spec: Preprocess, size: int, results: Results
) -> Generator[tuple[NDArray[np.intp], Pixels], None, None]:
    """Places [B] and preprocessed images [B, S, S, C] without results yet, in order and up to `size` at a time, decoded
    ahead by threads while others run.

    Images that cannot be read correctly are left out; raises ImageError once there are too many.
    """
    threads = listed.threads(min(usable_cpus(), _MOST_DECODERS))

    def read(place: int) -> Pixels:
        results.will_read(place)
        return preprocess(listed[place], spec)

    reading = work_ahead(
        read,
        range(results.done, len(listed)),
        threads=threads,
        ahead=_BATCHES_AHEAD * size,
    )
    batch: dict[int, Pixels] = {}
    with closing(reading):
        for place, image in reading:
            try:
                batch[place] = image.result()
            except ImageError as error:
                results.skipped.add(place, error)
            if len(batch) == size:
                yield np.array([*batch]), np.stack([*batch.values()])
                batch = {}
    if batch:
        yield np.array([*batch]), np.stack([*batch.values()])


def load(
    bundle: Bundle | str | Path,
    *,
    provider: Provider = "auto",
    threads: int | None = None,
    arithmetic: Arithmetic = "model",
) -> Model:
    """Open an exported bundle in this process; `.embed(images)` returns `Embeddings` as the client does.

    provider    `auto` uses CUDA if it works, else the CPU; any other is used or raises, with no fallback
    threads     threads per inference (up to 8 others decode); None: one per core that this process may use, within its
                container's quota
    arithmetic  `model` computes as the graph says; `bf16` needs OpenVINO, and is then the `precision` that is reported

    Raises BundleError for a bundle that is not exported, is damaged, or computes other vectors here than torch did;
    ConfigError for a wrong argument; InferenceError for a provider that does not work here; MissingExtraError when its
    package is not installed.
    """
    return Model(Session.open(bundle, provider=provider, threads=threads, arithmetic=arithmetic))
