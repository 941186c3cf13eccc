"""What `test_distributed.py` computes once in one process and once in two: rank r of w takes images r::w.

    python -m torch.distributed.run --standalone --nproc-per-node 2 two_ranks.py OUT IMAGES CONVNET_WEIGHTS VIT_WEIGHTS

Rank 0 writes OUT/loss.pt and OUT/model.pt; the adapted runs lie in OUT/convnet and OUT/vit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

import jepakit
from jepakit.backbone import build, stock_preprocess
from jepakit_training.model import LejepaModel, freeze, freeze_norm_statistics
from jepakit_training.sigreg import directions, lejepa_loss
from jepakit_training.views import Views

ADAPT = {
    "image_size": 64, "steps": 3, "warmup": 0.3, "batch_size": 8, "projector": (32, 32, 8), "n_slices": 16,
    "views": {"n_local": 1}, "workers": 0,
}  # fmt: skip


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(x: Tensor, dim: int) -> Tensor:
    """This rank's share of the images, which lie along `dim`."""
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


def model() -> dict[str, Any]:
    """One step of a ConvNet and its projector through accelerate: the loss, and the gradients DDP leaves behind."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == world()
    torch.manual_seed(11)
    backbone = build("test_resnet", {})
    freeze(backbone, "auto", from_random=False)
    bare = LejepaModel(backbone, stock_preprocess(backbone, 64), (32, 32, 8), backbone.num_features)
    optimizer = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(bare, optimizer)
    bare.train()
    freeze_norm_statistics(backbone)
    global_ = torch.randint(0, 256, (2, 12, 3, 64, 64), dtype=torch.uint8)
    local = torch.randint(0, 256, (1, 12, 3, 32, 32), dtype=torch.uint8)
    proj_VNK = prepared(Views(mine(global_, 1), mine(local, 1)))
    total, _, _ = lejepa_loss(proj_VNK, 2, 0.05, directions(8, 16, seed=0, step=0, device=torch.device("cpu")))
    accelerator.backward(total)
    gradients = {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}
    optimizer.step()
    return {
        "loss": mean_over_ranks(total.detach()),
        "gradients": gradients,
        "weights": {name: p.detach().clone() for name, p in bare.named_parameters()},
    }


def adapt(out: Path, images: Path, convnet_weights: Path, vit_weights: Path) -> None:
    """Three steps of the real thing, from a weights file: a ConvNet with frozen BatchNorm, and a ViT."""
    for name, backbone, weights in (("convnet", "test_resnet", convnet_weights), ("vit", "test_vit", vit_weights)):
        jepakit.adapt(images, out=out / name, backbone=backbone, weights=str(weights), **ADAPT)


def main() -> None:
    out, images, convnet_weights, vit_weights = map(Path, sys.argv[1:])
    adapt(out, images, convnet_weights, vit_weights)
    assert world() == 2, f"{world()} processes instead of 2"
    results = {"loss": loss(), "model": model()}
    if dist.get_rank() == 0:
        for name, result in results.items():
            torch.save(result, out / f"{name}.pt")
        (out / "world").write_text(str(world()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
