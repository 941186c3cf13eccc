"""Views to features to projections, at once and in two passes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from jepakit.backbones.backbone import build, stock_preprocess
from jepakit_training.data.views import Views
from jepakit_training.learning.batchnorm import freeze_norm_statistics
from jepakit_training.learning.model import Encoder, Projector, TwoPass
from jepakit_training.learning.sigreg import directions, lejepa_loss


def make_encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    backbone = build(name, {"dynamic_img_size": True} if "vit" in name else {})
    encoder = Encoder(backbone, stock_preprocess(backbone, 64)).train()
    freeze_norm_statistics(encoder)
    return encoder


def make_views(images: int = 6, n_local: int = 2) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(*(
        torch.randint(0, 256, (count, images, 3, size, size), dtype=torch.uint8, generator=generator)
        for count, size in ((2, 64), (n_local, 32))
    ))  # fmt: skip


def test_features_come_global_views_first_in_float32() -> None:
    encoder, views = make_encoder("test_vit"), make_views()
    both = encoder(views)
    assert (both.shape, both.dtype) == ((4, 6, 64), torch.float32)
    assert encoder(Views(views.global_, views.local[:0])).shape == (2, 6, 64)
    normal = (views.global_[1].float() / 255 - 0.5) / 0.5  # test_vit's mean and std
    torch.testing.assert_close(both[1], encoder.backbone(normal), rtol=1e-4, atol=1e-5)
    assert Projector(64, (16, 16, 8))(both).shape == (4, 6, 8)


def test_a_projector_in_half_precision_gives_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Projector(64, (16, 16, 8))(torch.randn(4, 6, 64)).dtype == torch.float32


def gradients_of(encoder: Encoder, projector: Projector, features: Tensor, two_pass: TwoPass | None) -> Tensor:
    slices_KS = directions(8, 16, seed=0, step=0, device=torch.device("cpu"))
    loss, _, _ = lejepa_loss(projector(features), 2, 0.1, slices_KS)
    torch.autograd.backward(loss)
    if two_pass is not None:
        two_pass.backward()
    parameters = [*encoder.parameters(), *projector.parameters()]
    gradients = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(gradients).double()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_two_passes_give_the_gradient_of_the_whole_batch(name: str, micro_batch: int) -> None:
    """Six images by one, by four and two, at once; a ViT, and a ConvNet with frozen BatchNorm."""
    encoder, projector, views = make_encoder(name), Projector(64 if "vit" in name else 96, (16, 16, 8)), make_views()
    whole = gradients_of(encoder, projector, encoder(views), None)
    two_pass = TwoPass(encoder, micro_batch, contextlib.nullcontext)
    parts = gradients_of(encoder, projector, two_pass.forward(views, seed=3), two_pass)
    assert float((parts - whole).norm() / whole.norm()) < 1e-5


def test_averaging_the_losses_of_micro_batches_is_far_off() -> None:
    """Why there are two passes."""
    encoder, projector, views = make_encoder("test_vit"), Projector(64, (16, 16, 8)), make_views()
    whole = gradients_of(encoder, projector, encoder(views), None)
    halves = [Views(*(group[:, part] for group in views)) for part in (slice(0, 3), slice(3, 6))]
    averaged = sum(gradients_of(encoder, projector, encoder(half), None) / 2 for half in halves)
    assert float((averaged - whole).norm() / whole.norm()) > 0.3


def test_both_passes_draw_the_same_random_numbers() -> None:
    """Dropout between them would make the gradient that of another network."""
    encoder, views = make_encoder("test_vit"), make_views()
    encoder.backbone = nn.Sequential(encoder.backbone, nn.Dropout(0.5))
    two_pass = TwoPass(encoder, 2, contextlib.nullcontext)
    features = two_pass.forward(views, seed=3)
    again = [two_pass._embed(*part).detach() for part in two_pass._parts]
    assert torch.equal(torch.cat(again, dim=1), features.detach())
    assert (features == 0).any()


def test_two_passes_of_a_frozen_backbone_are_one() -> None:
    encoder, views = make_encoder("test_vit"), make_views()
    with torch.no_grad():
        features = TwoPass(encoder, 2, contextlib.nullcontext).forward(views, seed=3)
    assert not features.requires_grad
