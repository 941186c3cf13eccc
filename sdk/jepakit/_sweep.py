"""A sweep: several adaptations of one start on the same images, with different settings, and which of them to keep.

SWEEP/
  lamb=0.02,unfreeze=auto/  a run per combination of the settings that vary, as `adapt` writes it
  lamb=0.02,unfreeze=all/
  …
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from jepakit._files import as_path
from jepakit._frozen import Printed
from jepakit._messages import did_you_mean, first_few
from jepakit._run_files import START
from jepakit._signatures import ExportSettings, takes_export_settings
from jepakit.bundles.bundle import WEIGHTS, Bundle, open_bundle
from jepakit.bundles.comparison import SCORES, Comparison, Scores, Verdict
from jepakit.config import AdaptConfig, ViewsConfig, flattened
from jepakit.errors import ConfigError, DataError
from jepakit.evaluation.evaluate import judge_best
from jepakit.run import Run, is_run

_VIEWS = tuple(f"views.{name}" for name in ViewsConfig.model_fields)
# These change neither the start nor what it is measured on, so the runs can be compared.
_VARIABLE = (
    "domain", "steps", "epochs", "batch_size", "unfreeze", "lora_rank", "norm_statistics", "lamb", "lr", "layer_decay",
    "projector_lr", "weight_decay", "warmup", "clip_norm", "n_slices", "projector", "anchor", "mix", "average",
    "average_over", *_VIEWS,
)  # fmt: skip
# These decide what is measured: they are the same in all runs of a sweep.
_SHARED = (
    "backbone", "image_size", "resize", "pooling", "standardize", "tile", "overlap", "min_valid", "frame", "value_range",
    "precision", "held_out", "measure_on", "seed",
)  # fmt: skip
# Losses can be compared only between runs that differ in nothing but these.
_LEAVES_THE_LOSS_ALONE = frozenset({
    "steps", "epochs", "unfreeze", "lora_rank", "norm_statistics", "lamb", "lr", "layer_decay", "projector_lr",
    "weight_decay", "warmup", "clip_norm",
})  # fmt: skip
_LONGEST_NAME = 200
"""Characters of a run's name: file systems allow 255 bytes, and longer names are derived from it."""
_LAMBDA_POWER = 0.4
_LAST_SHARE = 0.1
"""Share of the logged steps, at the end, over which the loss is averaged."""


def combinations(vary: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each run, by its name such as `lamb=0.02,unfreeze=all`: every combination of the values in `vary`.

    settings  those that are the same in all runs

    Raises ConfigError if a setting cannot vary, or has no values or one of them twice.
    """
    if not isinstance(vary, Mapping):
        raise ConfigError(f"vary = {vary!r}: give a dict of settings and their values, e.g. {{'lamb': [0.02, 0.05]}}")
    if not vary:
        raise ConfigError("vary names no setting: give one or more with their values, e.g. lamb with 0.02 and 0.05")
    # An array, as of np.logspace, is a list of numbers too.
    vary = {key: values.tolist() if hasattr(values, "tolist") else values for key, values in vary.items()}
    for key, values in vary.items():
        _check(key, values, settings)
    runs: dict[str, dict[str, Any]] = {}
    for values in product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        name = ",".join(f"{key}={_as_word(value)}" for key, value in chosen.items())
        if len(name) > _LONGEST_NAME:
            raise ConfigError(
                f"a run of the sweep would be called {name}, longer than a folder's name may be ({_LONGEST_NAME} characters): "
                "let fewer settings vary at a time"
            )
        if name in runs:
            raise ConfigError(f"two of the sweep's runs would be called {name}: give each value once")
        runs[name] = _merged(settings, chosen)
    return runs


def _check(key: str, values: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """ConfigError unless the setting `key` can vary over `values`."""
    known = [*AdaptConfig.model_fields, *_VIEWS]
    if key not in known:
        raise ConfigError(f"vary: unknown setting {key!r}{did_you_mean(key, known)}")
    if key not in _VARIABLE:
        raise ConfigError(
            f"{key} cannot vary within a sweep: the start and what it is measured on must be the same in all runs, or they "
            f"could not be compared. These can: {', '.join(_VARIABLE)}"
        )
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"vary: {key} = {values!r}: give a list of values")
    parent, dot, name = key.partition(".")
    group = settings.get(parent)
    if name in _set_in(group) if dot else key in settings:
        raise ConfigError(f"{key} is given twice: as one value, and as one that varies")


def _set_in(group: object) -> Iterable[str]:
    """The names of the settings given in a group."""
    if isinstance(group, ViewsConfig):
        return group.model_fields_set
    return group if isinstance(group, Mapping) else ()


def _merged(settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the `chosen` values, those of views in their group."""
    merged = dict(settings)
    for key, value in chosen.items():
        parent, dot, name = key.partition(".")
        if dot:
            group = merged.get(parent, {})
            given = group.model_dump(exclude_unset=True) if isinstance(group, ViewsConfig) else group
            merged[parent] = {**given, name: value}
        else:
            merged[key] = value
    return merged


def _as_word(value: object) -> str:
    """A value as part of a folder's name."""
    text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)


class Sweep(Printed):
    """A sweep's folder, opened. Print it for a table.

    path        the folder
    runs        the finished runs by name, best first: by balanced accuracy or, without labels, by `scaled_losses`, then last those
                whose projections collapsed
    unfinished  names of the runs that were stopped or have failed
    scaled_losses
                by name, the mean loss over the last tenth of a run, divided by λ^0.4 (arXiv 2511.08544): the lower, the better
                the embeddings, as was shown for runs of one recipe from random weights. It cannot see harm done to the
                start. Empty if the runs differ in more than that allows (views, batch size, projector, anchor), or a log is empty
    verdict     whether to keep the best run or the start; the interval allows for its being the best of several
    failed      why runs failed, by name; known only to the call that ran them

    Raises DataError if no run has finished, or if the runs are not of one start and the same images; BundleError if the
    bundle of one is damaged.
    """

    def __init__(self, path: str | Path, failed: Mapping[str, str] | None = None) -> None:
        self.path = as_path(path, "path")
        self.failed = dict(failed or {})
        found = {run.path.name: run for run in _runs_in(self.path)}
        self.unfinished = tuple(name for name, run in found.items() if not run.finished)
        found = {name: run for name, run in found.items() if run.finished}
        if not found:
            raise DataError(f"no run in {self.path} has finished: run its `jepakit sweep` command again to resume")
        _check_comparable(found.values())
        self.scaled_losses = _losses(found)
        collapsed = {name for name, run in found.items() if run.collapsed}
        self.verdict, names = _ranked(
            {name: run.comparison for name, run in found.items()}, self.scaled_losses, collapsed
        )
        self.runs = {name: found[name] for name in names}

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r})"

    @property
    def best(self) -> Run:
        """The first of `runs`; `verdict` says whether to keep it."""
        return next(iter(self.runs.values()))

    @takes_export_settings
    def export(self, out: str | Path, **settings: Unpack[ExportSettings]) -> Bundle:
        """Export what `verdict` says to keep, the best run or the start, to ONNX.

        Takes the settings of `jepakit.export`, and raises its errors; `which` is "best" unless given, and "last" is the best
        run in any case.
        """
        if settings.get("which", "best") == "best":
            settings["which"] = "last" if self.verdict.word == "better" else "start"
        return self.best.export(out, **settings)

    def __str__(self) -> str:
        start = self.best.comparison.before
        rows = _loss_rows(self.runs, self.scaled_losses) if start is None else _score_rows(start, self.runs)
        unfinished = [f"not finished: {first_few(self.unfinished, 3)}"] if self.unfinished else []
        return "\n".join([*_aligned(rows), *unfinished, str(self.verdict)])


def is_sweep(path: Path) -> bool:
    """Whether a path is the folder of a sweep."""
    return not is_run(path) and any(_runs_in(path))


def open_sweep(path: str | Path) -> Sweep:
    """Open the folder of a sweep; DataError when it is not one. Raises the errors of `Sweep`, too."""
    path = as_path(path, "path")
    if not is_sweep(path):
        raise DataError(f"{path} is not a sweep: it holds no runs")
    return Sweep(path)


def _runs_in(path: Path) -> list[Run]:
    return [Run(folder) for folder in sorted(path.iterdir()) if is_run(folder)] if path.is_dir() else []


def check_can_hold(path: Path, configs: Mapping[str, AdaptConfig], data_digest: str) -> None:
    """DataError if the folder holds runs on other images, or measured in another way, than those to come."""
    to_come = next(iter(configs.values())).resolved().model_dump(mode="json")
    for run in _runs_in(path):
        if run.path.name in configs or not (run.path / START).is_dir():
            continue
        basis = _basis(run)
        if basis["images"] != data_digest or any(basis[name] != to_come[name] for name in _SHARED):
            raise DataError(
                f"{run.path} was measured on other images or in another way, and could not be compared with the new runs: name "
                "another folder for the sweep"
            )


def _check_comparable(runs: Iterable[Run]) -> None:
    """DataError unless all runs began with the same weights, and were measured on the same images in the same way."""
    first, *others = runs
    for run in others:
        one, other = _basis(first), _basis(run)
        if differing := [what for what in one if one[what] != other[what]]:
            raise DataError(
                f"{first.path} and {run.path} cannot be compared, as they differ in {', '.join(differing)}: move one of them out of "
                "the sweep"
            )


def _basis(run: Run) -> dict[str, object]:
    """By name, the values that must be the same in all runs of a sweep."""
    manifest = open_bundle(run.path / START).manifest
    return {
        "start weights": manifest.files[WEIGHTS],
        "images": manifest.provenance.data_digest,
        **{name: run.config.get(name, AdaptConfig.model_fields[name].default) for name in _SHARED},
    }


def _ranked(
    comparisons: Mapping[str, Comparison], losses: Mapping[str, float], collapsed: Collection[str]
) -> tuple[Verdict, list[str]]:
    """The verdict on the best run, and the names of all, best first. The loss is lowest where the projections collapsed."""
    if next(iter(comparisons.values())).before is None:
        names = sorted(comparisons, key=lambda name: (name in collapsed, losses.get(name, 0.0)))
        return comparisons[names[0]].verdict, names
    names = sorted(comparisons, key=lambda name: -(comparisons[name].verdict.difference or 0.0))
    return judge_best(names[0], [comparisons[name].verdict for name in names]), names


def _losses(runs: Mapping[str, Run]) -> dict[str, float]:
    configs = [flattened(run.config) for run in runs.values()]
    for name in _VARIABLE:
        if name not in _LEAVES_THE_LOSS_ALONE and any(config.get(name) != configs[0].get(name) for config in configs):
            return {}
    # A step whose loss was not finite was skipped.
    logged = {
        name: [step["loss"] for step in run.metrics() if math.isfinite(step["loss"])] for name, run in runs.items()
    }
    return {name: _loss(run, logged[name]) for name, run in runs.items()} if all(logged.values()) else {}


def _loss(run: Run, logged: Sequence[float]) -> float:
    last = logged[-max(1, round(_LAST_SHARE * len(logged))) :]
    return fmean(last) / math.pow(run.plan["lamb"], _LAMBDA_POWER)


def _score_rows(start: Scores, runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """A heading, and for the start and each run its balanced accuracies, the difference and its interval, and whether its
    projections collapsed."""
    heading = ("", SCORES["linear_balanced"], SCORES["knn_balanced"], "points (95 % interval)", "")
    rows: list[tuple[str, ...]] = [heading, ("the start", *_percent(start), "", "")]
    for name, run in runs.items():
        after, verdict = run.comparison.after, run.comparison.verdict
        assert after is not None, "a start with scores has a result with scores"
        rows.append((name, *_percent(after), _difference(verdict), _collapsed(run)))
    return rows


def _percent(scores: Scores) -> tuple[str, str]:
    return f"{scores.linear_balanced:.1%}", f"{scores.knn_balanced:.1%}"


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        return ""
    return f"{100 * verdict.difference:+.1f} ({100 * verdict.low:+.1f} to {100 * verdict.high:+.1f})"


def _collapsed(run: Run) -> str:
    return "collapsed" if run.collapsed else ""


def _loss_rows(runs: Mapping[str, Run], losses: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A heading, and each run with its loss, if it has one, and whether its projections collapsed."""
    rows = []
    for name, run in runs.items():
        loss = (f"{losses[name]:.4f}",) if losses else ()
        rows.append((name, *loss, _collapsed(run)))
    return [("", "loss / λ^0.4", ""), *rows] if losses else rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows of a table as lines; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
