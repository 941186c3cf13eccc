"""What the views of an image cost a core: ours, the plain torchvision recipe, and lightly-train's transform.

    python benchmarks/views.py [--quick] [--lightly-env DIR]

CPU milliseconds an image for 2 views of 224 pixels and 6 of 96, `natural` strengths, from JPEG files of
500 × 375 pixels and about 100 KB that it makes itself. One thread, decoding included in everything.
lightly-train (AGPL) runs in an environment of its own, made in DIR or, without it, in a temporary folder; what it
does is its own default recipe of the same views, float32 and normalised, where the others end in uint8.
Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from _blocks import Block, Ratio, at_least, measure, ratio, timed
from _processes import EndedError, Script
from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig, ViewsConfig
from jepakit.images import read_image
from jepakit.sources import list_images
from jepakit_training.data.batches import Key, ViewDataset
from jepakit_training.data.cache import ImageCache
from jepakit_training.data.views import Crops, ViewMaker, collate, finish

GLOBAL, LOCAL = (2, 224), (6, 96)
H100_IMAGES_PER_S = 2900
"""ViT-S/16 with these views at 25 % of the bf16 peak: the rate the loader has to keep up with."""
LIGHTLY = "lightly-train==0.18.0"
AGAIN = " (again)"

CONFIG = AdaptConfig(images="-", domain="natural", views=ViewsConfig(n_local=6)).resolved_views()
SPEC = Preprocess(
    size=224,
    resize_to=224,
    resize="shorter",
    interpolation="bicubic",
    bands=3,
    dtype="uint8",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
LOADER, EVERYTHING = "loader work", "everything on the CPU"
CACHED_LOADER, CACHED_EVERYTHING = "loader work, from the cache", "everything on the CPU, from the cache"
DECODING, WITHOUT_BLUR = "decoding alone", "everything but blur"
PLAIN, PLAIN_TENSORS, LIGHTLY_CASE = "plain recipe on Pillow images", "plain recipe on tensors", "lightly-train"


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of 1/f noise with shapes on it, about as hard to decode as photographs."""
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        spectrum = np.fft.rfft2(random.standard_normal((375, 500, 3)), axes=(0, 1))
        radius = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
        noise = np.fft.irfft2(spectrum / np.maximum(radius, 1 / 500)[:, :, None], (375, 500), axes=(0, 1))
        pixels = (128 + 50 * noise / noise.std()).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        for left, top, width, height, *colour in random.integers(
            0, [400, 275, 150, 150, 256, 256, 256], (6, 7)
        ).tolist():
            draw.ellipse((left, top, left + width, top + height), fill=tuple(colour))
        paths.append(folder / f"{number:03}.jpg")
        image.save(paths[-1], quality=88)
    return paths


class Ours:
    """The work of a loader's worker and its collation on all images: the product's own dataset, with every check."""

    def __init__(self, folder: Path, cache: ImageCache) -> None:
        self._images = list_images(folder, "none")
        self._maker = ViewMaker(CONFIG, GLOBAL[1], LOCAL[1])
        self._plain, self._cached = self._dataset(None), self._dataset(cache)
        self._epoch = 0
        self._crops(self._cached)  # fills the cache

    def decoded(self) -> list[NDArray[Any]]:
        return [read_image(ref, SPEC, at_least=self._maker.least_side) for ref in self._images]

    def crops(self) -> Crops:
        return self._crops(self._plain)

    def cached_crops(self) -> Crops:
        return self._crops(self._cached)

    def _dataset(self, cache: ImageCache | None) -> ViewDataset:
        return ViewDataset(self._images, np.arange(len(self._images)), SPEC, self._maker, 0, cache)

    def _crops(self, dataset: ViewDataset) -> Crops:
        self._epoch += 1
        items = [dataset[Key(self._epoch, place)] for place in range(len(self._images))]
        return collate([item.crops for item in items if item.crops is not None])


def without_blur(crops: Crops) -> Crops:
    return crops._replace(
        global_changes=crops.global_changes._replace(blur=np.zeros_like(crops.global_changes.blur)),
        local_changes=crops.local_changes._replace(blur=np.zeros_like(crops.local_changes.blur)),
    )


def plain_recipe(size: int, area: tuple[float, float], *, on_tensors: bool) -> v2.Compose:
    """The usual recipe, view by view: strengths of `natural`, and everywhere a blur kernel of 23, as for 224 pixels."""
    steps = [
        v2.RandomResizedCrop(size, area, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(CONFIG.brightness, CONFIG.contrast, CONFIG.saturation, CONFIG.hue)], 0.8),
        v2.RandomGrayscale(CONFIG.gray),
        v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], CONFIG.blur),
        v2.RandomSolarize(128, CONFIG.solarize),
    ]
    return v2.Compose(steps if on_tensors else [*steps, v2.PILToTensor()])


def plain_work(paths: list[Path], *, on_tensors: bool) -> Callable[[], object]:
    global_ = plain_recipe(GLOBAL[1], CONFIG.global_area, on_tensors=on_tensors)
    local = plain_recipe(LOCAL[1], CONFIG.local_area, on_tensors=on_tensors)

    def views(path: Path) -> list[torch.Tensor]:
        image = Image.open(path).convert("RGB")
        source = pil_to_tensor(image) if on_tensors else image
        return [global_(source) for _ in range(GLOBAL[0])] + [local(source) for _ in range(LOCAL[0])]

    def work() -> object:
        return [torch.stack(view) for view in zip(*map(views, paths), strict=True)]

    return work


class LightlyMissingError(Exception):
    """lightly-train cannot be installed or started."""


def lightly_python(env: Path) -> Path:
    """The interpreter of an environment with lightly-train, which is made if missing."""
    python = env / "bin" / "python"
    if not python.exists():
        print(f"installing {LIGHTLY} into {env} …", file=sys.stderr)
        venv.create(env, with_pip=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", LIGHTLY]).returncode:
            raise LightlyMissingError(f"{LIGHTLY} could not be installed into {env}")
    return python


@contextmanager
def lightly_block(env: Path, images: Path) -> Iterator[Block]:
    """lightly-train's work on the images as a block, in its own process."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"OMP_NUM_THREADS": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    command = [lightly_python(env), Path(__file__).with_name("_lightly_worker.py"), images]
    with Script(command, env=own) as worker:
        try:
            worker.answer()
        except EndedError:
            raise LightlyMissingError(
                f"{LIGHTLY} did not start in {env}: remove that folder, and it is installed anew"
            ) from None
        yield lambda: float(worker.asked())


def run(paths: list[Path], folder: Path, rounds: int, lightly: Block | None) -> dict[str, list[float]]:
    ours = Ours(
        paths[0].parent, ImageCache(folder / "cache", 1 << 30, ViewMaker(CONFIG, GLOBAL[1], LOCAL[1]).least_side, "")
    )
    cases = {
        LOADER: timed(ours.crops),
        LOADER + AGAIN: timed(ours.crops),
        EVERYTHING: timed(lambda: finish(ours.crops())),
        EVERYTHING + AGAIN: timed(lambda: finish(ours.crops())),
        CACHED_LOADER: timed(ours.cached_crops),
        CACHED_EVERYTHING: timed(lambda: finish(ours.cached_crops())),
        DECODING: timed(ours.decoded),
        WITHOUT_BLUR: timed(lambda: finish(without_blur(ours.crops()))),
        PLAIN: timed(plain_work(paths, on_tensors=False)),
        PLAIN_TENSORS: timed(plain_work(paths, on_tensors=True)),
    }
    return measure(cases | ({LIGHTLY_CASE: lightly} if lightly else {}), rounds=rounds)


GOALS = (
    (PLAIN, LOADER, 8.0),
    (LIGHTLY_CASE, LOADER, 2.0),
    (LIGHTLY_CASE, CACHED_LOADER, 3.0),
    (PLAIN, EVERYTHING, 4.0),
    (LIGHTLY_CASE, EVERYTHING, 1.0),
)
"""(slow, fast, how many times as long the slow one should take at least)."""


def report(seconds: dict[str, list[float]], images: int) -> dict[str, Any]:
    """Print the table; returns its numbers."""
    ms = {name: 1000 * float(np.median(blocks)) / images for name, blocks in seconds.items()}
    print(
        f"CPU ms an image, one thread, {GLOBAL[0]} × {GLOBAL[1]} + {LOCAL[0]} × {LOCAL[1]} px views, decoding included\n"
    )
    for name, value in ms.items():
        print(f"{name:<42}{value:8.2f}   {value * H100_IMAGES_PER_S / 1000:6.1f} cores feed one H100 at ViT-S")

    print("\nshares of everything on the CPU")
    shares = {
        "decoding": ms[DECODING],
        "crop and resize": ms[LOADER] - ms[DECODING],
        "colour": ms[WITHOUT_BLUR] - ms[LOADER],
        "blur": ms[EVERYTHING] - ms[WITHOUT_BLUR],
    }
    for name, value in shares.items():
        print(f"{name:<42}{value:8.2f}   {value / ms[EVERYTHING]:6.0%}")

    print("\nA/A: the same code under two names")
    controls = {name: ratio(seconds[name + AGAIN], seconds[name]) for name in (LOADER, EVERYTHING)}
    for name, control in controls.items():
        print(f"{name:<42}{control}")

    print("\ntimes as long as ours, with 95 % intervals")
    ratios: dict[str, Ratio] = {}
    for slow, fast, goal in GOALS:
        if slow in seconds:
            found = ratios[f"{slow} / {fast}"] = ratio(seconds[slow], seconds[fast])
            verdict = at_least(goal, found.low, found.high)
            print(f"{slow + ' / ' + fast:<66}{found!s:<22} goal {goal:g}: {verdict}")
    return {
        "ms_per_image": ms,
        "shares_ms": shares,
        "a_a": {name: control._asdict() for name, control in controls.items()},
        "ratios": {name: found._asdict() for name, found in ratios.items()},
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; lightly-train only with --lightly-env")
    parser.add_argument("--lightly-env", type=Path, metavar="DIR", help="environment of lightly-train, made if missing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, rounds = (8, 5) if options.quick else (16, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        paths = make_images(folder / "images", count)
        size = sum(path.stat().st_size for path in paths) / count
        print(f"{count} JPEG files of {size / 1000:.0f} KB, {rounds} rounds")
        try:
            if options.quick and not options.lightly_env:
                raise LightlyMissingError("--quick without --lightly-env")
            with lightly_block(options.lightly_env or folder / "lightly", folder / "images") as lightly:
                seconds = run(paths, folder, rounds, lightly)
        except LightlyMissingError as reason:
            print(f"lightly-train left out: {reason}")
            seconds = run(paths, folder, rounds, None)
        print(json.dumps(report(seconds, count)))


if __name__ == "__main__":
    main()
