"""Runs of `adapt` on tiny models, shared by the training tests on CPU and GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import jepakit
import jepakit_training.learning.learner
import jepakit_training.learning.sigreg
from jepakit._run_files import BUNDLE
from jepakit.bundles.bundle import WEIGHTS
from jepakit.run import Run

TINY: dict[str, Any] = {
    "image_size": 64, "batch_size": 8, "projector": (32, 32, 8), "n_slices": 16, "views": {"n_local": 1}, "workers": 0,
}  # fmt: skip

Adapt = Callable[..., Run]


def adapting(images: Path, weights_file: Callable[[str], Path], **defaults: Any) -> Adapt:
    """`adapt(out, backbone="test_vit", **changed settings)`, from a file of weights."""

    def call(out: Path, backbone: str = "test_vit", *, folder: Path | None = None, **settings: Any) -> Run:
        weights = settings.pop("weights", None) or str(weights_file(backbone))
        told = {**TINY, **defaults, **settings}
        return jepakit.adapt(folder or images, out=out, backbone=backbone, weights=weights, **told)

    return call


def weights_of(run: Run, part: str = BUNDLE) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(run.path / part / WEIGHTS)
    return tensors


@contextmanager
def stopping_in_step(
    step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """Send this process a signal in the middle of a step, counted from the call's first one."""
    real, done = jepakit_training.learning.sigreg.lejepa_loss, iter(range(10_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(done) == step:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(jepakit_training.learning.learner, "lejepa_loss", interrupted)
        yield
