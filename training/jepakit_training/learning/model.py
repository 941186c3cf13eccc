"""Views → features → projections. The projector is training state and is never exported.

Shapes: V views, N images on this rank, E features, K projector outputs; views come global ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jepakit.backbones.backbone import is_hierarchical
from jepakit.bundles.manifest import Preprocess
from jepakit_training.data.views import Views
from jepakit_training.learning.batchnorm import GlobalBatchNorm1d


def layout_of(backbone: nn.Module) -> torch.memory_format:
    """Channels last for hierarchical backbones (ConvNets, Swin): 1.8 times the images/s of a MobileNetV2 step on a CPU.

    Not if torch 2.15 would corrupt its own memory in the backward pass on a CPU: in a 1 × 1 convolution with stride 2
    over fewer than 8 channels (in the stems of MobileOne and FastViT).
    """
    unsafe = any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride != (1, 1) and part.in_channels < 8
        for part in backbone.modules()
    )
    return torch.channels_last if is_hierarchical(backbone) and not unsafe else torch.contiguous_format


class Encoder(nn.Module):
    """Views to pooled features: one backbone call per resolution (0.83 to 0.94 times the time of one per view)."""

    _mean: Tensor
    _std: Tensor

    def __init__(self, backbone: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("_mean", preprocess.unit * torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", preprocess.unit * torch.tensor(preprocess.std)[:, None, None], persistent=False)

    def forward(self, views: Views) -> Tensor:
        """Views [V, N, C, H, W] at each size, uint8 or scaled float32 → float32 features [V, N, E]."""
        return torch.cat(
            [
                self.backbone((group.flatten(0, 1).float() - self._mean) / self._std)
                .float()
                .unflatten(0, group.shape[:2])
                for group in views
                if len(group)
            ]
        )


class Projector(nn.Sequential):
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear. The BatchNorms keep SIGReg's gradient alive."""

    def __init__(self, n_features: int, widths: tuple[int, int, int]) -> None:
        first, second, outputs = widths
        super().__init__(
            nn.Linear(n_features, first),
            GlobalBatchNorm1d(first),
            nn.ReLU(),
            nn.Linear(first, second),
            GlobalBatchNorm1d(second),
            nn.ReLU(),
            nn.Linear(second, outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features [V, N, E] → float32 projections [V, N, K]."""
        projections: Tensor = super().forward(features.flatten(0, 1))  # type: ignore[no-untyped-call]
        return projections.float().reshape(*features.shape[:2], -1)


class TwoPass:
    """The encoder, run over a batch in micro-batches, with exactly the gradient of the whole batch.

    SIGReg is a statistic of the whole batch: averaging the losses of micro-batches puts the gradient 60 to 120 % off.
    So features are first computed without a graph; projector and loss see the whole batch; then every micro-batch is
    embedded again, with the same random numbers, and receives its share of the gradient. One more forward pass of the
    backbone allows any batch size.

    encoder   the encoder as prepared by accelerate
    no_sync   a context in which its gradients are not yet reduced over the ranks
    """

    def __init__(
        self, encoder: nn.Module, micro_batch: int, no_sync: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._encoder, self._micro_batch, self._no_sync = encoder, micro_batch, no_sync
        self._parts: list[tuple[int, Views]] = []
        self._features: Tensor = torch.empty(0)

    def forward(self, views: Views, seed: int) -> Tensor:
        """Features [V, N, E] of the batch, a leaf that requires a gradient if gradients are enabled."""
        self._parts = [(seed + place, part) for place, part in enumerate(split_views(views, self._micro_batch))]
        with torch.no_grad():
            features = torch.cat([self._embed(*part) for part in self._parts], dim=1)
        self._features = features.requires_grad_(torch.is_grad_enabled())
        return self._features

    def backward(self) -> None:
        """Propagate the gradient of `forward`'s features to the encoder's parameters."""
        assert self._features.grad is not None
        gradients = torch.split(self._features.grad, self._micro_batch, dim=1)
        for (seed, part), gradient in zip(self._parts, gradients, strict=True):
            with nullcontext() if part is self._parts[-1][1] else self._no_sync():
                torch.autograd.backward(self._embed(seed, part), gradient)

    def _embed(self, seed: int, part: Views) -> Tensor:
        torch.manual_seed(seed)
        features: Tensor = self._encoder(part)
        return features


def split_views(views: Views, size: int) -> Sequence[Views]:
    """Views [V, N, C, H, W] in parts of `size` images; the last part may be smaller."""
    return [Views(*groups) for groups in zip(*(torch.split(group, size, dim=1) for group in views), strict=True)]
