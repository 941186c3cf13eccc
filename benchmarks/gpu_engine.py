"""How fast a model answers on a GPU: ONNX Runtime through jepakit, by batch size and precision, and torch beside it.

    python benchmarks/gpu_engine.py [--quick] [--rounds N]

ViT-S/16, ViT-B/16 and ResNet-50 at 224 pixels with random weights, images in and vectors out in main memory, as the
service has them; images/s by the clock. Exports of fp32 (no TF32), of fp16, and of fp16 with attention as one operator
(opset 23). Every case runs in each round, in random order. `two at a time` are two threads that share a session. Then
the service's batcher round each export. Prints tables, and one JSON object as the last line. Without a GPU it
says so and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors

import jepakit
from _blocks import measure
from engine import Nobody, Run, batched, clocked, flops_an_image, through
from jepakit._machine import usable_cpus
from jepakit.backbones.backbone import restore
from jepakit.backbones.embedder import Embedder
from jepakit.bundles import golden
from jepakit.bundles.bundle import WEIGHTS
from jepakit.inference.ort import import_ort
from jepakit.inference.session import Session
from jepakit_service.models.batcher import Batcher, Capacity, Decoded
from trainer import weights_of

ort = import_ort()

MODELS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "ResNet-50": "resnet50"}
EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {}, "fp16": {"precision": "fp16"}, "fp16, opset 23": {"precision": "fp16", "opset": 23},
}  # fmt: skip
IMAGES, BATCHES = 256, (1, 8, 32, 64, 128)
TWO, TORCH = "two at a time", "torch eager"


def torch_run(embedder: Embedder, dtype: torch.dtype) -> Run:
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            vectors: NDArray[np.float32] = embedder(torch.from_numpy(images).cuda()).float().cpu().numpy()
        return vectors

    return run


def counted(batch: int) -> int:
    """Images in a block: with single images, a few will do."""
    return 32 if batch == 1 else IMAGES


def two_at_a_time(pool: ThreadPoolExecutor, run: Run, images: NDArray[np.uint8], batch: int) -> Callable[[], object]:
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return lambda: list(pool.map(run, parts))


def one_model(backbone: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Images/s of every case by batch, agreement with torch in float32, and the batcher's images/s."""
    weights = weights_of(backbone, folder)
    exports = {
        name: jepakit.export(f"{backbone}:{weights}", folder / f"{backbone}-{place}", image_size=224, **settings)
        for place, (name, settings) in enumerate(EXPORTS.items())
    }
    images = golden.synthetic_images(IMAGES, 224, 3)
    plain = exports["fp32"]
    embedder = Embedder(
        restore(plain.manifest.backbone, load_tensors(plain.read(WEIGHTS))),
        plain.manifest.preprocess,
        plain.manifest.embedding,
    ).eval()
    flops = flops_an_image(embedder, images[0])
    embedder = embedder.cuda()
    runs: dict[str, Run] = {name: Session.open(bundle, provider="cuda").run for name, bundle in exports.items()}
    runs[f"{TORCH} fp32"] = torch_run(embedder, torch.float32)
    runs[f"{TORCH} fp16"] = torch_run(embedder, torch.float16)
    expected = runs[f"{TORCH} fp32"](images[:8])
    agreement = {name: golden.agreement(run(images[:8]), expected)._asdict() for name, run in runs.items()}
    with ThreadPoolExecutor(2) as pool, asyncio.Runner() as loop, ExitStack() as batchers:
        cases = {
            (name, batch): clocked(batched(run, images[: counted(batch)], batch))
            for name, run in runs.items()
            for batch in BATCHES
        }
        cases |= {
            (f"{name}, {TWO}", batch): clocked(two_at_a_time(pool, runs[name], images, batch))
            for name in EXPORTS
            for batch in BATCHES[1:]
        }
        for name in EXPORTS:
            for lanes in (1, 2):
                batcher = Batcher(
                    lambda image: Decoded(np.asarray(image), 0),
                    runs[name],
                    runs[name],
                    Capacity(32, lanes, few=0, cores=usable_cpus(), lane_cores=0, batch_s=math.inf),
                    Nobody(),
                )
                batchers.callback(batcher.close)
                cases[f"{name}, service's batcher, {lanes} lanes", 32] = clocked(
                    lambda batcher=batcher: loop.run(through(batcher, images))  # type: ignore[misc]
                )
        seconds = measure({json.dumps(case): block for case, block in cases.items()}, rounds=rounds)
    rates: dict[str, dict[int, float]] = {}
    for case, blocks in seconds.items():
        name, batch = json.loads(case)
        rates.setdefault(name, {})[batch] = counted(batch) / float(np.median(blocks))
    return {"gflop_per_image": flops / 1e9, "images_per_s": rates, "agreement_with_torch": agreement}


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}, {found['gflop_per_image']:.1f} GFLOP an image: images/s by batch\n")
    print(f"| | {' | '.join(map(str, BATCHES))} |\n|---|{'---|' * len(BATCHES)}")
    for case, by_batch in found["images_per_s"].items():
        cells = [f"{by_batch[batch]:.0f}" if batch in by_batch else "" for batch in BATCHES]
        print(f"| {case} | {' | '.join(cells)} |")
    for case, agreed in found["agreement_with_torch"].items():
        print(
            f"{case} to torch fp32: relative error {agreed['relative_error']:.1e}, centred cosine "
            f"{agreed['centred_cosine']:.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, few rounds")
    parser.add_argument("--rounds", type=int, help="rounds of each case (7; 2 with --quick)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"left_out": "no NVIDIA GPU here"}))
        return
    torch.backends.cudnn.allow_tf32 = False
    rounds = options.rounds or (2 if options.quick else 7)
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, ONNX Runtime {ort.__version__}"
    )
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, backbone in list(MODELS.items())[: 1 if options.quick else None]:
            results[name] = one_model(backbone, Path(folder), rounds)
            show(name, results[name])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
