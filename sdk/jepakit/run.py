"""A run of adaptation on disk: its settings, its log and its result.

RUN/
  config.toml       the resolved settings (holds paths: keep it private)
  environment.json  versions, and a fingerprint of the data
  plan.json         values derived from the settings: steps, learning rate, λ, sizes, device, threads (may hold paths:
                    keep it private)
  split.csv         which images train and which are held out (holds paths: keep it private)
  metrics.jsonl     one line per logged step
  skipped.csv       images that could not be read, and why (holds paths: keep it private)
  checkpoints/      where the same command resumes from
  neighbours.png    held-out images and those most similar to them, before and after (shows images: keep it private)
  start/            the weights it started from, as a bundle without a graph
  bundle/           the adapted weights, as a bundle without a graph; its manifest holds the verdict
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Unpack

from pydantic import computed_field

from jepakit._files import as_path
from jepakit._frozen import Frozen, Printed
from jepakit._progress import human_time
from jepakit._run_files import BUNDLE, CONFIG, METRICS, NEIGHBOURS, PLAN
from jepakit._signatures import ExportSettings, takes_export_settings
from jepakit.bundles.bundle import Bundle, open_bundle
from jepakit.bundles.comparison import Comparison, Verdict
from jepakit.errors import BundleError, DataError

COLLAPSED_STD = 0.05
"""Projections whose standard deviation is below this have collapsed; new projectors have 0.34, and SIGReg wants 1."""


class Run(Printed):
    """A run's folder, as `adapt` and `open_run` return it; printed, it shows what was measured. The module's docstring lists what is in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path, "path")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def __str__(self) -> str:
        if not self.finished:
            return f"{self.path}, not finished"
        picture = f"\npicture: {self.neighbours}" if self.neighbours.is_file() else ""
        return f"{self.path}\n{self.comparison}{picture}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings; DataError when the file is gone or damaged."""
        return self._read(CONFIG, tomllib.loads)

    @property
    def finished(self) -> bool:
        """Whether the adapted bundle has been written."""
        return (self.path / BUNDLE).is_dir()

    def check_finished(self) -> None:
        """Raise BundleError when the run has not finished."""
        if not self.path.exists():
            remedy = "it was moved or removed" if self.path.is_absolute() else "open the run again by its whole path"
            raise BundleError(f"{self.path} does not exist: {remedy}")
        if not self.finished:
            raise BundleError(f"{self.path} has not finished: run its `jepakit adapt` command again to resume")

    @cached_property
    def bundle(self) -> Bundle:
        """The adapted weights; BundleError when the run has not finished."""
        self.check_finished()
        return open_bundle(self.path / BUNDLE)

    @property
    def comparison(self) -> Comparison:
        """Scores before and after, on images never trained on, and the verdict.

        BundleError when the run has not finished, or its bundle was replaced by one without a comparison.
        """
        comparison = self.bundle.manifest.comparison
        if comparison is None:
            raise BundleError(
                f"{self.path / BUNDLE} holds no comparison, so no run wrote it: put the run's own bundle back, or adapt again"
            )
        return comparison

    @property
    def verdict(self) -> Verdict:
        """Better, same, worse or cannot tell, with the numbers behind it."""
        return self.comparison.verdict

    @property
    def neighbours(self) -> Path:
        """The path of the picture of held-out images beside those most similar to them, before and after."""
        return self.path / NEIGHBOURS

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The values derived from the settings (plan.json); DataError when the file is gone or damaged."""
        return self._read(PLAN, json.loads)

    def _read(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        return read_record(self.path / name, parse, "put it back, or start a new run")

    @property
    def collapsed(self) -> bool:
        """Whether the projections collapsed (all images look alike to the model), by the last three logged steps."""
        last = [step["proj_std"] for step in self.metrics()[-3:]]
        return bool(last) and median(last) < COLLAPSED_STD

    def metrics(self) -> list[dict[str, float]]:
        """The logged steps: step, loss, prediction, sigreg, grad_norm, lr, images_per_s, data_wait (share of the time),
        proj_std, proj_rank, peak_memory_gb (so far), and anchor if it has a weight."""
        return read_metrics(self.path / METRICS)

    @takes_export_settings
    def export(self, out: str | Path, **settings: Unpack[ExportSettings]) -> Bundle:
        """Export to ONNX, verified against torch; takes the settings of `jepakit.export`, and raises its errors."""
        from jepakit._frontdoor import export

        return export(self.path, out=out, **settings)


class DryRun(Frozen, Printed):
    """What a run would take, estimated from a few of its steps."""

    steps: int
    warmup_steps: int
    """How many of the steps have the backbone frozen."""
    batch_size: int
    warmup_step_s: float
    """Seconds a step with the backbone frozen, loading included."""
    step_s: float
    """Seconds a step with the backbone training."""
    measuring_s: float
    """Seconds to measure the start and the result: to embed the images, and to fit the probes."""
    peak_memory_gb: float
    """Peak of this process; on a CPU, including all batches that the loader's processes prefetch."""
    total_memory_gb: float
    """Total available: the GPU's memory, else main memory."""
    device: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return (
            self.warmup_steps * self.warmup_step_s + (self.steps - self.warmup_steps) * self.step_s + self.measuring_s
        )

    def __str__(self) -> str:
        warmup = f", {self.warmup_step_s:.2f} s while the projector warms up" if self.warmup_steps else ""
        return (
            f"{self.step_s:.2f} s a step ({self.batch_size / self.step_s:.1f} images/s){warmup}\n"
            f"{self.peak_memory_gb:.1f} GB of memory at most, of {self.total_memory_gb:.0f} GB ({self.device})\n"
            f"{self.steps} steps and measuring twice: about {human_time(self.total_s)}; nothing was kept"
        )


def read_record(path: Path, parse: Callable[[str], Any], remedy: str) -> dict[str, Any]:
    """The content of one of a run's files; DataError with the remedy if it is missing or damaged."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r:.40}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is gone or damaged ({error}): {remedy}") from None
    return values


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl; empty before the first step. A killed run can leave its last line half written."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run, finished or not; False for one that we may not read."""
    try:
        return (path / CONFIG).is_file()
    except PermissionError:  # up to Python 3.13
        return False


def open_run(path: str | Path) -> Run:
    """Open the folder of a run; DataError when it is not one."""
    path = as_path(path, "path")
    if is_run(path):
        return Run(path)
    with contextlib.suppress(PermissionError):  # up to Python 3.13
        if not path.exists():
            raise DataError(f"{path} does not exist: name the folder of a run")
    raise DataError(f"{path} is not a run: it has no {CONFIG} that this user can read")
