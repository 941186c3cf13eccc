"""Views: the crops and changes that LeJEPA pulls together.

An image is decoded once; every view is cut from it in uint8. All randomness of an image's views comes from
one seed, so they are the same bytes with any number of workers, before and after a resume.

Shapes: V views, C bands, H × W pixels; uint8, RGB, 0-255.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2.functional import pil_to_tensor

from jepakit.config import ViewsConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_JITTER_SHARE = 0.8


class Views(NamedTuple):
    """Views of one image (or, with N behind V, of a batch): uint8 [V, C, H, W] at each of the two sizes."""

    global_: Tensor
    local: Tensor


class ViewMaker:
    """Cuts the views of one image by `config`'s recipe, at `global_size` and `local_size` pixels a side."""

    def __init__(self, config: ViewsConfig, global_size: int, local_size: int) -> None:
        self._global = _recipe(config, global_size, config.global_area)
        self._local = _recipe(config, local_size, config.local_area)
        self._counts = config.n_global, config.n_local
        self._local_size = local_size

    def __call__(self, image: Image, seed: int) -> Views:
        """The views of an RGB image, a function of the image and `seed` alone."""
        pixels = pil_to_tensor(image)
        n_global, n_local = self._counts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            global_ = torch.stack([self._global(pixels) for _ in range(n_global)])
            local = [self._local(pixels) for _ in range(n_local)]
        empty = pixels.new_empty(0, pixels.shape[0], self._local_size, self._local_size)
        return Views(global_, torch.stack(local) if local else empty)


def _recipe(config: ViewsConfig, size: int, area: tuple[float, float]) -> transforms.Compose:
    steps: list[transforms.Transform] = []
    if config.rotation_degrees:
        steps.append(transforms.RandomRotation(config.rotation_degrees, InterpolationMode.BILINEAR))
    steps.append(
        transforms.RandomResizedCrop(size, scale=area, interpolation=InterpolationMode.BICUBIC, antialias=True)
    )
    if config.horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip(config.horizontal_flip))
    if config.vertical_flip:
        steps.append(transforms.RandomVerticalFlip(config.vertical_flip))
    if config.quarter_turns:
        steps.append(QuarterTurns())
    if config.brightness or config.contrast or config.saturation or config.hue:
        jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        steps.append(transforms.RandomApply([jitter], _JITTER_SHARE))
    if config.gray:
        steps.append(transforms.RandomGrayscale(config.gray))
    if config.blur:
        kernel = max(3, size // 20 * 2 + 1)
        steps.append(transforms.RandomApply([transforms.GaussianBlur(kernel, (0.1, 2.0 * size / 224))], config.blur))
    if config.solarize:
        steps.append(transforms.RandomSolarize(threshold=128, p=config.solarize))
    return transforms.Compose(steps)


class QuarterTurns(torch.nn.Module):
    """Rotates a square [C, S, S] by a random multiple of 90°, exactly."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.rot90(pixels, int(torch.randint(4, ())), dims=(-2, -1))
