"""One step and what it changes, with every setting of the method, on real tiny backbones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import jepakit_training.learning.learner
from jepakit.backbones.backbone import start_backbone, stock_preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, TrainingError
from jepakit.sources import ImageList, list_images
from jepakit_training.data.views import Views
from jepakit_training.learning.learner import Learner, Outcome
from jepakit_training.learning.sigreg import directions, lejepa_loss
from jepakit_training.plan import make_plan

TINY: dict[str, Any] = {
    "image_size": 64, "steps": 8, "warmup": 0.25, "batch_size": 8, "projector": (32, 32, 8), "n_slices": 16, "lr": 1e-3,
    "views": {"n_local": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def images(image_folder: Callable[..., Path]) -> ImageList:
    return list_images(str(image_folder()), "none")


@pytest.fixture(scope="module")
def make(images: ImageList, weights_file: Callable[[str], Path]) -> Callable[..., tuple[Learner, nn.Module]]:
    """`make("test_vit", **settings)`: a learner, and the backbone it trains."""

    def call(name: str = "test_vit", **settings: Any) -> tuple[Learner, nn.Module]:
        weights = settings.pop("weights", None) or str(weights_file(name))
        config = AdaptConfig(images="x", backbone=name, weights=weights, **{**TINY, **settings})
        torch.manual_seed(0)
        backbone, _ = start_backbone(name, weights, config.image_size)
        plan = make_plan(config, images, backbone, 1, bands=3, value_bytes=1)
        return Learner(
            config, plan, backbone, stock_preprocess(backbone, config.image_size), Accelerator(cpu=True)
        ), backbone

    return call


def views(step: int = 0) -> Views:
    generator = torch.Generator().manual_seed(step)
    return Views(*(
        torch.randint(0, 256, (2, 8, 3, size, size), dtype=torch.uint8, generator=generator) for size in (64, 32)
    ))  # fmt: skip


def train(learner: Learner, steps: range = range(8)) -> list[Outcome]:
    return [learner.step(step, views(step)) for step in steps]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.flatten().float() for value in module.state_dict().values()])


def change(backbone: nn.Module, before: Tensor) -> float:
    return float((weights(backbone) - before).norm())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_micro_batches_and_checkpointed_activations_change_nothing_but_memory(
    make: Callable[..., Any], name: str
) -> None:
    ends = []
    for settings in ({}, {"micro_batch": 3}, {"activation_checkpointing": True}):
        learner, backbone = make(name, **settings)
        before = weights(backbone)
        losses = train(learner, range(5))
        ends.append((torch.stack([one.loss for one in losses]), weights(backbone) - before))
    (expected, expected_moved), *others = ends
    assert float(expected_moved.norm()) > 0
    for other_losses, other_moved in others:
        torch.testing.assert_close(other_losses, expected, rtol=1e-4, atol=1e-5)
        # AdamW's first steps are signs of gradients: one that is 0 but for rounding may take either sign.
        assert float((other_moved - expected_moved).norm() / expected_moved.norm()) < 0.1


def test_lambda_slices_and_learning_rates_reach_the_step(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a rate so low that a floor would raise it."""
    seen: list[tuple[int, float, torch.Size]] = []

    def watched(proj: Tensor, n_global: int, lamb: float, slices: Tensor) -> Any:
        seen.append((n_global, lamb, slices.shape))
        return lejepa_loss(proj, n_global, lamb, slices)

    monkeypatch.setattr(jepakit_training.learning.learner, "lejepa_loss", watched)
    learner, _ = make(lamb=0.37, lr=1e-7, projector_lr=1e-3)
    groups = learner.optimizer.param_groups
    assert max(group["base_lr"] for group in groups if group["role"] == "backbone") == pytest.approx(1e-7)
    assert {group["base_lr"] for group in groups if group["role"] == "projector"} == {1e-3}
    for step in range(8):
        outcome = learner.step(step, views(step))
        cosine = (1 + math.cos(math.pi * step / 8)) / 2
        ramps = {"projector": (step + 1) / 10 * cosine, "backbone": max(0, step - 1) / 10 * cosine}
        assert all(group["lr"] == pytest.approx(group["base_lr"] * ramps[group["role"]]) for group in groups)
        assert float(outcome.loss) == pytest.approx(0.63 * float(outcome.prediction) + 0.37 * float(outcome.sigreg))
    assert seen == [(2, 0.37, torch.Size([8, 16]))] * 8


def test_no_block_is_dropped_at_random(make: Callable[..., Any]) -> None:
    """timm's Swin would, in its frozen blocks too: every micro-batch, and every second pass over it, would be embedded by another."""
    learner, _ = make("swin_tiny_patch4_window7_224", weights="random")
    globals_ = views().global_
    assert learner.encoder.training
    with torch.no_grad():
        once, again = (learner.encoder(Views(globals_, globals_[:0])) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_low_rank_additions_train_and_are_merged(make: Callable[..., Any], name: str) -> None:
    learner, backbone = make(name, unfreeze="lora", lora_rank=4)
    start, _ = start_backbone(name, learner._config.weights, 64)
    train(learner)
    learner.finish()
    assert list(backbone.state_dict()) == list(start.state_dict())
    moved = [key for key, value in backbone.state_dict().items() if not torch.equal(value, start.state_dict()[key])]
    assert moved
    assert not [key for key in moved if "norm" in key or "bn" in key or key.endswith("bias")]


def test_a_checkpoint_of_everything_goes_on_exactly(make: Callable[..., Any]) -> None:
    settings = {"unfreeze": "lora", "average": "ema", "anchor": 1.0}
    whole, whole_backbone = make(**settings)
    train(whole)
    whole.finish()
    first, _ = make(**settings)
    train(first, range(5))
    second, backbone = make(**settings)
    second.load_state_dict(first.state_dict())
    train(second, range(5, 8))
    second.finish()
    assert torch.equal(weights(backbone), weights(whole_backbone))


def test_a_mix_ends_so_far_from_the_start(make: Callable[..., Any]) -> None:
    moves = []
    for mix in (1.0, 0.25):
        learner, backbone = make("test_resnet", mix=mix)
        before = weights(backbone)
        train(learner)
        learner.finish()
        moves.append(change(backbone, before))
    assert moves[1] == pytest.approx(0.25 * moves[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_lags_behind(make: Callable[..., Any], kind: str) -> None:
    moves = []
    for average in ("none", kind):
        learner, backbone = make("test_resnet", average=average, average_over=0.5)
        before = weights(backbone)
        train(learner)
        learner.finish()
        moves.append(change(backbone, before))
    assert 0 < moves[1] < moves[0]


@pytest.mark.slow
def test_an_anchor_holds_the_features_near_the_start(make: Callable[..., Any]) -> None:
    ends = {}
    for weight in (0.001, 100.0):
        # Elsewhere the frozen layers of a CPU with bfloat16 round, and the start that is compared with does not.
        learner, _ = make("test_vit", anchor=weight, precision="fp32")
        anchors = [float(one.anchor) for one in train(learner) if one.anchor is not None]
        assert anchors[:2] == [0, 0]  # the projector warms up
        assert anchors[2] == pytest.approx(0, abs=1e-5)  # before the first change
        ends[weight] = anchors[-1]
    assert 0 < ends[100.0] < 0.5 * ends[0.001]


def test_the_start_that_an_anchor_compares_with_is_embedded_in_micro_batches_too(make: Callable[..., Any]) -> None:
    """The projector, whose rounding AdamW blows up, is left out: the features after one step are the same."""
    ends = []
    for settings in ({}, {"micro_batch": 3}):
        learner, _ = make("test_vit", anchor=1.0, **settings)
        seen: list[int] = []
        learner._anchor.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output.shape[1]))
        ends.append(torch.stack([one.anchor for one in train(learner, range(4)) if one.anchor is not None]))
        assert seen == ([8, 8] if not settings else [3, 3, 2] * 2)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-2, atol=1e-6)


def test_without_an_anchor_there_is_none(make: Callable[..., Any]) -> None:
    assert train(make()[0], range(1))[0].anchor is None


def test_trained_statistics_move_and_frozen_ones_do_not(make: Callable[..., Any]) -> None:
    for setting, moves in (("frozen", False), ("trained", True)):
        learner, backbone = make("test_resnet", norm_statistics=setting)
        before = [value.clone() for value in backbone.buffers()]
        train(learner, range(3))
        assert any(not torch.equal(a, b) for a, b in zip(before, backbone.buffers(), strict=True)) == moves


def test_statistics_wait_for_the_projector_to_warm_up_like_the_weights(make: Callable[..., Any]) -> None:
    learner, backbone = make("test_resnet", norm_statistics="trained", anchor=1)
    before = weights(backbone)
    assert [outcome.anchor for outcome in train(learner, range(2))] == [0, 0]
    assert change(backbone, before) == 0
    train(learner, range(2, 3))
    assert change(backbone, before) > 0


def test_trained_statistics_and_micro_batches_are_refused_together(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"micro_batch = 2: the BatchNorms of test_resnet train"):
        make("test_resnet", norm_statistics="trained", micro_batch=2)
    with pytest.raises(ConfigError, match="micro_batch = 2"):
        make("test_resnet", weights="random", micro_batch=2)
    make("test_vit", norm_statistics="trained", micro_batch=2)  # there is none


def test_a_backbone_without_checkpointing_says_so(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="timm has none for crossvit_tiny_240; micro_batch"):
        make("crossvit_tiny_240", weights="random", image_size=240, activation_checkpointing=True)


@pytest.mark.parametrize(("bad", "stops"), [({2, 3, 4}, True), ({2, 3, 5, 6}, False)])
def test_three_bad_steps_in_a_row_stop_the_run_however_late_it_is_checked(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bad: set[int], stops: bool
) -> None:
    """On a GPU that is at logged steps alone, which may come after a good one."""
    steps = itertools.count()

    def poisoned(*args: Any) -> Any:
        total, *others = lejepa_loss(*args)
        return total * (float("nan") if next(steps) in bad else 1), *others

    monkeypatch.setattr(jepakit_training.learning.learner, "lejepa_loss", poisoned)
    learner, _ = make()
    train(learner)
    if stops:
        with pytest.raises(TrainingError, match="not finite 3 times in a row, up to step 7"):
            learner.check(7)
    else:
        learner.check(7)


@pytest.mark.parametrize("average", ["none", "ema"])
def test_a_bad_step_leaves_trained_statistics_as_they_were(make: Callable[..., Any], average: str) -> None:
    """A number that is not finite would stay in running statistics for ever."""
    learner, backbone = make("test_resnet", norm_statistics="trained", average=average)
    train(learner, range(4))
    before = {name: value.clone() for name, value in backbone.named_buffers() if "running" in name}
    first = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda _, inputs: (inputs[0] * math.inf,))
    assert not torch.isfinite(learner.step(4, views(4)).grad_norm)
    hook.remove()
    assert all(torch.equal(before[name], value) for name, value in backbone.named_buffers() if name in before)
    assert torch.isfinite(learner.step(5, views(5)).grad_norm)
    assert not any(torch.equal(before[name], value) for name, value in backbone.named_buffers() if name in before)
    learner.finish()
    assert all(torch.isfinite(value).all() for value in backbone.state_dict().values())


def test_steps_that_change_nothing_are_an_error(make: Callable[..., Any]) -> None:
    learner, _ = make()
    train(learner, range(2))  # the warm-up
    with pytest.raises(TrainingError, match="no step was taken; raise steps"):
        learner.finish()


@pytest.mark.slow
def test_a_compiled_backbone_takes_the_same_steps(make: Callable[..., Any]) -> None:
    # Where a CPU has bfloat16, frozen layers compute in it, and fused kernels round elsewhere.

    plain, compiled = (
        torch.stack([one.loss for one in train(make(compile=on, precision="fp32")[0], range(4))])
        for on in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_every_step_has_directions_and_random_numbers_of_its_own(
    make: Callable[..., tuple[Learner, nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    seeds: list[int] = []
    manual_seed = torch.manual_seed

    def noting(*args: Any, **options: Any) -> Tensor:
        drawn.append(directions(*args, **options))
        return drawn[-1]

    def noting_seed(seed: int) -> Any:
        seeds.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(jepakit_training.learning.learner, "directions", noting)
    learner, _ = make()
    monkeypatch.setattr(torch, "manual_seed", noting_seed)
    train(learner, range(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert len(set(seeds)) == 3


def test_the_global_views_alone_are_the_target(
    make: Callable[..., tuple[Learner, nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, int]] = []

    def noting(projections: Tensor, n_global: int, *others: Any) -> Any:
        counts.append((len(projections), n_global))
        return lejepa_loss(projections, n_global, *others)

    monkeypatch.setattr(jepakit_training.learning.learner, "lejepa_loss", noting)
    globals_, locals_ = views()
    make()[0].step(0, Views(globals_, torch.cat([locals_, locals_])))
    assert counts == [(6, 2)]


def test_a_gradient_is_clipped_to_its_norm_and_told_as_it_was(make: Callable[..., Any]) -> None:
    learner, _ = make(clip_norm=1e-3)
    seen: list[float] = []

    def note(optimizer: Any, *_: Any) -> None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        seen.append(float(torch.stack([one.grad.norm() for one in parameters if one.grad is not None]).norm()))

    learner._raw_optimizer.register_step_pre_hook(note)
    told = [float(one.grad_norm) for one in train(learner, range(3))]
    assert min(told) > 1e-2
    assert seen == pytest.approx([1e-3] * 3, rel=1e-2)


def test_backbone_and_projector_train_at_the_rates_of_the_run(make: Callable[..., Any]) -> None:
    learner, _ = make(lr=2e-3, projector_lr=5e-4, weight_decay=0.03)
    groups = learner._raw_optimizer.param_groups
    for role, rate in (("backbone", 2e-3), ("projector", 5e-4)):
        assert max(group["base_lr"] for group in groups if group["role"] == role) == pytest.approx(rate)
    assert {group["weight_decay"] for group in groups} == {0, 0.03}
    assert {group["betas"] for group in groups} == {(0.9, 0.98)}


def test_an_anchor_weighs_as_much_as_asked_for(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _ = make(anchor=100.0, precision="fp32")
    losses: list[float] = []
    backward = learner._accelerator.backward

    def noting(loss: Tensor) -> None:
        losses.append(loss.item())
        backward(loss)

    monkeypatch.setattr(learner._accelerator, "backward", noting)
    last = train(learner, range(5))[-1]
    assert last.anchor is not None
    assert float(last.anchor) > 0
    assert losses[-1] == pytest.approx(float(last.loss) + 100 * float(last.anchor), rel=1e-5)


def test_the_projector_trains_while_the_backbone_waits(make: Callable[..., Any]) -> None:
    learner, backbone = make()
    before, projector = weights(backbone), weights(learner._raw_projector)
    train(learner, range(2))
    assert change(learner._raw_projector, projector) > 0
    assert change(backbone, before) == 0
    train(learner, range(2, 3))
    assert change(backbone, before) > 0
