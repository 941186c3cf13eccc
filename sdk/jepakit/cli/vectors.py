"""Commands that make embeddings and compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jepakit._messages import counted
from jepakit._say import show
from jepakit.cli.options import (
    OVERLAP,
    AsJson,
    Frame,
    Images,
    Tile,
    source,
)
from jepakit.cli.output import check_out, print_rows, write_csv
from jepakit.cli.settings import given_ones, number_or_word
from jepakit.cli.stopping import exit_on_signals
from jepakit.embeddings import holds_embeddings
from jepakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jepakit.embeddings import Embeddings
    from jepakit.inference.session import Model
    from jepakit.sources import ImageList


def embed(
    images: Images,
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
        str, typer.Option(help="classes, kept beside the vectors: auto, folder, none, or a CSV, TSV or Parquet file")
    ] = "auto",
    tile: Tile = None,
    overlap: Annotated[int, typer.Option(help=OVERLAP)] = 0,
    min_valid: Annotated[float, typer.Option(help="smallest share of a tile that must be valid (not no-data)")] = 0.5,
    frame: Frame = None,
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
    out = check_out(out, ".npz")
    if out.exists() and not holds_embeddings(out):
        raise ConfigError(f"--out {out} exists and holds no embeddings: name another file, or remove it")
    exit_on_signals()
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
            embeddings = client.embed(source(images), model=model, **options)
    else:
        from jepakit.inference.session import load

        assert bundle is not None
        embeddings = load(bundle, **runtime).embed(source(images), **options)
    embeddings.save(out)
    if most_skipped:
        write_csv(Path(f"{out}.skipped.csv"), [("id", "reason"), *skipped])
    part.unlink(missing_ok=True)
    n_classes = 0 if embeddings.labels is None else len(set(embeddings.labels))
    labelled = f"labels of {counted(n_classes, 'class')}" if n_classes else "no labels"
    show(
        f"{out}: {counted(len(embeddings), 'vector')} of {embeddings.vectors.shape[1]} numbers, {labelled}, "
        f"model {embeddings.model_id}"
    )
    if n_classes > 1:
        show(f"next: jepakit probe fit {quote(str(out))} --out probe.safetensors")


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
    labels: Annotated[str, typer.Option(help="for bundles: auto, folder, or a CSV, TSV or Parquet file")] = "auto",
    group: Annotated[
        str,
        typer.Option(
            help="patient, slide or scene of each image, which is not split between folds: auto (a manifest's column, DICOM's "
            "PatientID), folder, none, or a CSV, TSV or Parquet file; for files of embeddings only that"
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Judge on labelled images which of two models to keep."""
    from jepakit import Embeddings
    from jepakit._groups import image_of
    from jepakit.evaluation.compare import compare as judge
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
    from jepakit.inference.session import load

    if path.suffix == ".npz" or path.is_file():
        return Embeddings.load(path)
    if images is None:
        raise ConfigError(
            f"{path} is not an .npz file: if it is a bundle, name the images to embed with it, with --images"
        )
    return load(path)


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
    print_rows(
        (query, rank, known.ids[place], f"{cosine:.4f}")
        for query, places, cosines in found
        for rank, (place, cosine) in enumerate(zip(places.tolist(), cosines.tolist(), strict=True), 1)
    )
