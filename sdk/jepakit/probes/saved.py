"""Reads saved probes: safetensors, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jepakit._files import as_path
from jepakit.errors import ConfigError, DataError
from jepakit.probes.given import Labels
from jepakit.probes.knn import KNNProbe
from jepakit.probes.linear import LinearProbe
from jepakit.probes.probe import HEADER

_KINDS: dict[str, type[LinearProbe] | type[KNNProbe]] = {"linear": LinearProbe, "knn": KNNProbe}
_HEADER_FIELDS = ("kind", "params", "classes", "classes_dtype", "model_id", "columns")


def load_probe(path: str | Path) -> LinearProbe | KNNProbe:
    """Read a saved probe of either kind; raises DataError for a file that is missing or not a probe."""
    from safetensors import SafetensorError, safe_open

    path = as_path(path, "path")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        kind, params = header["kind"], header["params"]
        unknown = _unknown(kind, header)
        if not unknown:
            probe = _KINDS[kind](**params)
            probe.classes_, probe.model_id_ = _stored_classes(header), _stored_space(header)
            probe.fitted_on_ = arrays.pop("fitted_on")
            probe._restore(arrays)
            if "columns" in header:
                probe.feature_names_in_ = np.array(header["columns"], dtype=object)
                if probe.feature_names_in_.shape != (probe.n_features_in_,):
                    raise ValueError("its columns do not fit its arrays")
            if not (strange := arrays.keys() - probe._arrays().keys()):
                return probe
            unknown = f"a {type(probe).__name__} with {min(strange)[:40]!r}"
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: make it with probe.save or `jepakit probe fit`") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError, OSError):
        whose = " of this version of jepakit" if is_probe(path) else ""
        raise DataError(
            f"{path} is not a saved probe{whose}: make one with probe.save or `jepakit probe fit … --out FILE.safetensors`"
        ) from None
    raise DataError(f"{path} holds {unknown}, unknown to this jepakit: upgrade jepakit, or fit the probe again")


def is_probe(path: Path) -> bool:
    """Whether a file is a saved probe, of this version or another, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _unknown(kind: str, header: dict[str, Any]) -> str:
    """What a saved probe has that this version cannot read, in words; empty if nothing."""
    if kind not in _KINDS:
        return f"a probe of kind {kind[:40]!r}"
    strange = [f"the parameter {name[:40]!r}" for name in header["params"] if name not in _KINDS[kind]().get_params()]
    strange += [repr(name[:40]) for name in header if name not in _HEADER_FIELDS]
    if not strange:
        try:
            _KINDS[kind](**header["params"])._check_params()
        except ConfigError as error:
            strange = [str(error).partition(":")[0]]
    return f"a {_KINDS[kind].__name__} with {strange[0]}" if strange else ""


def _stored_classes(header: dict[str, Any]) -> Labels:
    """The classes in their original dtype; ValueError for one that no probe has."""
    dtype = header["classes_dtype"]
    if dtype is not None and np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"classes of dtype {dtype}")
    return np.array(header["classes"], dtype)


def _stored_space(header: dict[str, Any]) -> str | None:
    """The model_id of the vectors; None if they were not embeddings."""
    model_id = header["model_id"]
    if model_id is None or isinstance(model_id, str):
        return model_id
    raise TypeError(f"a model_id of type {type(model_id).__name__}")
