"""Opens a bundle's verified model.onnx in ONNX Runtime: arrays in, arrays out.

`Session` is what the service's engine and the export check run on; `load(bundle)` is the same without a
service, with the client's `embed`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jepakit import golden
from jepakit.bundle import GOLDEN, GRAPH, Bundle, Manifest, Preprocess, open_bundle
from jepakit.embeddings import Embeddings
from jepakit.errors import BundleError, ConfigError, MissingExtraError, ServeError
from jepakit.images import Pixels

Provider = Literal["auto", "cpu", "cuda"]

_ORT_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session:
    """One model in ONNX Runtime. Raises ServeError when CUDA was asked for and does not work: never a silent CPU.

    graph     the bytes of model.onnx (bytes, not a path: ONNX Runtime then refuses any external file)
    manifest  of the bundle the bytes came from
    provider  `auto` takes CUDA where it works, else the CPU
    threads   of one inference; None: one a core this process may use
    """

    def __init__(
        self, graph: bytes, manifest: Manifest, *, provider: Provider = "auto", threads: int | None = None
    ) -> None:
        self.manifest = manifest
        self.provider, self._session = _open(graph, provider, threads or len(os.sched_getaffinity(0)))

    @classmethod
    def open(cls, bundle: Bundle | str | Path, *, provider: Provider = "auto", threads: int | None = None) -> Session:
        """Verify the whole bundle, open its graph, and check that it reproduces the golden inputs."""
        bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        graph = bundle.read(GRAPH)
        bundle.verify()
        session = cls(graph, bundle.manifest, provider=provider, threads=threads)
        session.check_golden(golden.unpack(bundle.read(GOLDEN)))
        return session

    def run(self, images: Pixels) -> NDArray[np.float32]:
        """Embed preprocessed images: [B, size, size, C], uint8 or raw float32 → float32 [B, D]."""
        (vectors,) = self._session.run(["embeddings"], {"images": images})
        return vectors  # type: ignore[no-any-return]

    def check_golden(self, expected: golden.Golden) -> float:
        """The relative error on the golden inputs; BundleError when it is above the tolerance table's."""
        assert self.manifest.graph is not None
        limit = golden.RELATIVE_TOLERANCE[self.manifest.graph.precision, self.provider]
        error = golden.relative_error(self.run(expected.inputs(self.manifest.preprocess)), expected.vectors)
        if error > limit:
            raise BundleError(
                f"{self.manifest.name} computes other vectors here than torch did at export: relative error "
                f"{error:.2g}, at most {limit:g} is allowed on {self.provider}; export the bundle again on this machine"
            )
        return error


class Model:
    """A bundle in this process, with the client's `embed`: no service, no network."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.manifest = session.manifest

    @property
    def model_id(self) -> str:
        """The vector space (16 hex digits)."""
        return self.manifest.model_id

    def embed(
        self, images: Any, *, labels: str = "auto", tile: int | None = None, overlap: int = 0,
        min_valid: float = 0.5, frame: int | Literal["each"] | None = None, progress: bool = True,
    ) -> Embeddings:  # fmt: skip
        """Embed what `Client.embed` takes; order kept. The arguments are the client's.

        Raises ImageError for the first image that cannot be read rightly, ConfigError for tiles of another size
        than the model's.
        """
        from jepakit._progress import track
        from jepakit.images import preprocess
        from jepakit.sources import gather

        check_tile(tile, self.manifest.preprocess)
        listed = gather(images, labels, tile=tile, overlap=overlap, min_valid=min_valid, frame=frame)
        vectors = np.empty((len(listed), self.manifest.embedding.dim), np.float32)
        batch = 4  # larger ones are slower on a CPU: activations leave the L2 cache
        for start in track(range(0, len(listed), batch), "embed", enabled=progress):
            places = range(start, min(start + batch, len(listed)))
            pixels = np.stack([preprocess(listed[place], self.manifest.preprocess) for place in places])
            vectors[start : start + len(places)] = self._session.run(pixels)
        return Embeddings(vectors, self.model_id, tuple(listed.ids), listed.labels)


def check_tile(tile: int | None, spec: Preprocess) -> None:
    """Refuse to cut tiles of another size than the model was made for: padded or squeezed, they would be another scale."""
    if tile is not None and spec.tile is not None and tile != spec.tile:
        raise ConfigError(
            f"tile = {tile}: the model was made for tiles of {spec.tile} × {spec.tile} pixels: give tile={spec.tile}"
        )


def load(bundle: str | Path, *, provider: Provider = "auto", threads: int | None = None) -> Model:
    """Open an exported bundle in this process; `.embed(images)` gives `Embeddings` as the client does."""
    return Model(Session.open(bundle, provider=provider, threads=threads))


def _open(graph: bytes, provider: Provider, threads: int) -> tuple[Literal["cpu", "cuda"], Any]:
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingExtraError("running a model needs ONNX Runtime: pip install 'jepakit[serve]'") from None
    wanted: Sequence[Literal["cpu", "cuda"]] = ("cuda", "cpu") if provider == "auto" else (provider,)
    for choice in wanted:
        if choice == "cuda" and not _has_cuda(ort):
            continue
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # fp32 means fp32: CUDA would round products to TF32 unless told not to.
        configured = [(_ORT_PROVIDERS[choice], {"use_tf32": 0} if choice == "cuda" else {})]
        try:
            session = ort.InferenceSession(graph, options, providers=configured)
        except Exception as error:  # pybind exceptions have no common base worth naming
            raise BundleError(f"ONNX Runtime cannot open the graph: {str(error).splitlines()[0]}") from None
        # ONNX Runtime falls back to the CPU with a log line only.
        if session.get_providers()[0] == _ORT_PROVIDERS[choice]:
            return choice, session
    raise ServeError(
        "provider cuda was asked for, but ONNX Runtime cannot use a GPU here: check nvidia-smi and "
        "pip install 'jepakit[gpu]', or ask for --provider cpu"
    )


def _has_cuda(ort: Any) -> bool:
    if _ORT_PROVIDERS["cuda"] not in ort.get_available_providers() or not Path("/dev/nvidiactl").exists():
        return False
    ort.preload_dlls()
    return True
