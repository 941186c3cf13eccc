"""The settings of `adapt` and `export` for editors, type checkers and notebooks; `jepakit.config` documents each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel

from jepakit.bundles.manifest import Pooling, Precision, Resize, Standardize
from jepakit.config import AdaptConfig, Domain, ExportConfig, Tracker, ValueRange, ViewsConfig

_Call = TypeVar("_Call", bound=Callable[..., Any])


class AdaptSettings(TypedDict, total=False):
    """The fields of `AdaptConfig` except `images` and `out`, which are separate arguments."""

    backbone: str
    weights: str | Path
    domain: Domain
    views: ViewsConfig | dict[str, Any]
    image_size: int
    resize: Literal["auto"] | Resize
    pooling: Literal["auto"] | Pooling
    standardize: Literal["auto"] | Standardize
    labels: str | Path
    group: str | Path
    tile: int | None
    overlap: int
    min_valid: float
    frame: int | Literal["each"] | None
    value_range: ValueRange | Sequence[float]
    augment_on: Literal["auto", "cpu", "device"]
    cache: str | Path | None
    cache_gb: float
    steps: int | None
    epochs: int | None
    batch_size: int
    micro_batch: int | None
    unfreeze: int | Literal["auto", "none", "all", "lora"]
    lora_rank: int
    norm_statistics: Literal["auto", "frozen", "trained"]
    lamb: float | None
    lr: float | None
    layer_decay: float | None
    projector_lr: float
    weight_decay: float
    warmup: float
    clip_norm: float
    n_slices: int
    projector: Sequence[int]
    anchor: float
    mix: float
    average: Literal["none", "ema", "swa"]
    average_over: float
    precision: Literal["auto", "fp32", "bf16"]
    activation_checkpointing: bool
    compile: bool
    most_skipped: float
    held_out: float
    measure_on: int
    save_every_s: float
    workers: int | None
    processes: int | None
    launcher: Literal["local", "ray"]
    trackers: Tracker | Sequence[Tracker]
    seed: int


class ExportSettings(TypedDict, total=False):
    """The fields of `ExportConfig` except `source` and `out`."""

    which: Literal["best", "last", "start"]
    name: str | None
    precision: Precision
    pooling: Pooling | None
    standardize: Standardize | None
    tokens: bool
    dynamic_size: bool
    verify_images: str | Path | None
    normalize: bool | None
    image_size: int | None
    resize: Resize | None
    opset: int


def takes_adapt_settings(call: _Call) -> _Call:
    """A decorator: the signature lists the fields of `AdaptConfig` in place of `**settings`, for completion and `help`."""
    return _taking(call, AdaptSettings, AdaptConfig)


def takes_export_settings(call: _Call) -> _Call:
    """A decorator: the signature lists the fields of `ExportConfig` in place of `**settings`, for completion and `help`."""
    return _taking(call, ExportSettings, ExportConfig)


def _taking(call: _Call, names: type[Any], config: type[BaseModel]) -> _Call:
    own = [each for each in signature(call).parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    settings = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=_shown(config.model_fields[name].get_default(call_default_factory=True)),
        )
        for name in names.__annotations__
    ]
    call.__signature__ = signature(call).replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
    return call


def _shown(default: object) -> object:
    """The default as the signature shows it: a group of settings, whose repr is long, as `{}`, which changes none of them."""
    return {} if isinstance(default, BaseModel) else default
