"""A dry run: what it says of the run, and that nothing stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import jepakit
from jepakit.cli import app
from jepakit.errors import ConfigError
from jepakit.run import DryRun

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
    assert 0.1 < estimate.peak_memory_gb < estimate.memory_gb
    assert list(tmp_path.iterdir()) == []
    assert "nothing was kept" in str(estimate)


def test_a_single_step_and_rare_labels_can_be_tried_too(
    image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(classes=1, per_class=28)
    (folder / "rare").mkdir()
    for number in range(2):
        (folder / "texture0" / f"{number:03d}.png").rename(folder / "rare" / f"{number}.png")
    estimate = jepakit.dry_run(
        folder, backbone="test_vit", weights="random", image_size=64, batch_size=8, steps=1, workers=0, processes=2
    )
    assert estimate.step_s > 0
    assert "images/s" in str(estimate)
    assert "one process does the dry run" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would_refuse(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="needs tile"):
        jepakit.dry_run(image_folder(), overlap=8)
    with pytest.raises(ConfigError, match="has 6 blocks"):
        jepakit.dry_run(image_folder(), backbone="test_vit", weights="random", image_size=64, unfreeze=50, workers=0)
