"""A dry run: what it says about the run, and that it leaves nothing behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

import jepakit
from jepakit.cli import app
from jepakit.errors import ConfigError, DataError
from jepakit.evaluation.evaluate import Measurement
from jepakit.run import DryRun
from jepakit_training import dryrun, launch, measuring, setup
from jepakit_training.data.batches import ViewDataset
from jepakit_training.holdout import MeasuringSet
from jepakit_training.measuring import Features
from jepakit_training.setup import Setup, prepare

SETTINGS = ["--backbone", "test_vit", "--image-size", "64", "--batch-size", "8", "--steps", "50", "--workers", "0"]


def test_a_dry_run_says_what_the_run_would_take_and_keeps_nothing(
    image_folder: Callable[..., Path],
    weights_file: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "adapt",
        str(image_folder()),
        "--weights",
        str(weights_file("test_vit")),
        *SETTINGS,
        "--dry-run",
        "--json",
    ]
    done = CliRunner().invoke(app, [*command, "--out", "run"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    total = told.pop("total_s")
    estimate = DryRun(**told)
    assert (estimate.steps, estimate.warmup_steps, estimate.batch_size, estimate.device) == (50, 5, 8, "cpu")
    assert estimate.warmup_step_s > 0
    assert estimate.step_s > 0
    assert total == pytest.approx(5 * estimate.warmup_step_s + 45 * estimate.step_s + estimate.measuring_s)
    assert 0.1 < estimate.peak_memory_gb < estimate.total_memory_gb
    assert list(tmp_path.iterdir()) == []
    assert "nothing was kept" in str(estimate)


def test_a_single_step_and_rare_labels_can_be_tried_too(
    image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(classes=1, per_class=28)
    random_numbers = torch.random.get_rng_state()
    (folder / "rare").mkdir()
    for number in range(2):
        (folder / "texture0" / f"{number:03d}.png").rename(folder / "rare" / f"{number}.png")
    estimate = jepakit.dry_run(
        folder, backbone="test_vit", weights="random", image_size=64, batch_size=8, steps=1, workers=0, processes=2
    )
    assert estimate.step_s > 0
    assert torch.equal(torch.random.get_rng_state(), random_numbers), "the caller's are as they were"
    assert "images/s" in str(estimate)
    assert "the dry run uses one process" in capsys.readouterr().err


def test_a_dry_run_tells_of_a_process_a_gpu(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    settings: dict[str, Any] = {"backbone": "test_vit", "image_size": 64, "unfreeze": 50, "workers": 0}
    with pytest.raises(ConfigError, match="has 6 blocks"):
        jepakit.dry_run(image_folder(), weights="random", **settings)
    assert "the run itself would use 4" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="this machine has 4 GPUs"):
        jepakit.dry_run(image_folder(), weights="random", processes=5, **settings)


def test_gpus_that_torch_cannot_use_train_nothing_and_are_told(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a driver that is too old."""
    if torch.cuda.is_available():
        pytest.skip("torch can use this machine's GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(setup, "has_nvidia_driver", lambda: True)
    jepakit.dry_run(image_folder(), weights="random", backbone="test_vit", image_size=64, workers=0, steps=1)
    told = capsys.readouterr().err
    assert "the run itself would use" not in told
    assert "warning: trains on the CPU, as torch cannot use this machine's GPU: see `jepakit doctor`" in told


def test_a_dry_run_refuses_what_the_run_would_refuse(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="overlap = 8 without tile: give tile too"):
        jepakit.dry_run(image_folder(), out=Path("runs/x"), overlap=8)
    with pytest.raises(ConfigError, match="has 6 blocks"):
        jepakit.dry_run(image_folder(), backbone="test_vit", weights="random", image_size=64, unfreeze=50, workers=0)


@pytest.mark.parametrize(("labels", "poolings"), [("folder", ("head", "stages")), ("none", ("head",))])
def test_measuring_is_estimated_from_all_that_a_run_does(
    labels: str, poolings: tuple[str, ...], image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding is made to take 20 ms an image and pooling; 40 of 120 images are embedded, probes see 120."""
    embedded: list[tuple[int, tuple[str, ...]]] = []
    probed: list[int] = []
    extract, measure_vectors = measuring.extract, measuring.measure_vectors

    def slow_extract(*args: Any, **settings: Any) -> Features:
        embedded.append((len(args[2]), tuple(args[4])))
        time.sleep(0.02 * len(args[2]) * len(args[4]))
        return extract(*args, **settings)

    def noted(vectors: NDArray[np.float32], images: MeasuringSet) -> Measurement:
        probed.append(len(vectors))
        return measure_vectors(vectors, images)

    monkeypatch.setattr(measuring, "extract", slow_extract)
    monkeypatch.setattr(measuring, "measure_vectors", noted)
    estimate = jepakit.dry_run(
        image_folder(per_class=60), backbone="test_resnet", weights="random", image_size=64, batch_size=8, steps=1,
        workers=0, labels=labels,
    )  # fmt: skip
    assert [(count, len(pooled)) for count, pooled in embedded] == [(40, len(poolings)), (40, 1)]
    assert embedded[0][1] == poolings
    assert estimate.measuring_s > 120 * 0.02 * (len(poolings) + 1)
    assert probed == ([96] * 6 + [120] * 2 if labels == "folder" else [])


def test_a_broken_file_does_not_stop_a_dry_run(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    (folder / "texture0" / "003.png").write_bytes(b"rubbish")
    dry_run = partial(
        jepakit.dry_run, folder, backbone="test_vit", weights="random", image_size=64, batch_size=8, steps=1, workers=0
    )
    assert dry_run(most_skipped=0.1).measuring_s > 0
    with pytest.raises(DataError, match="over 1 % of the images cannot be read"):
        dry_run()
    for number in (4, 5):
        (folder / "texture0" / f"00{number}.png").write_bytes(b"rubbish")
    with pytest.raises(
        DataError, match=r"more, among them texture0/00\d.png, texture0/00\d.png.*; over 5 %"
    ) as refused:
        dry_run(most_skipped=0.05)
    assert "skipped.csv" not in str(refused.value)


def test_a_dry_run_on_a_cpu_counts_the_batches_that_the_loader_makes_ahead(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dryrun, "peak_gb", lambda _: 1.0)
    monkeypatch.setattr(dryrun, "prepare", lambda *args: _with_plan(prepare(*args), batch_bytes=10**9, prefetch=2))
    settings: dict[str, Any] = {"weights": "random", "image_size": 64, "batch_size": 8, "steps": 1}
    for workers, peak in ((0, 1.0), (1, 3.0)):
        estimate = jepakit.dry_run(image_folder(), backbone="test_vit", workers=workers, **settings)
        assert estimate.peak_memory_gb == peak


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_takes_at_least_as_long_as_loading_its_batch(
    workers: int, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batches of all loader processes are there at once, and say nothing about those that follow."""
    getitem = ViewDataset.__getitem__

    def slow(self: ViewDataset, *args: Any) -> Any:
        time.sleep(0.05)
        return getitem(self, *args)

    monkeypatch.setattr(ViewDataset, "__getitem__", slow)
    estimate = jepakit.dry_run(
        image_folder(), backbone="test_vit", weights="random", image_size=64, batch_size=16, steps=4, workers=workers
    )
    assert estimate.step_s > 0.7 * 16 * 0.05 / max(1, workers)


def _with_plan(setup: Setup, **changed: Any) -> Setup:
    return replace(setup, plan=replace(setup.plan, **changed))
