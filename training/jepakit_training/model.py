"""What is trained: the backbone's last layers and a projector that is never exported.

Shapes: V views, N images on this rank, K projector outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.models import group_parameters
from torch import Tensor, nn

from jepakit.backbone import is_hierarchical
from jepakit.bundle import Preprocess
from jepakit.errors import ConfigError
from jepakit_training.data import normalise
from jepakit_training.views import Views

_VIT_BLOCKS = 2


class LejepaModel(nn.Module):
    """Views → projections. One backbone call a resolution, one projector call for all views."""

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, backbone: nn.Module, preprocess: Preprocess, widths: tuple[int, int, int], n_features: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = Projector(n_features, widths)
        self.backbone_frozen = False
        unit = 255 if preprocess.dtype == "uint8" else 1
        self.register_buffer("_mean", unit * torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", unit * torch.tensor(preprocess.std)[:, None, None], persistent=False)

    def forward(self, views: Views) -> Tensor:
        """Views [V, N, C, H, W] at each size, uint8 or scaled float32 → float32 projections [V, N, K], the global views first."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
            features = [
                self.backbone(normalise(group.flatten(0, 1), self._mean, self._std)) for group in views if len(group)
            ]
        projections: Tensor = self.projector(torch.cat(features)).float()
        return projections.reshape(-1, views.global_.shape[1], projections.shape[-1])


class Projector(nn.Sequential):
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear. Its BatchNorms are what keeps SIGReg's gradient alive."""

    def __init__(self, n_features: int, widths: tuple[int, int, int]) -> None:
        first, second, outputs = widths
        super().__init__(
            nn.Linear(n_features, first), GlobalBatchNorm1d(first), nn.ReLU(),
            nn.Linear(first, second), GlobalBatchNorm1d(second), nn.ReLU(),
            nn.Linear(second, outputs),
        )  # fmt: skip


class GlobalBatchNorm1d(nn.Module):
    """BatchNorm over the batch of all ranks, for training only (it keeps no running statistics).

    torch's SyncBatchNorm refuses the CPU, and local statistics put the gradient 22 to 30 % off.
    """

    def __init__(self, n_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_features))
        self.bias = nn.Parameter(torch.zeros(n_features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[rows, features] → the same, each feature normalised over the rows of all ranks."""
        x = x.float()
        mean = _mean_over_ranks(x.mean(dim=0))
        variance = _mean_over_ranks((x - mean).square().mean(dim=0))
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


def _mean_over_ranks(x: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    total: Tensor = _AllReduceSum.apply(x)
    return total / dist.get_world_size()


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks that autograd sees: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def freeze(backbone: Any, unfreeze: Literal["auto", "none", "all"] | int, *, from_random: bool) -> list[str]:
    """Set which of the backbone's parameters train; returns their names.

    `auto`: all from random weights, else the last two transformer blocks, or what follows a ConvNet's
    second-to-last feature level. An integer: the last N blocks of timm's own grouping. Norms that follow
    count with the last block. Raises ConfigError for more blocks than there are.
    """
    if unfreeze == "auto" and from_random:
        unfreeze = "all"
    names = [name for name, _ in backbone.named_parameters()]
    if unfreeze == "all":
        chosen = set(names)
    elif unfreeze == "none":
        chosen = set()
    elif unfreeze == "auto" and is_hierarchical(backbone):
        chosen = _after_second_last_level(backbone, names)
    else:
        chosen = _last_blocks(backbone, _VIT_BLOCKS if unfreeze == "auto" else unfreeze)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def freeze_norm_statistics(backbone: nn.Module) -> None:
    """Keep BatchNorm at its stored statistics: re-estimating them on the domain costs 7 to 9 points."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def parameter_groups(
    model: LejepaModel, *, lr: float, projector_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups, backbone first; no weight decay on norms, biases and position embeddings."""
    groups = []
    for module, rate, role in (
        (model.backbone, lr, "backbone"),
        (model.projector, projector_lr, "projector"),
    ):
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        plain = [
            parameter for name, parameter in named if parameter.ndim <= 1 or "pos_embed" in name or "token" in name
        ]
        ids = set(map(id, plain))
        decayed = [parameter for _, parameter in named if id(parameter) not in ids]
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "base_lr": rate, "lr": rate, "weight_decay": decay, "role": role})
    return groups


def _after_second_last_level(backbone: Any, names: list[str]) -> set[str]:
    """Everything that comes after the second-to-last feature level, by timm's order of the parameters."""
    module = backbone.feature_info[-2]["module"]
    inside = [place for place, name in enumerate(names) if name.startswith(f"{module}.")]
    if not inside:
        return _last_blocks(backbone, 1)
    # A stem or a stage is one run of names; what trains is all that follows it.
    return set(names[max(inside) + 1 :])


def _last_blocks(backbone: Any, count: int) -> set[str]:
    """The last `count` blocks (a ConvNet's stages) and what follows them: final norms and attention pooling."""
    depth_of: dict[str, int] = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)
    roots = tuple({level["module"].split(".")[0] + "." for level in backbone.feature_info})
    blocks = sorted({depth for name, depth in depth_of.items() if name.startswith(roots)})
    if count > len(blocks):
        raise ConfigError(f"unfreeze = {count}: this backbone has {len(blocks)} blocks; use `all` for everything")
    return {name for name, depth in depth_of.items() if depth >= blocks[-count]}
