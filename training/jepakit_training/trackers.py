"""Experiment trackers, off unless asked for: accelerate's, told where to write and to send nothing by themselves."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from jepakit.config import Tracker
from jepakit_training.records import TolerateWriteErrors

_PROJECT = "jepakit"
_MLFLOW_RUN = "mlflow-run.txt"
_SILENT = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Read by the trackers' packages when they are imported: each of them reports to its makers otherwise."""


class Trackers:
    """What is logged goes to every tracker named.

    names     of the trackers; their packages are there (see `jepakit._frontdoor.require`)
    run       the run's folder, in which all of them keep their files
    settings  the run's, for the trackers' own tables
    first     the step the run goes on from: what was logged of later ones is done again
    main      whether this process is the one that logs

    A disk that is full while the run trains gives a warning. W&B stays offline and MLflow in the run's folder unless
    WANDB_MODE or MLFLOW_TRACKING_URI says otherwise.
    """

    def __init__(
        self, names: Iterable[Tracker], run: Path, settings: Mapping[str, Any], first: int, *, main: bool
    ) -> None:
        self._trackers = [_tracker(name, run, first) for name in names] if main else []
        if self._trackers:
            PartialState()  # the trackers' own logging wants it
        self._tolerate = {tracker.name: TolerateWriteErrors(f"{tracker.name} in {run}") for tracker in self._trackers}
        flat = _flat(settings)
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
        """Write out what is left."""
        for tracker in self._trackers:
            with self._tolerate[tracker.name]:
                tracker.finish()


def _tracker(name: Tracker, run: Path, first: int) -> GeneralTracker:
    for variable, value in _SILENT.items():
        os.environ.setdefault(variable, value)
    title = run.resolve().name
    if name == "tensorboard":
        # With `purge_step` TensorBoard forgets what was logged of the steps that are done again.
        return TensorBoardTracker("tensorboard", run, purge_step=first or None)
    if name == "wandb":
        return WandBTracker(
            _PROJECT, name=title, dir=run, mode=os.environ["WANDB_MODE"], id=_wandb_id(run), resume="allow"
        )
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        (run / "mlruns").mkdir(exist_ok=True)
        # Recent versions of MLflow refuse to start a store of plain files.
        mlflow.set_tracking_uri(f"sqlite:///{(run / 'mlruns' / 'mlflow.db').resolve()}")
    known = run / _MLFLOW_RUN
    return MLflowTracker(_PROJECT, run_name=title, run_id=known.read_text(encoding="utf-8") if known.exists() else None)


def _wandb_id(run: Path) -> str:
    """One id for the run and all its resumptions, which W&B then shows as one."""
    file = run / "wandb" / "run-id.txt"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `views.n_local = 4`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
