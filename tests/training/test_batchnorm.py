"""BatchNorm over all ranks, in one process; test_distributed.py has two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jepakit.backbones.backbone import build, start_backbone
from jepakit_training.learning.batchnorm import (
    GlobalBatchNorm1d,
    batch_norms,
    freeze_norm_statistics,
    make_norm_statistics_global,
)


def test_global_batch_norm_is_torchs_batch_norm() -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(50, 7) + torch.arange(7)).requires_grad_()
    ours, theirs = GlobalBatchNorm1d(7), nn.BatchNorm1d(7).train()
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(0.5, 2, 7))
            module.bias.copy_(torch.linspace(-1, 1, 7))
    upstream = torch.randn(50, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    our_grads = torch.autograd.grad((ours(x) * upstream).sum(), (x, ours.weight, ours.bias))
    their_grads = torch.autograd.grad((theirs(x) * upstream).sum(), (x, theirs.weight, theirs.bias))
    for got, expected in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050", "levit_128s"])
def test_a_backbone_with_global_statistics_is_the_same_backbone(name: str) -> None:
    """LeViT normalises tokens, MobileNet has its activation in the same layer."""
    torch.manual_seed(0)
    theirs = build(name, {"img_size": 64} if "levit" in name else {}).train()
    ours = copy.deepcopy(theirs)
    make_norm_statistics_global(ours)
    images = torch.randn(6, 3, 64, 64)
    results: list[tuple[Tensor, dict[str, Tensor], list[Tensor]]] = []
    for module in (theirs, ours):
        features = module(images)
        parameter_gradients = torch.autograd.grad(features.square().mean(), tuple(module.parameters()))
        results.append((features, dict(module.named_buffers()), list(parameter_gradients)))
    (features, buffers, gradients), (our_features, our_buffers, our_gradients) = results
    torch.testing.assert_close(our_features, features, rtol=1e-3, atol=1e-4)
    assert buffers.keys() == our_buffers.keys()
    for key, value in buffers.items():
        torch.testing.assert_close(our_buffers[key], value, rtol=1e-3, atol=1e-4)
    whole, our_whole = (torch.cat([one.flatten() for one in each]) for each in (gradients, our_gradients))
    assert float((our_whole - whole).norm() / whole.norm()) < 1e-3
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-3, atol=1e-3)


def test_frozen_statistics_stay_in_training_mode_and_trained_ones_move(weights_file: Callable[[str], Path]) -> None:
    backbone, _ = start_backbone("test_resnet", str(weights_file("test_resnet")), 64)
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    assert len(before) == 3 * len(batch_norms(backbone)) > 0
    freeze_norm_statistics(backbone.train())
    assert backbone.training
    backbone(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
    backbone.train()(torch.randn(4, 3, 64, 64))  # the trap is real
    assert not any(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
