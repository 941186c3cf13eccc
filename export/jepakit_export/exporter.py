"""`export`: find the weights, build the `Embedder`, convert, verify, write the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from jepakit._export_source import name_and_weights
from jepakit._extras import versions_of
from jepakit._messages import lines_of
from jepakit._progress import stage
from jepakit._run_files import START
from jepakit._say import say
from jepakit.backbones.backbone import (
    fitting_size,
    is_bundle_weights,
    restore,
    start_backbone,
    stock_preprocess,
    tensors_of,
)
from jepakit.backbones.embedder import Embedder, check_pooling, pool
from jepakit.bundles import golden
from jepakit.bundles.bundle import DATA, GOLDEN, GRAPH, WEIGHTS, Bundle, is_bundle, name_for, open_bundle, write_bundle
from jepakit.bundles.comparison import Comparison
from jepakit.bundles.manifest import (
    Backbone,
    EmbeddingSpec,
    Graph,
    Manifest,
    Precision,
    Preprocess,
    Provenance,
    compute_model_id,
)
from jepakit.config import ExportConfig
from jepakit.errors import ConfigError, ExportError, WriteError
from jepakit.images import Pixels, center_crop
from jepakit.inference.session import Session
from jepakit.run import Run, is_run
from jepakit_export.convert import seal, to_onnx
from jepakit_export.quantize import to_int8
from jepakit_export.verify import (
    BATCH_SIZES,
    Expected,
    calibration_and_check,
    check,
    check_half,
    check_sizes,
    expect,
    halved,
    least_multiple,
    read_users_images,
)

_PACKAGES = ("jepakit", "torch", "timm", "onnx", "onnxscript")


class Source(NamedTuple):
    """A backbone with its weights, and everything the manifest says about it."""

    backbone: Any
    described: Backbone
    preprocess: Preprocess
    embedding: EmbeddingSpec
    provenance: Provenance
    comparison: Comparison | None
    model_id: str | None
    """The `model_id` of the bundle that is exported; None for a timm backbone."""


def export(config: ExportConfig) -> Bundle:
    """Write the bundle that `config` asks for and return it; its source and destination have been checked.

    Raises BackboneError, BundleError, ConfigError or DataError for an unusable source, ExportError if the graph cannot
    be made or ONNX Runtime does not reproduce torch, WriteError if there is no room; no bundle is written then.
    """
    out = Path(config.out)
    source = _source(config)
    users = None if config.verify_images is None else read_users_images(config.verify_images, source.preprocess)
    source = source._replace(embedding=_standardized(source, config, users))
    embedder = Embedder(source.backbone, source.preprocess, source.embedding, tokens=config.tokens).eval()
    images = golden.make_images(source.preprocess)
    inputs = center_crop(images, source.preprocess.size)
    patience = ", for other sizes too: some backbones take minutes" if config.dynamic_size else ""
    stage(f"converting {source.described.name} to ONNX ({config.precision}{patience})")
    expected = expect(embedder, inputs)
    tensors = tensors_of(source.backbone)
    converted = halved(embedder) if config.precision == "fp16" else embedder
    calibrating, others = calibration_and_check(config.precision, inputs, users)
    graph = _graph(config, source, converted, calibrating)
    manifest = _manifest(config, source, tensors, graph)
    with _failing_as(f"the graph of {source.described.name} cannot be made a file"):
        sealed = seal(graph, _metadata(manifest, config.precision))
    stage("verifying it against torch")
    if config.precision == "fp16":
        with _failing_as(f"torch cannot compute {source.described.name} in half precision (use precision=fp32)"):
            check_half(converted, source.preprocess, [inputs] if users is None else [inputs, users])
    opened = partial(Session, sealed.graph, provider="cpu", data=sealed.data)
    session = opened(manifest)
    agreement = check(session, config.precision, expected)
    if others is not None:
        agreement = check(session, config.precision, expect(embedder, others))
    multiple = least_multiple(embedder, source.preprocess) if config.dynamic_size else 1
    manifest = manifest.model_copy(update={"graph": _facts(config, agreement, expected, multiple)})
    if config.dynamic_size:
        check_sizes(opened(manifest), config.precision, embedder, inputs)

    def write_files(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS)
        (folder / GRAPH).write_bytes(sealed.graph)
        if sealed.data is not None:
            (folder / DATA).write_bytes(sealed.data)
        (folder / GOLDEN).write_bytes(golden.pack(golden.Golden(images, expected.vectors)))

    write_bundle(out, manifest, write_files)
    return open_bundle(out)


def _manifest(config: ExportConfig, source: Source, tensors: dict[str, torch.Tensor], graph: ir.Model) -> Manifest:
    """The manifest without the facts about the graph, which is not verified yet."""
    named = {name: value.numpy() for name, value in tensors.items()}
    if config.precision == "int8":  # its rounding and calibrated ranges are part of the space
        held = {name: value.const_value for name, value in graph.graph.initializers.items()}
        named |= {f"graph/{name}": tensor.numpy() for name, tensor in held.items() if tensor is not None}
    kind: Literal["int8", "float"] = "int8" if config.precision == "int8" else "float"
    model_id = compute_model_id(source.described, source.preprocess, source.embedding, named, kind)
    comparison = source.comparison
    if comparison is not None and model_id != source.model_id:
        comparison = comparison.noting(f"measured on vectors of model {source.model_id}, of which these are a variant")
    return Manifest(
        name=config.name or name_for(Path(config.out)),
        model_id=model_id,
        backbone=source.described,
        preprocess=source.preprocess,
        embedding=source.embedding,
        provenance=source.provenance,
        comparison=comparison,
    )


def _facts(config: ExportConfig, agreement: golden.Agreement, expected: Expected, size_multiple: int) -> Graph:
    """What the manifest says about a graph whose agreement with torch was measured."""
    return Graph(
        precision=config.precision,
        opset=config.opset,
        relative_error=agreement.relative_error,
        centred_cosine=agreement.centred_cosine,
        same_neighbour=agreement.same_neighbour,
        batch_sizes=BATCH_SIZES,
        verified_on="golden inputs" if config.verify_images is None else "the user's images",
        tokens=None if expected.tokens is None else (expected.tokens.shape[1], expected.tokens.shape[2]),
        dynamic_size=config.dynamic_size,
        size_multiple=size_multiple,
    )


def _graph(config: ExportConfig, source: Source, embedder: Embedder, images: Pixels) -> ir.Model:
    """The graph in the requested precision; `images` are an example, and calibrate int8."""
    example = torch.from_numpy(images[:2])
    with _failing_as(f"torch cannot export {source.described.name}"):
        graph = to_onnx(embedder, example, opset=config.opset, dynamic_size=config.dynamic_size)
    if config.precision != "int8":
        return graph
    with _failing_as(f"{source.described.name} cannot be quantised"):
        return to_int8(graph, images)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Turn errors in the block, of the libraries' many classes, into one whose message begins with `what`.

    A WriteError for what cannot be written, such as a temporary folder without room; an ExportError otherwise.
    """
    try:
        yield
    except ExportError:
        raise
    except (OSError, SafetensorError) as error:
        folder = tempfile.gettempdir()
        raise WriteError(
            f"{what}: {lines_of(error)[0]}; make room in {folder}, or let TMPDIR name another folder"
        ) from error
    except Exception as error:
        raise ExportError(f"{what}: {lines_of(error)[0]}") from error


def _standardized(source: Source, config: ExportConfig, users: Pixels | None) -> EmbeddingSpec:
    """The embedding's spec with centre and scale measured on the user's images, if requested."""
    if config.standardize is None or config.standardize == source.embedding.standardize:
        return source.embedding
    plain = source.embedding.model_copy(update={"standardize": "none", "center": None, "scale": None})
    if config.standardize == "none":
        return plain
    assert users is not None
    unnormalised = plain.model_copy(update={"normalize": False})
    vectors = expect(Embedder(source.backbone, source.preprocess, unnormalised).eval(), users).vectors
    return plain.standardized_by(vectors, config.standardize)


def _source(config: ExportConfig) -> Source:
    path = Path(config.source)
    if is_run(path):
        return _of_bundle(_of_run(Run(path), config.which if "which" in config.model_fields_set else None), config)
    if is_bundle(path):
        bundle = open_bundle(path)
        _warn_of(bundle.manifest.comparison, "")
        return _of_bundle(bundle, config)
    return _of_timm(config)


def _of_run(run: Run, which: Literal["best", "last", "start"] | None) -> Bundle:
    """One of a finished run's two bundles; `best` follows the verdict: the trained one if better, else the start.

    If `which` is None: the trained one, with a warning if the verdict is not "better".
    """
    start = which == "start" or (which == "best" and run.verdict.word != "better")
    if which == "best":
        chosen = "weights that the run began with" if start else "adapted weights"
        say(f"the verdict is {run.verdict.word}: exports the {chosen}")
    if which is None:
        _warn_of(run.comparison, "; which=best follows it, which=start exports the weights that the run began with")
    return open_bundle(run.path / START) if start else run.bundle


def _warn_of(comparison: Comparison | None, remedy: str) -> None:
    """Warn if the trained weights were measured and the verdict is not "better"."""
    if comparison is not None and comparison.after is not None and comparison.verdict.word != "better":
        say(f"warning: the run's verdict on these weights is {comparison.verdict.word}{remedy}")


def _of_bundle(bundle: Bundle, config: ExportConfig) -> Source:
    manifest = bundle.manifest
    embedding = manifest.embedding
    if config.normalize is not None:
        embedding = embedding.model_copy(update={"normalize": config.normalize})
    backbone = restore(manifest.backbone, load(bundle.read(WEIGHTS)))
    return Source(
        backbone,
        manifest.backbone,
        manifest.preprocess,
        embedding,
        manifest.provenance,
        manifest.comparison,
        manifest.model_id,
    )


def _of_timm(config: ExportConfig) -> Source:
    name, weights = name_and_weights(config.source)
    weights = weights or "pretrained"
    if is_bundle_weights(weights):
        raise ConfigError(
            f"{weights} is a bundle, which says itself how its images are fed and pooled: jepakit export {weights}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `random` is the same backbone each time
        backbone, described = start_backbone(name, weights, config.image_size)
    size = None if config.image_size is None else fitting_size(backbone, config.image_size)
    preprocess = stock_preprocess(backbone, size)
    if config.resize is not None:
        preprocess = preprocess.resized_by(config.resize)
    pooling = config.pooling or "head"
    check_pooling(backbone, name, pooling)
    with torch.inference_mode():
        dim = pool(backbone, torch.zeros(1, preprocess.bands, preprocess.size, preprocess.size), pooling).shape[1]
    embedding = EmbeddingSpec(dim=dim, pooling=pooling, standardize="none", normalize=bool(config.normalize))
    settings = {"source": f"{name}:{Path(weights).name}"}
    provenance = Provenance(config=settings, steps=0, images_seen=0, data_digest=None, versions=versions_of(_PACKAGES))
    return Source(backbone, described, preprocess, embedding, provenance, None, None)


def _metadata(manifest: Manifest, precision: Precision) -> dict[str, str]:
    """The metadata written into model.onnx itself."""
    return {
        "jepakit.name": manifest.name,
        "jepakit.model_id": manifest.model_id,
        "jepakit.preprocess": manifest.preprocess.model_dump_json(),
        "jepakit.embedding": manifest.embedding.model_dump_json(exclude={"center", "scale"}),
        "jepakit.precision": precision,
        "jepakit.license": manifest.backbone.start.license,
    }
