"""What `test_distributed.py` computes once in one process and once in two: rank r of w takes images r::w.

    python -m torch.distributed.run --standalone --nproc-per-node 2 two_ranks.py OUT IMAGES CONVNET_WEIGHTS VIT_WEIGHTS

Rank 0 writes OUT/loss.pt and a file for each of STEPS; the adapted runs lie in OUT/convnet and OUT/vit. Every rank writes
OUT/told-N.json: the message it got where runs were refused.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

import jepakit
from jepakit._run_files import BUNDLE
from jepakit.backbones.backbone import start_backbone, stock_preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import DataError, ImageError, TrainingError
from jepakit.sources import list_images
from jepakit_training.data.batches import ViewDataset
from jepakit_training.data.views import Views
from jepakit_training.learning import learner as learner_module
from jepakit_training.learning.distributed import SharedFlag
from jepakit_training.learning.learner import Learner
from jepakit_training.learning.sigreg import directions, lejepa_loss
from jepakit_training.plan import make_plan

ADAPT: dict[str, Any] = {
    "image_size": 64, "steps": 3, "warmup": 0.3, "batch_size": 8, "projector": (32, 32, 8), "n_slices": 16,
    "views": {"n_local": 1}, "workers": 0,
}  # fmt: skip

UNREADABLE = {"texture0/001.png", "texture0/004.png", "texture0/007.png", "texture0/010.png", "texture1/001.png"}
"""Five of the 28 images, all of them trained on."""


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(x: Tensor, dim: int) -> Tensor:
    """This rank's share of the images along `dim`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return x.index_select(dim, torch.arange(rank, x.shape[dim], world()))


def mean_over_ranks(x: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(x)
    return x / world()


def loss() -> dict[str, Tensor]:
    """The bare loss and its gradient with respect to a parameter behind the projections, averaged as DDP would."""
    generator = torch.Generator().manual_seed(3)
    inputs_VNK = 1.3 * torch.randn(3, 24, 16, generator=generator) + 0.2
    weight = torch.randn(16, 16, generator=generator).div(4).requires_grad_()
    slices_KS = directions(16, 40, seed=1, step=2, device=torch.device("cpu"))
    total, prediction, regulariser = lejepa_loss(mine(inputs_VNK, 1) @ weight, 2, 0.3, slices_KS)
    (gradient,) = torch.autograd.grad(total, weight)
    return {
        "total": mean_over_ranks(total.detach()),
        "prediction": mean_over_ranks(prediction.detach()),
        "sigreg": mean_over_ranks(regulariser.detach()),
        "gradient": mean_over_ranks(gradient),
    }


def steps(name: str, weights: Path, **settings: Any) -> dict[str, Any]:
    """Five steps of the learner by plain gradient descent: the losses, and what moved after one step and after five.

    Gradient descent, because AdamW's first steps are signs of gradients: one that is 0 except for rounding may take
    either sign.
    """
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == world()
    config = AdaptConfig(
        images="x", backbone=name, weights=str(weights), lr=0.05, projector_lr=0.05, **{**ADAPT, **settings, "steps": 5}
    )
    backbone, _ = start_backbone(name, str(weights), 64)
    listed = list_images([np.zeros((8, 8), np.uint8)] * 40, "none")
    plan = make_plan(config, listed, backbone, world(), bands=3, value_bytes=1)
    learner = Learner(config, plan, backbone, stock_preprocess(backbone, 64), accelerator)
    learner.optimizer = accelerator.prepare(torch.optim.SGD(learner._raw_optimizer.param_groups, lr=0.05))

    def state() -> dict[str, Tensor]:
        parts = {
            **backbone.state_dict(),
            **{f"projector.{k}": v for k, v in learner._raw_projector.state_dict().items()},
        }
        return {key: value.detach().clone() for key, value in parts.items() if value.is_floating_point()}

    start, losses, moved = state(), [], []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        views = Views(*(
            mine(torch.randint(0, 256, (count, 8, 3, size, size), dtype=torch.uint8, generator=generator), 1)
            for count, size in ((2, 64), (1, 32))
        ))  # fmt: skip
        step_losses = learner.step(step, views)
        losses.append(torch.stack([mean_over_ranks(step_losses.loss), step_losses.sigreg, step_losses.grad_norm]))
        moved.append({key: value - start[key] for key, value in state().items()})
    return {"losses": torch.stack(losses), "first": moved[0], "last": moved[-1]}


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "a ViT": ("test_vit", {"unfreeze": "all"}),
    "a ViT in micro-batches": ("test_vit", {"micro_batch": 3, "warmup": 0.0}),
    "a ConvNet with frozen BatchNorm": ("test_resnet", {"warmup": 0.0}),
    "a ConvNet with trained BatchNorm": ("test_resnet", {"norm_statistics": "trained", "unfreeze": "all"}),
}
"""What is trained for five steps, by name: the backbone, and the settings in addition to ADAPT's."""


def adapt(out: Path, images: Path, convnet_weights: Path, vit_weights: Path) -> None:
    """Three steps of the real thing, from a weights file: a ConvNet with frozen BatchNorm, and a ViT."""
    for name, backbone, weights in (("convnet", "test_resnet", convnet_weights), ("vit", "test_vit", vit_weights)):
        jepakit.adapt(images, out=out / name, backbone=backbone, weights=str(weights), **ADAPT)


def skip(out: Path, images: Path, weights: Path) -> dict[str, Any]:
    """Unreadable images in training: listed in OUT/skipped, and refused if one fewer may be skipped."""

    def read(dataset: ViewDataset, index: int) -> Any:
        if (name := dataset.images.ids[index]) in UNREADABLE:
            met.add(name)
            raise ImageError(f"{name}: cannot be read", code="unreadable")
        return real(dataset, index)

    real, met, refusals = ViewDataset._read, set[str](), {}
    with mock.patch.object(ViewDataset, "_read", read):
        for name, most in (("skipped", len(UNREADABLE)), ("refused", len(UNREADABLE) - 1)):
            try:
                jepakit.adapt(
                    images,
                    out=out / name,
                    backbone="test_vit",
                    weights=str(weights),
                    **ADAPT,
                    most_skipped=(most + 0.5) / 28,
                )
            except DataError as error:
                refusals[name] = str(error)
    return {"met": sorted(met), "refusals": refusals}


def stop(out: Path, images: Path, weights: Path) -> dict[str, Any]:
    """Only rank 1 is told to stop, in its second step, and the run is resumed; first, which flags both ranks see."""

    def interrupted(*args: Any) -> Any:
        if next(steps_done) == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return lejepa_loss(*args)

    shared = SharedFlag()
    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        of_its_own = SharedFlag()
    rank, steps_done, code = dist.get_rank(), itertools.count(), None
    flags = [[flag.any(rank == up) for up in range(3)] for flag in (shared, of_its_own)]
    run: dict[str, Any] = {"out": out / "stopped", "backbone": "test_vit", "weights": str(weights), **ADAPT}
    with (
        mock.patch.object(learner_module, "lejepa_loss", interrupted),
        mock.patch.object(Accelerator, "reduce", autospec=True, side_effect=Accelerator.reduce) as reduced,
    ):
        try:
            jepakit.adapt(images, **run)
        except SystemExit as stopped:
            code = stopped.code
    told = {"flags": flags, "code": code, "steps": next(steps_done), "on the device": reduced.call_count}
    jepakit.adapt(images, **run)
    return told


def resume_apart(out: Path, weights: Path, images: Path) -> str:
    """Resume a run with two ranks, only one of which finds its folder."""
    folder = out / f"disk-of-{dist.get_rank()}"
    if dist.get_rank() == 0:
        shutil.copytree(out / "vit", folder)
        shutil.rmtree(folder / BUNDLE)
    try:
        jepakit.adapt(images, out=folder, backbone="test_vit", weights=str(weights), **ADAPT)
    except TrainingError as error:
        return str(error)
    return ""


def images_apart(out: Path, weights: Path, images: Path) -> str:
    """A run of two ranks, one of which finds one image fewer under the same name."""
    folder = out / f"images-of-{dist.get_rank()}"
    shutil.copytree(images, folder)
    if dist.get_rank() == 1:
        min(folder.rglob("*.png")).unlink()
    try:
        jepakit.adapt(folder, out=out / "apart", backbone="test_vit", weights=str(weights), **ADAPT)
    except DataError as error:
        return str(error)
    return ""


def main() -> None:
    out, images, convnet_weights, vit_weights = map(Path, sys.argv[1:])
    adapt(out, images, convnet_weights, vit_weights)
    assert world() == 2, f"{world()} processes instead of 2"
    told = {"skip": skip(out, images, vit_weights), "resume": resume_apart(out, vit_weights, images)}
    told["images"] = images_apart(out, vit_weights, images)
    told["stop"] = stop(out, images, vit_weights)
    (out / f"told-{dist.get_rank()}.json").write_text(json.dumps(told))
    weights = {"test_resnet": convnet_weights, "test_vit": vit_weights}
    results = {"loss": loss(), **{what: steps(name, weights[name], **more) for what, (name, more) in STEPS.items()}}
    if dist.get_rank() == 0:
        for name, result in results.items():
            torch.save(result, out / f"{name}.pt")
        (out / "world").write_text(str(world()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
