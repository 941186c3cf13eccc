"""What a GPU makes of training: images/s, the share of its peak, what the loader leaves of it, and lightly-train beside it.

    python benchmarks/gpu_trainer.py [--only PART] [--rounds N] [--lightly-env DIR]

ViT-Ti, -S and -B/16 from random weights, every weight trained, 2 views of 224 pixels and 6 of 96, bfloat16: the
product's own loop with its views in GPU memory (what the model alone allows), the same by hand, with the backbone
compiled, and from JPEG files, as a user trains. With --lightly-env lightly-train's simclr and dinov2 on as many views of
as many pixels, each with the same number of loader processes. Every loop is a process of its own, held up between blocks
of 5 steps, which are taken in turns and in random order; seconds are by the clock. Prints tables, and one JSON object as
the last line. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from _blocks import ratio
from _trainer_worker import ON_GPU
from trainer import (
    AGAIN,
    BARE_MEMORY,
    DISTINCT,
    PRODUCT,
    PRODUCT_MEMORY,
    against_lightly,
    many,
    measured,
    ours,
    peak_gflops,
    settings_of,
    show,
    show_peer,
)
from views import make_images

ROUNDS, FILES = 15, 4096
COMPILED = "jepakit, compiled, views in memory"
VIEWS = {"n_global": 2, "n_local": 6, "local_size": 96}
WORKERS = 8
# Name, timm's name, images per batch. Four processes share the card.
MODELS = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", 128),
    "ViT-S/16": ("vit_small_patch16_224", 128),
    "ViT-B/16": ("vit_base_patch16_224", 64),
}
PEERS: dict[str, dict[str, Any]] = {
    "simclr": {
        "model": "timm/vit_small_patch16_224", "ours": "vit_small_patch16_224", "batch": 128, "size": 224, "goal": 2.0,
        "views": {"n_global": 2, "n_local": 0}, "transform_args": {}, "workers": WORKERS,
    },
    "dinov2": {
        "model": "dinov2/vits14-noreg", "ours": "vit_small_patch14_dinov2", "batch": 64, "size": 224, "goal": 2.0,
        "views": {"n_global": 2, "n_local": 6, "local_size": 98},
        "transform_args": {"local_view": {"num_views": 6, "view_size": [98, 98]}}, "workers": WORKERS,
    },
}  # fmt: skip


def throughput(name: str, images: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """One model: the step alone, by hand and compiled; then the product from files."""
    backbone, batch = MODELS[name]
    settings = settings_of(
        backbone,
        images,
        folder,
        rounds,
        weights="random",
        batch_size=batch,
        image_size=224,
        views=VIEWS,
        workers=WORKERS,
    )
    found: dict[str, Any] = {"batch": batch}
    seconds: dict[str, list[float]] = {}
    for group in ((PRODUCT_MEMORY, BARE_MEMORY, BARE_MEMORY + AGAIN, COMPILED), (PRODUCT,)):
        with ExitStack() as stack:
            loops = {
                case: stack.enter_context(
                    ours(
                        case.removesuffix(AGAIN),
                        settings | ({"compile": True} if case == COMPILED else {}),
                        folder / str(len(seconds) + place),
                    )
                )
                for place, case in enumerate(group)
            }
            part = measured(loops, batch, rounds)
        seconds |= part.pop("seconds")
        for key, values in part.items():
            found[key] = found.get(key, {}) | values if isinstance(values, dict) else max(found.get(key, 0), values)
    found["ratios"] = {
        f"{slow} / {BARE_MEMORY}": ratio(seconds[slow], seconds[BARE_MEMORY])._asdict()
        for slow in (BARE_MEMORY + AGAIN, PRODUCT_MEMORY, COMPILED)
    }
    found["images_per_s"] = {case: 1000 / ms for case, ms in found["ms_per_image"].items()}
    return found


def show_throughput(name: str, found: dict[str, Any], peak: float) -> None:
    """Print one model's table: images/s and the share of the best bfloat16 matrix product."""
    show(f"{name}, batches of {found['batch']}, 2 × 224 + 6 × 96 px", found)
    gflop = found["gflop_per_step"] / found["batch"]
    for case, rate in found["images_per_s"].items():
        print(f"{case:<36}{rate:>10.0f} images/s{rate * gflop / peak:>8.0%} of the best matrix product")
    share = 1 - found["images_per_s"][PRODUCT] / found["images_per_s"][PRODUCT_MEMORY]
    print(f"{gflop:.1f} GFLOP an image, forward and backward; the loader takes {share:.0%} of the speed from files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, few rounds")
    parser.add_argument("--rounds", type=int, help=f"rounds of each case ({ROUNDS}; 3 with --quick)")
    parser.add_argument("--only", action="append", choices=[*MODELS, *PEERS], help="a part alone; repeatable")
    parser.add_argument("--lightly-env", type=Path, metavar="DIR", help="environment of lightly-train, made if missing")
    options = parser.parse_args()
    if not ON_GPU:
        print(json.dumps({"left_out": "no NVIDIA GPU here"}))
        return
    rounds = options.rounds or (3 if options.quick else ROUNDS)
    wanted = options.only or (["ViT-S/16"] if options.quick else [*MODELS, *(PEERS if options.lightly_env else ())])
    peak = peak_gflops()
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}; best bfloat16 matrix product "
        f"{peak / 1000:.0f} TFLOP/s"
    )
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "peak_gflops": peak}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        images = many(make_images(folder / "source", DISTINCT), folder / "images", FILES)
        for part in [part for part in MODELS if part in wanted]:
            results[part] = throughput(part, images, folder / MODELS[part][0], rounds)
            show_throughput(part, results[part], peak)
        for method in [part for part in PEERS if part in wanted]:
            results[method] = against_lightly(
                method, PEERS[method], images, options.lightly_env, folder / method, rounds
            )
            show_peer(method, PEERS[method], results[method])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
