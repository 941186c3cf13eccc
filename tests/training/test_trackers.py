"""TensorBoard's own reader finds what was logged, exactly once, even after a resume."""

from __future__ import annotations

import errno
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from tests.training.forked import import_trackers, start

from jepakit_training.run import trackers
from jepakit_training.run.trackers import Trackers, _loggable, _tracker

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


def test_no_tracker_is_imported_unless_asked_for(tmp_path: Path) -> None:
    process = start(import_trackers, tmp_path / "imported", log=tmp_path / "log")
    process.join(120)
    imported = (tmp_path / "imported").read_text().splitlines()
    assert "jepakit_training.run.trackers" in imported, (tmp_path / "log").read_text()
    assert not {"tensorboard", "wandb", "mlflow"} & set(imported)


def test_nested_settings_become_one_table() -> None:
    assert _loggable(SETTINGS) == {
        "lr": 1e-4, "views.n_local": 4, "views.global_area": "(0.3, 1.0)", "labels": "None"
    }  # fmt: skip


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "")  # so that what a test sets ends with it
        monkeypatch.delenv(variable)


@pytest.fixture
def made(nothing_set: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the packages of W&B and MLflow, which need not be there."""
    asked: list[Any] = []
    for name in ("WandBTracker", "MLflowTracker"):
        monkeypatch.setattr(trackers, name, lambda project, **settings: asked.append(settings))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(set_tracking_uri=asked.append))
    return asked


@pytest.mark.usefixtures("made")
def test_no_tracker_reports_to_its_makers_unless_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "MLFLOW_"))}

    _tracker("tensorboard", tmp_path, 0)
    assert told() == {}  # the caller's own W&B is left as it is
    _tracker("wandb", tmp_path, 0)
    assert told() == {"WANDB_ERROR_REPORTING": "false"}
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    _tracker("wandb", tmp_path, 0)
    _tracker("mlflow", tmp_path, 0)
    assert told() == {"WANDB_ERROR_REPORTING": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}


def test_wandb_stays_in_the_runs_folder_as_one_run(
    made: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in (None, None, "online"):
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        _tracker("wandb", tmp_path, 0)
    first, again, elsewhere = made
    assert (first["dir"], first["mode"], first["resume"]) == (tmp_path, "offline", "allow")
    assert len(first["id"]) == 8
    assert again == first
    assert elsewhere == {**first, "mode": "online"}
    (tmp_path / "other").mkdir()
    _tracker("wandb", tmp_path / "other", 0)
    assert made[-1]["id"] != first["id"]


def test_mlflow_stays_in_the_runs_folder_as_one_run_unless_told_where(
    made: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tracker("mlflow", tmp_path, 0)
    assert made == [f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}", {"run_name": tmp_path.name, "run_id": None}]
    assert (tmp_path / "mlruns").is_dir()
    (tmp_path / trackers._MLFLOW_RUN).write_text("r1")
    made.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    _tracker("mlflow", tmp_path, 3)
    assert made == [{"run_name": tmp_path.name, "run_id": "r1"}]
