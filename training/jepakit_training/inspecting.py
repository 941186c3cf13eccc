"""`inspect`: look at a sample of the images, report what was found, draw the contact sheet."""

from __future__ import annotations

import math
from pathlib import Path

from jepakit.bundle import Preprocess
from jepakit.config import AdaptConfig
from jepakit.inspection import SAMPLE, Inspection, printable, report
from jepakit.scan import scan
from jepakit.sources import ImageList
from jepakit_training.plan import local_size_of
from jepakit_training.sheet import write_sheet
from jepakit_training.values import choose_preprocess, chosen_frame

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inspect(config: AdaptConfig, images: ImageList, sheet: Path | None) -> Inspection:
    """The report on `images`; the views drawn are those of the chosen domain, or of the suggested one.

    sheet  where to draw it, checked by `check_place`; WriteError where that cannot be written
    """
    found = scan(images, value_range=config.value_range, frame=chosen_frame(config), sample=SAMPLE)
    seen = report(images, found, image_size=config.image_size, tile=config.tile, value_range=config.value_range)
    if sheet is None:
        return seen
    domain = config.domain if "domain" in config.model_fields_set else seen.domain
    recipe = config.model_copy(update={"domain": domain}).resolved_views()
    recipe.check_bands(found.kind.bands)
    spec = choose_preprocess(found, config, _any_backbone(config.image_size))
    sizes = config.image_size, local_size_of(config.image_size, recipe)
    title = f"{found.kind}; views of domain {domain} at {sizes[0]} and {sizes[1]} px"
    write_sheet(sheet, images, spec, recipe, sizes, title)
    return seen.model_copy(update={"sheet": printable(str(sheet))})


def _any_backbone(size: int) -> Preprocess:
    """What most backbones want; only the picture depends on it."""
    return Preprocess(
        size=size, resize_to=math.floor(size / 0.9), resize="shorter", interpolation="bicubic", bands=3, dtype="uint8",
        mean=_IMAGENET_MEAN, std=_IMAGENET_STD,
    )  # fmt: skip
