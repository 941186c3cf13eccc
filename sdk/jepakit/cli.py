"""The command line. Exit codes: 0 done, 1 the work failed, 2 the user's input was wrong."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jepakit import __version__
from jepakit._cli_settings import WithSettings, given_ones, number_or_word, settings_of, to_vary
from jepakit._files import as_path, prepare_place, written
from jepakit._messages import counted, first_few
from jepakit._one_line import one_line
from jepakit._progress import human_time
from jepakit._say import drop_unwritten, flush_shown, is_terminal, say, show
from jepakit.errors import ConfigError, DataError, JepakitError, TrainingError

if TYPE_CHECKING:
    from jepakit._sweep import Sweep
    from jepakit.comparison import Verdict
    from jepakit.embeddings import Embeddings
    from jepakit.run import DryRun, Run
    from jepakit.session import Model
    from jepakit.sources import ImageList

_Images = Annotated[
    list[str],
    typer.Argument(help="a folder, glob or list of image files; a CSV or Parquet manifest; .tar shards; a ZIP"),
]
_ONE_STOP_S = 5.0
_TILE = "side length, in pixels, of the tiles that large images are cut into"
_OVERLAP = "overlap of neighbouring tiles, in pixels"
_FRAME = "for multi-frame files: the number of the frame, from 0, or each"
_VALUE_RANGE = "for images that are not 8-bit: auto, file (DICOM's own window), ct-brain, ct-soft-tissue, ct-lung, ct-bone, or LOW:HIGH"
# Options of several commands.
_Backbone = Annotated[str | None, typer.Option(help="timm model name [vit_small_patch14_reg4_dinov2.lvd142m]")]
_Weights = Annotated[str | None, typer.Option(help="pretrained, random, a file, or a bundle [pretrained]")]
_DOMAINS = "general, natural, satellite, histology, radiology, microscopy, multispectral"
_Domain = Annotated[str | None, typer.Option(help=f"preset for the views: {_DOMAINS} [general]")]
_ImageSize = Annotated[int | None, typer.Option(help="side length of the images the model takes, in pixels [224]")]
_StepCount = Annotated[int | None, typer.Option(help="optimizer steps [300, or one epoch if that is more]")]
_Tile = Annotated[int | None, typer.Option(help=_TILE)]
_Overlap = Annotated[int | None, typer.Option(help=_OVERLAP)]
_Frame = Annotated[str | None, typer.Option(help=_FRAME)]
_ValueRange = Annotated[str | None, typer.Option(help=_VALUE_RANGE)]
_Config = Annotated[Path | None, typer.Option(help="TOML file of settings; options on the command line override it")]
_Labels = Annotated[
    str | None,
    typer.Option(
        help="classes, used only to measure: auto, folder (first-level ones), none, or a CSV or Parquet file, which may name only "
        "some images [auto]"
    ),
]
_Group = Annotated[
    str | None,
    typer.Option(
        help="which images are held out together: auto (a manifest's column, DICOM's PatientID, the tiles of an image), folder, "
        "none, or a CSV or Parquet file [auto]"
    ),
]
_LabelTable = Annotated[
    Path | None, typer.Option(help="CSV or Parquet table of path and label, instead of the embeddings' own labels")
]
_AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapt an image backbone to your own images, export it, serve it, probe it.",
)
probe_app = typer.Typer(no_args_is_help=True, help="Fit and use probes on embeddings.")
app.add_typer(probe_app, name="probe")
weights_app = typer.Typer(no_args_is_help=True, help="Pretrained weights for machines without network access.")
app.add_typer(weights_app, name="weights")


def main() -> None:
    """Entry point: every JepakitError becomes one line on standard error and its exit code."""
    try:
        code = _run()
        flush_shown()
    except JepakitError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("stopped")
        code = 130
    except ImportError as error:
        if "failed to map segment" not in str(error):
            raise
        say(f"error: {error}: this process may not have enough address space; raise its limit (ulimit -v)")
        code = 1
    except BrokenPipeError:  # whoever read the output has seen enough
        code = 1
    finally:
        drop_unwritten(sys.stdout)
    sys.exit(code)


def _run() -> str | int | None:
    """Run the command; returns its exit code, or raises its error."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        return ended.code
    return 0


def _print_version(asked: bool) -> None:
    if asked:
        show(f"jepakit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Options that come before any command."""
    # Escape what the terminal cannot show (`猫` in Latin-1, names that are not UTF-8): it must not fail finished work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@app.command(cls=WithSettings)
def adapt(
    images: _Images,
    out: Annotated[str | None, typer.Option(help="the run's folder [runs/<folder>-<date>]")] = None,
    backbone: _Backbone = None,
    weights: _Weights = None,
    domain: _Domain = None,
    image_size: _ImageSize = None,
    tile: _Tile = None,
    overlap: _Overlap = None,
    frame: _Frame = None,
    value_range: _ValueRange = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training images, instead of --steps")] = None,
    steps: _StepCount = None,
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
    labels: _Labels = None,
    group: _Group = None,
    seed: Annotated[int | None, typer.Option(help="random seed of the whole run [0]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="loader processes [cores minus one, at most 8, with a GPU at most 16]")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="training processes [one per GPU, else 1]")] = None,
    launcher: Annotated[str | None, typer.Option(help="local, or ray for a cluster [local]")] = None,
    config: _Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting, e.g. views.n_local=6; overrides its option")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run a few steps, estimate time and memory, keep nothing")
    ] = False,
    as_json: _AsJson = False,
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
    settings.pop("images", None)  # a run's config.toml has them
    if dry_run:
        estimate = run_dry(_source(images), **settings)
        show(json.dumps(estimate.model_dump()) if as_json else estimate)
        return
    with _exiting_when_stopped():
        run = run_adapt(_source(images), **settings)
    if os.environ.get("RANK", "0") != "0":  # of several under a launcher one speaks
        return
    _report(run, as_json=as_json)


@app.command(cls=WithSettings)
def sweep(
    images: _Images,
    out: Annotated[str, typer.Option(help="the sweep's folder, which will hold a run for each combination")],
    vary: Annotated[
        list[str],
        typer.Option(help="a setting and its values, e.g. unfreeze=auto,all or views.hue=0,0.1; can be repeated"),
    ],
    backbone: _Backbone = None,
    weights: _Weights = None,
    domain: _Domain = None,
    image_size: _ImageSize = None,
    steps: _StepCount = None,
    labels: _Labels = None,
    group: _Group = None,
    config: _Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting of adapt, e.g. lr=1e-4; overrides its option")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run a few steps of each run, estimate time and memory, keep nothing")
    ] = False,
    as_json: _AsJson = False,
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
    for name in ("images", "out"):  # a run's config.toml has them
        settings.pop(name, None)
    varied: dict[str, list[Any]] = {}
    for key, values in map(to_vary, vary):
        varied.setdefault(key, []).extend(values)
    if dry_run:
        _print_estimates(dry_sweep(_source(images), out=out, vary=varied, **settings), as_json=as_json)
        return
    with _exiting_when_stopped():
        found = run_sweep(_source(images), out=out, vary=varied, **settings)
    _report_sweep(found, as_json=as_json)
    if found.failed:
        raise TrainingError(
            f"{counted(len(found.failed), 'run')} failed ({first_few(list(found.failed), 3)}): see the warnings above; the same command "
            "tries again"
        )


@contextmanager
def _exiting_when_stopped() -> Iterator[None]:
    """A block of training that Ctrl-C ends with exit code 130; prints `stopped` unless the error says where."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            say("stopped")
        raise typer.Exit(130) from None


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="the TOML file to write")] = Path("jepakit.toml"),
) -> None:
    """Write a TOML file with all settings of adapt, for you to edit."""
    from jepakit.template import template

    file = as_path(file, "file")
    if file.exists():
        raise ConfigError(f"{file} is there already: name another file")
    with written(file) as stream:
        stream.write(template().encode())
    show(
        f"{file}: every setting with its default, commented out\nnext: jepakit adapt IMAGES --config {quote(str(file))}"
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run, or of a sweep")],
    as_json: _AsJson = False,
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
        runs = [{"name": name, **_as_json(run), "loss": found.losses.get(name)} for name, run in found.runs.items()]
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


def _print_estimates(estimates: dict[str, DryRun], *, as_json: bool) -> None:
    total_s = sum(each.total_s for each in estimates.values())
    if as_json:
        runs = {name: each.model_dump() for name, each in estimates.items()}
        show(json.dumps({"runs": runs, "total_s": total_s}))
        return
    for name, each in estimates.items():
        show(
            f"{name}: {human_time(each.total_s)}, {each.step_s:.2f} s a step, {each.peak_memory_gb:.1f} GB of memory at most"
        )
    show(f"{counted(len(estimates), 'run')}: about {human_time(total_s)}; nothing was kept")


@app.command(cls=WithSettings)
def inspect(
    images: _Images,
    sheet: Annotated[Path, typer.Option(help="the contact sheet to write")] = Path("contact-sheet.png"),
    as_json: _AsJson = False,
    domain: Annotated[
        str | None, typer.Option(help=f"preset for the views that are drawn: {_DOMAINS} [the suggested one]")
    ] = None,
    image_size: _ImageSize = None,
    tile: _Tile = None,
    overlap: _Overlap = None,
    frame: _Frame = None,
    value_range: _ValueRange = None,
    labels: _Labels = None,
    group: _Group = None,
    config: _Config = None,
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
        tile=tile,
        overlap=overlap,
        labels=labels,
        group=group,
        frame=number_or_word(frame),
        value_range=value_range,
    )
    for name in ("images", "out"):  # a run's config.toml has them
        settings.pop(name, None)
    seen = run_inspection(_source(images), sheet=sheet, **settings)
    show(json.dumps(seen.model_dump(mode="json"), indent=1) if as_json else seen)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="a run, a bundle, or NAME[:pretrained|:random|:FILE] for a timm model")],
    out: Annotated[str, typer.Option(help="the bundle to write")],
    which: Annotated[str | None, typer.Option(help="for a run: best, last or start [last]")] = None,
    name: Annotated[str | None, typer.Option(help="the model's name in the service [the folder's]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or int8 [fp32]")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="for a timm model: head, stages, cls, mean, cls+mean, last2 [head]")
    ] = None,
    standardize: Annotated[
        str | None,
        typer.Option(
            help="adjust each number inside the graph, as measured on --verify-images: none, center, scale [a run's or bundle's own]"
        ),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="add patch tokens as a second output")] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="make a graph that takes other image sizes too")
    ] = False,
    verify_images: Annotated[
        str | None,
        typer.Option(help="16 or more of your own images to verify on, and to calibrate int8 with [golden inputs]"),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="scale vectors to length 1")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="for a timm model: side length of the images, in pixels")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 24 [20]")] = None,
) -> None:
    """Export a model to ONNX, verified against torch."""
    from jepakit._frontdoor import export as run_export

    _exit_on_signals()
    settings = settings_of(
        which=which,
        name=name,
        precision=precision,
        pooling=pooling,
        standardize=standardize,
        tokens=tokens or None,
        dynamic_size=dynamic_size or None,
        verify_images=verify_images,
        normalize=normalize,
        image_size=image_size,
        opset=opset,
    )
    bundle = run_export(source, out, **settings)
    manifest = bundle.manifest
    assert manifest.graph is not None
    show(
        f"{bundle.path}: {manifest.backbone.name}, {manifest.preprocess.size} px → {manifest.embedding.dim} numbers "
        f"({manifest.embedding.pooling}), {manifest.graph.precision}: relative error to torch "
        f"{manifest.graph.relative_error:.1e}, centred cosine {manifest.graph.centred_cosine:.5f} on {manifest.graph.verified_on}"
    )
    show(f"name     {manifest.name}\nmodel_id {manifest.model_id}\ndigest   {bundle.digest}")
    show(f"next: jepakit serve {quote(str(bundle.path))}")


@app.command(cls=WithSettings)
def serve(
    bundles: Annotated[list[str] | None, typer.Argument(help="bundles, or folders of bundles")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings, in the form that --print-config prints; options override it"),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print all settings, and exit")] = False,
    host: Annotated[str | None, typer.Option(help="address to listen on [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on [8000]")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="file of API keys, one line name:sha256 each")] = None,
    new_key: Annotated[str | None, typer.Option(help="make an API key with this name, print it, and exit")] = None,
    provider: Annotated[str | None, typer.Option(help="auto, cpu, cuda, tensorrt, openvino [auto]")] = None,
    arithmetic: Annotated[str | None, typer.Option(help="model, or bf16 with openvino [model]")] = None,
    expect: Annotated[
        list[str] | None, typer.Option(help="digest of a bundle to accept; bundles with any other digest are refused")
    ] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="serve from a single process, without Ray Serve")] = False,
    proxy: Annotated[
        str | None, typer.Option(help="proxy in front of Ray's replicas: haproxy, python [haproxy on Linux]")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="processes that each hold all models [1]")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, json [text]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting, e.g. max_images=64; overrides its option")
    ] = None,
) -> None:
    """Serve exported bundles over HTTP.

    Settings not given here are read from JEPAKIT_SERVE_<SETTING> variables.
    """
    from jepakit._frontdoor import new_api_key
    from jepakit._frontdoor import serve as run_serve

    if new_key is not None:
        key, line, n_others = new_api_key(new_key, api_key_file)
        show(f"key for clients (shown once): {key}")
        show(f"line for the key file:        {line}" if api_key_file is None else f"added to {api_key_file}")
        show("next: jepakit serve … --api-key-file FILE; a client reads its key from JEPAKIT_API_KEY")
        if n_others:
            show(
                f"older keys named {new_key!r} in that file, which stay valid until their lines are deleted: {n_others}"
            )
        return
    settings = settings_of(
        set_,
        bundles=tuple(bundles) if bundles else None,
        host=host,
        port=port,
        api_key_file=api_key_file,
        provider=provider,
        arithmetic=arithmetic,
        expect=tuple(expect) if expect else None,
        ray=False if no_ray else None,
        proxy=proxy,
        replicas=replicas,
        log_format=log_format,
    )
    run_serve(settings, config, print_config=print_config)


@app.command()
def deploy(
    bundle: Annotated[Path, typer.Argument(help="the exported bundle to put into service")],
    folder: Annotated[Path, typer.Argument(help="the folder of bundles that the service watches")],
    url: Annotated[str, typer.Option(help="the service that should switch")] = "http://127.0.0.1:8000",
    timeout: Annotated[float, typer.Option(help="seconds to wait for every replica")] = 300.0,
) -> None:
    """Replace a model in service without any request failing.

    If the new version fails, the old one stays.

    Set JEPAKIT_API_KEY to a key if the service needs one.
    """
    from jepakit._frontdoor import deploy as run_deploy

    _exit_on_signals()
    model, replaced, beside = run_deploy(bundle, folder, url, timeout_s=timeout)
    show(f"{model.name} is now {model.model_id}\ndigest   {model.digest}")
    if replaced and replaced.dim != model.dim:
        show(f"its vectors have {model.dim} numbers now, and had {replaced.dim}")
    if beside and not replaced:
        show(
            f"{model.name} is a new model beside {first_few(beside, 3)}: if it is meant to replace one of them, deploy it "
            "under that name (`jepakit export --name`), and remove this one from the folder"
        )


@app.command()
def embed(
    images: _Images,
    out: Annotated[Path, typer.Option(help="the .npz file to write")],
    url: Annotated[str | None, typer.Option(help="URL of the service to embed with")] = None,
    bundle: Annotated[Path | None, typer.Option(help="exported bundle to embed with, in this process")] = None,
    model: Annotated[
        str | None, typer.Option(help="for a service with several models: NAME, or NAME@MODEL_ID to pin it")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="for a bundle: auto, cpu, cuda, tensorrt, openvino [auto]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="for a bundle: threads for one inference [one per core]")] = None,
    arithmetic: Annotated[str | None, typer.Option(help="for a bundle: model, or bf16 with openvino [model]")] = None,
    labels: Annotated[
        str, typer.Option(help="classes, kept beside the vectors: auto, folder, none, or a CSV or Parquet file")
    ] = "auto",
    tile: _Tile = None,
    overlap: Annotated[int, typer.Option(help=_OVERLAP)] = 0,
    min_valid: Annotated[float, typer.Option(help="smallest share of a tile that must be valid (not no-data)")] = 0.5,
    frame: _Frame = None,
    most_skipped: Annotated[
        float, typer.Option(help="share of the images that may be left out; OUT.skipped.csv then lists which and why")
    ] = 0.0,
) -> None:
    """Embed images with a service or a bundle, into one file.

    Set JEPAKIT_API_KEY to a key if the service needs one. If it is stopped, the same command continues: what is done is
    kept in OUT.part.
    """
    if (url is None) == (bundle is None):
        raise ConfigError("say what to embed with: either --url http://127.0.0.1:8000 or --bundle bundles/NAME")
    if bundle is not None and model is not None:
        raise ConfigError(
            f"--model {model} chooses among a service's models, but a bundle is a single model: leave it out"
        )
    runtime = given_ones(provider=provider, threads=threads, arithmetic=arithmetic)
    if url is not None and runtime:
        raise ConfigError(
            f"--{next(iter(runtime))} is for a bundle in this process; a service has its own setting: leave it out"
        )
    out = _check_out(out, ".npz")
    _exit_on_signals()
    skipped: list[tuple[str, str]] = []
    part = Path(f"{out}.part")
    options: dict[str, Any] = {
        "labels": labels,
        "tile": tile,
        "overlap": overlap,
        "min_valid": min_valid,
        "frame": number_or_word(frame),
        "most_skipped": most_skipped,
        "on_skipped": lambda *row: skipped.append(row),
        "resume": part,
    }
    if url is not None:
        from jepakit.client import Client

        with Client(url) as client:
            embeddings = client.embed(_source(images), model=model, **options)
    else:
        from jepakit.session import load

        assert bundle is not None
        embeddings = load(bundle, **runtime).embed(_source(images), **options)
    embeddings.save(out)
    if most_skipped:
        _write_csv(Path(f"{out}.skipped.csv"), [("id", "reason"), *skipped])
    part.unlink(missing_ok=True)
    labelled = (
        "no labels" if embeddings.labels is None else f"labels of {counted(len(set(embeddings.labels)), 'class')}"
    )
    show(
        f"{out}: {counted(len(embeddings), 'vector')} of {embeddings.vectors.shape[1]} numbers, {labelled}, "
        f"model {embeddings.model_id}"
    )
    if embeddings.labels is not None:
        show(f"next: jepakit probe fit {quote(str(out))} --out probe.safetensors")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="an exported bundle, or a file from `jepakit embed`")],
    second: Annotated[Path, typer.Argument(help="the other one; a file must be of the same images")],
    images: Annotated[
        str | None,
        typer.Option(
            help="for bundles: one source of labelled images to embed, preferably ones that neither was trained on (tiles, frames, "
            "or a share to be skipped: `jepakit embed` first)"
        ),
    ] = None,
    labels: Annotated[str, typer.Option(help="for bundles: auto, folder, or a CSV or Parquet file")] = "auto",
    group: Annotated[
        str,
        typer.Option(
            help="patient, slide or scene of each image, which is not split between folds: auto (a manifest's column, DICOM's "
            "PatientID), folder, none, or a CSV or Parquet file; for files of embeddings only that"
        ),
    ] = "auto",
    as_json: _AsJson = False,
) -> None:
    """Judge on labelled images which of two models to keep."""
    from jepakit import Embeddings
    from jepakit._compare import compare as judge
    from jepakit._groups import image_of
    from jepakit.sources.groups import groups_of

    opened = [_open_embeddings_or_bundle(each, images) for each in (first, second)]
    if all(isinstance(each, Embeddings) for each in opened) and (images is not None or labels != "auto"):
        raise ConfigError(
            f"--images and --labels say what bundles embed, but {first} and {second} already hold embeddings and labels: leave them out"
        )
    listed = None if images is None else _comparable(images, labels, group)
    before, after = (each if isinstance(each, Embeddings) else each.embed(images, labels=labels) for each in opened)
    groups: Sequence[str] | None = None
    if listed is not None and listed.groups is not None:
        of_image = dict(zip(listed.ids, listed.groups, strict=True))
        groups = [of_image.get(image_of(name), name) for name in before.ids]
    elif listed is None and group != "auto":
        groups = groups_of(before.ids, group)
    one, other = (path.resolve().name for path in (first, second))
    comparison = judge(before, after, groups=groups, names=(one, other) if one != other else None)
    if as_json:
        show(json.dumps(comparison.model_dump(mode="json")))
        return
    show(comparison)


def _comparable(images: str, labels: str, group: str) -> ImageList:
    """The images that two models are to be compared on, before anything is embedded; DataError if they have no labels."""
    from jepakit.sources import gather

    listed = gather(images, labels, group)
    if listed.labels is None:
        raise DataError(
            f"no labels were found for {images}, and models are compared on labelled images: name them with --labels"
        )
    return listed


def _open_embeddings_or_bundle(path: Path, images: str | None) -> Embeddings | Model:
    """Open an argument of `compare`; ConfigError for a bundle without images to embed."""
    from jepakit import Embeddings
    from jepakit.session import load

    if path.suffix == ".npz" or path.is_file():
        return Embeddings.load(path)
    if images is None:
        raise ConfigError(
            f"{path} is not an .npz file: if it is a bundle, name the images to embed with it, with --images"
        )
    return load(path)


@app.command()
def nearest(
    queries: Annotated[Path, typer.Argument(help="embeddings of the images to look for, from `jepakit embed`")],
    index: Annotated[
        Path | None, typer.Argument(help="embeddings to search, by the same model [the other queries]")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="number of images to find for each query")] = 5,
) -> None:
    """Find the images most similar to each query.

    Prints query id, rank, id and cosine, separated by tabs.
    """
    from jepakit import Embeddings

    asked = Embeddings.load(queries)
    known = asked if index is None else Embeddings.load(index)
    found = zip(asked.ids, *known.nearest(None if index is None else asked, k), strict=True)
    _print_rows(
        (query, rank, known.ids[place], f"{cosine:.4f}")
        for query, places, cosines in found
        for rank, (place, cosine) in enumerate(zip(places.tolist(), cosines.tolist(), strict=True), 1)
    )


@app.command()
def doctor() -> None:
    """Report what this machine has, and what to fix.

    The exit code is 1 if there is something to fix.
    """
    from jepakit.doctor import examine

    lines, problems = examine()
    show("\n".join(lines))
    for problem in problems:
        show(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)
    show("nothing to fix")


@weights_app.command("fetch", short_help="Fetch pretrained weights into a file.")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="timm model name, with or without the tag of its weights")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
) -> None:
    """Fetch a backbone's pretrained weights into a file, for a machine without network access."""
    from jepakit._frontdoor import fetch_weights

    out = _check_out(out, ".safetensors")
    _exit_on_signals()
    start = fetch_weights(name, out)
    show(f"{out}: {start.source}, licence: {start.license}")
    show(f"next, on the other machine: jepakit adapt IMAGES --backbone {name} --weights {quote(str(out))}")


@probe_app.command("fit")
def probe_fit(
    embeddings: Annotated[Path, typer.Argument(help="labelled embeddings, from `jepakit embed`")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    kind: Annotated[str, typer.Option(help="linear or knn")] = "linear",
    labels: _LabelTable = None,
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: a rare class counts as much as a common one")
    ] = None,
    group: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet table of path and group (patient, slide): no group is split between folds (linear)"
        ),
    ] = None,
    c: Annotated[
        float | None, typer.Option("-C", "--c", help="inverse regularization strength (linear) [cross-validated]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random seed of the folds (linear) [0]")] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="neighbours (knn) [20]")] = None,
) -> None:
    """Fit a probe on labelled embeddings."""
    from jepakit import Embeddings, KNNProbe, LinearProbe
    from jepakit.probes import is_probe
    from jepakit.sources.groups import groups_of

    if kind not in ("linear", "knn"):
        raise ConfigError(f"kind = {kind!r}: choose linear or knn")
    of_kind: dict[str, dict[str, object]] = {
        "linear": {"--group": group, "-C": c, "--seed": seed},
        "knn": {"-k": k},
    }
    other = "knn" if kind == "linear" else "linear"
    for option, value in of_kind[other].items():
        if value is not None:
            raise ConfigError(f"{option} {value} is for {other} probes, but this one is {kind}: leave it out")
    out = _check_out(out, ".safetensors")
    if out.exists() and not is_probe(out):
        raise ConfigError(f"--out {out} exists and is no probe, but may be a model's weights: name another file")
    vectors = _labelled(Embeddings.load(embeddings), labels)
    probe: LinearProbe | KNNProbe
    if kind == "knn":
        probe = KNNProbe(**given_ones(k=k, class_weight=class_weight)).fit(vectors)
    else:
        groups = None if group is None else groups_of(vectors.ids, group)
        probe = LinearProbe(**given_ones(C=c, seed=seed, class_weight=class_weight)).fit(vectors, groups=groups)
    probe.save(out)
    told = f"{out}: {kind} probe, {len(probe.classes_)} classes, fitted on {counted(len(vectors), 'image')}"
    if isinstance(probe, LinearProbe) and probe.cv_balanced_accuracy_ is not None:
        told += f"; balanced accuracy in cross-validation {probe.cv_balanced_accuracy_:.1%} (C = {probe.C_:g})"
    show(
        f"{told}\nnext: jepakit probe evaluate {quote(str(out))} OTHER.npz, with embeddings of labelled images that it was not fitted on"
    )


@probe_app.command("evaluate")
def probe_evaluate(
    probe: Annotated[Path, typer.Argument(help="a probe, from `jepakit probe fit`")],
    embeddings: Annotated[Path, typer.Argument(help="labelled embeddings of images it was not fitted on")],
    labels: _LabelTable = None,
    as_json: _AsJson = False,
) -> None:
    """Evaluate a probe on labelled embeddings."""
    from dataclasses import asdict

    from jepakit import Embeddings, load_probe

    report = load_probe(probe).evaluate(_labelled(Embeddings.load(embeddings), labels))
    show(json.dumps(asdict(report)) if as_json else report)


def _labelled(vectors: Embeddings, table: Path | None) -> Embeddings:
    """Those of the embeddings to which the table gives labels, with these; all of them as they are without a table."""
    from jepakit import Embeddings
    from jepakit.sources.labels import labels_of

    if table is None:
        return vectors
    labels = labels_of(vectors.ids, table)
    places = [place for place, label in enumerate(labels) if label is not None]
    if len(places) < len(vectors):
        say(f"{len(places):,} of {len(vectors):,} images are labelled by {table}; the others are left out")
    chosen = vectors[places]
    return Embeddings(chosen.vectors, chosen.model_id, chosen.ids, tuple(filter(None, labels)))


@probe_app.command("predict", short_help="Print each image's class and probability.")
def probe_predict(
    probe: Annotated[Path, typer.Argument(help="a probe, from `jepakit probe fit`")],
    embeddings: Annotated[Path, typer.Argument(help="embeddings, from `jepakit embed`")],
    every: Annotated[bool, typer.Option("--all", help="print a column for each class, under its name")] = False,
) -> None:
    """Print the id, class and probability of each image, separated by tabs."""
    from jepakit import Embeddings, load_probe

    fitted, vectors = load_probe(probe), Embeddings.load(embeddings)
    probabilities = fitted.predict_proba(vectors)
    named = zip(vectors.ids, probabilities, strict=True)
    if every:
        _print_rows([("id", *fitted.classes_)])
        _print_rows((name, *(f"{value:.4f}" for value in row)) for name, row in named)
    else:
        _print_rows((name, fitted.classes_[row.argmax()], f"{row.max():.4f}") for name, row in named)


def _print_rows(rows: Iterable[tuple[object, ...]]) -> None:
    """Print tab-separated rows; cells with tabs, line breaks or quotes are quoted (on a terminal, escaped)."""
    shown = one_line if is_terminal(sys.stdout) else str
    lines = SimpleNamespace(write=partial(show, end=""))
    csv.writer(lines, delimiter="\t", lineterminator="\n").writerows([shown(str(cell)) for cell in row] for row in rows)


def _source(images: list[str]) -> str | list[str]:
    """One argument may be any source; several, as from a glob that the shell expanded, are a list of files."""
    return images[0] if len(images) == 1 else images


def _exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit from now on, so that unfinished work is cleaned up as on Ctrl-C.

    Those that follow within seconds of the first of them, or of Ctrl-C, are ignored: terminals, make and npm send several,
    and none may cut the cleaning up short. A signal that is ignored stays ignored, as nohup wants for SIGHUP.
    """
    first = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal first
        if time.monotonic() - first < _ONE_STOP_S:
            return
        first = time.monotonic()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _check_out(file: Path, suffix: str) -> Path:
    """The output file, its folder created; ConfigError, before any work, if it could not be written."""
    file = as_path(file, "out")
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder: name a file in it")
    if file.suffix not in ("", suffix):
        raise ConfigError(f"--out {file}: the output is a {suffix} file: give a name that ends in {suffix}")
    prepare_place(file)
    return file


def _write_csv(file: Path, rows: list[tuple[str, str]]) -> None:
    """Write rows of text, with any characters in names; WriteError if they cannot be written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with written(as_path(file, "out")) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))
