"""`jepakit probe`: fit and use probes on embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from jepakit._messages import counted
from jepakit._say import say, show
from jepakit.cli.options import (
    AsJson,
    LabelTable,
)
from jepakit.cli.output import check_out, print_rows
from jepakit.cli.settings import given_ones
from jepakit.errors import ConfigError

if TYPE_CHECKING:
    from jepakit.embeddings import Embeddings


def probe_fit(
    embeddings: Annotated[Path, typer.Argument(help="labelled embeddings, from `jepakit embed`")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    kind: Annotated[str, typer.Option(help="linear or knn")] = "linear",
    labels: LabelTable = None,
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: a rare class counts as much as a common one")
    ] = None,
    group: Annotated[
        Path | None,
        typer.Option(
            help="CSV, TSV or Parquet table of path and group (patient, slide): no group is split between folds (linear)"
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
    out = check_out(out, ".safetensors")
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


def probe_evaluate(
    probe: Annotated[Path, typer.Argument(help="a probe, from `jepakit probe fit`")],
    embeddings: Annotated[Path, typer.Argument(help="labelled embeddings of images it was not fitted on")],
    labels: LabelTable = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a probe on labelled embeddings."""
    from dataclasses import asdict

    from jepakit import Embeddings, load_probe

    report = load_probe(probe).evaluate(_labelled(Embeddings.load(embeddings), labels))
    show(json.dumps(asdict(report)) if as_json else report)


def _labelled(vectors: Embeddings, table: Path | None) -> Embeddings:
    """The embeddings that the table labels, with those labels; without a table, all of them unchanged."""
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
        print_rows([("id", *fitted.classes_)])
        print_rows((name, *(f"{value:.4f}" for value in row)) for name, row in named)
    else:
        print_rows((name, fitted.classes_[row.argmax()], f"{row.max():.4f}") for name, row in named)
