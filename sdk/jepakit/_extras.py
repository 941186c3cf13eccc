"""The optional parts of the installation: what each needs, and the error if it is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata

from jepakit.errors import MissingExtraError

NEEDS = {
    "train": ("torch", "timm", "PIL", "torchvision", "accelerate", "tomli_w"),
    "lora": ("peft",),
    "tensorboard": ("tensorboard",),
    "cluster": ("ray", "pandas", "pyarrow", "fsspec", "requests"),
    "export": ("torch", "timm", "PIL", "onnx", "onnxscript", "onnx_ir", "onnxruntime"),
    "serve": (
        "PIL",
        "onnxruntime",
        "ray",
        "starlette",
        "fastapi",
        "uvicorn",
        "httptools",
        "python_multipart",
        "psutil",
        "prometheus_client",
        "pydantic_settings",
        "swagger_ui_bundle",
    ),
}
"""The modules that each extra installs and that are imported."""
_NOT_ON_WINDOWS = ("train", "cluster", "serve")
"""Extras that fork, or lock files."""


def missing(extra: str) -> list[str]:
    """Which modules of an extra are not installed."""
    return [module for module in NEEDS[extra] if importlib.util.find_spec(module) is None]


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def require(extra: str) -> None:
    """Raise MissingExtraError unless the modules of `extra` are installed, and it works on this operating system."""
    if os.name == "nt" and extra in _NOT_ON_WINDOWS:
        raise MissingExtraError("this needs Linux or macOS: on Windows, install and run it in WSL 2")
    if modules := missing(extra):
        raise MissingExtraError(f"this needs {modules[0]}, which is not installed: pip install 'jepakit[{extra}]'")


def require_tracker(name: str) -> None:
    """Raise MissingExtraError unless a tracker of experiments is installed."""
    if name in NEEDS:
        require(name)
    elif importlib.util.find_spec(name) is None:
        raise MissingExtraError(f"trackers = {name} needs {name}, which is not installed: pip install {name}")
