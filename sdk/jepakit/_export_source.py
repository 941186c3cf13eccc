"""Checks of the source of `export` that need no torch: a run, a bundle, or a timm name."""

from __future__ import annotations

import os
from pathlib import Path

from jepakit._files import reason_of, with_home
from jepakit._messages import did_you_mean
from jepakit._run_files import CONFIG
from jepakit._timm_names import check_name, known_names
from jepakit.bundles.bundle import MANIFEST, Bundle, is_bundle, open_bundle
from jepakit.bundles.manifest import Standardize
from jepakit.config import START_WORDS, ExportConfig
from jepakit.errors import BackboneError, ConfigError, DataError
from jepakit.run import Run, is_run


def name_and_weights(source: str) -> tuple[str, str]:
    """Split NAME or NAME:WEIGHTS of a timm backbone into its two parts, expanding a leading `~` of a file."""
    name, _, weights = source.partition(":")
    return name, with_home(weights)


def check_source(config: ExportConfig) -> None:
    """Raise DataError, BackboneError, BundleError or ConfigError for an invalid source, or one that the settings do not
    fit."""
    path = Path(config.source)
    if is_run(path):
        _check_fits(Run(path).bundle, config)
        return
    bundle = open_bundle(path) if is_bundle(path) else None  # first: it reports a folder that this user may not read
    if "which" in config.model_fields_set:
        raise ConfigError(
            f"which = {config.which!r} chooses weights of a run, but {path} is not a run: leave which out"
        )
    if bundle is not None:
        _check_fits(bundle, config)
        return
    _check_standardize(config, "none")
    name, weights = name_and_weights(config.source)
    if path.exists():
        timm = f"; for timm's backbone say {path}:pretrained" if name.partition(".")[0] in known_names() else ""
        raise DataError(f"{path} is neither a run nor a bundle: it has no {CONFIG} and no {MANIFEST}{timm}")
    if os.sep in name:
        raise DataError(f"{config.source} does not exist: name a run, a bundle, or one of timm's backbones")
    check_name(name)
    if weights and weights not in START_WORDS:
        _check_there(name, weights)


def _check_there(name: str, weights: str) -> None:
    """Raise BackboneError for weights that do not exist, or that may not be looked for."""
    try:
        Path(weights).stat()
    except PermissionError as error:
        raise BackboneError(f"{weights} cannot be read ({reason_of(error)}): let this user read it") from None
    except (OSError, ValueError):
        raise BackboneError(
            f"{weights} does not exist{did_you_mean(weights, START_WORDS)}; say {name}:pretrained, {name}:random or {name}:FILE"
        ) from None


def _check_fits(bundle: Bundle, config: ExportConfig) -> None:
    """Raise ConfigError for settings that would export another model than the one that was measured."""
    preprocess, embedding = bundle.manifest.preprocess, bundle.manifest.embedding
    if config.image_size not in (None, preprocess.size):
        raise ConfigError(f"{bundle.path} was measured at {preprocess.size} px: image_size is for timm names only")
    if config.resize not in (None, preprocess.resize):
        raise ConfigError(
            f"{bundle.path} was measured with resize {preprocess.resize}: adapt with resize={config.resize} instead"
        )
    if config.pooling not in (None, embedding.pooling):
        raise ConfigError(
            f"{bundle.path} was measured with pooling {embedding.pooling}: adapt with pooling={config.pooling} instead"
        )
    _check_standardize(config, embedding.standardize)


def _check_standardize(config: ExportConfig, measured: Standardize) -> None:
    """Raise ConfigError if a centre or scale has to be measured, but there are no images to measure it on."""
    if config.standardize not in (None, "none", measured) and config.verify_images is None:
        raise ConfigError(
            f"standardize = {config.standardize!r} measures the domain's images: give some with verify_images=DIR"
        )
