"""`export`: find the weights, build the `Embedder`, convert, verify, write the bundle."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file

from jepakit import golden
from jepakit.backbone import (
    Embedder,
    pool,
    restore,
    round_size,
    size_multiple,
    start_backbone,
    stock_preprocess,
)
from jepakit.bundle import (
    GOLDEN,
    GRAPH,
    MANIFEST,
    WEIGHTS,
    Backbone,
    Bundle,
    EmbeddingSpec,
    Graph,
    Manifest,
    Preprocess,
    Provenance,
    compute_model_id,
    name_for,
    open_bundle,
    write_bundle,
)
from jepakit.config import ExportConfig
from jepakit.errors import BundleError, ConfigError, DataError, ExportError
from jepakit.evaluate import Comparison
from jepakit.images import centre_crop
from jepakit.run import BUNDLE, CONFIG, START
from jepakit_export.convert import to_onnx
from jepakit_export.verify import BATCH_SIZES, check, torch_vectors

_PACKAGES = ("jepakit", "torch", "timm", "onnx", "onnxscript")


class Source(NamedTuple):
    """A backbone with its weights, and all the manifest says of it."""

    backbone: Any
    described: Backbone
    preprocess: Preprocess
    embedding: EmbeddingSpec
    provenance: Provenance
    comparison: Comparison | None


def export(config: ExportConfig) -> Bundle:
    """Write the bundle that `config` asks for and return it.

    Raises BackboneError, BundleError or ConfigError for an unusable source, ExportError when ONNX Runtime
    does not reproduce torch; then nothing is written.
    """
    out = Path(config.out)
    if out.exists():
        raise BundleError(f"{out} already exists, and a bundle is never overwritten: remove it or name another --out")
    source = _source(config)
    embedder = Embedder(source.backbone, source.preprocess, source.embedding).eval()
    images = golden.make_images(source.preprocess)
    inputs = centre_crop(images, source.preprocess.size)
    expected = golden.Golden(images, torch_vectors(embedder, inputs))
    tensors = {name: value.detach().cpu().contiguous() for name, value in source.backbone.state_dict().items()}
    manifest = Manifest(
        name=config.name or name_for(out),
        model_id=compute_model_id(
            source.described,
            source.preprocess,
            source.embedding,
            {name: value.numpy() for name, value in tensors.items()},
        ),
        backbone=source.described,
        preprocess=source.preprocess,
        embedding=source.embedding,
        provenance=source.provenance,
        comparison=source.comparison,
    )
    try:
        graph = to_onnx(embedder, torch.from_numpy(inputs[:2]), opset=config.opset, metadata=_stamp(manifest))
    except ExportError:
        raise
    except Exception as error:  # the exporter wraps whatever went wrong in classes of its own
        raise ExportError(
            f"torch cannot export {source.described.name}: {str(error).strip().splitlines()[0]}"
        ) from error
    worst = check(graph, manifest, expected)
    manifest = manifest.model_copy(
        update={"graph": Graph(precision="fp32", opset=config.opset, relative_error=worst, batch_sizes=BATCH_SIZES)}
    )

    def write_files(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS)
        (folder / GRAPH).write_bytes(graph)
        (folder / GOLDEN).write_bytes(golden.pack(expected))

    write_bundle(out, manifest, write_files)
    return open_bundle(out)


def _source(config: ExportConfig) -> Source:
    path = Path(config.source)
    if (path / CONFIG).is_file():
        return _of_run(path, config)
    if (path / MANIFEST).is_file():
        return _of_bundle(open_bundle(path), config)
    if path.is_dir():
        raise DataError(f"{path} is neither a run nor a bundle: it has no {CONFIG} and no {MANIFEST}")
    return _of_timm(config)


def _of_run(path: Path, config: ExportConfig) -> Source:
    if not (path / BUNDLE).is_dir():
        raise BundleError(f"{path} has not finished: run its `jepakit adapt` command again to go on")
    return _of_bundle(open_bundle(path / (START if config.which == "start" else BUNDLE)), config)


def _of_bundle(bundle: Bundle, config: ExportConfig) -> Source:
    manifest = bundle.manifest
    if config.image_size not in (None, manifest.preprocess.size):
        raise ConfigError(
            f"{bundle.path} was measured at {manifest.preprocess.size} px: --image-size is for timm names only"
        )
    embedding = manifest.embedding
    if config.pooling not in (None, embedding.pooling):
        raise ConfigError(
            f"{bundle.path} was measured with pooling {embedding.pooling}: adapt with --pooling {config.pooling} instead"
        )
    if config.normalize is not None:
        embedding = embedding.model_copy(update={"normalize": config.normalize})
    backbone = restore(manifest.backbone, load(bundle.read(WEIGHTS)))
    return Source(backbone, manifest.backbone, manifest.preprocess, embedding, manifest.provenance, manifest.comparison)


def _of_timm(config: ExportConfig) -> Source:
    name, _, weights = config.source.partition(":")
    backbone, described = start_backbone(name, weights or "pretrained", config.image_size)
    size = None if config.image_size is None else round_size(config.image_size, size_multiple(backbone))
    preprocess = stock_preprocess(backbone, size)
    pooling = config.pooling or "head"
    with torch.inference_mode():
        dim = pool(backbone, torch.zeros(1, preprocess.bands, preprocess.size, preprocess.size), pooling).shape[1]
    embedding = EmbeddingSpec(dim=dim, pooling=pooling, standardize="none", normalize=bool(config.normalize))
    told = {
        "source": f"{name}:{weights or 'pretrained'}"
        if weights in ("", "pretrained", "random")
        else f"{name}:{Path(weights).name}"
    }
    versions = {package: metadata.version(package) for package in _PACKAGES}
    provenance = Provenance(config=told, steps=0, images_seen=0, data_digest=None, versions=versions)
    return Source(backbone, described, preprocess, embedding, provenance, None)


def _stamp(manifest: Manifest) -> dict[str, str]:
    return {
        "jepakit.name": manifest.name,
        "jepakit.model_id": manifest.model_id,
        "jepakit.preprocess": manifest.preprocess.model_dump_json(),
        "jepakit.license": manifest.backbone.start.license,
    }
