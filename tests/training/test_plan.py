"""The choices that settings leave to the data and the backbone."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from jepakit.backbones.backbone import build, stock_preprocess
from jepakit.bundles.bundle import WEIGHTS, write_bundle
from jepakit.bundles.manifest import Backbone, EmbeddingSpec, Manifest, Provenance, StartWeights
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError, TrainingError
from jepakit.sources import list_images
from jepakit_training import loader_limits
from jepakit_training import plan as plan_module
from jepakit_training.learning import precision
from jepakit_training.learning.precision import mixed_precision
from jepakit_training.loop import explaining_out_of_memory
from jepakit_training.plan import Plan, make_plan


@pytest.fixture(autouse=True)
def much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "shared_bytes", lambda: math.inf)
    monkeypatch.setattr(plan_module, "can_share", lambda: True)


def plan(backbone: str = "test_vit", *, images: int = 1000, world: int = 1, **settings: Any) -> Plan:
    listed = list_images([np.zeros((8, 8), np.uint8)] * images, "none")
    arguments: dict[str, Any] = {"dynamic_img_size": True} if backbone == "test_vit" else {}
    return make_plan(
        AdaptConfig(images="x", backbone=backbone, **settings),
        listed,
        build(backbone, arguments),
        world,
        bands=3,
        value_bytes=1,
    )


def test_defaults_follow_the_backbone_and_the_views() -> None:
    assert plan("test_vit").lr == 1e-4
    assert plan("test_resnet").lr == 3e-4
    assert plan("test_resnet", weights="random").lr == 5e-4
    assert plan(lr=0.7).lr == 0.7
    assert plan().lamb == pytest.approx(0.005 * 6)
    assert plan(views={"n_local": 0}).lamb == pytest.approx(0.005 * 2)
    assert plan(lamb=0.5).lamb == 0.5
    assert (plan().image_size, plan().local_size) == (224, 96)
    assert plan(views={"local_size": 64}).local_size == 64
    assert (plan(image_size=100).image_size, plan("test_resnet", image_size=100).image_size) == (96, 96)


@pytest.mark.parametrize(("batch_size", "expected"), [(512, 0.03), (128, 0.03), (64, 0.06), (16, 0.24), (4, 0.5)])
def test_a_small_batch_weighs_sigreg_as_much_as_a_large_one(batch_size: int, expected: float) -> None:
    made = plan(batch_size=batch_size)
    assert made.lamb == pytest.approx(expected)
    assert any(f"lamb = {expected:g} instead of 0.03" in note for note in made.notes) == (batch_size < 128)
    assert plan(batch_size=batch_size, lamb=0.01).lamb == 0.01
    assert not any("lamb" in note for note in plan(batch_size=batch_size, lamb=0.01).notes)


def test_length_in_steps_or_epochs() -> None:
    assert plan(steps=7).steps == 7
    assert plan(epochs=3, batch_size=100).steps == 3 * 8  # 800 of 1000 images train
    assert plan(images=100).steps == 300
    assert plan(images=100_000).steps == math.ceil(98_000 / 128)


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs"), [(319, 128, 10), (319, 128, 1), (1000, 128, 3), (40, 32, 7)]
)
def test_every_image_is_seen_as_often_as_there_are_epochs(images: int, batch_size: int, epochs: int) -> None:
    made = plan(images=images, batch_size=batch_size, epochs=epochs)
    seen = made.steps * made.batch_size / len(made.split.train)
    assert epochs <= seen < epochs + made.batch_size / len(made.split.train)


def test_the_projector_warms_up_alone_unless_everything_is_new_or_nothing_else_trains() -> None:
    some = plan(steps=100)
    assert some.warmup_steps == 10
    assert [some.backbone_ramp(step) for step in range(10)] == [0.0] * 10
    assert 0 < some.backbone_ramp(10) < some.backbone_ramp(19)
    assert 0 < some.ramp(0) < some.ramp(9)
    assert some.ramp(20) > some.ramp(60) > some.ramp(99) > 0
    assert [some.ramp(step) for step in (0, 50, 99)] == pytest.approx([0.1, 0.5, 0.00024672], rel=1e-4)
    assert some.backbone_ramp(10) == pytest.approx(0.1 * 0.97553, rel=1e-3), "up again, on the same cosine"
    assert plan(steps=100, weights="random").warmup_steps == plan(steps=100, unfreeze="none").warmup_steps == 0


def test_the_share_of_the_weights_that_train_is_told() -> None:
    def told(**settings: Any) -> list[str]:
        return [note for note in plan(**settings).notes if note.startswith("unfreeze = ")]

    assert told() == ["unfreeze = auto: 27.3% of the weights of test_vit train"]
    assert told(unfreeze=1) == ["unfreeze = 1: 13.7% of the weights of test_vit train"]
    assert told(weights="random") == ["unfreeze = auto: 100.0% of the weights of test_vit train"]
    assert told(unfreeze="lora") == []


def test_what_leaves_the_backbone_as_it_is_says_so_and_moves_no_statistics() -> None:
    still = plan("test_resnet", unfreeze="none", weights="random")
    assert still.norm_statistics == "frozen"
    assert any("the start is what is exported" in note for note in still.notes)
    with pytest.raises(ConfigError, match="norm_statistics = trained changes a backbone that unfreeze = none leaves"):
        plan("test_resnet", unfreeze="none", norm_statistics="trained")
    assert [plan(steps=steps, warmup=0.99).warmup_steps for steps in (1, 2, 6)] == [0, 1, 5]


def test_a_small_folder_shrinks_the_batch_and_says_so() -> None:
    small = plan(images=40)
    assert small.batch_size == 32
    assert any("batch of 32 images instead of 128" in note for note in small.notes)
    assert any("40 images are very few" in note for note in small.notes)
    with pytest.raises(DataError, match="15 images are too few"):
        plan(images=15)


def test_an_image_size_that_is_rounded_says_so() -> None:
    rounded = plan(image_size=47)
    assert rounded.image_size == 48
    assert "image_size = 48 instead of 47: test_vit takes only multiples of 16" in rounded.notes
    assert not any("instead of" in note for note in plan(image_size=48).notes)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_rank_holds_equally_many_images(world: int) -> None:
    assert plan(world=world).batch_size % world == 0
    assert 128 - world < plan(world=world).batch_size <= 128


def test_a_batch_shrunk_to_fit_the_processes_is_not_blamed_on_the_number_of_images() -> None:
    notes = " ".join(plan(world=3).notes)
    assert "126" in notes
    assert "126 images instead of 128: there are" not in notes


def test_a_batch_shrunk_to_few_images_is_not_blamed_on_the_processes() -> None:
    assert any(
        "batch of 30 images instead of 128: there are only 32 to train on" in note
        for note in plan(images=40, world=3).notes
    )


def test_more_processes_than_images_in_a_batch_are_refused_with_what_helps() -> None:
    with pytest.raises(ConfigError, match=r"batch_size = 2 over 3 processes .*: raise batch_size"):
        plan(batch_size=2, world=3)
    with pytest.raises(
        ConfigError, match="32 images to train on for 40 processes is less than one each: use fewer processes"
    ):
        plan(images=40, world=40)


def test_all_of_pretrained_weights_train_with_layer_wise_decay() -> None:
    assert plan(unfreeze="all").layer_decay == 0.75
    assert plan(unfreeze="all", weights="random").layer_decay == plan().layer_decay == 1
    assert plan(layer_decay=0.5).layer_decay == 0.5


def test_statistics_are_trained_only_where_there_are_some_to_learn() -> None:
    assert plan("test_resnet").norm_statistics == "frozen"
    assert plan("test_resnet", weights="random").norm_statistics == "trained"
    assert plan("test_vit", weights="random", norm_statistics="trained").norm_statistics == "frozen"
    assert plan("test_resnet", norm_statistics="trained").norm_statistics == "trained"


@pytest.mark.parametrize(
    ("memory_gb", "workers", "expected", "warned"),
    [
        (1000, None, (8, 2), False),
        (36, None, (8, 1), False),
        (16, None, (4, 1), False),
        (1, None, (1, 1), True),
        (16, 8, (8, 1), True),
        (16, 0, (0, 2), False),
    ],
)
def test_batches_made_ahead_take_a_quarter_of_the_memory_at_most(
    monkeypatch: pytest.MonkeyPatch, memory_gb: int, workers: int | None, expected: tuple[int, int], warned: bool
) -> None:
    """Batches of 512 × 137,216 pixels of three bands of floats: 0.84 GB."""
    monkeypatch.setattr(plan_module, "usable_cpus", lambda: 64)
    monkeypatch.setattr(plan_module, "main_memory", lambda: memory_gb * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = AdaptConfig(images="x", backbone="test_vit", batch_size=512, workers=workers)
    listed = list_images([np.zeros((8, 8), np.uint8)] * 1000, "none")
    made = make_plan(config, listed, build("test_vit", {"dynamic_img_size": True}), 1, bands=3, value_bytes=4)
    assert made.batch_bytes == 512 * (2 * 224**2 + 4 * 96**2) * 3 * 4
    assert (made.workers, made.prefetch) == expected
    assert made.queued_bytes == expected[0] * expected[1] * made.batch_bytes
    assert any("of views in advance" in note and "lower workers" in note for note in made.notes) == warned
    halved = make_plan(config, listed, build("test_vit", {"dynamic_img_size": True}), 2, bands=3, value_bytes=4)
    assert halved.batch_bytes == made.batch_bytes // 2


@pytest.mark.parametrize(
    ("free_mb", "world", "workers", "expected"),
    [
        (1000, 1, None, (8, 2)),
        (480, 1, None, (8, 1)),
        (160, 1, None, (3, 1)),
        (160, 1, 3, (3, 1)),
        (160, 1, 0, (0, 2)),
        (640, 2, None, (8, 1)),
        (20, 1, None, (0, 2)),
    ],
)
def test_batches_made_ahead_fit_in_dev_shm(
    monkeypatch: pytest.MonkeyPatch, free_mb: int, world: int, workers: int | None, expected: tuple[int, int]
) -> None:
    """Batches of 96 × 137,216 pixels of three bands: 39.5 MB, one of which is trained on."""
    monkeypatch.setattr(plan_module, "usable_cpus", lambda: 64)
    monkeypatch.setattr(plan_module, "main_memory", lambda: 10**12)
    monkeypatch.setattr(plan_module, "shared_bytes", lambda: free_mb * 1e6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = plan(batch_size=96, workers=workers, world=world)
    assert (made.workers, made.prefetch) == expected
    notes = [note for note in made.notes if "loader process" in note]
    assert bool(notes) == (workers is None and made.workers < 8)
    for note in notes:
        assert note.startswith(f"{made.workers} loader processes instead of 8: /dev/shm has {free_mb}.0 MB free")
        assert note.endswith("takes 39.5 MB there: give the container more (docker run --shm-size 2g)")


def test_more_loader_processes_than_dev_shm_has_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "shared_bytes", lambda: 160e6)
    with pytest.raises(ConfigError, match=r"workers = 4: /dev/shm has 160\.0 MB free.*--shm-size.*take workers=3$"):
        plan(batch_size=96, workers=4)


def test_loader_processes_need_a_dev_shm_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "usable_cpus", lambda: 4)
    monkeypatch.setattr(plan_module, "can_share", lambda: False)
    with pytest.raises(ConfigError, match=r"workers = 4: /dev/shm cannot be written.*, or take workers=0$"):
        plan(workers=4)
    assert any(note.startswith("0 loader processes instead of 3: /dev/shm cannot be") for note in plan().notes)
    assert plan(workers=0).workers == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_missing_dev_shm_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert loader_limits.can_share()
    monkeypatch.setattr(loader_limits, "SHARED", tmp_path / "none")
    assert not loader_limits.can_share()
    assert loader_limits.shared_bytes() == math.inf


@pytest.mark.parametrize(("on_gpu", "cores", "expected"), [(False, 64, 8), (True, 64, 16), (True, 6, 5), (True, 1, 0)])
def test_a_core_is_left_to_the_model_and_a_gpu_has_more_loaders(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, cores: int, expected: int
) -> None:
    monkeypatch.setattr(plan_module, "usable_cpus", lambda: cores)
    monkeypatch.setattr(plan_module, "main_memory", lambda: 10**12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert plan().workers == expected


def test_micro_batches_are_of_a_process_and_none_where_they_save_nothing() -> None:
    assert plan(batch_size=64, micro_batch=16).micro_batch == 16
    assert plan(batch_size=64, micro_batch=32, world=2).micro_batch is None
    assert plan(batch_size=64).micro_batch is None


def test_batch_norms_that_train_see_a_batch_once() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing: the BatchNorms of test_resnet train"):
        plan("test_resnet", weights="random", activation_checkpointing=True)
    assert plan("test_resnet", activation_checkpointing=True).norm_statistics == "frozen"
    assert plan("test_vit", weights="random", activation_checkpointing=True).norm_statistics == "frozen"
    for weights, exact in (("random", False), ("pretrained", True)):
        config = AdaptConfig(images="x", backbone="test_resnet", weights=weights)
        made, backbone = plan("test_resnet", weights=weights), build("test_resnet", {})
        explaining = explaining_out_of_memory(config, made, backbone, Accelerator(cpu=True))
        with pytest.raises(TrainingError, match="image_size below") as error, explaining:
            raise torch.OutOfMemoryError
        assert ("micro_batch" in str(error.value)) == ("checkpointing" in str(error.value)) == exact, weights


@pytest.mark.parametrize(("name", "has_some"), [("test_vit", True), ("crossvit_tiny_240", False)])
def test_checkpointing_is_advised_only_where_timm_has_some(name: str, has_some: bool) -> None:
    config, made = AdaptConfig(images="x", backbone=name), plan(name, image_size=240)
    explaining = explaining_out_of_memory(config, made, build(name, {}), Accelerator(cpu=True))
    with pytest.raises(TrainingError, match="micro_batch=64") as error, explaining:
        raise torch.OutOfMemoryError
    assert ("checkpointing" in str(error.value)) == has_some


def test_a_backbone_of_one_size_gets_local_views_of_that_size() -> None:
    fixed = plan("coat_lite_tiny")
    assert fixed.local_size == fixed.image_size == 224
    assert any("takes images of one size only" in note for note in fixed.notes)


def test_a_size_that_the_backbone_does_not_take_is_refused_with_its_own() -> None:
    assert plan("crossvit_tiny_240", image_size=240).image_size == 240
    with pytest.raises(ConfigError, match="image_size = 64: coat_lite_tiny does not take this size; its own is 224"):
        plan("coat_lite_tiny", image_size=64)


@pytest.mark.parametrize(("labels", "held_out"), [(("a", "b") * 500, 200), (None, 30)])
def test_groups_are_held_out_past_the_images_to_measure_on_where_labels_can_judge_them(
    labels: tuple[str, ...] | None, held_out: int
) -> None:
    listed = list_images([np.zeros((8, 8), np.uint8)] * 1000, "none")
    images = replace(listed, labels=labels, groups=tuple(str(number // 10) for number in range(1000)))
    config = AdaptConfig(images="x", backbone="test_resnet", measure_on=20)
    assert (
        len(make_plan(config, images, build("test_resnet", {}), 1, bands=3, value_bytes=1).split.held_out) == held_out
    )


@pytest.mark.parametrize(
    ("steps", "same_data", "settings", "warns"),
    [
        (300, False, {}, True),
        (300, True, {"seed": 1}, True),
        (300, True, {"held_out": 0.4}, True),
        (300, True, {"measure_on": 5000}, True),
        (300, True, {}, False),
        (0, False, {}, False),
    ],
)
@pytest.mark.parametrize("before", [None, "other data", "these data"])
@pytest.mark.parametrize("named", ["first", f"first/{WEIGHTS}"])
def test_a_start_that_may_have_seen_what_is_held_out_is_warned_of(
    tmp_path: Path, steps: int, same_data: bool, settings: dict[str, Any], warns: bool, before: str | None, named: str
) -> None:
    images, backbone = list_images([np.zeros((8, 8), np.uint8)] * 100, "none"), build("test_resnet", {})
    chosen = {"seed": 0, "held_out": 0.2, "measure_on": 2000}
    start = None if before is None else Provenance(
        config=chosen, steps=9, images_seen=9, versions={},
        data_digest=images.digest() if before == "these data" else "1" * 16,
    )  # fmt: skip
    manifest = Manifest(
        name="first", model_id="0" * 16,
        backbone=Backbone(name="test_resnet", arguments={}, start=StartWeights(source="made", license="mit")),
        preprocess=stock_preprocess(backbone, 64),
        embedding=EmbeddingSpec(dim=64, pooling="head", standardize="none"),
        provenance=Provenance(
            config=chosen, steps=steps, images_seen=steps, versions={}, start=start,
            data_digest=images.digest() if same_data else "0" * 16,
        ),
    )  # fmt: skip
    write_bundle(tmp_path / "first", manifest, lambda folder: save_file(backbone.state_dict(), folder / WEIGHTS))
    config = AdaptConfig(images="x", backbone="test_resnet", weights=str(tmp_path / named), **settings)
    plan = make_plan(config, images, backbone, 1, bands=3, value_bytes=1)
    notes = " ".join(plan.notes)
    warns = warns or before == "other data" or (before is not None and bool(settings))
    assert ("may be others" in notes and "split column" in notes) == warns
    kept = ("maybe optimistic, as the start was trained in a run whose held-out images may be others",)
    assert plan.caveats == (kept if warns else ())
    apart = replace(images, held_out=np.arange(100) < 20)
    assert "may be others" not in " ".join(make_plan(config, apart, backbone, 1, bands=3, value_bytes=1).notes)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_refused_where_it_would_crawl(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mixed_precision("fp32") == mixed_precision("auto") == "no"
    if has:
        assert mixed_precision("bf16") == "bf16"
    else:
        with pytest.raises(ConfigError, match="this machine has no bfloat16 instructions; use auto or fp32"):
            mixed_precision("bf16")
