"""Which parameters train, how fast, and what low-rank additions leave behind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import nn

from jepakit.backbones.backbone import build
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError
from jepakit_training.learning.batchnorm import freeze_norm_statistics
from jepakit_training.learning.model import Projector
from jepakit_training.learning.trainable import add_lora, check_trainable, freeze, parameter_groups, switch_off_dropout

Unfreeze = Literal["auto", "none", "all"] | int


def trained(name: str, unfreeze: Unfreeze, *, from_random: bool = False) -> tuple[set[str], set[str]]:
    """(parameters that train, all parameters)."""
    backbone = build(name, {})
    freeze(backbone, unfreeze, from_random=from_random)
    return trainable(backbone), {key for key, _ in backbone.named_parameters()}


def trainable(backbone: nn.Module) -> set[str]:
    return {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}


def starting_with(names: set[str], *prefixes: str) -> set[str]:
    found = {name for name in names if name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in found) for prefix in prefixes)
    return found


@pytest.mark.parametrize(
    ("name", "unfreeze", "prefixes"),
    [
        # The last stage of a ConvNet, the last two blocks of a ViT.
        ("resnet10t", "auto", ("layer4.",)),
        ("test_convnext", "auto", ("stages.3.", "head.norm.")),
        ("mobilenetv2_100", "auto", ("blocks.5.", "blocks.6.", "conv_head.", "bn2.")),
        ("test_efficientnet", "auto", ("blocks.4.", "conv_head.", "bn2.")),
        ("test_vit", "auto", ("blocks.4.", "blocks.5.", "norm.")),
        ("vit_tiny_patch16_224", "auto", ("blocks.10.", "blocks.11.", "norm.")),
        # The last stage where timm names no module of a feature level.
        ("mvitv2_tiny", "auto", ("stages.3.", "norm.")),
        ("twins_svt_small", "auto", ("patch_embeds.3.", "blocks.3.", "pos_block.3.", "norm.")),
        ("twins_pcpvt_small", "auto", ("patch_embeds.3.", "blocks.3.", "pos_block.3.", "norm.")),
        # Norms alone are no block.
        ("coat_tiny", "auto", ("parallel_blocks.5.", "norm2.", "norm3.", "norm4.", "aggregate.")),
        ("densenet121", 1, ("features.denseblock4.", "features.norm5.")),
    ],
)
def test_the_last_layers_train(name: str, unfreeze: Unfreeze, prefixes: tuple[str, ...]) -> None:
    training, everything = trained(name, unfreeze)
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
    freeze(backbone, "auto", from_random=False)
    last = len(backbone.blocks) - 1
    blocks = {key.split(".")[1] for key in trainable(backbone) if key.startswith("blocks.")}
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


@pytest.mark.parametrize("name", ["poolformerv2_s12", "caformer_s18", "pit_s_224", "rdnet_tiny"])
def test_a_number_is_refused_where_timm_does_not_tell_the_blocks(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name, {})
    freeze(backbone, "auto", from_random=False)
    kind = type(backbone).__name__
    with pytest.raises(
        ConfigError, match=f"unfreeze = 2: timm does not tell the blocks of {kind}; use `auto`, `all` or"
    ):
        freeze(backbone, 2, from_random=False)


@pytest.mark.parametrize(("name", "blocks"), [("test_vit", 6), ("test_resnet", 4), ("mvitv2_tiny", 4)])
def test_the_number_of_blocks_that_the_refusal_names_is_the_most_that_is_taken(name: str, blocks: int) -> None:
    trained(name, blocks)
    with pytest.raises(ConfigError, match=f"has {blocks} blocks"):
        trained(name, blocks + 1)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("unfreeze", ["auto", "all", "none"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_optimizer_holds_every_trainable_parameter_once_and_decays_no_norm_or_bias(
    name: str, unfreeze: Unfreeze, layer_decay: float
) -> None:
    backbone, projector = build(name, {}), Projector(4, (8, 8, 8))
    freeze(backbone, unfreeze, from_random=False)
    groups = parameter_groups(
        backbone, projector, lr=1e-4, projector_lr=1e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {key: p for key, p in backbone.named_parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in (*trained.values(), *projector.parameters())}

    settings = {id(parameter): group for group in groups for parameter in group["params"]}
    for key, parameter in (*backbone.named_parameters(), *projector.named_parameters()):
        if not parameter.requires_grad:
            continue
        group = settings[id(parameter)]
        assert group["role"] == ("backbone" if key in trained else "projector")
        plain = parameter.ndim <= 1 or any(word in key for word in ("pos_embed", "cls_token", "reg_token"))
        assert group["weight_decay"] == (0 if plain else 0.05), key
    assert torch.optim.AdamW(groups)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize(
    ("name", "part"),
    [("swin_tiny_patch4_window7_224", "relative_position_bias_table"), ("levit_128s", "attention_biases")],
)
def test_no_weight_decay_on_what_the_backbone_names_itself(name: str, part: str, layer_decay: float) -> None:
    backbone, projector = build(name, {}), Projector(4, (8, 8, 8))
    groups = parameter_groups(
        backbone, projector, lr=1e-4, projector_lr=1e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = [decay[id(parameter)] for key, parameter in backbone.named_parameters() if part in key]
    assert set(found) == {0.0}


def test_a_layer_that_mixes_tokens_decays_like_any_and_a_token_does_not() -> None:
    backbone, projector = build("poolformerv2_s12", {}), Projector(4, (8, 8, 8))
    backbone.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 4))
    backbone.stages[0].blocks[0].token_mixer.qkv = torch.nn.Linear(4, 4)
    groups = parameter_groups(backbone, projector, lr=1e-4, projector_lr=1e-3, weight_decay=0.05)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(backbone.cls_token)] == 0
    assert decay[id(backbone.stages[0].blocks[0].token_mixer.qkv.weight)] == 0.05


def test_layer_decay_halves_the_rate_from_each_layer_to_the_one_before() -> None:
    backbone, projector = build("test_vit", {}), Projector(4, (8, 8, 8))
    freeze(backbone, "all", from_random=False)
    groups = parameter_groups(backbone, projector, lr=1e-3, projector_lr=1e-2, weight_decay=0.05, layer_decay=0.5)
    rate = {id(parameter): group["base_lr"] for group in groups for parameter in group["params"]}
    named = dict(backbone.named_parameters())
    depths = [rate[id(named[f"blocks.{block}.attn.qkv.weight"])] for block in range(6)]
    assert [later / earlier for earlier, later in pairwise(depths)] == pytest.approx([2] * 5)
    assert rate[id(named["norm.weight"])] == pytest.approx(1e-3)
    assert rate[id(named["patch_embed.proj.weight"])] < depths[0]
    assert {rate[id(parameter)] for parameter in projector.parameters()} == {1e-2}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mobilenetv2_050"])
def test_low_rank_additions_are_nothing_at_first_and_merge_into_the_weights(name: str) -> None:
    torch.manual_seed(0)
    backbone: Any = build(name, {"img_size": 64} if "vit" in name else {}).eval()
    names = set(backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone(images)
        lora = add_lora(backbone, rank=4, seed=0)
        assert torch.equal(backbone(images), before)
        trained = {key: p for key, p in backbone.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in key for key in trained)
        assert sum(p.numel() for p in trained.values()) < 0.5 * sum(p.numel() for p in backbone.parameters())
        for parameter in trained.values():
            nn.init.normal_(parameter, std=0.05)
        changed = backbone(images)
        merged = lora.merge_and_unload()
        assert merged is backbone
        assert set(backbone.state_dict()) == names
        assert not torch.allclose(changed, before, rtol=1e-2)
        torch.testing.assert_close(backbone(images), changed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["test_nfnet", "vit_tiny_r_s16_p8_224", "tf_efficientnetv2_b0"])
def test_low_rank_additions_merge_beside_convolutions_of_timms_own(name: str) -> None:
    """Weight-standardised ones get none; those that pad as TensorFlow does are plain enough."""
    torch.manual_seed(0)
    backbone: Any = build(name, {"img_size": 64} if "vit" in name else {}).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if key.endswith(".gain"):  # of a block's last convolution it is 0 at first
                parameter.fill_(1)
        before = backbone(images)
        lora = add_lora(backbone, rank=4, seed=0)
        assert torch.equal(backbone(images), before)
        for key, parameter in backbone.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        changed = backbone(images)
        lora.merge_and_unload()
        assert (changed - before).norm() > 0.01 * before.norm()
        assert (backbone(images) - changed).norm() < 1e-4 * changed.norm()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("eva_giant_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 32, "num_heads": 2}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1,), "num_heads": (2,), "embed_dim": 32}),
    ],
)
def test_low_rank_additions_are_learnt_where_attention_takes_its_layers_weight(
    name: str, arguments: dict[str, Any]
) -> None:
    backbone: Any = build(name, arguments).eval()
    images, weights = torch.randn(2, 3, arguments["img_size"], arguments["img_size"]), torch.randn(2, 32)
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if "norm" in key and key.endswith("weight"):  # Swin V2's blocks are nothing at first
                parameter.fill_(1)
        before = backbone(images)
        add_lora(backbone, rank=4, seed=0)
        torch.testing.assert_close(backbone(images), before)
    (backbone(images) * weights).sum().backward()
    learnt = {key: p.grad for key, p in backbone.named_parameters() if "qkv.lora_B" in key}
    assert learnt
    assert all(grad is not None and grad.abs().max() > 0 for grad in learnt.values())


def test_low_rank_additions_to_nothing_are_refused() -> None:
    with torch.device("meta"):
        backbone = build("resnetv2_50x1_bit", {})
    with pytest.raises(ConfigError, match="unfreeze = lora: ResNetV2 has no linear layer and no ungrouped convolution"):
        add_lora(backbone, rank=4, seed=0)


def test_asking_whether_it_can_train_changes_nothing_and_refuses_what_training_would() -> None:
    def config(name: str, **settings: Any) -> AdaptConfig:
        return AdaptConfig(images="x", backbone=name, **settings)

    with torch.device("meta"):
        vit: Any = build("test_vit", {})
        vit.norm.requires_grad_(False)
        for unfreeze in ("auto", "all", "none", 2, "lora"):
            check_trainable(vit, config("test_vit", unfreeze=unfreeze, activation_checkpointing=True))
        assert not vit.grad_checkpointing
        assert trainable(vit) == {name for name, _ in vit.named_parameters() if not name.startswith("norm.")}
        with pytest.raises(ConfigError, match="unfreeze = 50: this backbone has 6 blocks"):
            check_trainable(vit, config("test_vit", unfreeze=50))
        with pytest.raises(ConfigError, match="unfreeze = lora: ResNetV2"):
            check_trainable(build("resnetv2_50x1_bit", {}), config("resnetv2_50x1_bit", unfreeze="lora"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7_224", 64),
        pytest.param("nest_tiny", 224, marks=pytest.mark.slow),
        ("rexnet_100", 32),
        ("ghostnet_050", 32),
        ("legacy_seresnet18", 32),
        ("cpubone_nano", 64),
        ("vit_relpos_small_patch16_224", 64),
    ],
)
def test_dropout_and_stochastic_depth_are_off_where_timm_turns_them_on(name: str, size: int) -> None:
    torch.manual_seed(0)
    backbone = build(name, {"img_size": size} if "patch" in name else {}).train()
    freeze_norm_statistics(backbone)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert not torch.equal(backbone(images), backbone(images))
        switch_off_dropout(backbone)
        assert torch.equal(backbone(images), backbone(images))
        assert torch.equal(backbone(images), backbone.eval()(images))


def test_low_rank_additions_depend_on_the_seed_alone() -> None:
    def factor(seed: int) -> torch.Tensor:
        backbone = build("test_vit", {})
        add_lora(backbone, rank=4, seed=seed)
        first: torch.Tensor = next(p.detach() for key, p in backbone.named_parameters() if "lora_A" in key)
        return first

    assert torch.equal(factor(1), factor(1))
    assert not torch.equal(factor(1), factor(2))


def test_no_weight_decay_on_positions_and_scales_of_any_shape() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rel_pos_h, self.rel_pos_w = nn.Parameter(torch.ones(7, 4)), nn.Parameter(torch.ones(7, 4))
            self.gain, self.temperature = nn.Parameter(torch.ones(8, 1, 1, 1)), nn.Parameter(torch.ones(2, 1, 1))
            self.layer = nn.Linear(4, 1)

    block = Block()
    groups = parameter_groups(block, nn.Linear(4, 4), lr=1.0, projector_lr=1.0, weight_decay=0.05)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {name for name, parameter in block.named_parameters() if decay[id(parameter)]}
    assert found == {"layer.weight"}
