"""Measuring embeddings before and after: which pooling to use, and whether adaptation helped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from jepakit._groups import assign_folds, codes, numbered
from jepakit._messages import counted
from jepakit._progress import stage, track
from jepakit.backbones.backbone import is_bundle_weights
from jepakit.backbones.embedder import Embedder, check_pooling, pool_all, poolings_of
from jepakit.bundles.bundle import open_bundle
from jepakit.bundles.comparison import Comparison
from jepakit.bundles.manifest import EmbeddingSpec, Pooling, Preprocess, Standardize
from jepakit.config import AdaptConfig
from jepakit.errors import DataError, ImageError, InputError, NoMemoryError
from jepakit.evaluation.evaluate import NO_LABELS, Measurement, judge, measure, no_labels
from jepakit.images import Pixels, preprocess
from jepakit.sources import ImageList
from jepakit_training.holdout import MeasuringSet, Split
from jepakit_training.loader_limits import PATIENCE_S, end_with_trainer, start_method
from jepakit_training.memory import loader_errors
from jepakit_training.run.records import SkippedFiles

_BATCH = 16


@dataclass
class Features:
    """Pooled outputs, before centring, of the images to measure on: float32 [N, D] for each pooling.

    `readable` covers all images asked for, `skipped` holds indices into the source; rows are the readable images, and
    `digests`, uint64 [N], tell whether their pixels are the same another time.
    """

    by_pooling: dict[Pooling, NDArray[np.float32]]
    readable: NDArray[np.bool_]
    skipped: list[tuple[int, str]]
    digests: NDArray[np.uint64]


def extract(
    backbone: Any,
    images: ImageList,
    indices: NDArray[np.intp],
    spec: Preprocess,
    poolings: Sequence[Pooling],
    *,
    device: torch.device,
    workers: int,
    what: str,
    progress: bool,
) -> Features:
    """Pool the backbone's features of some images, read with the model's preprocess, in float32."""
    # Only what comes before pooling is used, so the dimensions do not matter.
    bare = EmbeddingSpec(dim=1, pooling="head", standardize="none")
    plain = Embedder(backbone, spec, bare).to(device).eval()
    loader = DataLoader(
        _Preprocessed(images, indices, spec),
        batch_size=_BATCH,
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        worker_init_fn=end_with_trainer if workers else None,
        collate_fn=list,
        timeout=PATIENCE_S if workers else 0,
    )
    rows: dict[Pooling, list[NDArray[np.float32]]] = {pooling: [] for pooling in poolings}
    readable, skipped, digests = np.ones(len(indices), bool), [], []
    starts = range(0, len(indices), _BATCH)
    with loader_errors(workers):
        for start, items in zip(track(starts, what, progress=progress), loader, strict=True):
            for place, item in enumerate(items, start):
                if isinstance(item, ImageError):
                    readable[place] = False
                    skipped.append((int(indices[place]), str(item)))
                elif isinstance(item, InputError | NoMemoryError):
                    raise item
            pixels = [item for item in items if not isinstance(item, ImageError)]
            digests += [int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest()) for image in pixels]
            if not pixels:
                continue
            with torch.inference_mode():
                x = plain.to_network_input(torch.from_numpy(np.stack(pixels)).to(device))
                for pooling, vectors in pool_all(backbone, x, poolings).items():
                    rows[pooling].append(vectors.float().cpu().numpy())
    nothing = np.empty((0, 0), np.float32)
    pooled = {pooling: np.concatenate(parts) if parts else nothing for pooling, parts in rows.items()}
    return Features(pooled, readable, skipped, np.array(digests, np.uint64))


def _as_started(config: AdaptConfig) -> AdaptConfig:
    """The settings, where `auto` pooling and standardising become those of the bundle that the run starts from, so that its
    vectors before adaptation are like that bundle's. Centre and scale are measured anew."""
    if not is_bundle_weights(config.weights):
        return config
    start = open_bundle(config.weights).manifest.embedding
    pooling = start.pooling if config.pooling == "auto" else config.pooling
    alike = config.standardize == "auto" and pooling == start.pooling and start.standardize != "none"
    standardize = start.standardize if alike else config.standardize
    return config.model_copy(update={"pooling": pooling, "standardize": standardize})


def _choose_poolings(config: AdaptConfig, backbone: Any, *, has_labels: bool) -> tuple[Pooling, ...]:
    """The poolings to compare before training; only one if the user chose it or there is nothing to compare by."""
    if config.pooling != "auto":
        check_pooling(backbone, config.backbone, config.pooling)
        return (config.pooling,)
    return ("head", "stages") if has_labels and "stages" in poolings_of(backbone) else ("head",)


def _specify(pooling: Pooling, standardize: Literal["auto", Standardize], fit: NDArray[np.float32]) -> EmbeddingSpec:
    """The embedding's spec, with centre and scale measured on `fit` [N, D]."""
    if standardize == "auto":
        standardize = "scale" if pooling == "stages" else "center"
    return EmbeddingSpec(dim=fit.shape[1], pooling=pooling, standardize="none").standardized_by(fit, standardize)


def measure_vectors(vectors: NDArray[np.float32], images: MeasuringSet) -> Measurement:
    """Probes fitted on the labelled `fit` rows, evaluated on the labelled held-out rows."""
    vectors, images = vectors[images.is_labelled], images.only(images.is_labelled)
    fit, held_out = images.only(images.is_fit), images.only(~images.is_fit)
    assert fit.labels is not None
    assert held_out.labels is not None
    return measure(
        vectors[images.is_fit],
        fit.labels,
        vectors[~images.is_fit],
        held_out.labels,
        train_groups=fit.groups,
        held_out_groups=held_out.groups,
    )


def pick_pooling(features: Features, images: MeasuringSet, standardize: Literal["auto", Standardize]) -> Pooling:
    """The pooling whose probes do best in cross-validation on the `fit` images; held-out images stay unseen.

    The first pooling if there are too few labels, or groups, to tell.
    """
    poolings, fit = list(features.by_pooling), images.only(images.is_fit & images.is_labelled)
    if len(poolings) == 1 or fit.labels is None:
        return poolings[0]
    classes = codes(fit.labels)
    third = assign_folds(numbered(fit.groups, len(fit.labels)), classes, 3)
    parts = [replace(fit, is_fit=third != fold) for fold in range(3)]
    if not all(len(np.unique(fit.labels[part.is_fit])) > 1 and not part.is_fit.all() for part in parts):
        return poolings[0]

    def score(pooling: Pooling) -> float:
        raw = features.by_pooling[pooling][images.is_fit]
        vectors = _specify(pooling, standardize, raw).standardized(raw)[images.is_labelled[images.is_fit]]
        scores = [measure_vectors(vectors, part).scores for part in parts]
        return float(np.mean([(one.linear_balanced, one.knn_balanced) for one in scores]))

    return max(poolings, key=score)


@dataclass
class Measured:
    """An embedding's spec, the vectors [N, D] of the images to measure on, their results (None without labels), and a
    digest of each image's pixels, uint64 [N]."""

    embedding: EmbeddingSpec
    vectors: NDArray[np.float32]
    measurement: Measurement | None
    digests: NDArray[np.uint64]


class Measuring:
    """Measures the start and the end of a run on the same images.

    caveats  what makes the verdict optimistic, to keep with it
    extract  the function that computes features, with the arguments of this module's `extract`
    """

    def __init__(
        self,
        config: AdaptConfig,
        images: ImageList,
        parts: Split,
        spec: Preprocess,
        *,
        caveats: Sequence[str],
        device: torch.device,
        workers: int,
        skipped: SkippedFiles,
        progress: bool,
        extract: Callable[..., Features] = extract,
    ) -> None:
        self.images = MeasuringSet.choose(images, parts, config.measure_on)
        self._source, self._config, self._spec = images, _as_started(config), spec
        self._device, self._workers = device, workers
        self._skipped, self._progress, self._take, self._caveats = skipped, progress, extract, caveats
        self._why_no_labels = NO_LABELS

    def start(self, backbone: Any) -> Measured:
        """Measure the start, with the pooling whose probes do best there; held-out images have no say in that choice."""
        poolings = _choose_poolings(self._config, backbone, has_labels=self.images.labels is not None)
        features = self._extract(backbone, poolings, "measure the start")
        self._skipped.add(*((self._source.ids[index], reason) for index, reason in features.skipped))
        self.images = self.images.only(features.readable)
        self._check_images()
        self._say_fitting()
        return self._measured(features, pick_pooling(features, self.images, self._config.standardize))

    def end(self, backbone: Any, before: Measured) -> Measured:
        """Measure the result with the same pooling; centre and scale are measured anew. DataError if an image cannot be read any
        more, or has changed."""
        pooling = before.embedding.pooling
        features = self._extract(backbone, (pooling,), "measure the result")
        if not features.readable.all():
            raise DataError(
                f"{counted(len(features.skipped), 'image')} measured before training cannot be read any more, the first: "
                f"{features.skipped[0][1]}. Put back what was there and run the same command again: it resumes from the "
                "last checkpoint"
            )
        # A dataset of the caller's may give another view each time; files that differ were replaced.
        if not self._source.in_memory and len(changed := np.flatnonzero(features.digests != before.digests)):
            first = self._source.ids[self.images.indices[changed[0]]]
            raise DataError(
                f"{counted(len(changed), 'image')} measured before training have changed since, the first: {first}. Put back what was "
                "there and run the same command again: it resumes from the last checkpoint"
            )
        self._say_fitting()
        return self._measured(features, pooling)

    def _say_fitting(self) -> None:
        if self._progress and self.images.labels is not None:
            stage("fitting probes")

    def conclude(self, before: Measured, after: Measured) -> Comparison:
        """The verdict on held-out images; "cannot tell" without labels."""
        is_fit, is_labelled = self.images.is_fit, self.images.is_labelled
        if before.measurement is None or after.measurement is None:
            return no_labels(int(is_fit.sum()), int((~is_fit).sum()), self._why_no_labels)
        fit, held_out = self.images.only(is_fit & is_labelled), self.images.only(~is_fit & is_labelled)
        assert fit.labels is not None
        assert held_out.labels is not None
        judged = judge(
            before.measurement,
            after.measurement,
            held_out.labels,
            n_train=len(fit.indices),
            groups=held_out.groups,
            train_labels=fit.labels,
        )
        if n_known := int(np.isin(before.digests[~is_fit & is_labelled], before.digests[is_fit]).sum()):
            judged = judged.noting(
                f"{n_known} of {counted(len(held_out.indices), 'held-out image')} are also among those that probes are fitted on, under "
                "other names, so this is optimistic: remove copies (`jepakit inspect` names some)"
            )
        if n_unmeasured := self.images.n_unmeasured:
            n_measured = len(np.unique(fit.labels))
            judged = judged.noting(
                f"measured on {n_measured} of {n_measured + n_unmeasured} classes (measure_on = {self._config.measure_on})"
            )
        for caveat in self._caveats:
            judged = judged.noting(caveat)
        return judged

    def _check_images(self) -> None:
        """DataError if no image of one part can be read. Labels that cannot be probed are dropped: those of a single
        class, or of images on one side only."""
        for name, part in (("to train on", self.images.is_fit), ("held out", ~self.images.is_fit)):
            if not part.any():
                raise DataError(
                    f"none of the images {name} that were to be measured can be read ({len(self._skipped)}, {self._skipped.where}): "
                    "repair them, or correct their rows in the manifest"
                )
        if self.images.labels is not None and (why := _why_not_probed(self.images.labels, self.images)):
            self.images.labels, self._why_no_labels = None, why

    def _extract(self, backbone: Any, poolings: Sequence[Pooling], what: str) -> Features:
        return self._take(
            backbone,
            self._source,
            self.images.indices,
            self._spec,
            poolings,
            device=self._device,
            workers=self._workers,
            what=what,
            progress=self._progress,
        )

    def _measured(self, features: Features, pooling: Pooling) -> Measured:
        raw = features.by_pooling[pooling]
        embedding = _specify(pooling, self._config.standardize, raw[self.images.is_fit])
        vectors = embedding.standardized(raw)
        measurement = None if self.images.labels is None else measure_vectors(vectors, self.images)
        return Measured(embedding, vectors, measurement, features.digests)


def _why_not_probed(labels: NDArray[np.str_], images: MeasuringSet) -> str:
    """Why probes cannot be fitted on these labels, or evaluated by them; empty if they can."""
    for name, part in (("to fit probes on", images.is_fit), ("held out", ~images.is_fit)):
        if not (part & images.is_labelled).any():
            return (
                f"none of the images {name} is labelled ({part.sum()}), and a verdict needs labelled ones on both sides: label "
                "some of them, or mind the manifest's split"
            )
    fitted = labels[images.is_fit & images.is_labelled]
    if len(np.unique(fitted)) > 1:
        return ""
    return (
        f"all {len(fitted)} images to fit probes on are labelled {str(fitted[0])!r}, and a probe tells two "
        "classes apart: label some of another class, or leave labels out (labels=none)"
    )


class _Preprocessed(Dataset[Any]):
    """Preprocessed images [H, W, C]. Errors are returned as items: raised in a worker, they would come with a traceback."""

    def __init__(self, images: ImageList, indices: NDArray[np.intp], spec: Preprocess) -> None:
        self._images, self._indices, self._spec = images, indices, spec

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Pixels | InputError | NoMemoryError:
        try:
            return preprocess(self._images[int(self._indices[place])], self._spec)
        except (InputError, NoMemoryError) as error:
            return error
