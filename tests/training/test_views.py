"""Views: they depend only on the image and the seed, whatever the image's size, bands and type."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from jepakit.bundles.manifest import Scaling
from jepakit.config import PRESETS, AdaptConfig, Domain, ViewsConfig
from jepakit.errors import ConfigError
from jepakit_training.data.views import Crops, ViewMaker, Views, collate, draw_boxes, finish

SEEDS = range(40)
PLAIN: dict[str, float] = {"brightness": 0, "contrast": 0, "horizontal_flip": 0}


def recipe(domain: Domain, **settings: Any) -> ViewsConfig:
    return AdaptConfig(images="x", domain=domain, views=ViewsConfig.model_validate(settings)).resolved_views()


def noise_image(width: int, height: int, bands: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, bands), np.uint8)


def gradient_image(axis: int) -> NDArray[np.uint8]:
    """Dark to bright, left to right (axis 1) or top to bottom (axis 0)."""
    ramp = np.broadcast_to(np.linspace(30, 220, 96), (96, 96))
    return np.stack([ramp if axis else ramp.T] * 3, axis=-1).astype(np.uint8)


def crops_of(pixels: NDArray[Any], config: ViewsConfig, seed: int) -> Crops:
    return ViewMaker(config, 64, 32)(pixels, seed)


def views_of(pixels: NDArray[Any], config: ViewsConfig, seed: int) -> Views:
    return finish(crops_of(pixels, config, seed))


def same(one: Views, other: Views) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("domain", PRESETS)
def test_the_same_image_and_seed_give_the_same_views(domain: Domain) -> None:
    image, config = noise_image(90, 70), recipe(domain)
    torch.manual_seed(1)
    first = views_of(image, config, 5)
    torch.manual_seed(2)
    torch.rand(13)
    second, other = views_of(image, config, 5), views_of(image, config, 6)
    assert same(first, second)
    assert not torch.equal(first.global_, other.global_)
    assert not torch.equal(first.global_[0], first.global_[1])


def test_the_global_random_states_are_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    views_of(noise_image(80, 80), recipe("natural"), 3)
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize(("domain", "bands"), [*((domain, 3) for domain in PRESETS), ("multispectral", 13)])
def test_a_views_bytes_do_not_depend_on_the_images_it_is_batched_with(domain: Domain, bands: int) -> None:
    config = recipe(domain, rotation_degrees=10, blur=0.5, n_local=3)
    crops = [crops_of(noise_image(60 + 9 * place, 50, bands), config, place) for place in range(7)]
    alone = [finish(one) for one in crops]
    for batch in (range(7), range(2, 4), range(6, -1, -1)):
        together = finish(collate([crops[place] for place in batch]))
        for column, place in enumerate(batch):
            assert same(Views(*(group[:, column] for group in together)), alone[place])


def test_a_views_floats_depend_on_their_batch_by_a_millionth_at_most() -> None:
    scaling = Scaling(low=(0.0,) * 3, high=(255.0,) * 3, measured=True)
    maker = ViewMaker(recipe("natural"), 64, 32, scaling)
    crops = [maker(noise_image(70, 50).astype(np.float32), seed) for seed in range(5)]
    together = finish(collate(crops))
    for place, one in enumerate(crops):
        for batched, alone in zip(together, finish(one), strict=True):
            assert torch.allclose(batched[:, place], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("domain", PRESETS)
@pytest.mark.parametrize("size", [(64, 64), (200, 40), (37, 150), (900, 20), (32, 32), (9, 8)])
def test_shapes_and_dtype_of_square_oblong_and_tiny_images(domain: Domain, size: tuple[int, int]) -> None:
    views = views_of(noise_image(*size), recipe(domain, n_global=2, n_local=3), 0)
    assert (views.global_.shape, views.local.shape) == ((2, 3, 64, 64), (3, 3, 32, 32))
    assert views.global_.dtype == views.local.dtype == torch.uint8


@pytest.mark.parametrize("bands", [1, 2, 4, 5, 13])
def test_any_number_of_bands(bands: int) -> None:
    views = views_of(noise_image(50, 40, bands), recipe("multispectral"), 0)
    assert (views.global_.shape, views.local.shape) == ((2, bands, 64, 64), (4, bands, 32, 32))


@pytest.mark.parametrize("setting", ["saturation", "hue", "gray", "solarize"])
@pytest.mark.parametrize("bands", [1, 4])
def test_a_setting_for_colours_refuses_other_images_by_name(setting: str, bands: int) -> None:
    config = recipe("general", **{setting: 0.1})
    config.check_bands(3)
    with pytest.raises(ConfigError, match=rf"views\.{setting} = 0\.1 .* these have {bands}: set views\.{setting} = 0"):
        config.check_bands(bands)
    with pytest.raises(ConfigError, match=setting):
        crops_of(noise_image(40, 40, bands), config, 0)


def test_no_local_views() -> None:
    crops = [crops_of(noise_image(64, 64), recipe("general", n_local=0, n_global=3), seed) for seed in range(2)]
    views, batch = finish(crops[0]), finish(collate(crops))
    assert (views.global_.shape, views.local.shape) == ((3, 3, 64, 64), (0, 3, 32, 32))
    assert (batch.global_.shape, batch.local.shape) == ((3, 2, 3, 64, 64), (0, 2, 3, 32, 32))
    assert views.local.dtype == torch.uint8


def test_an_array_that_may_not_be_written_to_is_cut_and_left_as_it_is() -> None:
    pixels = noise_image(64, 64)
    before = pixels.copy()
    pixels.flags.writeable = False
    views_of(pixels, recipe("general", global_area=(1, 1)), 0)
    assert np.array_equal(pixels, before)


def test_a_crop_of_the_whole_image_is_pillows_resize_within_one_level() -> None:
    pixels = np.asarray(Image.fromarray(noise_image(12, 12)).resize((100, 100), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    for view in crops_of(pixels, recipe("general", global_area=(1, 1), **PLAIN), 0).views.global_:
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_other_than_8_bit_data_is_resized_raw_and_scaled_after() -> None:
    raw = (noise_image(60, 50, 2).astype(np.float32) - 100) * 30
    plain = recipe("general", **PLAIN)
    scaling = Scaling(low=(-3000.0, -1000.0), high=(4650.0, 2000.0), measured=True)
    wide = Scaling(low=(-1e5, -1e5), high=(1e5, 1e5), measured=True)
    views = ViewMaker(plain, 64, 32, scaling)(raw, 3).views.global_
    unclipped = ViewMaker(plain, 64, 32, wide)(raw, 3).views.global_.double() * 2e5 - 1e5
    low, high = (torch.tensor(ends).double()[:, None, None] for ends in (scaling.low, scaling.high))
    expected = ((unclipped - low) / (high - low)).clamp(0, 1)
    assert views.dtype == torch.float32
    assert torch.allclose(views.double(), expected, rtol=0, atol=1e-4)
    assert (views[:, 1] == 1).any(), "the scaling's end is a clip"


def test_8_bit_data_and_the_same_values_as_floats_give_the_same_views() -> None:
    # Mid-range values: what bicubic overshoots is clipped between the two passes in uint8, after them in float.
    pixels, config = noise_image(70, 50) // 2 + 60, recipe("natural")
    scaling = Scaling(low=(0.0,) * 3, high=(255.0,) * 3, measured=True)
    bytes_, floats = ViewMaker(config, 64, 32)(pixels, 1), ViewMaker(config, 64, 32, scaling)(pixels.astype("f4"), 1)
    for view, other in zip(finish(bytes_).global_, finish(floats).global_, strict=True):
        difference = (view.float() - 255 * other).abs()
        assert float(difference.max()) <= 3
        assert float(difference.mean()) < 0.6


@pytest.mark.parametrize("area", [(0.05, 0.3), (0.3, 1.0)])
def test_crops_have_the_areas_and_aspects_asked_for_and_stay_inside(area: tuple[float, float]) -> None:
    boxes = np.array(draw_boxes(np.random.default_rng(0), 4000, 375, 500, area))
    top, left, bottom, right = boxes.T
    height, width = bottom - top, right - left
    assert top.min() >= 0
    assert left.min() >= 0
    assert bottom.max() <= 375
    assert right.max() <= 500
    shares, aspects = height * width / (375 * 500), width / height
    assert area[0] * 0.97 <= shares.min()
    assert shares.max() <= area[1] * 1.03
    assert 0.74 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.36
    assert bottom.max() == 375
    assert top.min() == 0


def test_crops_of_small_images_are_no_less_than_16_pixels_a_side() -> None:
    boxes = np.array(draw_boxes(np.random.default_rng(0), 500, 32, 32, (0.05, 0.3)))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() == 16
    boxes = np.array(draw_boxes(np.random.default_rng(0), 500, 8, 9, (0.05, 0.3)))
    assert np.array_equal(boxes[:, 2:] - boxes[:, :2], np.full((500, 2), (8, 9)))
    for height, width, box in ((900, 8, (16, 8)), (8, 900, (8, 16))):
        boxes = np.array(draw_boxes(np.random.default_rng(0), 50, height, width, (0.3, 1.0)))
        assert np.array_equal(boxes[:, 2:] - boxes[:, :2], np.full((50, 2), box))


def test_crops_of_a_long_thin_image_lie_anywhere_along_it_and_are_not_squashed() -> None:
    top, left, bottom, right = np.array(draw_boxes(np.random.default_rng(0), 500, 30, 900, (0.3, 1.0))).T
    assert ((right - left) / (bottom - top)).max() <= 4 / 3 + 0.05
    assert left.min() < 50
    assert right.max() > 850


def test_the_least_side_is_where_the_smallest_crop_is_not_enlarged() -> None:
    maker = ViewMaker(ViewsConfig(), 224, 96)
    assert maker.least_side == 496
    boxes = np.array(draw_boxes(np.random.default_rng(0), 4000, 496, 496, ViewsConfig().local_area))
    assert 95 <= (boxes[:, 2:] - boxes[:, :2]).min() <= 98
    assert ViewMaker(ViewsConfig(n_local=0), 224, 96).least_side == 473


def test_local_views_show_less_of_the_image_than_global_ones() -> None:
    def spread(views: Tensor) -> float:
        means = views.float().mean(dim=(1, 2))  # [V, W]: the gradient along the view
        return float((means[:, -4:].mean(dim=1) - means[:, :4].mean(dim=1)).abs().mean())

    some = [views_of(gradient_image(1), recipe("general", **PLAIN), seed) for seed in SEEDS]
    assert np.mean([spread(views.local) for views in some]) < 0.7 * np.mean([spread(views.global_) for views in some])


def orientations(domain: Domain, axis: int, **settings: float) -> set[str]:
    """Where the bright side of a gradient ends up, over many views."""
    seen = set()
    for seed in SEEDS:
        for view in views_of(gradient_image(axis), recipe(domain, **settings), seed).global_.float():
            sides = {
                "right": view[..., -8:].mean(), "left": view[..., :8].mean(),
                "bottom": view[:, -8:].mean(), "top": view[:, :8].mean(),
            }  # fmt: skip
            seen.add(max(sides, key=lambda side: float(sides[side])))
    return seen


def test_radiology_never_swaps_left_and_right_nor_top_and_bottom() -> None:
    assert orientations("radiology", axis=1) == {"right"}
    assert orientations("radiology", axis=0) == {"bottom"}


@pytest.mark.parametrize("domain", ["general", "natural"])
def test_everyday_images_are_mirrored_but_never_stood_on_their_head(domain: Domain) -> None:
    assert orientations(domain, axis=1, solarize=0) == {"left", "right"}
    assert orientations(domain, axis=0, solarize=0) == {"bottom"}


@pytest.mark.parametrize("domain", ["satellite", "histology", "microscopy", "multispectral"])
def test_domains_without_an_upright_see_all_orientations(domain: Domain) -> None:
    assert orientations(domain, axis=1) == {"left", "right", "top", "bottom"}


def test_quarter_turns_and_flips_move_pixels_and_change_none() -> None:
    pixels = noise_image(64, 64)
    plain = {**PLAIN, "global_area": (1, 1)}
    turning = recipe("general", **{**plain, "horizontal_flip": 0.5}, vertical_flip=0.5, quarter_turns=True)
    still, turned = recipe("general", **plain), []
    for seed in SEEDS:
        views = zip(views_of(pixels, still, seed).global_, views_of(pixels, turning, seed).global_, strict=True)
        for view, other in views:
            ways = [torch.rot90(flip, turns, dims=(1, 2)) for flip in (view, view.flip(2)) for turns in range(4)]
            turned.append(next(place for place, way in enumerate(ways) if torch.equal(way, other)))
    assert set(turned) == set(range(8))


def test_a_user_value_wins_over_the_preset() -> None:
    assert recipe("histology", hue=0.3).hue == 0.3
    assert recipe("histology", hue=0.3).quarter_turns
    assert recipe("natural").hue == 0.1


def test_crops_go_to_a_device_and_their_changes_stay() -> None:
    crops = crops_of(noise_image(40, 40), recipe("general"), 0)
    moved = crops.to(torch.device("meta"))
    assert {group.device.type for group in moved.views} == {"meta"}
    assert moved.global_changes is crops.global_changes


@pytest.mark.parametrize(("height", "width", "box"), [(30, 900, (30, 40)), (900, 30, (40, 30))])
def test_crops_of_a_long_thin_image_are_the_largest_of_a_legal_aspect(
    height: int, width: int, box: tuple[int, int]
) -> None:
    boxes = np.array(draw_boxes(np.random.default_rng(0), 50, height, width, (0.3, 1.0)))
    assert np.array_equal(boxes[:, 2:] - boxes[:, :2], np.full((50, 2), box))


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100)])
def test_crops_of_an_image_that_is_squashed_are_those_of_the_square(height: int, width: int) -> None:
    square = np.array(draw_boxes(np.random.default_rng(0), 500, 100, 100, (0.05, 1.0)))
    boxes = np.array(draw_boxes(np.random.default_rng(0), 500, height, width, (0.05, 1.0), unit=width / height))
    apart = np.abs(boxes / np.array([height, width] * 2) - square / 100).max(axis=1)
    # Both are rounded to whole pixels, which now and then decides whether a box fits.
    assert np.mean(apart <= 2 / 100) > 0.98


@pytest.mark.parametrize(("resize", "brightest"), [("shorter", 120), ("squash", 220)])
def test_a_view_of_all_of_a_long_image_is_squashed_if_the_model_is_fed_so(resize: Any, brightest: int) -> None:
    ramp = np.broadcast_to(np.linspace(30, 220, 288), (96, 288))
    image = np.stack([ramp] * 3, axis=-1).astype(np.uint8)
    maker = ViewMaker(recipe("general", **PLAIN, global_area=(1.0, 1.0)), 64, 32, resize=resize)
    view = finish(maker(image, 0)).global_[0].int()
    assert view.max() - view.min() == pytest.approx(brightest - 30, abs=10)


def test_quarter_turns_alone_are_all_four() -> None:
    seen = orientations("general", axis=1, horizontal_flip=0, quarter_turns=True)
    assert seen == {"left", "right", "top", "bottom"}


def test_a_vertical_flip_turns_views_upside_down_and_a_horizontal_one_left_to_right() -> None:
    alone: dict[str, Any] = {"horizontal_flip": 0, "quarter_turns": False}
    assert len(orientations("general", axis=0, **{**alone, "vertical_flip": 0.5})) == 2
    assert len(orientations("general", axis=1, **{**alone, "vertical_flip": 0.5})) == 1
    assert len(orientations("general", axis=0, **{**alone, "horizontal_flip": 0.5})) == 1
    assert len(orientations("general", axis=1, **{**alone, "horizontal_flip": 0.5})) == 2


def test_crops_are_those_of_torchvision_in_distribution() -> None:
    """On a long image many boxes do not fit, and how often one is tried again shows in how much is cut out."""
    image, area = torch.zeros(1, 100, 300), (0.08, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(2000)]
    ours = np.array(draw_boxes(np.random.default_rng(0), 2000, 100, 300, area))
    high, wide = (ours[:, 2:] - ours[:, :2]).T
    for one, other in (high * wide, [box[2] * box[3] for box in theirs]), (ours[:, 1], [box[1] for box in theirs]):
        assert np.mean(one) == pytest.approx(np.mean(other), rel=0.05)


@pytest.mark.parametrize("bands", [4, 5, 13])
def test_bands_keep_their_order(bands: int) -> None:
    pixels = np.broadcast_to(np.arange(bands, dtype=np.uint8) * 10, (50, 40, bands))
    for view in crops_of(pixels, recipe("multispectral"), 0).views.global_:
        assert torch.equal(view, torch.arange(bands, dtype=torch.uint8)[:, None, None].expand_as(view) * 10)


def test_global_and_local_views_are_blurred_by_their_own_size() -> None:
    some = [crops_of(noise_image(64, 64), recipe("natural", blur=1), seed) for seed in SEEDS]
    for size, changes in ((64, [one.global_changes for one in some]), (32, [one.local_changes for one in some])):
        assert max(each.blur.max() for each in changes) == pytest.approx(2 * size / 224, rel=0.1)
