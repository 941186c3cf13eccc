"""Views: a function of the image and the seed alone, and each preset leaves its domain's signal alone."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jepakit.config import PRESETS, AdaptConfig, Domain, ViewsConfig
from jepakit_training.views import QuarterTurns, ViewMaker, Views

SEEDS = range(40)


def recipe(domain: Domain, **settings: float | bool) -> ViewsConfig:
    return AdaptConfig(images="x", domain=domain, views=ViewsConfig.model_validate(settings)).resolved_views()


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def gradient_image(axis: int) -> Image.Image:
    """Dark to bright, left to right (axis 1) or top to bottom (axis 0)."""
    ramp = np.broadcast_to(np.linspace(30, 220, 96), (96, 96))
    return Image.fromarray(np.stack([ramp if axis else ramp.T] * 3, axis=-1).astype(np.uint8))


def views_of(image: Image.Image, config: ViewsConfig, seed: int) -> Views:
    return ViewMaker(config, 64, 32)(image, seed)


@pytest.mark.parametrize("domain", PRESETS)
def test_the_same_image_and_seed_give_the_same_views(domain: Domain) -> None:
    image, config = noise_image(90, 70), recipe(domain)
    torch.manual_seed(1)
    first = views_of(image, config, 5)
    torch.manual_seed(2)
    torch.rand(13)
    second, other = views_of(image, config, 5), views_of(image, config, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
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


@pytest.mark.parametrize("domain", PRESETS)
@pytest.mark.parametrize("size", [(64, 64), (200, 40), (37, 150), (9, 8)])
def test_shapes_and_dtype_of_square_oblong_and_tiny_images(domain: Domain, size: tuple[int, int]) -> None:
    views = views_of(noise_image(*size), recipe(domain, n_global=2, n_local=3), 0)
    assert (views.global_.shape, views.local.shape) == ((2, 3, 64, 64), (3, 3, 32, 32))
    assert views.global_.dtype == views.local.dtype == torch.uint8


def test_no_local_views() -> None:
    views = views_of(noise_image(64, 64), recipe("general", n_local=0, n_global=3), 0)
    assert (views.global_.shape, views.local.shape) == ((3, 3, 64, 64), (0, 3, 32, 32))
    assert views.local.dtype == torch.uint8


def test_local_views_show_less_of_the_image_than_global_ones() -> None:
    def spread(views: Tensor) -> float:
        means = views.float().mean(dim=(1, 2))  # [V, W]: the gradient along the view
        return float((means[:, -4:].mean(dim=1) - means[:, :4].mean(dim=1)).abs().mean())

    plain = recipe("general", brightness=0, contrast=0)
    some = [views_of(gradient_image(1), plain, seed) for seed in SEEDS]
    assert np.mean([spread(views.local) for views in some]) < 0.7 * np.mean([spread(views.global_) for views in some])


def hues(domain: Domain) -> NDArray[np.float64]:
    """Mean hue (0 to 1) of each view of a pink image with a texture, like a stain."""
    texture = np.random.default_rng(0).uniform(0.7, 1.1, (64, 64, 1))
    pink = Image.fromarray((np.array([200, 80, 150]) * texture).astype(np.uint8))
    return np.array([
        colorsys.rgb_to_hsv(*(view.float().mean(dim=(1, 2)) / 255).tolist())[0]
        for seed in SEEDS for view in views_of(pink, recipe(domain), seed).global_
    ])  # fmt: skip


@pytest.mark.parametrize("domain", [name for name in PRESETS if name != "natural"])
def test_presets_of_domains_where_colour_means_something_leave_the_hue_alone(domain: Domain) -> None:
    original = colorsys.rgb_to_hsv(200 / 255, 80 / 255, 150 / 255)[0]
    # Radiology's rotation blends edges with black, which moves brightness and not hue.
    assert np.abs(hues(domain) - original).max() < 0.015


def test_the_natural_preset_does_change_colour() -> None:
    assert np.ptp(hues("natural")) > 0.05


@pytest.mark.parametrize("domain", [name for name in PRESETS if name not in ("natural", "histology")])
def test_without_saturation_jitter_grey_levels_of_the_bands_keep_their_order_and_grey_stays_grey(
    domain: Domain,
) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(40, 200, (64, 64, 1), np.uint8).repeat(3, axis=2))
    for seed in SEEDS:
        for view in views_of(grey, recipe(domain), seed).global_:
            assert torch.equal(view[0], view[1])
            assert torch.equal(view[0], view[2])


def orientations(domain: Domain, axis: int) -> set[str]:
    """Where the bright side of a gradient ends up, over many views."""
    seen = set()
    for seed in SEEDS:
        for view in views_of(gradient_image(axis), recipe(domain, brightness=0, contrast=0), seed).global_.float():
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
    plain: dict[str, float] = {"solarize": 0}
    seen = {
        max((("right", view[..., -8:].mean()), ("left", view[..., :8].mean())), key=lambda side: float(side[1]))[0]
        for seed in SEEDS for view in views_of(gradient_image(1), recipe(domain, **plain), seed).global_.float()
    }  # fmt: skip
    assert seen == {"left", "right"}
    for seed in SEEDS:
        for view in views_of(gradient_image(0), recipe(domain, **plain), seed).global_.float():
            assert view[:, -8:].mean() > view[:, :8].mean()


@pytest.mark.parametrize("domain", ["satellite", "histology", "microscopy"])
def test_domains_without_an_upright_see_all_orientations(domain: Domain) -> None:
    assert orientations(domain, axis=1) == {"left", "right", "top", "bottom"}


def test_quarter_turns_are_exact() -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    turned = [QuarterTurns()(pixels) for _ in range(40)]
    expected = [torch.rot90(pixels, turns, dims=(-2, -1)) for turns in range(4)]
    found = {next(place for place, one in enumerate(expected) if torch.equal(view, one)) for view in turned}
    assert found == {0, 1, 2, 3}


def test_a_user_value_wins_over_the_preset() -> None:
    assert recipe("histology", hue=0.3).hue == 0.3
    assert recipe("histology", hue=0.3).quarter_turns
    assert recipe("natural").hue == 0.1
