"""The settings of adaptation and export: one class each, however they are given.

The Python call, the command line and the TOML file all use these classes. They are checked before torch is imported, so
that a typo fails at once. Each setting documents what a default of None means; the numbers are the constants below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from jepakit._files import with_home
from jepakit._frozen import Frozen, StrictBools
from jepakit._messages import did_you_mean
from jepakit._timm_names import check_name
from jepakit.bundles.bundle import MANIFEST, is_bundle
from jepakit.bundles.manifest import NAME_PATTERN, Pooling, Precision, Resize, Standardize
from jepakit.errors import ConfigError
from jepakit.sources.table import RULES, is_rule
from jepakit.sources.tiles import Cut

START_WORDS = ("pretrained", "random")
"""Start weights that are not a file: timm's own, and none."""

Domain = Literal["general", "natural", "satellite", "histology", "radiology", "microscopy", "multispectral"]
Fraction = Annotated[float, Field(ge=0, le=1)]
TextOrPath = Annotated[
    str, BeforeValidator(lambda value: with_home(value) if isinstance(value, str | os.PathLike) else value)
]
# Usual display windows of CT, in Hounsfield units.
CT_WINDOWS = {
    "ct-brain": (0.0, 80.0), "ct-soft-tissue": (-160.0, 240.0), "ct-lung": (-1350.0, 150.0), "ct-bone": (-500.0, 1300.0),
}  # fmt: skip
ValueRange = Literal["auto", "file", "ct-brain", "ct-soft-tissue", "ct-lung", "ct-bone"] | tuple[float, float]
_RANGES = ("auto", "file", *CT_WINDOWS)


def chosen_range(value_range: ValueRange) -> tuple[float, float] | None:
    """The range that `value_range` names; None for `auto` and `file`, which depend on the images."""
    return CT_WINDOWS.get(value_range) if isinstance(value_range, str) else value_range


Tracker = Literal["tensorboard", "wandb", "mlflow"]
Unfreeze = Literal["auto", "none", "all"] | Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=10)]

DEFAULT_STEPS = 300
RAMP_STEPS = 10
LAMBDA_PER_VIEW, MOST_LAMBDA = 0.005, 0.5
DEFAULT_BATCH_SIZE = 128
LR_SCRATCH, LR_CONVNET, LR_VIT = 5e-4, 3e-4, 1e-4
LAYER_DECAY = 0.75
LOCAL_SHARE = 96 / 224
"""Side of local views, as a share of the image size."""


def _read_value_range(value: object) -> object:
    """`LOW:HIGH`, as one writes in a shell, as two numbers; anything else unchanged."""
    if not isinstance(value, str) or value in _RANGES:
        return value
    low, _, high = value.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise ValueError(
            f"give {', '.join(_RANGES)}, or LOW:HIGH in the files' units{did_you_mean(value, _RANGES)}"
        ) from None


class _Settings(StrictBools, Frozen):
    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """List the settings in the docstring too, where `help` finds them."""
        lines = (
            f"{name}  ({_default(field)})\n    {' '.join((field.description or '').split())}"
            for name, field in cls.model_fields.items()
        )
        cls.__doc__ = "\n\n".join([cleandoc(cls.__doc__ or ""), *lines])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return (
        f"default: {type(field.default).__name__ + '()' if isinstance(field.default, Frozen) else repr(field.default)}"
    )


class ViewsConfig(_Settings):
    """How views are cut and changed. A domain preset fills in the second half; any value can be overridden."""

    n_global: Annotated[int, Field(ge=1, le=8)] = 2
    """Global views per image, at the image size."""
    n_local: Annotated[int, Field(ge=0, le=16)] = 4
    """Local views per image, at `local_size`. Published: 6."""
    global_area: tuple[Fraction, Fraction] = (0.3, 1.0)
    """Share of the image's area that a global view shows."""
    local_area: tuple[Fraction, Fraction] = (0.05, 0.3)
    """Share of the image's area that a local view shows."""
    local_size: Annotated[int, Field(ge=16)] | None = None
    """Side length of local views, in pixels; None: 96/224 of the image size, rounded to the backbone's patch or stride."""

    @field_validator("global_area", "local_area")
    @classmethod
    def _rising(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1]:
            raise ValueError("give the smallest and the largest share, e.g. [0.3, 1.0]")
        return area

    horizontal_flip: Fraction = 0.5
    """Probability of a left-right flip."""
    vertical_flip: Fraction = 0.0
    """Probability of an upside-down flip."""
    quarter_turns: bool = False
    """Rotate by a random multiple of 90°."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Rotate by up to this angle in either direction; the corners are filled by reflecting the view."""
    brightness: Fraction = 0.3
    """Multiply all values by 1 ± up to this. Brightness, contrast, saturation and hue are changed in four out of five views."""
    contrast: Fraction = 0.3
    """Multiply the distance to the view's mean grey (each band's own mean, unless there are 3) by 1 ± up to this."""
    saturation: Fraction = 0.0
    """Multiply the distance of colours to grey by 1 ± up to this; like the next two, only for 3 bands."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Turn colours by up to this share of the colour circle in either direction; brightness is kept."""
    gray: Fraction = 0.0
    """Probability of losing colour."""
    band_gain: Fraction = 0.0
    """Multiply each band by its own 1 ± up to this."""
    band_offset: Fraction = 0.0
    """Add to each band its own ± up to this share of the full range."""
    blur: Fraction = 0.0
    """Probability of a Gaussian blur, with sigma 0.1 to 2 at 224 px."""
    solarize: Fraction = 0.0
    """Probability of inverting the bright half of the values; only for 3 bands."""

    def check_bands(self, bands: int) -> None:
        """Raise ConfigError when a setting only makes sense for colour images and these are not."""
        if bands == 3:
            return
        for name in ("saturation", "hue", "gray", "solarize"):
            value = getattr(self, name)
            if value:
                raise ConfigError(
                    f"views.{name} = {value:g} needs colour images of 3 bands, these have {bands}: set views.{name} = 0, "
                    "or take a domain that leaves colours alone (radiology for one band, multispectral for several)"
                )


# The meaning of a colour, a stain or a density differs by domain: presets never destroy it.
PRESETS: dict[Domain, dict[str, float | bool]] = {
    "general": {},
    "natural": {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "gray": 0.2,
        "blur": 0.5,
        "solarize": 0.2,
    },
    "satellite": {"vertical_flip": 0.5, "quarter_turns": True},
    "histology": {
        "vertical_flip": 0.5,
        "quarter_turns": True,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.1,
    },
    "radiology": {"horizontal_flip": 0.0, "rotation_degrees": 10.0},
    "microscopy": {"vertical_flip": 0.5, "quarter_turns": True},
    # Band ratios are the signal: each band changes a little, independently of the others.
    "multispectral": {
        "vertical_flip": 0.5,
        "quarter_turns": True,
        "brightness": 0.0,
        "contrast": 0.0,
        "band_gain": 0.1,
        "band_offset": 0.02,
    },
}


class AdaptConfig(_Settings):
    """Settings of `jepakit.adapt`. Only `images` is required.

    "Published" refers to the recipe of the method's paper (arXiv 2511.08544) and its implementations, for training from random
    weights. Where a default differs and no reason is given, it comes from an earlier study, which continued from pretrained
    weights of a MobileNetV2, with one set of values for four sets of images; no comparison with the published value is recorded.
    """

    images: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    """A folder (read recursively), a glob, a file, or a list of paths."""
    out: str | None = None
    """The run's folder; None: runs/<folder>-<date>."""
    backbone: str = "vit_small_patch14_reg4_dinov2.lvd142m"
    """A timm model name, with or without the tag of its weights."""
    weights: TextOrPath = "pretrained"
    """`pretrained` (from the hub, the only network access), `random`, a .safetensors or .pth file, or a bundle."""
    domain: Domain = "general"
    """Preset for the views that leaves the domain's signal intact."""
    views: ViewsConfig = ViewsConfig()
    """How views are cut and changed; values set here override the domain's."""
    image_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Side length, in pixels, of global views and of the exported model; rounded to the patch or stride."""
    resize: Literal["auto"] | Resize = "auto"
    """How an image becomes a square: `shorter` resizes its shorter side and takes the middle, so the ends of a long image are
    not seen; `squash` resizes both sides, so all of it is, distorted; `auto`: as the weights or the bundle that the run
    starts from were made for, nearly always `shorter`. Views are cut from the image as it is resized."""
    pooling: Literal["auto"] | Pooling = "auto"
    """What the embedding pools; `auto`: as the bundle does that the run starts from; else, with labels, whichever of
    `head` and `stages` scores better before training; without, `head`."""
    standardize: Literal["auto", Standardize] = "auto"
    """Centre, or centre and scale, each number of the embedding by the images' own statistics, inside the
    graph; `auto`: as the bundle does that the run starts from, if it does and pools alike; else `scale` for `stages`,
    whose parts differ in magnitude, `center` for `head`."""
    labels: TextOrPath = "auto"
    """`auto`, `folder` or `none`: whether first-level folders are classes; or a CSV, TSV or Parquet file of paths and
    labels, which may cover only some of the images. Labels are used to measure, never to train."""
    group: TextOrPath = "auto"
    """Which images belong together (patient, scene), so that no held-out image has a sibling in training: `auto`
    (a manifest's column, DICOM's PatientID, or a tile's scene), `none` (tiles of a scene still stay together),
    `folder`, or a CSV, TSV or Parquet file."""
    tile: Annotated[int, Field(ge=32)] | None = None
    """Side length, in pixels, of the tiles that large images are cut into; None: images are used whole."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """Overlap of neighbouring tiles, in pixels."""
    min_valid: Fraction = 0.5
    """Tiles with a smaller share of valid (not "no data") area are left out."""
    frame: Annotated[int, Field(ge=0)] | Literal["each"] | None = None
    """For multi-frame files: the number of the frame to use, from 0, or `each`; None: such files are refused."""
    value_range: Annotated[ValueRange, BeforeValidator(_read_value_range)] = "auto"
    """Which values become black and white in images that are not 8-bit: `auto` (measured), `file` (each DICOM
    file's own window), the name of a CT window, or [low, high] in the files' units."""
    augment_on: Literal["auto", "cpu", "device"] = "auto"
    """Where colours are changed and views blurred: in the loader processes, or batched on the training
    device; `auto`: on the device if it is a GPU. It affects only speed."""
    cache: TextOrPath | None = None
    """A folder in which to keep decoded and downscaled images, for files that are slow to read; None: no cache."""
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """Maximum size of `cache`, in GB (10^9 bytes)."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; None: given by `epochs`, else 300 or one epoch, whichever is more. At 300 steps SIGReg is still
    falling: longer runs gain more."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the training images: enough steps for each image to be seen at least this often. None: `steps` decides."""
    batch_size: Annotated[int, Field(ge=2)] = DEFAULT_BATCH_SIZE
    """Images in one SIGReg test, over all processes: the statistic is computed over the whole batch and multiplied by
    its size, so the meaning of λ depends on it. 128 is the smallest that published runs use."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Images that the backbone processes at once, per process; None: the process's whole share of the batch. The gradient
    is exactly that of the whole batch, at the cost of one more forward pass. Set it when memory runs out."""
    unfreeze: Unfreeze | Literal["lora"] = "auto"
    """What trains besides the projector: N, the last N blocks; `auto`: everything from random weights, else a ViT's last 2
    blocks, or the layers at the last resolution of a ConvNet or another hierarchical backbone (Swin); `all`: everything;
    `lora`: low-rank additions to every layer, merged at the end; `none`: nothing, the start is exported. In a short run,
    training more layers does both more good and more harm."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the additions made by `unfreeze = lora`."""
    norm_statistics: Literal["auto", "frozen", "trained"] = "auto"
    """Whether the backbone's BatchNorms keep their stored statistics or learn those of the images; `auto`: kept, except
    when starting from random weights. Re-estimating them on a small set,
    without training, was measured to cost 7 to 9 points."""
    lamb: Annotated[float, Field(gt=0, lt=1)] | None = None
    """λ, the weight of SIGReg; None: 0.005 times the number of views, on which published runs agree, and as many times more
    as the batch is smaller than theirs, 128 images, up to 0.5: SIGReg shrinks with the batch, and collapse would pay."""
    lr: Rate | None = None
    """Learning rate of the backbone; None: 5e-4 from random weights, else 3e-4 for a ConvNet or another hierarchical
    backbone (Swin), 1e-4 for a ViT. 1e-3 gained more on one set and damaged another. Up over 10 steps, then down along a
    cosine to 0 (published: to a thousandth of it). The optimizer is AdamW with betas 0.9 and 0.98."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on `lr` from each layer to the one before it (towards the input); None: 0.75 where all layers of a pretrained
    backbone train, else 1."""
    projector_lr: Rate = 1e-3
    """Learning rate of the projector, which starts from random weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay, on all weights except norms, biases, position embeddings and those that the backbone itself
    exempts. Published: 0.05 for a ViT, 5e-4 for a ResNet."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which only the projector trains and the backbone is frozen (none from random weights): the
    gradient of a random projector would only disturb the backbone."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""
    n_slices: Annotated[int, Field(ge=1)] = 256
    """Random directions of SIGReg, drawn anew at every step. Published: 1024."""
    projector: tuple[Width, Width, Width] = (1024, 1024, 64)
    """Widths of the projector's three layers; the last is K. Having three matters: with two, a point or more was lost.
    Published: 2048, 2048 and 64 to 128."""
    anchor: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of a loss term, 1 - cosine between the features of global views and those that the start gives. It keeps the
    backbone near its start, at the cost of one more forward pass."""
    mix: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the way from the start to the trained weights at which the run's final weights lie: 0.5 halves the change.
    It turned runs that had changed too much into good ones."""
    average: Literal["none", "ema", "swa"] = "none"
    """End with an average of the weights over the last steps: exponential (`ema`) or equally weighted (`swa`). For long runs."""
    average_over: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps, at the end, over which weights are averaged."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the backbone and the projector compute in; their outputs and the loss are always float32. `auto`: bfloat16 on
    a GPU that has it; on a CPU that has it, only in the frozen layers. `bf16`: bfloat16 throughout."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third more work."""
    compile: bool = False
    """Compile the backbone with torch.compile; takes half a minute at the start on an H100. For long runs on a GPU."""

    most_skipped: Fraction = 0.01
    """Share of the images that may be unreadable or refused: each is listed and replaced; if there are more, the run stops."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images kept out of training, to measure on. If there are many, fewer are held out: `measure_on` images,
    or, with labels, those of about 120 groups if that is more."""
    measure_on: Annotated[int, Field(ge=20)] = 2000
    """Maximum number of images to measure on, on each side of the split; more on the held-out side if 3 of every class take more."""
    save_every_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between checkpoints."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; None: the number of cores minus one, at most 8 (16 with a GPU), and fewer if the batches that they
    prepare ahead would take over a quarter of main memory. They affect only speed."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Training processes, which share the batch; None: one per GPU (of this machine, or of the Ray cluster), else one."""
    launcher: Literal["local", "ray"] = "local"
    """What starts the training processes: this machine, or Ray Train on the cluster at RAY_ADDRESS."""
    trackers: tuple[Tracker, ...] = ()
    """Where to log in addition to metrics.jsonl, in files in the run's folder; W&B and MLflow send nothing unless WANDB_MODE
    or MLFLOW_TRACKING_URI says so."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is random."""

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        check_name(name)
        return name

    @field_validator("labels", "group")
    @classmethod
    def _rule_or_file(cls, rule: str) -> str:
        if not is_rule(rule):
            raise ValueError(
                f"no such file, or no table; give a CSV, TSV or Parquet file, or one of {', '.join(RULES)}{did_you_mean(rule, RULES)}"
            )
        return rule

    @field_validator("labels", "group", mode="before")
    @classmethod
    def _rule_or_table(cls, given: object, info: ValidationInfo) -> object:
        if isinstance(given, str | os.PathLike):
            return given
        column = str(info.field_name).removesuffix("s")
        go = "go with the images, list(zip(images, labels)), or into" if column == "label" else "go into"
        raise ValueError(
            f"give {', '.join(RULES)}, or a file; {column}s of your own {go} a CSV of path (0, 1, … for images in memory) "
            f"and {column}"
        )

    @model_validator(mode="after")
    def _tiles_and_values(self) -> Self:
        Cut(self.tile, self.overlap, self.min_valid, self.frame)  # refuses settings that do not go together
        if isinstance(self.value_range, tuple) and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range = {list(self.value_range)}: give low, then high, e.g. [-160, 240]")
        return self

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, trackers: object) -> object:
        return (trackers,) if isinstance(trackers, str) else trackers

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, weights: str) -> str:
        if weights in START_WORDS:
            return weights
        if Path(weights).is_dir() and not is_bundle(Path(weights)):
            inside = Path(weights) / "bundle"
            hint = f": do you mean {inside}?" if is_bundle(inside) else ""
            raise ValueError(f"a folder, but not a bundle (it has no {MANIFEST}){hint}")
        if not Path(weights).exists():
            raise ValueError(
                "no such file; give `pretrained`, `random`, a .safetensors or .pth file, or a bundle"
                + did_you_mean(weights, START_WORDS)
            )
        return weights

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        for name in ("average", "mix", "anchor") if self.unfreeze == "none" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} = {value} for a backbone that unfreeze = none leaves unchanged: leave one of them out"
                )
        return self

    def resolved_views(self) -> ViewsConfig:
        """The domain's preset, overridden by the values that the user set."""
        return ViewsConfig(**{**PRESETS[self.domain], **self.views.model_dump(exclude_unset=True)})

    def resolved(self) -> Self:
        """The same settings with every value of the views spelled out, as a run records them.

        Read back they give the same views, since explicit values win over the domain.
        """
        return self.model_copy(update={"views": self.resolved_views()})


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that --set takes, such as `views.n_local`, from nested ones."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in flattened(value).items()}
        else:
            flat[name] = value
    return flat


def _usable_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            "give at most 128 letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        )
    return name


class ExportConfig(_Settings):
    """Settings of `jepakit.export`."""

    source: str
    """A run, a bundle, or a timm model: NAME, NAME:pretrained, NAME:random or NAME:FILE."""
    out: str
    """The bundle to write."""
    which: Literal["best", "last", "start"] = "last"
    """For a run: `last`, the adapted weights; `start`, those it started from; `best`, whichever the verdict says to keep."""
    name: Annotated[str, AfterValidator(_usable_name)] | None = None
    """The bundle's name, by which clients ask for it; None: the name of its folder."""
    precision: Precision = "fp32"
    """Precision of the graph: `fp16` (for GPUs) halves the file; `int8` (for CPUs) makes a vector space of its own."""
    pooling: Pooling | None = None
    """For a timm model: what the embedding pools; None: `head`. A run keeps the pooling it chose."""
    standardize: Standardize | None = None
    """Centre, or centre and scale, each number by the statistics of `verify_images`; None: neither, or what the run chose."""
    tokens: bool = False
    """Whether to add patch tokens as a second output, `tokens`."""
    dynamic_size: bool = False
    """Whether the graph takes other image sizes too; only where the backbone allows it."""
    verify_images: TextOrPath | None = None
    """Your own images to verify on (and to calibrate int8 with), 16 or more; None: the golden inputs."""
    normalize: bool | None = None
    """Whether to scale vectors to length 1 inside the graph; None: no, or what the bundle says."""
    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    """For a timm model: side length of the images, in pixels; None: the size its weights were trained at."""
    resize: Resize | None = None
    """For a timm model: how an image becomes a square, as in `AdaptConfig`; None: as its weights were trained."""
    opset: Annotated[int, Field(ge=18, le=24)] = 20
    """ONNX opset."""
