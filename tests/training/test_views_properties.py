"""For any image, recipe and seed: views depend on nothing else, and stay within their range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from numpy.typing import NDArray

from jepakit.bundles.manifest import Scaling
from jepakit.config import AdaptConfig, Domain, ViewsConfig
from jepakit_training.data.views import ViewMaker, Views, collate, finish

COLOUR: list[Domain] = ["general", "natural", "satellite", "histology", "radiology", "microscopy"]
EXAMPLES = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@some.composite
def cases(draw: some.DrawFn) -> tuple[NDArray[Any], ViewMaker]:
    """An image of any shape, bands and depth, and a maker whose recipe fits it."""
    bands = draw(some.sampled_from([1, 2, 3, 6]))
    domain: Domain = draw(some.sampled_from(COLOUR)) if bands == 3 else "multispectral"
    recipe = AdaptConfig(images="-", domain=domain, views=ViewsConfig(n_local=1)).resolved_views()
    shape = draw(some.integers(8, 70)), draw(some.integers(8, 70)), bands
    random = np.random.default_rng(draw(some.integers(0, 99)))
    if draw(some.booleans()):
        return random.integers(0, 256, shape, np.uint8), ViewMaker(recipe, 32, 16)
    scaling = Scaling(low=(-5.0,) * bands, high=(70.0,) * bands, measured=True)
    return random.uniform(-10, 80, shape).astype(np.float32), ViewMaker(recipe, 32, 16, scaling)


def alike(one: Views, other: Views) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(EXAMPLES, max_examples=60)
@given(case=cases(), seed=some.integers(0, 2**63 - 1))
def test_views_are_a_function_of_image_recipe_and_seed(case: tuple[NDArray[Any], ViewMaker], seed: int) -> None:
    pixels, maker = case
    before = pixels.copy()
    first, again = finish(maker(pixels, seed)), finish(maker(pixels, seed))
    assert alike(first, again)
    np.testing.assert_array_equal(pixels, before)
    for views, size in zip(first, (32, 16), strict=True):
        assert views.shape[1:] == (pixels.shape[2], size, size)
        if views.dtype == torch.float32:
            assert views.min() >= 0
            assert views.max() <= 1


@settings(EXAMPLES, max_examples=30)
@given(case=cases(), seeds=some.lists(some.integers(0, 2**32), min_size=2, max_size=5, unique=True))
def test_8_bit_views_do_not_depend_on_their_batch(case: tuple[NDArray[Any], ViewMaker], seeds: list[int]) -> None:
    pixels, maker = case
    batch = finish(collate([maker(pixels, seed) for seed in seeds]))
    for place, seed in enumerate(seeds):
        for views, alone in zip(batch, finish(maker(pixels, seed)), strict=True):
            if views.dtype == torch.uint8:
                assert torch.equal(views[:, place], alone)
            else:
                assert (views[:, place] - alone).abs().max() <= 2e-6
