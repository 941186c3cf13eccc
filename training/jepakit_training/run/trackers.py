"""Experiment trackers, off unless asked for: accelerate's, set up to write to the run's folder and, by default, to send nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from jepakit.config import Tracker, flattened
from jepakit_training.run.records import TolerateWriteErrors

_PROJECT = "jepakit"
_MLFLOW_RUN = "mlflow-run.txt"
_SILENT: dict[Tracker, tuple[str, str]] = {
    "wandb": ("WANDB_ERROR_REPORTING", "false"),
    "mlflow": ("MLFLOW_DISABLE_TELEMETRY", "true"),
}
"""Variables that the trackers' packages read at import: otherwise each of them reports to its makers."""


class Trackers:
    """Logs to every tracker named.

    names     names of the trackers; their packages are installed (see `jepakit._extras.require_tracker`)
    run       the run's folder, in which all of them keep their files
    settings  the run's settings, for the trackers' own tables
    first     the step that the run resumes from: later steps that were logged are repeated
    main      whether this process is the one that logs

    A full disk during training only gives a warning. W&B stays offline and MLflow in the run's folder unless
    WANDB_MODE or MLFLOW_TRACKING_URI says otherwise.
    """

    def __init__(
        self, names: Iterable[Tracker], run: Path, settings: Mapping[str, Any], first: int, *, main: bool
    ) -> None:
        self._trackers = [_tracker(name, run, first) for name in names] if main else []
        if self._trackers:
            PartialState()  # required by accelerate's logging of the trackers
        self._tolerate = {tracker.name: TolerateWriteErrors(f"{tracker.name} in {run}") for tracker in self._trackers}
        flat = _loggable(settings)
        for tracker in self._trackers:
            tracker.start()
            if tracker.name == "mlflow":
                (run / _MLFLOW_RUN).write_text(tracker.tracker.info.run_id, encoding="utf-8")
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(flat)
            elif not first:  # as text: TensorBoard would show a table of settings as a second run
                tracker.log({"settings": "\n".join(f"    {key} = {value}" for key, value in flat.items())}, step=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        for tracker in self._trackers:
            with self._tolerate[tracker.name]:
                tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what is pending."""
        for tracker in self._trackers:
            with self._tolerate[tracker.name]:
                tracker.finish()


def _tracker(name: Tracker, run: Path, first: int) -> GeneralTracker:
    if name in _SILENT:
        os.environ.setdefault(*_SILENT[name])
    title = run.resolve().name
    if name == "tensorboard":
        # With `purge_step`, TensorBoard drops what was logged for steps that are repeated.
        return TensorBoardTracker("tensorboard", run, purge_step=first or None)
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        return WandBTracker(_PROJECT, name=title, dir=run, mode=mode, id=_wandb_id(run), resume="allow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        (run / "mlruns").mkdir(exist_ok=True)
        # Recent versions of MLflow refuse to start a store of plain files.
        mlflow.set_tracking_uri(f"sqlite:///{(run / 'mlruns' / 'mlflow.db').resolve()}")
    known = run / _MLFLOW_RUN
    return MLflowTracker(_PROJECT, run_name=title, run_id=known.read_text(encoding="utf-8") if known.exists() else None)


def _wandb_id(run: Path) -> str:
    """One id for the run and all its resumptions, so that W&B shows them as one."""
    file = run / "wandb" / "run-id.txt"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _loggable(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings in one level, values of other kinds as text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flattened(settings).items()
    }
