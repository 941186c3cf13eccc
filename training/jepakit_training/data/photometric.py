"""Changes to the values of a view: colour, blur, solarize, small rotations.

A loader worker draws the changes to an image's views from the image's seed; `apply` makes them, for many views
at once, in the worker or on the training device. `apply` draws nothing, and its result for a view does not depend
on the other views processed with it (float32: by 1e-6 at most).

Shapes: B views, C bands, H × W pixels. Values are 0-255 (uint8) or 0-1 (float32).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from jepakit.config import ViewsConfig
from jepakit_training.data.transfer import to_device

_JITTER_SHARE = 0.8
_BLUR_SIGMA = (0.1, 2.0)
_BLUR_SIZE = 224
"""The side, in pixels, that `_BLUR_SIGMA` refers to."""
# On a CPU, the float copies of 4 views of 224 pixels stay in its cache; with 32, it takes twice as long.
_VALUES_AT_ONCE = 4 * 3 * 224 * 224

_LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Shares of red, green and blue in the grey of a colour."""
_GREY = np.tile(_LUMA, (3, 1))
"""Maps a colour to its grey."""
_COLOUR = np.eye(3) - _GREY
"""Maps a colour to its difference from its grey."""
_QUARTER_TURN = np.array([[-0.2126, -0.7152, 0.9278], [0.143, 0.140, -0.283], [-0.7874, 0.7152, 0.0722]])
"""`_COLOUR` turned by 90° about the grey axis: the sine part of hueRotate in W3C's Filter Effects."""


class Changes(NamedTuple):
    """The changes to B views (or, collated, to [V, N] of them); the views' dimensions come first in each field.

    numpy, not torch: they are sent between processes by value, and `apply` selects the views to blur without waiting
    for a device.
    """

    brightness: NDArray[np.float64]
    """Factor of all values."""
    contrast: NDArray[np.float64]
    """Factor of the distance to the mean."""
    saturation: NDArray[np.float64]
    """Factor of the distance to grey; 0: no colour."""
    hue: NDArray[np.float64]
    """Angle in the colour circle, radians."""
    gain: NDArray[np.float64]
    """[..., C], factor of a band."""
    offset: NDArray[np.float64]
    """[..., C], added to a band, in shares of the full range."""
    blur: NDArray[np.float64]
    """Sigma in pixels; 0: none."""
    solarize: NDArray[np.bool_]
    angle: NDArray[np.float64]
    """Rotation, radians; 0: none."""

    def map(self, function: Any) -> Changes:
        """The same fields, each through `function`."""
        return Changes(*(function(field) for field in self))


def draw(config: ViewsConfig, random: np.random.Generator, views: int, bands: int, size: int) -> Changes:
    """Draw the changes to `views` views of `size` pixels a side, by `config`'s recipe.

    Raises ConfigError when the recipe does not fit the number of bands.
    """
    config.check_bands(bands)
    jittered = random.random(views) < _JITTER_SHARE

    def factor(most: float) -> NDArray[np.float64]:
        return np.where(jittered, random.uniform(1 - most, 1 + most, views), 1.0)

    def happens(probability: float) -> NDArray[np.bool_]:
        return random.random(views) < probability

    # Every number is drawn whether it is used or not, so that a setting does not affect the numbers of another.
    brightness, contrast, saturation = factor(config.brightness), factor(config.contrast), factor(config.saturation)
    hue = np.where(jittered, random.uniform(-config.hue, config.hue, views), 0.0)
    sigma = random.uniform(*_BLUR_SIGMA, views) * size / _BLUR_SIZE
    angle = random.uniform(-config.rotation_degrees, config.rotation_degrees, views)
    gain = random.uniform(1 - config.band_gain, 1 + config.band_gain, (views, bands))
    offset = random.uniform(-config.band_offset, config.band_offset, (views, bands))
    return Changes(
        brightness=brightness,
        contrast=contrast,
        saturation=np.where(happens(config.gray), 0.0, saturation),
        hue=2 * np.pi * hue,
        blur=np.where(happens(config.blur), sigma, 0.0),
        solarize=happens(config.solarize),
        angle=np.radians(angle),
        gain=gain,
        offset=offset,
    )


@torch.no_grad()
def apply(views_BCHW: Tensor, changes: Changes) -> Tensor:
    """Apply the changes to the views: a new tensor with the same shape, dtype and device.

    uint8 results are rounded; float32 ones depend on the other views of the call by 1e-6 at most.
    """
    done = torch.empty_like(views_BCHW, memory_format=torch.contiguous_format)
    values = math.prod(views_BCHW.shape[1:])
    at_once = max(1, _VALUES_AT_ONCE // values if views_BCHW.is_cpu else len(views_BCHW))
    # Autocast would multiply by the colour matrix in bfloat16, which cannot distinguish 256 levels.
    with torch.autocast(views_BCHW.device.type, enabled=False):
        for first in range(0, len(views_BCHW), at_once):
            part = slice(first, first + at_once)
            done[part] = _changed(views_BCHW[part], changes.map(lambda field, part=part: field[part]))
    return done


def _changed(views_BCHW: Tensor, changes: Changes) -> Tensor:
    most = 255.0 if views_BCHW.dtype == torch.uint8 else 1.0
    images = _recoloured(views_BCHW, changes, most).clamp_(0, most)
    _blur(images, changes.blur)
    _solarize(images, changes.solarize, most)
    _rotate(images, changes.angle)
    # Conversion to uint8 truncates.
    return images.add_(0.5) if views_BCHW.dtype == torch.uint8 else images


def _recoloured(views_BCHW: Tensor, changes: Changes, most: float) -> Tensor:
    """Brightness, contrast, saturation, hue, gains and offsets: together one affine map of a pixel's bands.

    Colour changes keep the mean grey or scale it, so their order does not matter; gains and offsets come last.
    """
    flat_BCP = views_BCHW.contiguous().flatten(2)
    # A sum of float32 depends on its order, and the order on threads and the size of the batch. Integers are exact, and
    # what float64 depends on is lost when rounded.
    exact = torch.int32 if views_BCHW.dtype == torch.uint8 else torch.float64
    mean_BC = (flat_BCP.sum(2, dtype=exact) / flat_BCP.shape[2]).float()
    scale_BC = changes.gain * changes.brightness[:, None]
    pull_BC = scale_BC * (1 - changes.contrast[:, None])
    colours = flat_BCP.shape[1] == 3
    centre_BC = (mean_BC * _to(_LUMA, mean_BC)).sum(1, keepdim=True) if colours else mean_BC
    shift_BC = centre_BC * _to(pull_BC, mean_BC) + _to(changes.offset * most, mean_BC)
    flat_BCP, shift_BC1 = flat_BCP.float(), shift_BC[:, :, None]
    if colours:
        matrix_BCC = (scale_BC * changes.contrast[:, None])[:, :, None] * _colour_matrices(changes)
        recoloured = torch.baddbmm(shift_BC1, _to(matrix_BCC, flat_BCP), flat_BCP)
    else:
        recoloured = flat_BCP * _to(scale_BC * changes.contrast[:, None], flat_BCP)[:, :, None] + shift_BC1
    return recoloured.view(views_BCHW.shape)


def _colour_matrices(changes: Changes) -> NDArray[np.float64]:
    """[B, 3, 3], saturation and hue: grey stays grey, and a colour keeps its grey."""
    cos, sin = np.cos(changes.hue)[:, None, None], np.sin(changes.hue)[:, None, None]
    matrices: NDArray[np.float64] = cos * _COLOUR + sin * _QUARTER_TURN
    return _GREY + changes.saturation[:, None, None] * matrices


def _blur(images_BCHW: Tensor, sigmas: NDArray[np.float64]) -> None:
    """Gaussian blur in place, by kernel size: most sigmas are small, and thus cheap."""
    radii = np.round(3 * sigmas).astype(np.intp)
    for radius in np.unique(radii[radii > 0]).tolist():
        chosen = np.flatnonzero(radii == radius)
        taps = np.exp(-0.5 * (np.arange(radius + 1) / sigmas[chosen, None]) ** 2)
        taps /= 2 * taps.sum(axis=1, keepdims=True) - taps[:, :1]
        places, taps_BR = to_device(torch.from_numpy(chosen), images_BCHW.device), _to(taps, images_BCHW)
        smooth = functional.pad(images_BCHW[places], (radius,) * 4, mode="reflect")
        images_BCHW[places] = _smoothed(_smoothed(smooth, taps_BR, dim=2), taps_BR, dim=3)


def _smoothed(padded_BCHW: Tensor, taps_BR: Tensor, dim: int) -> Tensor:
    """The middle of `padded`, convolved along `dim` with each view's symmetric kernel, given from its middle outwards.

    Uses shifted sums: on a CPU, two to three times as fast as a depthwise convolution with so few taps.
    """
    radius = taps_BR.shape[1] - 1
    length = padded_BCHW.shape[dim] - 2 * radius
    taps_RB111 = taps_BR.T[:, :, None, None, None]
    smooth = padded_BCHW.narrow(dim, radius, length) * taps_RB111[0]
    for tap in range(1, radius + 1):
        for start in (radius - tap, radius + tap):
            smooth.addcmul_(padded_BCHW.narrow(dim, start, length), taps_RB111[tap])
    return smooth


def _solarize(images_BCHW: Tensor, chosen: NDArray[np.bool_], most: float) -> None:
    """Invert the bright half of the values, in place."""
    if chosen.any():
        places = to_device(torch.from_numpy(np.flatnonzero(chosen)), images_BCHW.device)
        images = images_BCHW[places]
        images_BCHW[places] = torch.minimum(images, most - images)


def _rotate(images_BCHW: Tensor, angles: NDArray[np.float64]) -> None:
    """Rotate about the middle, in place; the corners are filled with reflections, never black."""
    chosen = np.flatnonzero(angles)
    if not len(chosen):
        return
    cos, sin, zero = np.cos(angles[chosen]), np.sin(angles[chosen]), np.zeros(len(chosen))
    maps_B23 = np.stack([cos, -sin, zero, sin, cos, zero], axis=1).reshape(-1, 2, 3)
    places = to_device(torch.from_numpy(chosen), images_BCHW.device)
    images = images_BCHW[places]
    grid = functional.affine_grid(_to(maps_B23, images), list(images.shape), align_corners=False)
    images_BCHW[places] = functional.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)


def _to(numbers: NDArray[Any], like: Tensor) -> Tensor:
    return to_device(torch.from_numpy(np.asarray(numbers, np.float32)), like.device)
