"""TensorBoard's own reader finds what was logged, exactly once, even after a resume."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker

from jepakit_training.trackers import Trackers, _loggable, _tracker

SETTINGS = {"lr": 1e-4, "views": {"n_local": 4, "global_area": (0.3, 1.0)}, "labels": None}


def log(run: Path, steps: range, scale: float = 1.0, *, main: bool = True, names: Any = ("tensorboard",)) -> None:
    trackers = Trackers(names, run, SETTINGS, steps.start, main=main)
    for step in steps:
        trackers.log(step, {"loss": scale / (step + 1), "sigreg": scale * step})
    trackers.close()


def read(run: Path) -> Any:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    log(tmp_path, range(10), scale=2.0)
    log(tmp_path, range(6, 12))  # killed, and gone on with from a checkpoint of step 6
    log(tmp_path, range(12, 15))
    scalars = read(tmp_path).Scalars("loss")
    assert [event.step for event in scalars] == list(range(15))
    for event in scalars:
        assert math.isclose(event.value, (2.0 if event.step < 6 else 1.0) / (event.step + 1), rel_tol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_settings_are_shown_as_text(tmp_path: Path) -> None:
    log(tmp_path, range(1))
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"loss", "sigreg"}
    (text,) = events.Tensors("settings/text_summary")
    assert b"views.n_local = 4" in text.tensor_proto.string_val[0]


def test_a_full_disk_is_outlived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("log", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, refuse)
    log(tmp_path, range(6, 9))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: tensorboard in {tmp_path} could not be written (No space left on device)")


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    log(tmp_path, range(3), names=())
    log(tmp_path, range(3), main=False)
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_is_imported_unless_asked_for() -> None:
    code = "import sys, jepakit_training.trackers; print([m for m in ('tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert out.stdout == "[]\n"


def test_nested_settings_become_one_table() -> None:
    assert _loggable(SETTINGS) == {
        "lr": 1e-4, "views.n_local": 4, "views.global_area": "(0.3, 1.0)", "labels": "None"
    }  # fmt: skip


def test_no_tracker_reports_to_its_makers_unless_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "")  # so that what is set here ends with the test
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    _tracker("tensorboard", tmp_path, 0)
    told = {name: os.environ[name] for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY")}
    assert told == {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
