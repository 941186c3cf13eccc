"""Which timm architectures work: each exported and held against torch, at 3 and 5 bands, and trained for two steps.

    python benchmarks/architectures.py [--quick | --only NAME ...] [--timeout SECONDS] [--rows FILE] [--out docs/architectures.md]

Each architecture gets random weights, with whatever starts at one value moved off it (a layer scale of 1e-6 would
hide every block behind it) and BatchNorm statistics measured on images (at 0 and 1 they let the images fade away
layer by layer, and a constant is easy to reproduce), at the smallest of 64, 96, 128 pixels that it takes, or at its own
size. At 3 bands the weights are a file given to `jepakit.export`, at 5 bands a bundle, as a run leaves
one. Export itself refuses a graph that misses torch by over 1e-4 at batch sizes 1, 2, 7 or 33. Each goes through it
in a process of its own, so that a crash or 90 s without an answer is a row of the table. In one more, `jepakit.adapt`
trains it from random weights for two steps, all of it, on a few made-up images of that size, 3 bands. About 50 minutes
on one core.
Prints a line for each, and one JSON object as the last line; --out writes the page, --rows keeps the rows in a file and
adds to those it holds: after a change, `--only` measures a few again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import _processes
import jepakit
from _processes import EndedError
from jepakit._run_files import BUNDLE, START
from jepakit.backbones.backbone import fitting_size, start_backbone, stock_preprocess, tensors_of
from jepakit.backbones.embedder import Embedder, pool, pool_all, poolings_of
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, GRAPH, WEIGHTS, write_bundle
from jepakit.bundles.manifest import Backbone, EmbeddingSpec, Manifest, Preprocess, Provenance, compute_model_id
from jepakit.errors import JepakitError
from jepakit.inference.ort import import_ort
from jepakit_export.verify import BATCH_SIZES

onnxruntime = import_ort()

FAMILIES = {
    "BEiT": ("beit_base_patch16_224", "beitv2_base_patch16_224"),
    "BoTNet, HaloNet": ("botnet26t_256", "halonet26t"),
    "CaiT": ("cait_xxs24_224",),
    "CLIP": ("vit_xsmall_patch16_clip_224", "resnet50_clip"),
    "CoaT": ("coat_lite_tiny",),
    "CoAtNet": ("test_coatnet", "coatnet_nano_rw_224"),
    "ConvFormer, CAFormer, PoolFormer": ("convformer_s18", "caformer_s18", "poolformer_s12"),
    "ConViT": ("convit_tiny",),
    "ConvNeXt": ("test_convnext", "convnext_atto", "convnextv2_atto"),
    "CrossViT": ("crossvit_tiny_240",),
    "CSPNet": ("cs3darknet_s",),
    "DaViT": ("davit_tiny",),
    "DeiT": ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    "DenseNet": ("densenet121",),
    "DINOv2": ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    "DINOv3": ("vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"),
    "DLA": ("dla46_c",),
    "DPN": ("dpn48b",),
    "EdgeNeXt": ("edgenext_xx_small",),
    "EfficientFormer": ("efficientformer_l1", "efficientformerv2_s0"),
    "EfficientNet": ("test_efficientnet", "efficientnet_b0", "tf_efficientnetv2_b0"),
    "EfficientViM": ("efficientvim_m1",),
    "EfficientViT": ("efficientvit_b0", "efficientvit_m0"),
    "EVA": ("eva02_tiny_patch14_224",),
    "FasterNet": ("fasternet_t0",),
    "FastViT": ("fastvit_t8",),
    "FlexiViT": ("flexivit_small",),
    "FocalNet": ("focalnet_tiny_srf",),
    "GCViT": ("gcvit_xxtiny",),
    "GhostNet": ("ghostnet_050", "ghostnetv3_050"),
    "HGNet": ("hgnetv2_b0",),
    "Hiera": ("hiera_tiny_224", "sam2_hiera_tiny"),
    "HRNet": ("hrnet_w18_small",),
    "Inception": ("inception_v3",),
    "InceptionNeXt": ("inception_next_atto",),
    "LeViT": ("levit_128s", "levit_conv_128s"),
    "MambaOut": ("test_mambaout", "mambaout_femto"),
    "MaxViT": ("test_maxvit", "maxvit_pico_rw_256"),
    "MLP-Mixer": ("mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224"),
    "MobileNet": (
        "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobilenetv4_hybrid_medium_075",
    ),
    "MobileOne": ("mobileone_s0",),
    "MobileViT": ("mobilevit_xxs", "mobilevitv2_050"),
    "MViTv2": ("mvitv2_tiny",),
    "NaFlexViT": ("naflexvit_base_patch16_gap",),
    "NesT": ("nest_tiny",),
    "NextViT": ("nextvit_small",),
    "NFNet": ("test_nfnet", "eca_nfnet_l0"),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384",),
    "PiT": ("pit_ti_224",),
    "PVT": ("pvt_v2_b0",),
    "RegNet": ("regnetx_002", "regnety_002"),
    "RepVGG": ("repvgg_a0",),
    "RepViT": ("repvit_m0_9",),
    "Res2Net": ("res2net50_48w_2s",),
    "ResNeSt": ("resnest14d",),
    "ResNet": ("test_resnet", "resnet18", "resnetv2_18", "resnet50"),
    "ResNeXt": ("resnext26ts", "resnext50_32x4d"),
    "ReXNet": ("rexnet_100",),
    "SENet": ("legacy_seresnet18", "seresnext26ts", "skresnet18"),
    "SHViT": ("shvit_s1",),
    "SigLIP": ("vit_base_patch16_siglip_224",),
    "StarNet": ("starnet_s050",),
    "SwiftFormer": ("swiftformer_xs",),
    "Swin": ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
    "TinyViT": ("tiny_vit_5m_224",),
    "Twins": ("twins_svt_small", "twins_pcpvt_small"),
    "VGG": ("vgg11", "vgg11_bn"),
    "ViT": ("test_vit", "vit_tiny_patch16_224", "vit_little_patch16_reg4_gap_256", "vit_small_patch32_224"),
    "ViT, hybrid": ("vit_tiny_r_s16_p8_224",),
    "ViT, relative positions": ("vit_relpos_small_patch16_224",),
    "VOLO": ("volo_d1_224",),
    "VoVNet": ("ese_vovnet19b_slim_dw",),
    "Xception": ("xception41",),
    "XCiT": ("xcit_nano_12_p16_224",),
}  # fmt: skip
"""The smallest of each kind; two of a family if they are built differently."""
QUICK = ("test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_maxvit", "beit_base_patch16_224")
BANDS = (3, 5)
SIZES = (64, 96, 128, None)
"""Pixels a side, tried in turn; None: the size of the architecture's own weights."""
TIMEOUT_S = 90
TRAIN_IMAGES, TRAIN_BATCH, TRAIN_STEPS = 20, 8, 2
LEAST_SPREAD = 1e-3
"""How far apart vectors of different images must be, as a share of their largest value, for agreement to mean much."""
PACKAGES = ("jepakit", "timm", "torch", "onnx", "onnxscript")


class Row(NamedTuple):
    """What one architecture did with one number of bands; `problem` says in words why it does not work."""

    name: str
    bands: int
    size: int = 0
    poolings: tuple[str, ...] = ()
    relative_error: float | None = None
    """Largest difference from torch over the largest value, at the worst batch size."""
    spread: float | None = None
    """Largest difference of a vector from the mean vector over the largest value."""
    file_mb: float | None = None
    cpu_s: float | None = None
    """CPU seconds of the whole export: building, converting, and comparing at every batch size."""
    problem: str | None = None
    training: str | None = None
    """Whether it trains: `yes`, and what did not move, or why it does not; None: not tried."""

    @property
    def trains(self) -> bool:
        return self.training is not None and self.training.startswith("yes")


class Case(NamedTuple):
    """A backbone with random weights, its preprocessing, and the requested image size (None: its own)."""

    backbone: Any
    described: Backbone
    spec: Preprocess
    asked: int | None


def measure(name: str, bands: int) -> Row:
    """Build, export and compare one architecture."""
    torch.manual_seed(0)
    row = Row(name, bands)
    try:
        case = smallest(name, bands)
        row = row._replace(size=case.spec.size, poolings=poolings_of(case.backbone))
        perturb(case.backbone, case.spec)
        check_poolings(case.backbone, case.spec)
        return _exported(row, case)
    except Exception as error:  # whatever happened is this row's answer
        return row._replace(problem=told(error))


def smallest(name: str, bands: int) -> Case:
    """The architecture with random weights at the first of `SIZES` at which torch can run it."""
    for size in SIZES:
        try:
            backbone, described = start_backbone(name, "random", size, bands)
            side = None if size is None else fitting_size(backbone, size)
            spec = with_bands(stock_preprocess(backbone, side), bands)
            with torch.inference_mode():
                backbone(torch.zeros(1, bands, spec.size, spec.size))
        except Exception:  # each family refuses a size in its own way
            if size is None:
                raise
        else:
            return Case(backbone, described, spec, size)
    raise AssertionError("SIZES ends in None")


def with_bands(spec: Preprocess, bands: int) -> Preprocess:
    """The same for another number of 8-bit bands, repeating the mean and std of the three in turn."""
    turns = [band % spec.bands for band in range(bands)]
    changes = {
        "bands": bands,
        "mean": tuple(spec.mean[turn] for turn in turns),
        "std": tuple(spec.std[turn] for turn in turns),
    }
    return Preprocess(**(spec.model_dump() | changes))


@torch.no_grad()
def perturb(backbone: nn.Module, spec: Preprocess) -> None:
    """Randomise everything that starts at a constant, and give BatchNorm the statistics of images."""
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        # Weak branches, as after training: at 1 every layer adds to the rounding errors, up to 50 % in an
        # EfficientNetV2, where torch no longer agrees with itself.
        norm.weight.mul_(0.25)
    for parameter in backbone.parameters():
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    # Not the golden images, on which the graph is compared.
    images = golden.synthetic_images(16, spec.size, spec.bands, seed=1)
    Embedder(backbone, spec, EmbeddingSpec(dim=1, pooling="head", standardize="none"))(torch.from_numpy(images))
    for norm in norms:
        norm.eval()
        if norm.running_var is not None:
            # What hardly varies on these few images would be amplified on others.
            norm.running_var.clamp_(min=0.1 * norm.running_var.mean())


def check_poolings(backbone: Any, spec: Preprocess) -> None:
    """Check that every pooling the backbone claims gives one finite vector per image, tokens the right way round."""
    images = torch.rand(2, spec.bands, spec.size, spec.size)
    for pooling in poolings_of(backbone):
        try:
            with torch.inference_mode():
                vectors = pool(backbone, images, pooling)
        except Exception as error:
            raise RuntimeError(f"pooling {pooling}: {told(error)}") from error
        wanted = backbone.num_features if pooling in ("cls", "mean") else vectors.shape[-1]
        if vectors.shape != (2, wanted) or not vectors.isfinite().all():
            raise RuntimeError(f"pooling {pooling}: {list(vectors.shape)} instead of [2, {wanted}], or not finite")
    if "stages" in poolings_of(backbone):
        with torch.inference_mode():
            both = pool_all(backbone, images, ("head", "stages"))
            if not all(torch.equal(vectors, pool(backbone, images, pooling)) for pooling, vectors in both.items()):
                raise RuntimeError("poolings head and stages of one pass are not those of two")


def _exported(row: Row, case: Case) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if row.bands == 3:
            file = folder / "weights.safetensors"
            save_file(tensors_of(case.backbone), file)
            source, size = f"{row.name}:{file}", case.asked
        else:
            write_start(folder / "start", case)
            source, size = str(folder / "start"), None
        start = time.process_time()
        bundle = jepakit.export(source, folder / "bundle", image_size=size)
        cpu_s = time.process_time() - start
        vectors = golden.unpack(bundle.read(GOLDEN)).vectors
        file_mb = len(bundle.read(GRAPH)) / 1e6
    assert bundle.manifest.graph is not None
    spread = float(np.abs(vectors - vectors.mean(axis=0)).max() / np.abs(vectors).max())
    return row._replace(
        relative_error=bundle.manifest.graph.relative_error,
        spread=spread,
        file_mb=file_mb,
        cpu_s=cpu_s,
        problem=None if spread >= LEAST_SPREAD else f"nothing is proven: its vectors differ by {spread:.1g} only",
    )


def write_start(path: Path, case: Case) -> None:
    """Write a bundle of the backbone without a graph, as a run leaves it behind."""
    tensors = tensors_of(case.backbone)
    with torch.inference_mode():
        dim = pool(case.backbone, torch.zeros(1, case.spec.bands, case.spec.size, case.spec.size), "head").shape[1]
    embedding = EmbeddingSpec(dim=dim, pooling="head", standardize="none")
    arrays = {name: value.numpy() for name, value in tensors.items()}
    manifest = Manifest(
        name="start",
        backbone=case.described,
        preprocess=case.spec,
        embedding=embedding,
        model_id=compute_model_id(case.described, case.spec, embedding, arrays),
        provenance=Provenance(config={}, steps=0, images_seen=0, data_digest=None, versions={}),
    )
    write_bundle(path, manifest, lambda folder: save_file(tensors, folder / WEIGHTS))


def train(name: str, bands: int) -> Row:
    """Two optimizer steps by `jepakit.adapt`, which also measures before and after, and which weights they moved."""
    row = Row(name, bands)
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            return row._replace(training=_trained(name, bands, Path(folder)))
    except Exception as error:  # whatever happened is this row's answer
        return row._replace(problem=told(error))


def _trained(name: str, bands: int, folder: Path) -> str:
    torch.manual_seed(0)
    case = smallest(name, bands)
    size = case.spec.size
    (folder / "images").mkdir()
    for number, pixels in enumerate(golden.synthetic_images(TRAIN_IMAGES, size, bands, seed=2)):
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
    run = jepakit.adapt(
        folder / "images",
        out=folder / "run",
        backbone=name,
        weights="random",
        image_size=size,
        labels="none",
        steps=TRAIN_STEPS,
        batch_size=TRAIN_BATCH,
        views={"n_global": 2, "n_local": 1},
        projector=(32, 32, 8),
        n_slices=16,
        workers=0,
    )
    last = run.metrics()[-1]
    if not (math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])):
        raise RuntimeError(f"loss {last['loss']}, gradient norm {last['grad_norm']}")
    start, end = (load_file(run.path / part / WEIGHTS) for part in (START, BUNDLE))
    still = {key for key, value in start.items() if torch.equal(value, end[key])}
    means = {key for key in start if key.endswith("running_mean")}
    if means & still:
        raise RuntimeError(f"{len(means & still)} of {len(means)} BatchNorms kept their statistics")
    weights = {key for key, _ in case.backbone.named_parameters()}
    if 2 * len(weights & still) > len(weights):
        raise RuntimeError(f"{len(weights & still)} of {len(weights)} weights did not move")
    return f"yes, all but {len(weights & still)} of {len(weights)} weights moved" if weights & still else "yes"


def told(error: Exception) -> str:
    """One line about the error, naming its class if the message isn't the product's own."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if isinstance(error, JepakitError) else f"{type(error).__name__}: {line}"


Measure = Callable[[str, int], Row]


def isolated(name: str, bands: int, *, measure: Measure = measure, timeout_s: float = TIMEOUT_S) -> Row:
    """Run `measure` in its own process; a crash or no answer in time is a row as well."""
    modules = ["jepakit_export", "jepakit_training.loop"]
    try:
        row: Row = _processes.isolated(measure, name, bands, preload=modules, timeout_s=timeout_s)
    except EndedError as error:
        return Row(name, bands, problem=str(error))
    return row


class Results(NamedTuple):
    """Rows by architecture and bands, and the versions they were measured with."""

    versions: dict[str, str]
    rows: dict[tuple[str, int], Row]


def versions() -> dict[str, str]:
    """Versions of everything involved; ONNX Runtime is asked directly, as its package has several names."""
    packages = {package: metadata.version(package) for package in PACKAGES}
    return packages | {"onnxruntime": onnxruntime.__version__, "Python": platform.python_version()}


def load_results(file: Path | None) -> Results:
    """The rows of `file` that were measured with the same versions; none without a file."""
    now = versions()
    if file is None or not file.exists():
        return Results(now, {})
    stored = json.loads(file.read_text())
    rows = [Row(**row | {"poolings": tuple(row["poolings"])}) for row in stored["rows"]]
    return Results(now, {(row.name, row.bands): row for row in rows} if stored["versions"] == now else {})


def as_json(results: Results) -> str:
    return json.dumps({"versions": results.versions, "rows": [row._asdict() for row in results.rows.values()]})


class Both(NamedTuple):
    """An architecture's rows, one for each of `BANDS`."""

    family: str
    rows: tuple[Row, ...]

    @property
    def works(self) -> bool:
        return all(row.problem is None for row in self.rows)


def _error(row: Row) -> str:
    return "**no**" if row.problem is not None else f"{row.relative_error:.1e}"


def _trains(row: Row) -> str:
    if row.training is None or row.trains:
        return row.training or ""
    return f"**no**: {shorten(row.training, 80, placeholder=' …')}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


COLUMNS: tuple[tuple[str, Callable[[Both], str]], ...] = (
    ("family", lambda both: both.family),
    ("architecture", lambda both: f"`{both.rows[0].name}`"),
    ("pixels", lambda both: str(both.rows[0].size or "")),
    ("error, 3 bands", lambda both: _error(both.rows[0])),
    ("error, 5 bands", lambda both: _error(both.rows[1])),
    ("file, MB", lambda both: _number(both.rows[0].file_mb, 1)),
    ("export, CPU s", lambda both: _number(both.rows[0].cpu_s, 1)),
    ("trains", lambda both: _trains(both.rows[0])),
    ("poolings", lambda both: ", ".join(both.rows[0].poolings)),
)
"""Heading and cell of each column of the page."""


def page(results: Results, command: str) -> str:
    """The page in Markdown: how many work, what does not and why, and the table."""
    listed = [
        Both(family, tuple(results.rows[name, bands] for bands in BANDS))
        for family, names in sorted(FAMILIES.items(), key=lambda item: item[0].lower())
        for name in names
        if all((name, bands) in results.rows for bands in BANDS)
    ]
    return "\n".join([*_summary(listed, results.versions, command), *_problems(listed), *_table(listed), ""])


def _summary(listed: list[Both], versions: dict[str, str], command: str) -> list[str]:
    fine = [both for both in listed if both.works]
    tried = [both.rows[0] for both in listed if both.rows[0].training is not None]
    worst = max((row.relative_error or 0 for both in fine for row in both.rows), default=0)
    batches = f"{', '.join(map(str, BATCH_SIZES[:-1]))} and {BATCH_SIZES[-1]}"
    return [
        "# Which backbones work",
        "",
        f"**{len(fine)} of {len(listed)} timm architectures export, and ONNX Runtime gives torch's vectors, with 3 and "
        f"with 5 bands**: at batch sizes {batches} by a relative error of at most {worst:.1e} (1e-4 is the most that "
        "`jepakit export` lets through in fp32).",
        "",
        *([f"**{sum(row.trains for row in tried)} of {len(tried)} train.**", ""] if tried else []),
        f"Measured with {', '.join(f'{name} {version}' for name, version in versions.items())}, on a CPU, by",
        "",
        f"    {command}",
        "",
        "Weights are random, with norms, biases and layer scales moved off their starting values and BatchNorm statistics "
        "measured on images, so that agreement is not met trivially; pretrained weights change none of the graph. The smallest variant stands for "
        "its family, at a small image size; larger ones are built of the same layers. The error is the largest difference "
        "to torch over the largest value, of the pooling `head`; every pooling listed was computed by torch and has "
        "the right shape. Training is two optimizer steps of `jepakit adapt` from random weights at 3 bands, everything "
        f"trained, BatchNorm on its batches, batches of {TRAIN_BATCH} images with 2 global views and 1 local one, at this "
        "size: the loss is finite and the weights move. File, CPU seconds (building, converting, comparing at all batch sizes; one thread) and poolings "
        "are those at 3 bands.",
        "",
    ]


def _problems(listed: list[Both]) -> list[str]:
    found = [row for both in listed for row in both.rows if row.problem is not None]
    lines = [f"- `{row.name}`, {row.bands} bands: {row.problem}" for row in found]
    lines += [
        f"- `{both.rows[0].name}`, training: {both.rows[0].training}"
        for both in listed
        if both.rows[0].training is not None and not both.rows[0].trains
    ]
    return ["## What does not, and why", "", *lines, ""] if lines else []


def _table(listed: list[Both]) -> list[str]:
    lines = [[heading for heading, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[cell(both) for _, cell in COLUMNS] for both in listed]
    return ["## Every architecture", "", *(f"| {' | '.join(line)} |" for line in lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    chosen.add_argument("--only", nargs="*", metavar="NAME", help="only these of the list; none: only write the page")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="more on a busy machine")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON file of rows to add to; made if missing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Markdown page to write")
    options = parser.parse_args()
    every = [name for names in FAMILIES.values() for name in names]
    names = QUICK if options.quick else every if options.only is None else options.only
    if strangers := sorted(set(names) - set(every)):
        parser.error(f"{', '.join(strangers)}: not in the list of this file")
    results = load_results(options.rows)
    for number, name in enumerate(names, start=1):
        for bands in BANDS:
            row = isolated(name, bands, timeout_s=options.timeout)
            if bands == BANDS[0]:
                trained = isolated(name, bands, measure=train, timeout_s=options.timeout)
                row = row._replace(training=trained.training or trained.problem)
                print(f"{number}/{len(names)} {name}, trains: {row.training}", flush=True)
            results.rows[name, bands] = row
            outcome = row.problem or f"error {row.relative_error:.1e}, spread {row.spread:.1e}, {row.cpu_s:.0f} CPU s"
            print(f"{number}/{len(names)} {name}, {bands} bands, {row.size} px: {outcome}", flush=True)
            if options.rows is not None:
                options.rows.write_text(as_json(results))
    if options.out is not None:
        quick = ["--quick"] if options.quick else []
        command = shlex.join(["python", "benchmarks/architectures.py", *quick, "--out", str(options.out)])
        options.out.write_text(page(results, command), encoding="utf-8")
    print(as_json(results))


if __name__ == "__main__":
    main()
