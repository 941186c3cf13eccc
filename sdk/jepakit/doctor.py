"""What this machine has for each part of jepakit, and what needs fixing. Nothing is sent anywhere."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from jepakit import __version__
from jepakit._extras import NEEDS, missing, versions_of
from jepakit._machine import MORE_SHARED, SHARED, main_memory, usable_cpus
from jepakit.errors import JepakitError
from jepakit.inference.runtime import Chosen, has_nvidia_driver, open_runtime

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_PACKAGES = {
    "train": ("torch", "timm", "torchvision", "accelerate"),
    "export": ("onnx", "onnxscript"),
    "serve": ("ray", "fastapi", "uvicorn"),
    "images": ("pillow", "tifffile", "pydicom"),
    "codecs": ("imagecodecs", "python-gdcm"),
    "runtime": (*_RUNTIMES, "openvino"),
    "parquet": ("pyarrow",),
    "lora": ("peft",),
    "cluster": ("ray", "pandas"),
    "tensorboard": ("tensorboard",),
    "tracing": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    "plots": ("matplotlib",),
}
"""The packages to report, by the extra that installs them."""
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX graph of a single node, y = x of one float."""
_LEAST_SHARED = 512 << 20


class Examination(NamedTuple):
    """`lines` say what there is, `problems` what to fix and how."""

    lines: list[str]
    problems: list[str]


def examine() -> Examination:
    """Examine the machine and the installed packages. torch is imported only if there is an NVIDIA driver."""
    lines = [
        f"jepakit     {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"machine     {usable_cpus()} usable cores, {_memory()}, {'an' if has_nvidia_driver() else 'no'} NVIDIA driver",
        *(f"{extra:<11} {_installed(extra, names)}" for extra, names in _PACKAGES.items()),
        f"providers   {', '.join(_usable_providers()) or 'none'}",
    ]
    return Examination(lines, [*_two_runtimes(), *_idle_gpu(), *_little_shared_memory()])


def _memory() -> str:
    """The size of main memory, in words; unknown on Windows, where Python does not tell."""
    return f"{main_memory() / 1e9:.1f} GB of memory" if hasattr(os, "sysconf") else "unknown memory"


def _installed(extra: str, names: Sequence[str]) -> str:
    versions = versions_of(names)
    said = [f"{name} {version}" for name, version in versions.items()]
    if not said:
        return f"not installed (pip install 'jepakit[{'serve' if extra == 'runtime' else extra}]')"
    lacking = [] if extra == "runtime" else [name for name in names if name not in versions]
    lacking += [module for module in missing(extra) if module not in lacking] if extra in NEEDS else []
    return ", ".join(said + [f"no {name}" for name in lacking])


def _usable_providers() -> Iterator[str]:
    for provider in get_args(Chosen):
        if _why_not(provider) is None:
            yield provider


def _why_not(provider: Chosen) -> JepakitError | None:
    """Why a provider cannot open a graph here, found by opening one; None if it can."""
    try:
        open_runtime(_IDENTITY, provider, threads=1)
    except JepakitError as error:
        return error
    return None


def _two_runtimes() -> Iterator[str]:
    if len(versions_of(_RUNTIMES)) > 1:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed, into the same folder: pip uninstall -y onnxruntime onnxruntime-gpu, "
            "then pip install only the one that you need"
        )


def _idle_gpu() -> Iterator[str]:
    if not has_nvidia_driver():
        return
    if importlib.util.find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            yield f"torch {torch.__version__} sees no GPU, so training would not use it: install torch for this driver's CUDA (nvidia-smi)"
    if versions_of(_RUNTIMES) and (error := _why_not("cuda")) is not None:
        yield f"the service would not use the GPU: {error}"


def _little_shared_memory() -> Iterator[str]:
    effects = {
        "torch": "training would have fewer loader processes",
        "ray": "the service may not start behind Ray's Python proxy (HAProxy, the default on Linux, and --no-ray do not need it)",
    }
    told = [effects[package] for package in versions_of(effects)]
    if told and SHARED.is_dir() and (size := shutil.disk_usage(SHARED).total) < _LEAST_SHARED:
        yield f"{SHARED} has only {size >> 20} MB, so {' and '.join(told)}: {MORE_SHARED}"
