"""Commands from a run to a service: `export`, `serve`, `deploy`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from jepakit._messages import counted, first_few
from jepakit._say import show
from jepakit.cli.settings import settings_of
from jepakit.cli.stopping import exit_on_signals

if TYPE_CHECKING:
    from jepakit.bundles.bundle import Bundle


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
    resize: Annotated[
        str | None, typer.Option(help="for a timm model: shorter (an image's middle) or squash (all of it, distorted)")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 24 [20]")] = None,
) -> None:
    """Export a model to ONNX, verified against torch."""
    from jepakit._frontdoor import export as run_export

    exit_on_signals()
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
        resize=resize,
        opset=opset,
    )
    bundle = run_export(source, out, **settings)
    _describe(bundle)
    show(f"next: jepakit serve {quote(str(bundle.path))}")


def show_bundle(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle, or one in a run")],
    verify: Annotated[bool, typer.Option("--verify", help="also compute its golden vectors here")] = False,
) -> None:
    """Describe a bundle, and check that its files are intact."""
    from jepakit.bundles.bundle import open_bundle

    opened = open_bundle(bundle)
    opened.verify()
    _describe(opened)
    manifest = opened.manifest
    seen = f"adapted in {manifest.provenance.steps} steps that saw {counted(manifest.provenance.images_seen, 'image')}"
    show(f"training {seen if manifest.provenance.steps else 'none: the start weights as they are'}")
    if manifest.comparison is not None:
        show(manifest.comparison)
    if verify:
        from jepakit.inference.session import load

        show(f"its files are intact, and it computes its golden vectors here, on {load(opened).provider}")
    else:
        show("its files are intact")


def _describe(bundle: Bundle) -> None:
    """Print what a bundle holds, and by which names and digests it is known."""
    manifest, graph = bundle.manifest, bundle.manifest.graph
    computed = "weights alone: `jepakit export` makes the graph"
    if graph is not None:
        computed = (
            f"{graph.precision}: relative error to torch {graph.relative_error:.1e}, centred cosine {graph.centred_cosine:.5f} on "
            f"{graph.verified_on}"
        )
    show(
        f"{bundle.path}: {manifest.backbone.name}, {manifest.preprocess.size} px → {manifest.embedding.dim} numbers "
        f"({manifest.embedding.pooling}), {computed}"
    )
    show(f"name     {manifest.name}\nmodel_id {manifest.model_id}\ndigest   {bundle.digest}")
    start = manifest.backbone.start
    show(f"weights  {start.source}, licence: {start.license}")


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

    exit_on_signals()
    model, replaced, beside = run_deploy(bundle, folder, url, timeout_s=timeout)
    show(f"{model.name} is now {model.model_id}\ndigest   {model.digest}")
    if replaced and replaced.dim != model.dim:
        show(f"its vectors have {model.dim} numbers now, and had {replaced.dim}")
    if beside and not replaced:
        show(
            f"{model.name} is a new model beside {first_few(beside, 3)}: if it is meant to replace one of them, deploy it "
            "under that name (`jepakit export --name`), and remove this one from the folder"
        )
