"""Commands that train, and that tell what a run would do or has done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jepakit._files import as_path, written
from jepakit._messages import counted, first_few
from jepakit._progress import human_time
from jepakit._say import show
from jepakit.cli.options import (
    DOMAINS,
    AsJson,
    Backbone,
    Config,
    Domain,
    Frame,
    Group,
    Images,
    ImageSize,
    Labels,
    Overlap,
    Resize,
    StepCount,
    Tile,
    ValueRange,
    Weights,
    source,
)
from jepakit.cli.settings import number_or_word, settings_of, to_vary
from jepakit.cli.stopping import exiting_when_stopped
from jepakit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from jepakit._sweep import Sweep
    from jepakit.bundles.comparison import Verdict
    from jepakit.run import DryRun, Run


def adapt(
    images: Images,
    out: Annotated[str | None, typer.Option(help="the run's folder [runs/<folder>-<date>]")] = None,
    backbone: Backbone = None,
    weights: Weights = None,
    domain: Domain = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    tile: Tile = None,
    overlap: Overlap = None,
    frame: Frame = None,
    value_range: ValueRange = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training images, instead of --steps")] = None,
    steps: StepCount = None,
    batch_size: Annotated[
        int | None, typer.Option(help="images in one step, and so in one SIGReg test, over all processes [128]")
    ] = None,
    unfreeze: Annotated[str | None, typer.Option(help="auto, none, all, lora, or the last N blocks [auto]")] = None,
    pooling: Annotated[str | None, typer.Option(help="auto, head, stages, cls, mean, cls+mean, last2 [auto]")] = None,
    lamb: Annotated[
        float | None,
        typer.Option(help="weight of SIGReg [0.005 times the number of views, more for batches below 128]"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="learning rate of the backbone [1e-4 for a ViT, 3e-4 for a ConvNet or Swin; 5e-4 from random weights]"
        ),
    ] = None,
    labels: Labels = None,
    group: Group = None,
    seed: Annotated[int | None, typer.Option(help="random seed of the whole run [0]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="loader processes [cores minus one, at most 8, with a GPU at most 16]")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="training processes [one per GPU, else 1]")] = None,
    launcher: Annotated[str | None, typer.Option(help="local, or ray for a cluster [local]")] = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting, e.g. views.n_local=6; overrides its option")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run a few steps, estimate time and memory, keep nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a backbone to your images, and measure whether it helped."""
    from jepakit._frontdoor import adapt as run_adapt
    from jepakit._frontdoor import dry_run as run_dry

    settings = settings_of(
        set_,
        config,
        out=out,
        backbone=backbone,
        weights=weights,
        domain=domain,
        image_size=image_size,
        resize=resize,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        unfreeze=number_or_word(unfreeze),
        pooling=pooling,
        lamb=lamb,
        lr=lr,
        labels=labels,
        group=group,
        seed=seed,
        workers=workers,
        tile=tile,
        overlap=overlap,
        frame=number_or_word(frame),
        value_range=value_range,
        processes=processes,
        launcher=launcher,
    )
    if dry_run:
        estimate = run_dry(source(images), **settings)
        show(json.dumps(estimate.model_dump()) if as_json else estimate)
        return
    with exiting_when_stopped():
        run = run_adapt(source(images), **settings)
    if os.environ.get("RANK", "0") != "0":  # under a launcher, only rank 0 reports
        return
    _report(run, as_json=as_json)


def sweep(
    images: Images,
    out: Annotated[str, typer.Option(help="the sweep's folder, which will hold a run for each combination")],
    vary: Annotated[
        list[str],
        typer.Option(help="a setting and its values, e.g. unfreeze=auto,all or views.hue=0,0.1; can be repeated"),
    ],
    backbone: Backbone = None,
    weights: Weights = None,
    domain: Domain = None,
    image_size: ImageSize = None,
    steps: StepCount = None,
    labels: Labels = None,
    group: Group = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting of adapt, e.g. lr=1e-4; overrides its option")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run a few steps of each run, estimate time and memory, keep nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt with several settings, and tell which result to keep.

    The same command again goes on where it was stopped.
    """
    from jepakit._frontdoor import dry_sweep
    from jepakit._frontdoor import sweep as run_sweep

    settings = settings_of(
        set_,
        config,
        backbone=backbone,
        weights=weights,
        domain=domain,
        image_size=image_size,
        steps=steps,
        labels=labels,
        group=group,
    )
    settings.pop("out", None)  # a run's config.toml has it
    varied: dict[str, list[Any]] = {}
    for key, values in map(to_vary, vary):
        varied.setdefault(key, []).extend(values)
    if dry_run:
        _print_estimates(out, dry_sweep(source(images), out=out, vary=varied, **settings), as_json=as_json)
        return
    with exiting_when_stopped():
        found = run_sweep(source(images), out=out, vary=varied, **settings)
    _report_sweep(found, as_json=as_json)
    if found.failed:
        raise TrainingError(
            f"{counted(len(found.failed), 'run')} failed ({first_few(list(found.failed), 3)}): see the warnings above; the same command "
            "tries again"
        )


def init(
    file: Annotated[Path, typer.Argument(help="the TOML file to write")] = Path("jepakit.toml"),
) -> None:
    """Write a TOML file with all settings of adapt, for you to edit."""
    from jepakit.cli.template import template

    file = as_path(file, "file")
    if file.exists():
        raise ConfigError(f"{file} is there already: name another file")
    with written(file) as stream:
        stream.write(template().encode())
    show(
        f"{file}: every setting with its default, commented out\nnext: jepakit adapt IMAGES --config {quote(str(file))}"
    )


def report(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run, or of a sweep")],
    as_json: AsJson = False,
) -> None:
    """Print again what a finished run, or a sweep, found."""
    from jepakit._sweep import Sweep, is_sweep
    from jepakit.run import open_run

    run = as_path(run, "run")
    if is_sweep(run):
        _report_sweep(Sweep(run), as_json=as_json)
    else:
        _report(open_run(run), as_json=as_json)


def _report(run: Run, *, as_json: bool) -> None:
    if as_json:
        show(json.dumps(_as_json(run)))
        return
    show(run.comparison)
    if run.neighbours.is_file():
        show(f"to see for yourself: {run.neighbours}")
    _print_exports(run, run.verdict, run.path.name)


def _as_json(run: Run) -> dict[str, Any]:
    return {"run": str(run.path), **run.comparison.model_dump(mode="json")}


def _print_exports(run: Run, verdict: Verdict, name: str) -> None:
    """Print the next command: export what the verdict says to keep, as `bundles/NAME`."""
    source, target = quote(str(run.path)), f"bundles/{name}"
    has_scores = run.comparison.after is not None
    if has_scores:
        exports = [("" if verdict.word == "better" else " --which start", target)]
    else:  # no verdict: export both, to compare them
        exports = [(" --which start", f"{target}-start"), ("", target)]
    for which, bundle in exports:
        show(f"next: jepakit export {source}{which} --out {quote(bundle)}")
    if not has_scores:
        show(f"next: jepakit compare {quote(exports[0][1])} {quote(target)} --images LABELLED")
        if tile := run.config.get("tile"):
            show(
                f"(LABELLED: single tiles; or compare what `jepakit embed --tile {tile}` writes of larger images with each)"
            )


def _report_sweep(found: Sweep, *, as_json: bool) -> None:
    if as_json:
        runs = {
            name: {**_as_json(run), "scaled_loss": found.scaled_losses.get(name)} for name, run in found.runs.items()
        }
        show(
            json.dumps(
                {
                    "sweep": str(found.path),
                    "verdict": found.verdict.model_dump(mode="json"),
                    "runs": runs,
                    "unfinished": list(found.unfinished),
                    "failed": found.failed,
                }
            )
        )
        return
    show(found)
    _print_exports(found.best, found.verdict, found.path.name)


def _print_estimates(out: str, estimates: dict[str, DryRun], *, as_json: bool) -> None:
    total_s = sum(each.total_s for each in estimates.values())
    if as_json:
        runs = {name: each.model_dump() for name, each in estimates.items()}
        show(json.dumps({"sweep": out, "runs": runs, "total_s": total_s}))
        return
    for name, each in estimates.items():
        show(
            f"{name}: {human_time(each.total_s)}, {each.step_s:.2f} s a step, {each.peak_memory_gb:.1f} GB of memory at most"
        )
    show(f"{counted(len(estimates), 'run')}: about {human_time(total_s)}; nothing was kept")


def inspect(
    images: Images,
    sheet: Annotated[Path, typer.Option(help="the contact sheet to write")] = Path("contact-sheet.png"),
    as_json: AsJson = False,
    domain: Annotated[
        str | None, typer.Option(help=f"preset for the views that are drawn: {DOMAINS} [the suggested one]")
    ] = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    tile: Tile = None,
    overlap: Overlap = None,
    frame: Frame = None,
    value_range: ValueRange = None,
    labels: Labels = None,
    group: Group = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting of adapt, e.g. min_valid=0.3; overrides its option")
    ] = None,
) -> None:
    """Report on your images as training would see them."""
    from jepakit._frontdoor import inspect as run_inspection

    settings = settings_of(
        set_,
        config,
        domain=domain,
        image_size=image_size,
        resize=resize,
        tile=tile,
        overlap=overlap,
        labels=labels,
        group=group,
        frame=number_or_word(frame),
        value_range=value_range,
    )
    settings.pop("out", None)  # a run's config.toml has it
    seen = run_inspection(source(images), sheet=sheet, **settings)
    show(json.dumps(seen.model_dump(mode="json"), indent=1) if as_json else seen)
