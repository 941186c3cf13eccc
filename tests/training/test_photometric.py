"""Changes to a view's values: what each setting does, and that presets leave their domain's signal alone."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from jepakit.config import PRESETS, AdaptConfig, Domain, ViewsConfig
from jepakit_training.data import photometric
from jepakit_training.data.photometric import Changes

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])


def recipe(domain: Domain, **settings: Any) -> ViewsConfig:
    return AdaptConfig(images="x", domain=domain, views=ViewsConfig.model_validate(settings)).resolved_views()


def drawn(domain: Domain, views: int = 200, bands: int = 3, size: int = 32, **settings: Any) -> Changes:
    return photometric.draw(recipe(domain, **settings), np.random.default_rng(0), views, bands, size)


def only(bands: int = 3, **fields: Any) -> Changes:
    """Changes to one view that do nothing except for the given fields."""
    ones, zeros = np.ones(1), np.zeros(1)
    none = Changes(ones, ones, ones, zeros, np.ones((1, bands)), np.zeros((1, bands)), zeros, zeros > 0, zeros)
    return none._replace(**{name: np.array([value]) for name, value in fields.items()})


def noise(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def changed(view: Tensor, **fields: Any) -> Tensor:
    """One view [C, H, W] with the given changes."""
    return photometric.apply(view[None], only(len(view), **fields))[0]


def same_view(view: Tensor, times: int) -> Tensor:
    return view.expand(times, *view.shape).contiguous()


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_no_change_changes_nothing(bands: int) -> None:
    view = noise(bands, 20, 20)
    assert torch.equal(changed(view), view)
    floats = torch.rand(bands, 20, 20)
    assert torch.allclose(changed(floats), floats, rtol=0, atol=1e-6)


def test_the_input_is_left_as_it_is() -> None:
    views = noise(4, 3, 20, 20)
    before = views.clone()
    photometric.apply(views, drawn("natural", 4))
    assert torch.equal(views, before)


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_brightness_multiplies_and_clips(bands: int) -> None:
    view = noise(bands, 20, 20)
    assert torch.equal(changed(view, brightness=1.5), (view.double() * 1.5 + 0.5).clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize(("brightness", "high"), [(1.0, 170), (1.4, 130)])
def test_contrast_is_about_the_mean_grey_of_the_brightened_view(brightness: float, high: int) -> None:
    view = noise(3, 20, 20, low=80, high=high)
    mean = float((view.double().mean((1, 2)) * LUMA).sum())
    expected = brightness * (mean + 0.5 * (view.double() - mean))
    assert float((changed(view, brightness=brightness, contrast=0.5) - expected).abs().max()) <= 0.51


def test_contrast_of_other_than_three_bands_is_about_each_bands_own_mean() -> None:
    view = torch.cat([noise(1, 20, 20, low=20, high=60), noise(1, 20, 20, low=150, high=200)])
    means = view.double().mean((1, 2))
    assert torch.allclose(changed(view, contrast=0.5).double().mean((1, 2)), means, rtol=0, atol=0.5)


def test_no_saturation_is_grey() -> None:
    view = noise(3, 20, 20)
    grey = changed(view, saturation=0.0).double()
    assert float((grey - (view.double() * LUMA[:, None, None]).sum(0)).abs().max()) <= 0.51


@pytest.mark.parametrize("hue", [-2.0, 0.3, 1.5])
def test_hue_turns_colours_and_keeps_their_grey(hue: float) -> None:
    view = noise(3, 20, 20, low=110, high=145).float() / 255
    turned = changed(view, hue=hue)
    weights = LUMA[:, None, None]
    assert torch.allclose((turned * weights).sum(0), (view * weights).sum(0), rtol=0, atol=1e-3)
    assert float((turned - view).abs().max()) > 0.02
    assert torch.allclose(changed(turned, hue=-hue), view, rtol=0, atol=2e-3)


def test_hue_turns_red_towards_yellow_as_the_colour_circle_goes() -> None:
    red = torch.tensor([0.6, 0.4, 0.4])[:, None, None].expand(3, 16, 16)
    turned = colorsys.rgb_to_hsv(*changed(red, hue=np.pi / 3)[:, 0, 0].tolist())[0]
    assert 0.08 < turned < 0.25


def test_gains_and_offsets_belong_to_their_band() -> None:
    view = torch.full((4, 16, 16), 100, dtype=torch.uint8)
    after = changed(view, gain=[1.0, 0.5, 1.0, 1.0], offset=[0.0, 0.0, 0.1, 0.0])
    assert after[:, 0, 0].tolist() == [100, 50, 126, 100]


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0])
def test_blur_is_a_gaussian_of_that_sigma(sigma: float) -> None:
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    spread = changed(point, blur=sigma)[0].double()
    at = torch.arange(33.0).double() - 16
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(0) * at**2).sum()) == pytest.approx(sigma**2, rel=0.06)
    assert torch.allclose(spread, spread.T, rtol=0, atol=1e-7)


def test_blur_looks_like_pillows() -> None:
    view = noise(3, 40, 40)
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    expected = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5))).astype(float)
    inner = (changed(view, blur=1.5).permute(1, 2, 0).numpy() - expected)[8:-8, 8:-8]
    assert np.abs(inner).mean() < 2  # Pillow approximates the Gaussian by boxes


def test_blur_brings_no_dark_border_in() -> None:
    flat = torch.full((3, 24, 24), 200, dtype=torch.uint8)
    assert torch.equal(changed(flat, blur=2.0), flat)


def test_solarize_inverts_the_bright_half() -> None:
    view = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    expected = torch.where(view >= 128, 255 - view, view)
    assert torch.equal(changed(view, solarize=True), expected)


def test_rotation_turns_about_the_middle_and_shows_no_black_corners() -> None:
    view = noise(3, 32, 32, low=100, high=200)
    turned = changed(view, angle=np.pi / 2)
    assert torch.equal(turned, torch.rot90(view, 1, (1, 2))) or torch.equal(turned, torch.rot90(view, -1, (1, 2)))
    assert int(changed(view, angle=np.radians(10)).min()) >= 100


def test_only_the_views_that_drew_a_change_are_changed() -> None:
    views, both = noise(3, 3, 20, 20), [only(), only(blur=1.0, solarize=True, angle=0.1), only()]
    after = photometric.apply(views, Changes(*(np.concatenate(field) for field in zip(*both, strict=True))))
    assert [torch.equal(one, other) for one, other in zip(views, after, strict=True)] == [True, False, True]


def test_a_views_bytes_do_not_depend_on_how_many_are_changed_at_once() -> None:
    for size in (32, 96, 224):
        views, changes = noise(9, 3, size, size), drawn("natural", 9, size=size, rotation_degrees=5)
        whole = photometric.apply(views, changes)
        for first, last in ((0, 1), (1, 4), (3, 9)):
            part = photometric.apply(views[first:last], changes.map(lambda field, f=first, t=last: field[f:t]))
            assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize(("bands", "size", "dtype"), [(3, 224, torch.uint8), (1, 576, torch.float32)])
def test_the_number_of_threads_changes_no_byte(bands: int, size: int, dtype: torch.dtype) -> None:
    views, threads = noise(6, bands, size, size).to(dtype), torch.get_num_threads()
    if dtype == torch.float32:
        views = views / 255
    changes = drawn("natural" if bands == 3 else "radiology", 6, bands=bands, size=size)
    try:
        torch.set_num_threads(1)
        alone = photometric.apply(views, changes)
        torch.set_num_threads(3)
        assert torch.equal(photometric.apply(views, changes), alone)
    finally:
        torch.set_num_threads(threads)


def test_autocast_round_the_call_costs_no_precision() -> None:
    views, changes = noise(4, 3, 32, 32), drawn("natural", 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = photometric.apply(views, changes)
    assert torch.equal(inside, photometric.apply(views, changes))


def test_probabilities_are_the_shares_of_the_views() -> None:
    changes = drawn("natural", views=4000)
    assert np.mean(changes.blur > 0) == pytest.approx(0.5, abs=0.03)
    assert np.mean(changes.solarize) == pytest.approx(0.2, abs=0.03)
    assert np.mean(changes.saturation == 0) == pytest.approx(0.2, abs=0.03)
    assert np.mean(changes.brightness != 1) == pytest.approx(0.8, abs=0.03)
    assert changes.blur.max() == pytest.approx(2 * 32 / 224, rel=0.02)
    assert np.abs(changes.hue).max() == pytest.approx(0.1 * 2 * np.pi, rel=0.02)


def test_a_setting_changes_no_other_ones_numbers() -> None:
    plain, more = drawn("general"), drawn("general", blur=0.5, hue=0.2, band_gain=0.1, solarize=0.2)
    assert np.array_equal(plain.brightness, more.brightness)
    assert np.array_equal(plain.contrast, more.contrast)
    assert not np.array_equal(plain.gain, more.gain)


def hues(domain: Domain) -> NDArray[np.float64]:
    """Mean hue (0 to 1) of many views of a stain-like pink texture that no change clips."""
    texture = torch.from_numpy(np.random.default_rng(0).uniform(0.7, 1.0, (1, 32, 32)))
    pink = (torch.tensor([140.0, 60.0, 110.0])[:, None, None] * texture).to(torch.uint8)
    views = photometric.apply(same_view(pink, 200), drawn(domain, solarize=0, gray=0))
    means = views.double().mean(dim=(2, 3)) / 255
    return np.array([colorsys.rgb_to_hsv(*mean)[0] for mean in means.tolist()])


@pytest.mark.parametrize("domain", ["general", "satellite", "histology", "radiology", "microscopy"])
def test_presets_of_domains_where_colour_means_something_leave_the_hue_alone(domain: Domain) -> None:
    original = colorsys.rgb_to_hsv(140, 60, 110)[0]
    assert np.abs(hues(domain) - original).max() < 0.015


def test_the_natural_preset_does_change_colour() -> None:
    assert np.ptp(hues("natural")) > 0.1


@pytest.mark.parametrize("domain", ["general", "satellite", "histology", "radiology", "microscopy"])
def test_grey_stays_grey(domain: Domain) -> None:
    views = photometric.apply(same_view(noise(1, 32, 32, low=40).expand(3, -1, -1), 100), drawn(domain, 100))
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views[:, 0], views[:, 2])


@pytest.mark.parametrize("bands", [1, 3])
def test_radiology_keeps_the_order_of_intensities(bands: int) -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(bands, -1, -1)
    views = photometric.apply(same_view(ramp, 100), drawn("radiology", 100, bands, rotation_degrees=0))
    steps = views.flatten(2).int().diff(dim=2)
    assert int(steps.min()) >= 0
    assert (views[:, :, -1, -1].int() - views[:, :, 0, 0].int() > 100).all()


@pytest.mark.parametrize("bands", [2, 3, 13])
def test_multispectral_keeps_bands_independent(bands: int) -> None:
    views, changes = noise(20, bands, 16, 16), drawn("multispectral", 20, bands)
    other = views.clone()
    other[:, 1] = noise(20, 16, 16, seed=1)
    before, after = photometric.apply(views, changes), photometric.apply(other, changes)
    apart = [band for band in range(bands) if band != 1]
    assert torch.equal(before[:, apart], after[:, apart])
    assert not torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before, views)


@pytest.mark.parametrize("domain", PRESETS)
def test_no_preset_leaves_the_values_as_they_are(domain: Domain) -> None:
    views = noise(20, 3, 32, 32)
    assert not torch.equal(photometric.apply(views, drawn(domain, 20)), views)


def test_floats_stay_within_0_and_1() -> None:
    views = photometric.apply(torch.rand(50, 3, 16, 16), drawn("natural", 50, rotation_degrees=20))
    assert views.dtype == torch.float32
    assert 0 <= float(views.min()) < 0.05
    assert 0.95 < float(views.max()) <= 1


def test_offsets_are_shares_of_the_full_range_of_float_values_too() -> None:
    view = torch.full((2, 16, 16), 0.5)
    assert torch.allclose(changed(view, offset=[0.02, -0.1])[:, 0, 0], torch.tensor([0.52, 0.4]))


def test_drawn_angles_reach_the_degrees_asked_for_in_radians() -> None:
    angles = drawn("radiology", views=2000).angle
    assert np.abs(angles).max() == pytest.approx(np.radians(10), rel=0.01)
    assert angles.min() < 0 < angles.max()


def test_gains_and_offsets_of_a_colour_belong_to_their_band_whatever_its_contrast_and_saturation() -> None:
    view = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    after = changed(view, contrast=0.5, saturation=0.5, gain=[1.0, 0.5, 1.0], offset=[0.0, 0.0, 0.1])
    assert after[:, 0, 0].tolist() == [100, 50, 126]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_factor_is_drawn_by_its_own_setting_to_both_sides(name: str) -> None:
    settings: dict[str, Any] = {"brightness": 0, "contrast": 0, "saturation": 0, "gray": 0, name: 0.4}
    changes = drawn("general", 2000, **settings)
    for field in ("brightness", "contrast", "saturation"):
        values = getattr(changes, field)
        most = 0.4 if field == name else 0
        assert [values.min(), values.max()] == pytest.approx([1 - most, 1 + most], abs=0.01)


def test_gains_and_offsets_are_drawn_for_each_band_to_both_sides() -> None:
    changes = drawn("multispectral", 2000, 5, band_gain=0.3, band_offset=0.2)
    for values, middle, most in ((changes.gain, 1, 0.3), (changes.offset, 0, 0.2)):
        np.testing.assert_allclose(values.min(axis=0), middle - most, atol=0.01)
        np.testing.assert_allclose(values.max(axis=0), middle + most, atol=0.01)
        assert np.abs(np.corrcoef(values.T) - np.eye(5)).max() < 0.1


def test_the_weakest_blur_is_a_tenth_of_a_pixel_at_224() -> None:
    blur = drawn("natural", 4000, size=224, blur=1).blur
    assert [blur.min(), blur.max()] == pytest.approx([0.1, 2], abs=0.01)


def test_a_view_is_blurred_before_its_bright_half_is_inverted() -> None:
    view = noise(3, 20, 20).float() / 255
    expected = changed(changed(view, blur=1.5), solarize=True)
    assert torch.allclose(changed(view, blur=1.5, solarize=True), expected, rtol=0, atol=1e-5)
