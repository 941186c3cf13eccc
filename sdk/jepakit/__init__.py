"""jepakit: adapt an image backbone to your own images, export it, serve it, probe it.

Importing it is light: torch, Pillow, Ray and the like are imported by the call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepakit import config as config
    from jepakit import errors as errors
    from jepakit._frontdoor import adapt as adapt
    from jepakit._frontdoor import dry_run as dry_run
    from jepakit._frontdoor import dry_sweep as dry_sweep
    from jepakit._frontdoor import export as export
    from jepakit._frontdoor import inspect as inspect
    from jepakit._frontdoor import sweep as sweep
    from jepakit._sweep import Sweep as Sweep
    from jepakit._sweep import open_sweep as open_sweep
    from jepakit.bundles.bundle import Bundle as Bundle
    from jepakit.bundles.bundle import open_bundle as open_bundle
    from jepakit.bundles.comparison import Comparison as Comparison
    from jepakit.bundles.comparison import Verdict as Verdict
    from jepakit.client import AsyncClient as AsyncClient
    from jepakit.client import Client as Client
    from jepakit.client import ModelInfo as ModelInfo
    from jepakit.embeddings import Embeddings as Embeddings
    from jepakit.errors import JepakitError as JepakitError
    from jepakit.evaluation.compare import compare as compare
    from jepakit.inference.session import Model as Model
    from jepakit.inference.session import load as load
    from jepakit.inspection import Inspection as Inspection
    from jepakit.probes import KNNProbe as KNNProbe
    from jepakit.probes import LinearProbe as LinearProbe
    from jepakit.probes import ProbeReport as ProbeReport
    from jepakit.probes import load_probe as load_probe
    from jepakit.run import DryRun as DryRun
    from jepakit.run import Run as Run
    from jepakit.run import open_run as open_run

__version__ = "0.1.0"

_HOME = {
    "AsyncClient": "client",
    "Bundle": "bundles.bundle",
    "Client": "client",
    "Comparison": "bundles.comparison",
    "DryRun": "run",
    "Embeddings": "embeddings",
    "Inspection": "inspection",
    "JepakitError": "errors",
    "KNNProbe": "probes",
    "LinearProbe": "probes",
    "Model": "inference.session",
    "ModelInfo": "client",
    "ProbeReport": "probes",
    "Run": "run",
    "Sweep": "_sweep",
    "Verdict": "bundles.comparison",
    "adapt": "_frontdoor",
    "compare": "evaluation.compare",
    "dry_run": "_frontdoor",
    "dry_sweep": "_frontdoor",
    "export": "_frontdoor",
    "inspect": "_frontdoor",
    "load": "inference.session",
    "load_probe": "probes",
    "open_bundle": "bundles.bundle",
    "open_run": "run",
    "open_sweep": "_sweep",
    "sweep": "_frontdoor",
}

_MODULES = ("config", "errors")

__all__ = [*_MODULES, *_HOME, "__version__"]


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return importlib.import_module(f"jepakit.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'jepakit' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"jepakit.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
