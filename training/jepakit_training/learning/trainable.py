"""Which of the backbone's parameters train, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Conv2dSame
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from jepakit.backbones.backbone import is_hierarchical
from jepakit.config import AdaptConfig, Unfreeze
from jepakit.errors import ConfigError
from jepakit_training.randomness import derive_seed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

_VIT_BLOCKS = 2
_LORA = "lora"
_PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)


def check_trainable(backbone: Any, config: AdaptConfig) -> None:
    """Check that the backbone can be trained as `config` says, before anything is measured, without changing it.

    Raises ConfigError for more blocks than there are, for LoRA if no layer can take it, and for activation checkpointing
    if timm does not support it.
    """
    if config.unfreeze == "lora":
        _layers_for_lora(backbone)
    else:
        _chosen(backbone, config.unfreeze, from_random=config.weights == "random")
    if config.activation_checkpointing:
        checkpoint_activations(backbone, config.backbone)
        backbone.set_grad_checkpointing(False)


def checkpoint_activations(backbone: Any, name: str) -> None:
    """Recompute activations instead of keeping them; ConfigError if timm does not support it."""
    if not can_checkpoint_activations(backbone):
        raise ConfigError(
            f"activation_checkpointing: timm has none for {name}; micro_batch saves memory on every backbone"
        )
    backbone.set_grad_checkpointing(True)


def can_checkpoint_activations(backbone: Any) -> bool:
    """Whether timm can recompute this backbone's activations; leaves that switched off."""
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        return False
    backbone.set_grad_checkpointing(False)
    return True


def freeze(backbone: Any, unfreeze: Unfreeze, *, from_random: bool) -> None:
    """Set which of the backbone's parameters train.

    `auto`: everything if the weights are random; else a ViT's last two blocks, or all that follows the second-to-last
    feature level of a ConvNet or another backbone of decreasing resolution (Swin). An integer N: the last N blocks in
    timm's grouping, with the norms after them. Raises ConfigError for more blocks than there are.
    """
    chosen = _chosen(backbone, unfreeze, from_random=from_random)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)


def trained_share(backbone: Any, config: AdaptConfig) -> float:
    """The share of the backbone's weights that train if `config.unfreeze` is not `lora`."""
    assert config.unfreeze != "lora"
    chosen = _chosen(backbone, config.unfreeze, from_random=config.weights == "random")
    sizes: dict[str, int] = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    return sum(sizes[name] for name in chosen) / sum(sizes.values())


def switch_off_dropout(backbone: nn.Module) -> None:
    """Compute the same features in every forward pass of training as when embedding: no dropout, no stochastic depth.

    Some timm classes have them by default (ReXNet drops a fifth of the pooled features, Swin one in ten of the last
    blocks, NesT one in two): also in frozen parts, and differently for every micro-batch.
    """
    for part in backbone.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(part, _DropoutNd))):
                setattr(part, name, 0.0)


def add_lora(backbone: nn.Module, rank: int, seed: int) -> LoraModel:
    """Give every linear layer and ungrouped convolution a trainable LoRA adapter (arXiv 2106.09685), and freeze the rest.
    Adapters output 0 at first and are scaled by 2. They change `backbone` in place, until `merge_and_unload()` of the
    returned object adds them to its weights and restores timm's structure.

    Weight-standardised convolutions get none: they standardise their weights in every forward pass, and standardising
    is not linear. Raises ConfigError if no layer is left.

    Attention that reads its qkv layer's weight directly (BEiT, EVA, Swin V2), bypassing the addition, calls the layer
    from now on: the same sums in another order.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    layers = _layers_for_lora(backbone)
    part: Any
    for part in backbone.modules():
        if hasattr(part, "qkv_bias_separate"):
            part.qkv_bias_separate = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        return LoraModel(backbone, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), _LORA)


def _is_plain(name: str, value: nn.Parameter) -> bool:
    """Whether a parameter gets no weight decay by its name or shape: a position embedding, a token (`cls_token`, but
    MetaFormer's `token_mixer` is a layer), a bias, or a scale, which some backbones keep as [C, 1, 1]."""
    is_position = "pos_embed" in name or name.endswith(("rel_pos_h", "rel_pos_w"))
    is_scale = not name.endswith("weight") and value.squeeze().ndim <= 1
    return is_position or is_scale or name.endswith(("token", "tokens"))


def parameter_groups(
    backbone: nn.Module,
    projector: nn.Module,
    *,
    lr: float,
    projector_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """AdamW's groups, backbone first; no weight decay on norms, biases, scales, position embeddings, tokens and what the
    backbone itself exempts (`no_weight_decay`), e.g. tables of relative positions.

    layer_decay  the factor on the learning rate from each of timm's layer groups to the one before it

    A group's `base_lr` is the learning rate that the schedule scales; its `role` says which part it belongs to.
    """
    groups = []
    for module, rate, role in ((backbone, lr, "backbone"), (projector, projector_lr, "projector")):
        spared: set[str] | list[str] = getattr(module, "no_weight_decay", set)()
        plain = [*spared, *(name for name, value in module.named_parameters() if _is_plain(name, value))]
        if role == "backbone" and layer_decay < 1:
            found = param_groups_layer_decay(module, weight_decay, plain, layer_decay=layer_decay)
        else:
            found = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=plain)
        for group in found:
            group["base_lr"] = group["lr"] = rate * group.pop("lr_scale", 1.0)
            groups.append({**group, "role": role})
    return groups


def _chosen(backbone: Any, unfreeze: Unfreeze, *, from_random: bool) -> set[str]:
    """Names of the parameters that `freeze` lets train."""
    if unfreeze == "auto" and from_random:
        unfreeze = "all"
    names = [name for name, _ in backbone.named_parameters()]
    if unfreeze == "all":
        return set(names)
    if unfreeze == "none":
        return set()
    if unfreeze == "auto" and is_hierarchical(backbone):
        return _after_second_last_level(backbone, names)
    return _last_blocks(backbone, unfreeze, _VIT_BLOCKS if unfreeze == "auto" else unfreeze)


def _layers_for_lora(backbone: nn.Module) -> list[str]:
    """Names of the layers that get LoRA adapters; ConfigError if there are none."""
    layers = [
        name
        for name, part in backbone.named_modules()
        if isinstance(part, nn.Linear) or (type(part) in _PLAIN_CONVOLUTIONS and part.groups == 1)
    ]
    if not layers:
        raise ConfigError(
            f"unfreeze = lora: {type(backbone).__name__} has no linear layer and no ungrouped convolution that uses its weights "
            "as they are; use `auto`, `all` or a number of blocks"
        )
    return layers


def _after_second_last_level(backbone: Any, names: list[str]) -> set[str]:
    """Everything after the second-to-last feature level, in timm's order of the parameters."""
    module = backbone.feature_info[-2]["module"]
    inside = [place for place, name in enumerate(names) if name.startswith(f"{module}.")]
    # A stem or a stage is one contiguous run of names; everything after it trains.
    after = set(names[max(inside) + 1 :]) if inside else set()
    return after if after & _of_layers(backbone) else _last_blocks(backbone, "auto", 1)


def _last_blocks(backbone: Any, unfreeze: Unfreeze, count: int) -> set[str]:
    """The last `count` blocks (a ConvNet's stages) and what follows them: final norms and attention pooling."""
    depth_of = _depths(backbone, unfreeze)
    roots = tuple({level["module"].split(".")[0] + "." for level in backbone.feature_info})
    # MViTv2 and Twins name no modules that exist: there, blocks are all that comes after the stem.
    inside = {name for name in depth_of if name.startswith(roots)} or {
        name for name, depth in depth_of.items() if depth
    }
    blocks = sorted({depth_of[name] for name in inside & _of_layers(backbone)})
    if count > len(blocks):
        raise ConfigError(f"unfreeze = {count}: this backbone has {len(blocks)} blocks; use `all` for everything")
    return {name for name, depth in depth_of.items() if depth >= blocks[-count]}


def _depths(backbone: Any, unfreeze: Unfreeze) -> dict[str, int]:
    """The block of every parameter, as timm counts them from the stem; ConfigError if it does not for this backbone."""
    try:
        return group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)  # type: ignore[no-any-return]
    except (AttributeError, AssertionError) as error:
        others = "`all` or `lora`" if unfreeze == "auto" else "`auto`, `all` or `lora`"
        raise ConfigError(
            f"unfreeze = {unfreeze}: timm does not tell the blocks of {type(backbone).__name__}; use {others}"
        ) from error


def _of_layers(backbone: Any) -> set[str]:
    """Names of the weights of layers: of two or more dimensions, unlike those of norms."""
    return {name for name, parameter in backbone.named_parameters() if parameter.squeeze().ndim > 1}
