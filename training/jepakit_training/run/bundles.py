"""The bundles of a run: the start, which a resumed run is compared with, and the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file

from jepakit._run_files import START
from jepakit.backbones.backbone import provenance_behind, tensors_of
from jepakit.bundles.bundle import WEIGHTS, open_bundle, write_bundle
from jepakit.bundles.comparison import Comparison
from jepakit.bundles.manifest import EmbeddingSpec, Manifest, Preprocess, Provenance, compute_model_id
from jepakit.errors import BundleError, ConfigError, DataError
from jepakit.run import Run
from jepakit_training.run.folder import FREE_SETTINGS, versions
from jepakit_training.setup import Setup

_SAME_CENTER = 0.01
"""How far a centre may differ between machines, as a share of its length; other images make it differ more."""


def write_run_bundle(
    path: Path, setup: Setup, embedding: EmbeddingSpec, *, name: str, steps: int, comparison: Comparison | None = None
) -> None:
    """Write a bundle without a graph: the backbone's weights after `steps` steps and everything needed to export them.

    Incomplete files that a killed process left in the run's folder are removed: it is locked, so nobody uses them.
    """
    for stale in path.parent.glob(".tmp-*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    tensors = tensors_of(setup.backbone)
    named = {key: value.numpy() for key, value in tensors.items()}
    manifest = Manifest(
        name=name,
        model_id=compute_model_id(setup.described, setup.spec, embedding, named),
        backbone=setup.described,
        preprocess=setup.spec,
        embedding=embedding,
        provenance=_provenance(setup, steps),
        comparison=comparison,
    )
    write_bundle(path, manifest, lambda folder: save_file(tensors, folder / WEIGHTS))


def check_start(setup: Setup, run: Run) -> None:
    """ConfigError if a resumed run's start weights, which the verdict and `mix` refer to, or its preprocess are not those that
    it began with. Weights that differ by rounding alone are set to those: another CPU may resize position embeddings otherwise."""
    if not (run.path / START).exists():
        return
    preprocess, before = _start_of(run)
    if preprocess != setup.spec:
        raise ConfigError(
            f"{run.path} was started with another scaling or normalisation of values: weights = {setup.config.weights} is another "
            "bundle, or some of the images that were measured then cannot be read now. Put them back, or name another folder for the run"
        )
    now = tensors_of(setup.backbone)
    if before.keys() != now.keys() or not all(_are_nearly_equal(now[name], value) for name, value in before.items()):
        raise ConfigError(
            f"{run.path} was started with other weights: weights = {setup.config.weights} has changed since. Put it back, or name "
            "another folder for the run"
        )
    setup.backbone.load_state_dict(before)


def check_measured(embedding: EmbeddingSpec, run: Run) -> None:
    """DataError if the centre, measured again on a resumed run's start, is not the one that it began with: images have changed."""
    then = open_bundle(run.path / START).manifest.embedding
    if then.pooling == embedding.pooling and _are_close(then.center, embedding.center):
        return
    raise DataError(
        f"{run.path} was started with other images: what was measured on them has changed since. Put back what was there, or "
        "name another folder for the run"
    )


def _are_nearly_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)


def _are_close(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    """Whether two centres are the same, but for the rounding of another machine."""
    if one is None or other is None:
        return one is other
    return bool(np.linalg.norm(np.subtract(one, other)) <= _SAME_CENTER * np.linalg.norm(one))


def _start_of(run: Run) -> tuple[Preprocess, dict[str, torch.Tensor]]:
    """The preprocess and the weights that a run began with; BundleError if they are damaged."""
    start = run.path / START
    try:
        bundle = open_bundle(start)
        data = bundle.read(WEIGHTS)
    except BundleError as error:
        raise BundleError(
            f"{run.path} cannot be resumed: {error}. Put {start} back as it was, or name another folder for the run"
        ) from None
    weights: dict[str, torch.Tensor] = load(data)
    return bundle.manifest.preprocess, weights


def _provenance(setup: Setup, steps: int) -> Provenance:
    settings = setup.config.resolved().model_dump(
        mode="json", exclude_none=True, exclude={"images", "cache", *FREE_SETTINGS}
    )
    for setting in ("weights", "labels", "group"):  # bundles are shared, so they hold no path of this machine
        settings[setting] = Path(settings[setting]).name
    return Provenance(
        config=settings,
        steps=steps,
        images_seen=steps * setup.plan.batch_size,
        data_digest=setup.images.digest(),
        versions=versions(),
        start=provenance_behind(setup.config.weights),
    )
