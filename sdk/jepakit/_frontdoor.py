"""The SDK's only entry points into training, export and the service; each package is imported on first use."""

from __future__ import annotations

import datetime
import glob
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from jepakit._checks import check_enough
from jepakit._explain import parse
from jepakit._extras import require, require_tracker
from jepakit._files import as_path, with_home
from jepakit._say import say, show
from jepakit._signatures import AdaptSettings, ExportSettings, takes_adapt_settings, takes_export_settings
from jepakit._sweep import Sweep, check_can_hold, combinations
from jepakit.bundles.bundle import Bundle, check_new, name_for
from jepakit.bundles.manifest import StartWeights
from jepakit.config import AdaptConfig, ExportConfig, ViewsConfig, chosen_range
from jepakit.errors import ConfigError, DataError, JepakitError, TrainingError
from jepakit.inspection import Inspection
from jepakit.run import DryRun, Run
from jepakit.sources import ImageList, list_images
from jepakit.sources.find import as_list
from jepakit.sources.memory import are_labelled_files

if TYPE_CHECKING:
    from jepakit_service.updates.deploy import Deployed

_P = ParamSpec("_P")
_T = TypeVar("_T")


@takes_adapt_settings
def adapt(images: Any, *, out: str | Path | None = None, **settings: Unpack[AdaptSettings]) -> Run:
    """Adapt a backbone to your own images and measure whether it helped; returns the finished `Run`.

    images    a folder (read recursively), a glob, a list of paths or of (path, label), a CSV, TSV or Parquet manifest,
              WebDataset shards, a ZIP, or images in memory: a map-style dataset or a sequence of arrays, Pillow images
              or (image, label). Classes (first-level folders, a column, labels) are used to measure, never to train
    out       the run's folder; by default runs/<folder>-<date>, for other runs of that day with -2, -3 … appended. The same call again resumes the run, or reports it, on any later day.
    settings  the fields of `jepakit.config.AdaptConfig`, whose `help` explains each: backbone, weights, domain, steps, …

    Raises ConfigError for a wrong setting, DataError for unusable images, ImageError for one that cannot be cut, and
    MissingExtraError for a package that is not installed, all before torch is imported; BackboneError or BundleError for
    weights that cannot be loaded; TrainingError when training cannot go on; WriteError when there is no disk space left.
    """
    config, listed = _to_adapt(images, out, settings)
    from jepakit_training.run.folder import check_folder

    folder = _folder(config, listed)
    check_folder(folder, config)
    check_enough(len(listed))
    return _train(config, listed, folder)


def _folder(config: AdaptConfig, images: ImageList) -> Path:
    """The run's folder: as given, else that of the newest run of the same settings and images, else a new one with today's date."""
    if config.out:
        return Path(config.out)
    from jepakit_training.run.folder import find_begun, has_begun

    name, runs = _stem(config.images), Path("runs")
    begun = sorted(runs.glob(f"{name}-????-??-??*"), reverse=True)
    if found := find_begun(begun, config, images):
        return found
    new = runs / f"{name}-{datetime.date.today():%Y-%m-%d}"
    others = (new.with_name(f"{new.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([new], others) if not has_begun(folder))


@takes_adapt_settings
def dry_run(images: Any, *, out: str | Path | None = None, **settings: Unpack[AdaptSettings]) -> DryRun:
    """Estimate the time and memory of `adapt` with the same arguments, from a few steps in one process; nothing is kept.

    Raises the errors of `adapt` for a wrong setting, unusable images, weights that cannot be loaded, or running out of
    memory.
    """
    config, listed = _to_adapt(images, out, settings)
    check_enough(len(listed))
    from jepakit_training.dryrun import dry_run as run_dry

    return _released(run_dry, config, listed)


def _to_adapt(images: Any, out: str | Path | None, settings: AdaptSettings) -> tuple[AdaptConfig, ImageList]:
    """Check the settings and list the images; missing packages are reported before torch is imported."""
    images = as_list(images)
    config = _adapt_config(images, out, settings)
    listed = _listed(images, config)
    _require_to_adapt(config)
    return config, listed


def _adapt_config(images: Any, out: str | Path | None, settings: Mapping[str, Any]) -> AdaptConfig:
    given_out = None if out is None else str(as_path(out, "out"))
    return parse(AdaptConfig, {"images": _describe_source(images), "out": given_out, **settings})


def _require_to_adapt(config: AdaptConfig) -> None:
    require("train")
    if config.launcher == "ray":
        require("cluster")
    if config.unfreeze == "lora":
        require("lora")
    for tracker in config.trackers:
        require_tracker(tracker)


@takes_adapt_settings
def sweep(
    images: Any, *, out: str | Path, vary: Mapping[str, Sequence[Any]], **settings: Unpack[AdaptSettings]
) -> Sweep:
    """Adapt once for each combination of the values of some settings, and say which result to keep; returns the `Sweep`.

    images    as in `adapt`
    out       the sweep's folder, which holds a run for each combination. The same call again resumes the sweep
    vary      the values of each setting that varies: {"lamb": [0.02, 0.05], "views.hue": [0.0, 0.1]}. It cannot be one that
              decides what is measured
    settings  as for `adapt`, the same in all runs

    Runs are done one after the other. If one ends in a TrainingError, the next one starts, and the sweep's `failed` says why.
    Raises the errors of `adapt`, those for wrong settings before the first run, and TrainingError if all runs fail.
    """
    folder = as_path(out, "out")
    configs, listed = _to_sweep(images, folder, vary, settings)
    failed = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        say(f"run {number} of {len(configs)}: {folder / name}")
        try:
            _train(config, listed, folder / name)
        except TrainingError as error:
            failed[name] = str(error)
            say(f"warning: {name} failed: {error}")
    if len(failed) == len(configs):
        raise TrainingError(f"all {len(failed)} runs failed; {name}: {failed[name]}")
    return Sweep(folder, failed)


@takes_adapt_settings
def dry_sweep(
    images: Any, *, out: str | Path, vary: Mapping[str, Sequence[Any]], **settings: Unpack[AdaptSettings]
) -> dict[str, DryRun]:
    """Estimate each run of `sweep` with the same arguments, by the run's name; nothing is kept. Raises as `dry_run`."""
    configs, listed = _to_sweep(images, as_path(out, "out"), vary, settings)
    from jepakit_training.dryrun import dry_run as run_dry

    return {name: _released(run_dry, config, listed) for name, config in configs.items()}


def _train(config: AdaptConfig, listed: ImageList, folder: Path) -> Run:
    """Run the training; an interrupt without a message, as outside the training steps, gets one that says how to resume."""
    from jepakit_training import adapt as run_training

    try:
        return _released(run_training, config, listed, folder)
    except KeyboardInterrupt as stop:
        if not str(stop):
            stop.args = ("stopped; run the same command again to resume",)
            say(str(stop))
        raise


def _released(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call `work`; free the local variables in the traceback of a JepakitError or interrupt that it raises.

    A notebook keeps the last traceback: the model, optimizer and batches of an interrupted run, or of one that ran out of
    memory, would stay in memory while the next cell resumes it.
    """
    callers = sys.exception()
    try:
        return work(*args, **kwargs)
    except (JepakitError, KeyboardInterrupt, SystemExit) as error:
        told: BaseException | None = error
        while told not in (None, callers):
            traceback.clear_frames(told.__traceback__)
            told = told.__context__
        if isinstance(error, JepakitError):
            raise
        raise error.with_traceback(None) from None  # where it was interrupted is chance: show no traceback


def _to_sweep(
    images: Any, folder: Path, vary: Mapping[str, Sequence[Any]], settings: AdaptSettings
) -> tuple[dict[str, AdaptConfig], ImageList]:
    """Check the settings of each run and what the folder already holds; returns the settings by run name, and the images."""
    images = as_list(images)
    _adapt_config(images, folder, settings)  # first report what is wrong in all runs
    configs = {
        name: _adapt_config(images, folder / name, chosen) for name, chosen in combinations(vary, settings).items()
    }
    listed = _listed(images, next(iter(configs.values())))
    for config in configs.values():
        _require_to_adapt(config)
    from jepakit_training.ranks import has_launcher
    from jepakit_training.run.folder import check_folder

    if has_launcher():
        raise ConfigError("a sweep starts its runs one by one: start it without torchrun or accelerate launch")
    check_can_hold(folder, configs, listed.digest())
    for name, config in configs.items():
        check_folder(folder / name, config)
    check_enough(len(listed))
    return configs, listed


@takes_adapt_settings
def inspect(images: Any, *, sheet: str | Path | None = None, **settings: Unpack[AdaptSettings]) -> Inspection:
    """Report what the trainer would see of these images, without training: print the result, or read its fields.

    images    as in `adapt`
    sheet     a PNG to write, showing some images and the views that training would make of them
    settings  as for `adapt`; only those about reading images have an effect: domain, views, backbone, image_size, resize, tile,
              overlap, min_valid, frame, value_range, labels, group, most_skipped

    Raises the errors of `adapt` for a wrong setting, unusable images or a missing package, and WriteError if the sheet cannot
    be written.
    """
    images = as_list(images)
    config = parse(AdaptConfig, {**settings, "images": _describe_source(images), "weights": "random"})
    place = None if sheet is None else as_path(sheet, "sheet")
    listed = _listed(images, config)
    require("train")
    from jepakit_training.pictures.sheet_path import check_sheet_path

    if place is not None:
        check_sheet_path(place, config.images)
    from jepakit_training.inspecting import inspect as run_inspection

    return run_inspection(config, listed, place)


@takes_export_settings
def export(source: str | Path | Run | Bundle, out: str | Path, **settings: Unpack[ExportSettings]) -> Bundle:
    """Export a run, a bundle or a timm backbone to ONNX, verified against torch; returns the new `Bundle`.

    source    a `Run`, a `Bundle`, the folder of either, or NAME[:pretrained|:random|:FILE] for any timm backbone
    out       the bundle's folder, which must not exist yet
    settings  the fields of `jepakit.config.ExportConfig`: which, name, precision, pooling, standardize, tokens,
              dynamic_size, verify_images, normalize, image_size, resize, opset

    Raises ConfigError for a wrong setting, BundleError for an `out` that exists, ConfigError, BackboneError, BundleError or
    DataError for an unusable source, DataError for unusable `verify_images`,
    ExportError when the graph does not reproduce torch, WriteError when there is no disk space left, MissingExtraError
    when torch is not installed. No bundle is written in any of these cases.
    """
    from jepakit._export_source import check_source

    given = source.path if isinstance(source, Run | Bundle) else as_path(source, "source")
    config = parse(ExportConfig, {"source": str(given), "out": str(as_path(out, "out")), **settings})
    check_source(config)
    if not (config.name or name_for(Path(config.out))):
        raise ConfigError(
            f"{config.out} has no ASCII letter or digit that could name the model: give it a name with name=NAME"
        )
    check_new(Path(config.out))
    require("export")
    from jepakit_export import export as run_export

    return run_export(config)


def serve(settings: dict[str, Any], file: Path | None = None, *, print_config: bool = False) -> None:
    """Run the service until it is told to stop, or only print its settings.

    settings  fields of `ServeSettings`; the rest come from JEPAKIT_SERVE_* variables, then from the YAML `file`
    """
    require("serve")
    from jepakit_service.settings import as_yaml, load

    parsed = load(settings, None if file is None else as_path(file, "config"), to_print=print_config)
    if print_config:
        show(as_yaml(parsed), end="")
        return
    from jepakit_service.app import run

    run(parsed)


def setting_named(name: str, command: str | None) -> str | None:
    """The dotted name of a command's setting, such as `views.hue` for `hue`; None if it has none. All but `serve` have those of `adapt`."""
    if command == "serve":
        require("serve")
        from jepakit_service.settings import ServeSettings

        return name if name in ServeSettings.model_fields else None
    if name in AdaptConfig.model_fields:
        return name
    return f"views.{name}" if name in ViewsConfig.model_fields else None


def deploy(bundle: Path, folder: Path, url: str, *, timeout_s: float) -> Deployed:
    """Put a bundle into the folder that a service watches and wait for the switch; on failure, restore the old one.

    Raises BundleError for an incomplete or damaged bundle, ServeError when the service refuses it or takes too long.
    """
    from jepakit_service.updates.deploy import deploy as run_deploy

    return run_deploy(as_path(bundle, "bundle"), as_path(folder, "folder"), url, timeout_s=timeout_s)


def new_api_key(name: str, key_file: str | None) -> tuple[str, str, int]:
    """Make an API key; returns it, its line for the key file, and how many other keys of that name `key_file` holds.

    The line is appended to `key_file` if given.
    """
    from jepakit_service.http.keys import append, new_key

    key, line = new_key(name)
    n_others = append(line, as_path(key_file, "api_key_file")) if key_file is not None else 0
    return key, line, n_others


def fetch_weights(name: str, out: Path) -> StartWeights:
    """Fetch a timm backbone's pretrained weights into a .safetensors file; returns their origin and licence."""
    from jepakit._timm_names import check_name

    check_name(name)
    require("export")
    from jepakit.backbones.backbone import fetch

    return fetch(name, as_path(out, "out"))


def _listed(images: Any, config: AdaptConfig) -> ImageList:
    return list_images(
        images,
        config.labels,
        group=config.group,
        tile=config.tile,
        overlap=config.overlap,
        min_valid=config.min_valid,
        frame=config.frame,
        chosen_range=chosen_range(config.value_range),
        most_skipped=config.most_skipped,
    )


def _describe_source(images: Any) -> str | tuple[str, ...]:
    """How the run's settings name its images; images in memory have no name."""
    if isinstance(images, str | Path):
        return with_home(images)
    if isinstance(images, Sized) and not len(images):
        raise DataError("images is empty: give a folder, a glob, a list of paths, or images")
    if are_labelled_files(images):
        images = [path for path, _ in images]
    if isinstance(images, Sequence) and all(isinstance(item, str | Path) for item in images):
        return tuple(map(with_home, images))
    return f"{len(images)} images in memory" if isinstance(images, Sized) else "images in memory"


def _stem(images: str | tuple[str, ...]) -> str:
    first = images if isinstance(images, str) else os.path.commonpath([os.path.abspath(path) for path in images])  # noqa: PTH100
    path = Path(first)
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    name = path.resolve().name
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name).strip("-") or "images"
