"""Shared fixtures: small seeded image folders, and weights files of tiny timm models. Nothing is downloaded."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

# With tiny models on a busy machine, several threads take ten times as long as one. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some tests import ONNX Runtime themselves.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # for `importorskip("openvino")`

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Tests without the mark `gpu` run on the CPU, even on machines with a GPU."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def textured_image(kind: int, seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Stripes with the frequency and slope of `kind`, a random phase and tint, and noise."""
    random = np.random.default_rng([kind, seed])
    rows, columns = np.mgrid[:height, :width]
    angle, frequency = kind * np.pi / 3, 0.4 + 0.5 * kind
    wave = np.sin(frequency * (np.cos(angle) * columns + np.sin(angle) * rows) + random.uniform(0, 2 * np.pi))
    tint = random.uniform(0.6, 1.0, 3)
    pixels = 128 + 70 * wave[..., None] * tint + random.normal(0, 12, (height, width, 3))
    return np.asarray(pixels.clip(0, 255), np.uint8)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`image_folder(classes=2, per_class=14, height=72, width=80, seed=0)` makes a new folder of class folders.

    The classes differ only in texture. `classes=0` makes `per_class` images in no class folder.
    """

    def make(*, classes: int = 2, per_class: int = 14, height: int = 72, width: int = 80, seed: int = 0) -> Path:
        root = tmp_path_factory.mktemp("images")
        for kind in range(max(1, classes)):
            folder = root / f"texture{kind}" if classes else root
            folder.mkdir(exist_ok=True)
            for number in range(per_class):
                pixels = textured_image(kind, 1000 * seed + number, height, width)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        return root

    return make


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all processes of this session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers of signals are as before after each test: a command that runs in this process sets its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder that one process at a time works in."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def weights_file(shared_folder: Path) -> Callable[[str], Path]:
    """`weights_file("test_vit")`: a .safetensors file of that timm model's seeded random weights, the same in all processes.

    To their readers these are pretrained weights; BatchNorm's statistics are not trivial.
    """

    def make(name: str) -> Path:
        import torch
        from safetensors.torch import save_file

        from jepakit.backbones.backbone import build

        file = shared_folder / "weights" / f"{name}.safetensors"
        with locked(file.parent):
            if not file.exists():
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(7)
                    module = build(name, {})
                    for key, value in module.state_dict().items():
                        if key.endswith("running_mean"):
                            value.normal_(0, 0.1)
                        elif key.endswith("running_var"):
                            value.uniform_(0.5, 1.5)
                save_file(module.state_dict(), file, {"license": "cc0-1.0"})
        return file

    return make


@pytest.fixture(scope="session")
def exported(shared_folder: Path) -> Callable[..., Path]:
    """`exported(source="test_vit:random", name="tiny", **settings)`: that bundle, made once for the tests of all processes.

    It takes seconds to make; a test that changes it makes a copy.
    """

    def get(source: str = "test_vit:random", *, name: str = "tiny", **settings: Any) -> Path:
        import jepakit

        what = repr((source, name, sorted(settings.items())))
        place = shared_folder / "exported" / hashlib.sha256(what.encode()).hexdigest()[:16]
        with locked(place):
            if not (place / name).exists():
                jepakit.export(source, place / name, **settings)
        return place / name

    return get


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """The real MobileNetV2 weights that the examples use (fp16)."""
    file = ROOT / "examples" / "weights" / "mobilenetv2_100.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return file
