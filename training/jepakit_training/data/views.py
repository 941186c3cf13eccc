"""Views: the crops of one image that LeJEPA pulls together.

An image is decoded once; every view is cut and resized from it, and that is all that a loader worker must
do: `finish` changes the views' values (`photometric`), in the worker or, batched, on the training device.
All randomness of an image's views comes from one seed, so their bytes are the same with any number of workers,
before and after a resume.

Shapes: V views, N images, C bands, H × W pixels. uint8, 0-255; other data float32, 0-1 after its scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from jepakit.bundles.manifest import Resize, Scaling
from jepakit.config import ViewsConfig
from jepakit_training.data import photometric
from jepakit_training.data.photometric import Changes

_ASPECTS = 3 / 4, 4 / 3
_LOG_ASPECTS = math.log(3 / 4), math.log(4 / 3)
_TRIES = 10
_LEAST_CROP = 16
"""Least pixels a side: chosen by area alone, a local crop of a small image would be a few enlarged pixels."""
_FAST_BANDS = 4
"""The most bands for torch's fast resize of uint8; four bands at a time, 13 take a quarter of the time."""


class Views(NamedTuple):
    """Views of one image [V, C, H, W] or of a batch [V, N, C, H, W], at each of the two sizes."""

    global_: Tensor
    local: Tensor

    def to(self, device: torch.device) -> Views:
        """The views on `device`."""
        return Views(*(group.to(device, non_blocking=True) for group in self))


class Crops(NamedTuple):
    """Unfinished views: cut and resized, with the changes still to be made to them."""

    views: Views
    global_changes: Changes
    local_changes: Changes

    def to(self, device: torch.device) -> Crops:
        """The crops on `device`; their changes stay on the CPU, where they are needed."""
        return self._replace(views=self.views.to(device))


class ViewMaker:
    """Cuts the views of one image by `config`'s recipe, at `global_size` and `local_size` pixels a side.

    resize  how the model is fed: for `squash`, views are cut as from the squashed image
    """

    def __init__(
        self,
        config: ViewsConfig,
        global_size: int,
        local_size: int,
        scaling: Scaling | None = None,
        *,
        resize: Resize = "shorter",
    ) -> None:
        self._config, self._scaling, self._squash = config, scaling, resize == "squash"
        self._groups = (
            (config.n_global, global_size, config.global_area),
            (config.n_local, local_size, config.local_area),
        )

    @property
    def least_side(self) -> int:
        """The shorter side of an image in pixels at which no crop is enlarged: decoding to more gains nothing."""
        return max(math.ceil(size / math.sqrt(area[0] * _ASPECTS[0])) for count, size, area in self._groups if count)

    def __call__(self, pixels_HWC: NDArray[Any], seed: int) -> Crops:
        """The crops of an image, a function of only the image and `seed`.

        pixels  uint8 [H, W, C], or float32 with raw values if the maker has a scaling

        Raises ConfigError when the recipe does not fit the number of bands.
        """
        assert pixels_HWC.dtype == (np.uint8 if self._scaling is None else np.float32)
        random = np.random.Generator(np.random.PCG64(seed))
        views, changes = [], []
        for count, size, area in self._groups:
            views.append(self._crops(pixels_HWC, random, count, size, area))
            changes.append(photometric.draw(self._config, random, count, pixels_HWC.shape[2], size))
        return Crops(Views(*views), *changes)

    def _crops(
        self, pixels_HWC: NDArray[Any], random: np.random.Generator, count: int, size: int, area: tuple[float, float]
    ) -> Tensor:
        height, width, bands = pixels_HWC.shape
        boxes = draw_boxes(random, count, height, width, area, unit=width / height if self._squash else 1.0)
        mirrored = (random.random(count) < self._config.horizontal_flip).tolist()
        upended = (random.random(count) < self._config.vertical_flip).tolist()
        turns = (random.integers(4, size=count) * self._config.quarter_turns).tolist()
        dtype = torch.uint8 if self._scaling is None else torch.float32
        # Bands last in memory, as the resize returns them: moving them to the front would take a fifth more time.
        crops = torch.empty(count, size, size, bands, dtype=dtype).permute(0, 3, 1, 2)
        for view in range(count):
            top, left, bottom, right = boxes[view]
            crop = resize(pixels_HWC[top:bottom, left:right], size, size)
            if upended[view]:
                crop = crop.flip(1)
            if mirrored[view]:
                crop = crop.flip(2)
            crops[view] = torch.rot90(crop, turns[view], dims=(1, 2)) if turns[view] else crop
        return crops if self._scaling is None else _scaled(crops, self._scaling)


def draw_boxes(
    random: np.random.Generator, count: int, height: int, width: int, area: tuple[float, float], *, unit: float = 1.0
) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom and right of `count` random crops, torchvision's RandomResizedCrop in distribution.

    An image too long and thin for the area is cut to the largest box with a legal aspect ratio, anywhere along it.

    unit  width over height of what counts as square: 1, or that of an image which is squashed to a square
    """
    # Plain arithmetic on a few numbers: a dozen numpy calls on arrays of 8 would cost as much as a crop.
    tries = random.random((count, _TRIES, 2)).tolist()
    places = random.random((count, 2)).tolist()
    boxes = []
    for view_tries, (down, across) in zip(tries, places, strict=True):
        high, wide = _box_size(view_tries, height, width, area, unit)
        top, left = int(down * (height - high + 1)), int(across * (width - wide + 1))
        boxes.append((top, left, top + high, left + wide))
    return boxes


def _box_size(
    tries: Sequence[tuple[float, float]], height: int, width: int, area: tuple[float, float], unit: float
) -> tuple[int, int]:
    """Height and width of the first box tried that fits into the image; never under 16 pixels a side, unless the image is."""
    least_high, least_wide = min(height, _LEAST_CROP), min(width, _LEAST_CROP)
    for share, place in tries:
        pixels = (area[0] + share * (area[1] - area[0])) * height * width
        aspect = unit * math.exp(_LOG_ASPECTS[0] + place * (_LOG_ASPECTS[1] - _LOG_ASPECTS[0]))
        high, wide = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < high <= height and 0 < wide <= width:
            return max(high, least_high), max(wide, least_wide)
    narrowest, widest = (unit * aspect for aspect in _ASPECTS)
    return max(min(height, int(width / narrowest)), least_high), max(min(width, int(height * widest)), least_wide)


def resize(pixels_HWC: NDArray[Any], height: int, width: int) -> Tensor:
    """[C, height, width] of the same dtype, uint8 or float32: bicubic, antialiased, Pillow's within one level."""
    # A copy, because torch warns about read-only arrays, such as a cached image.
    image_1CHW = torch.from_numpy(pixels_HWC.copy())[None].permute(0, 3, 1, 2)
    if image_1CHW.shape[1] > _FAST_BANDS:
        parts = torch.split(image_1CHW, _FAST_BANDS, dim=1)
        return torch.cat([_bicubic(part, height, width) for part in parts], dim=1)[0]
    return _bicubic(image_1CHW, height, width)[0]


def _bicubic(image_1CHW: Tensor, height: int, width: int) -> Tensor:
    return interpolate(image_1CHW, (height, width), mode="bicubic", antialias=True)


def _scaled(crops_VCHW: Tensor, scaling: Scaling) -> Tensor:
    # Resized first and scaled afterwards, like the exported graph's input.
    low, high = (torch.tensor(ends)[:, None, None] for ends in (scaling.low, scaling.high))
    return crops_VCHW.sub_(low).div_(high - low).clamp_(0, 1)


def collate(crops: Sequence[Crops]) -> Crops:
    """Stack the crops of N images: every [V, ...] becomes [V, N, ...]."""
    views, *changes = zip(*crops, strict=True)
    stacked = [Changes(*(np.stack(field, axis=1) for field in zip(*group, strict=True))) for group in changes]
    return Crops(Views(*(_stacked(group) for group in zip(*views, strict=True))), *stacked)


def _stacked(views: Sequence[Tensor]) -> Tensor:
    return torch.stack([group.permute(0, 2, 3, 1) for group in views], dim=1).permute(0, 1, 4, 2, 3)


def finish(crops: Crops) -> Views:
    """The views of one image or of a batch with their changes applied, on the crops' device."""
    return Views(
        _finished(crops.views.global_, crops.global_changes), _finished(crops.views.local, crops.local_changes)
    )


def _finished(views: Tensor, changes: Changes) -> Tensor:
    """`photometric.apply` for any number of leading dimensions."""
    lead = views.dim() - 3
    flat = changes.map(lambda field: field.reshape(-1, *field.shape[lead:]))
    return photometric.apply(views.flatten(0, lead - 1), flat).view(views.shape)
