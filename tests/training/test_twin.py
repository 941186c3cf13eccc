"""The twin that trains in place of the backbone: same features, same trained parameters, less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jepakit.backbones.backbone import start_backbone
from jepakit_training.learning.batchnorm import batch_norms
from jepakit_training.learning.trainable import freeze
from jepakit_training.learning.twin import twin_of

NAMES = ("test_resnet", "mobilenetv2_050", "test_vit", "densenet121")


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def start(name: str, weights_file: Callable[[str], Path]) -> nn.Module:
    backbone, _ = start_backbone(name, str(weights_file(name)), 64)
    freeze(backbone, "auto", from_random=False)
    return backbone


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_gives_the_features_and_gradients_of_the_backbone(
    name: str, noise: Tensor, weights_file: Callable[[str], Path]
) -> None:
    backbone = start(name, weights_file).double()  # in single precision, a ReLU near 0 may open in one of them alone
    twin = twin_of(backbone, noise.double(), bf16=False)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert [id(p) for p in twin.parameters() if p.requires_grad] == [id(p) for p in trained]
    other = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected, got = backbone.eval()(other), twin.eval()(other)
    assert float((got - expected).detach().norm() / expected.detach().norm()) < 1e-6
    for one, ours in zip(
        torch.autograd.grad(expected.square().sum(), trained),
        torch.autograd.grad(got.square().sum(), trained),
        strict=True,
    ):
        assert float((ours - one).norm()) <= 1e-6 * float(one.norm()) + 1e-9


@pytest.mark.parametrize(("name", "least"), [("test_resnet", 5), ("mobilenetv2_050", 30)])
def test_frozen_batch_norms_are_folded_and_trained_ones_stay(
    name: str, least: int, noise: Tensor, weights_file: Callable[[str], Path]
) -> None:
    backbone = start(name, weights_file)
    left = batch_norms(twin_of(backbone, noise, bf16=False))
    assert len(batch_norms(backbone)) - len(left) >= least
    trained = {id(norm.weight) for norm in batch_norms(backbone) if norm.weight.requires_grad}
    assert trained <= {id(norm.weight) for norm in left}


def test_a_norm_that_cannot_be_folded_stays(noise: Tensor) -> None:
    """What the convolution gives is used twice here: folded, the shortcut would be another one."""

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
            self.norm.running_var.fill_(9.0)  # type: ignore[union-attr]
            self.conv.requires_grad_(False), self.norm.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(self.norm(x) + x)  # type: ignore[no-any-return]

    module = Shortcut()
    twin = twin_of(module, noise, bf16=False)
    assert len(batch_norms(twin)) == 1
    torch.testing.assert_close(twin(noise), module(noise))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_in_bfloat16_only_frozen_layers_before_the_first_trained_one_are(
    name: str, noise: Tensor, weights_file: Callable[[str], Path]
) -> None:
    backbone = start(name, weights_file)
    twin = twin_of(backbone, noise, bf16=True)
    dtypes = {(parameter.dtype, parameter.requires_grad) for parameter in twin.parameters()}
    assert (torch.bfloat16, False) in dtypes
    assert (torch.bfloat16, True) not in dtypes
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    expected, got = backbone.eval()(noise), twin.eval()(noise)
    assert got.dtype == torch.float32
    error = float((got - expected).detach().norm() / expected.detach().norm())
    assert 1e-5 < error < 0.1


def test_a_frozen_layer_that_is_used_again_behind_a_trained_one_stays_in_float32(noise: Tensor) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.trained = nn.Conv2d(3, 3, 1).requires_grad_(False), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.trained(self.shared(x)))  # type: ignore[no-any-return]

    assert twin_of(Again(), noise, bf16=True).shared.weight.dtype == torch.float32  # type: ignore[union-attr]
