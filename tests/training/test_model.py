"""What trains and what stays, the projector's BatchNorm, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from jepakit.backbone import build, start_backbone, stock_preprocess
from jepakit.errors import ConfigError
from jepakit_training.model import (
    GlobalBatchNorm1d,
    LejepaModel,
    freeze,
    freeze_norm_statistics,
    parameter_groups,
)
from jepakit_training.views import Views

Unfreeze = Literal["auto", "none", "all"] | int


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


def trained(name: str, unfreeze: Unfreeze, *, from_random: bool = False) -> tuple[set[str], set[str]]:
    """(parameters that train, all parameters)."""
    backbone = build(name, {})
    returned = freeze(backbone, unfreeze, from_random=from_random)
    training = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert set(returned) == training
    assert len(returned) == len(set(returned))
    return training, {key for key, _ in backbone.named_parameters()}


def starting_with(names: set[str], *prefixes: str) -> set[str]:
    found = {name for name in names if name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in found) for prefix in prefixes)
    return found


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("resnet10t", ("layer4.",)),
        ("test_convnext", ("stages.3.", "head.norm.")),
        ("mobilenetv2_100", ("blocks.5.", "blocks.6.", "conv_head.", "bn2.")),
        ("test_efficientnet", ("blocks.4.", "conv_head.", "bn2.")),
        ("test_vit", ("blocks.4.", "blocks.5.", "norm.")),
        ("vit_tiny_patch16_224", ("blocks.10.", "blocks.11.", "norm.")),
    ],
)
def test_auto_trains_the_last_stage_of_a_convnet_and_the_last_two_blocks_of_a_vit(
    name: str, prefixes: tuple[str, ...]
) -> None:
    training, everything = trained(name, "auto")
    assert training == starting_with(everything, *prefixes)


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_siglip_224",
        "naflexvit_base_patch16_gap",
    ],
)
def test_auto_trains_two_blocks_of_every_kind_of_vit_whatever_norms_or_pooling_follow(name: str) -> None:
    with torch.device("meta"):
        backbone: Any = build(name, {})
    training = freeze(backbone, "auto", from_random=False)
    last = len(backbone.blocks) - 1
    blocks = {key.split(".")[1] for key in training if key.startswith("blocks.")}
    assert blocks == {str(last - 1), str(last)}


@pytest.mark.parametrize(
    "name", ["densenet121", "repvgg_a0", "regnety_002", "swin_tiny_patch4_window7_224", "edgenext_xx_small"]
)
def test_auto_trains_the_layers_at_the_last_resolution_of_other_families(name: str) -> None:
    """A share of the weights that makes sense: neither a lone norm nor nearly everything."""
    with torch.device("meta"):
        backbone: Any = build(name, {})
    freeze(backbone, "auto", from_random=False)
    sizes = [(p.numel(), p.requires_grad) for p in backbone.parameters()]
    share = sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
    assert 0.1 < share < 0.95
    last = [name for name, p in backbone.named_parameters() if p.requires_grad]
    names = [name for name, _ in backbone.named_parameters()]
    assert last == names[-len(last) :]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_auto_trains_everything_from_random_weights(name: str) -> None:
    training, everything = trained(name, "auto", from_random=True)
    assert training == everything


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("from_random", [False, True])
def test_none_and_all(name: str, from_random: bool) -> None:
    assert trained(name, "none", from_random=from_random)[0] == set()
    training, everything = trained(name, "all", from_random=from_random)
    assert training == everything


def test_a_number_counts_blocks_from_the_end() -> None:
    training, everything = trained("test_vit", 3)
    assert training == starting_with(everything, "blocks.3.", "blocks.4.", "blocks.5.", "norm.")
    training, everything = trained("resnet10t", 1)
    assert training == starting_with(everything, "layer4.")
    sizes = [len(trained("mobilenetv2_100", count)[0]) for count in (1, 2, 3)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_more_blocks_than_there_are_is_refused_with_the_number(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unfreeze = 50: this backbone has \d+ blocks; use `all`"):
        trained(name, 50)


@pytest.mark.parametrize(("name", "blocks"), [("test_vit", 6), ("test_resnet", 4)])
def test_the_number_of_blocks_that_the_refusal_names_is_the_most_that_is_taken(name: str, blocks: int) -> None:
    trained(name, blocks)
    with pytest.raises(ConfigError, match=f"has {blocks} blocks"):
        trained(name, blocks + 1)


def make_model(name: str, unfreeze: Unfreeze = "auto") -> LejepaModel:
    torch.manual_seed(0)
    backbone = build(name, {"dynamic_img_size": True} if "vit" in name else {})
    freeze(backbone, unfreeze, from_random=False)
    return LejepaModel(backbone, stock_preprocess(backbone, 64), (32, 32, 8), backbone.num_features)


def make_views(images: int = 6, n_local: int = 2) -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(*(
        torch.randint(0, 256, (count, images, 3, size, size), dtype=torch.uint8, generator=generator)
        for count, size in ((2, 64), (n_local, 32))
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("unfreeze", ["auto", "all", "none"])
def test_the_optimizer_holds_every_trainable_parameter_once_and_decays_no_norm_or_bias(
    name: str, unfreeze: Unfreeze
) -> None:
    model = make_model(name, unfreeze)
    groups = parameter_groups(model, lr=1e-4, projector_lr=1e-3, weight_decay=0.05)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    settings = {id(parameter): group for group in groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = settings[id(parameter)]
        is_backbone = key.startswith("backbone.")
        assert (group["role"], group["base_lr"]) == (("backbone", 1e-4) if is_backbone else ("projector", 1e-3))
        plain = parameter.ndim <= 1 or any(word in key for word in ("pos_embed", "cls_token", "reg_token"))
        assert group["weight_decay"] == (0 if plain else 0.05), key
    assert torch.optim.AdamW(groups)


def test_projections_come_global_views_first_in_float32() -> None:
    model = make_model("test_vit").train()
    views = make_views()
    both = model(views)
    assert (both.shape, both.dtype) == ((4, 6, 8), torch.float32)
    only_global = model(Views(views.global_, views.local[:0]))
    assert only_global.shape == (2, 6, 8)

    with torch.no_grad():
        normal = (views.global_[1].float() / 255 - 0.5) / 0.5  # test_vit's mean and std
        features = [model.backbone(normal)]
    got = model.backbone((views.global_[1].float() - model._mean) / model._std)
    torch.testing.assert_close(got, features[0], rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_gets_no_gradient_and_the_projector_does() -> None:
    model = make_model("test_vit").train()
    model.backbone_frozen = True
    model(make_views()).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    model.backbone_frozen = False
    model(make_views()).square().sum().backward()
    for key, parameter in model.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_frozen_batch_norm_statistics_stay_in_training_mode(weights_file: Callable[[str], Path]) -> None:
    backbone, _ = start_backbone("test_resnet", str(weights_file("test_resnet")), 64)
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    model = LejepaModel(backbone, stock_preprocess(backbone, 64), (32, 32, 8), 96).train()
    freeze_norm_statistics(backbone)
    assert model.projector.training
    assert backbone.training
    model(make_views())
    assert before
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())


def test_the_trap_is_real_without_freezing_statistics_move(weights_file: Callable[[str], Path]) -> None:
    backbone, _ = start_backbone("test_resnet", str(weights_file("test_resnet")), 64)
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    LejepaModel(backbone, stock_preprocess(backbone, 64), (32, 32, 8), 96).train()(make_views())
    assert not all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
