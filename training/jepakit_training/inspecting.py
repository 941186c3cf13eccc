"""`inspect`: look at a sample of the images, report counts, kinds, values, doubts and advice, draw a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from jepakit._checks import exceeds
from jepakit._messages import counted
from jepakit._progress import stage
from jepakit.backbones.backbone import build, fitting_size, stock_preprocess
from jepakit.bundles.manifest import Preprocess, Scaling
from jepakit.config import PRESETS, AdaptConfig, Domain
from jepakit.inspection import AS_ASKED, Inspection, Named, printable
from jepakit.sources import ImageList, evenly_spread
from jepakit_training.data.doubts import doubts, unseen_ends
from jepakit_training.data.scan import Scan, sampled, scan
from jepakit_training.data.values import choose_preprocess, chosen_frame, value_notes
from jepakit_training.pictures.rows import bands_shown
from jepakit_training.pictures.sheet import write_sheet
from jepakit_training.plan import FEW_IMAGES, local_size_of

_OTHERS = 768
"""Images looked at in addition to those that training looks at."""
_LISTED = 20
_SAME_BITS = 10  # of 256: photographs of the same part differ by less, other images by at least 60
_TILE_ABOVE = 4
_SMALL_SIDE = 96
_FAINT = 0.02


def inspect(config: AdaptConfig, images: ImageList, sheet: Path | None) -> Inspection:
    """The report on `images`; the views drawn are those of the chosen domain, or of the suggested one.

    sheet  where to draw it, checked by `check_sheet_path`; WriteError if it cannot be written
    """
    trained_on, others = sampled(images), evenly_spread(len(images), _OTHERS)
    places = np.union1d(trained_on, others)
    found = scan(images, value_range=config.value_range, frame=chosen_frame(config), places=places)
    with torch.device("meta"):
        backbone = build(config.backbone, {})
    size = fitting_size(backbone, config.image_size)
    spec = choose_preprocess(found.only(trained_on), config, stock_preprocess(backbone, size))
    seen = report(images, found, config, spec)
    if "domain" in config.model_fields_set:
        seen = seen.model_copy(update={"domain": config.domain, "domain_because": AS_ASKED})
    if sheet is None:
        return seen
    recipe = config.model_copy(update={"domain": seen.domain}).resolved_views()
    recipe.check_bands(found.kind.bands)
    sizes = size, local_size_of(size, recipe, backbone)
    stage("drawing the views")
    title = f"{found.kind}{bands_shown(spec.bands)}; views of domain {seen.domain} at {sizes[0]} and {sizes[1]} px"
    write_sheet(sheet, images, spec, recipe, sizes, title)
    return seen.model_copy(update={"sheet": printable(str(sheet))})


def report(images: ImageList, found: Scan, config: AdaptConfig, spec: Preprocess) -> Inspection:
    """Put a scan's findings, near-duplicates and advice together, for a model that is fed by `spec`."""
    sizes = sorted((one.size for one in found.seen), key=lambda size: size[0] * size[1])
    median = sizes[len(sizes) // 2]
    measured = found.only(sampled(images))
    scaling = measured.scaling(config.value_range)
    mean, std = measured.statistics(scaling)
    domain, because = _suggest_domain(found, mean)
    pairs = near_duplicates(found)
    odd = [Named(id=images.ids[one.index], what=f"holds {one.kind}") for one in found.odd]
    unreadable = [Named(id=images.ids[index], what=reason) for index, reason in found.unreadable]
    advice = _advice(images, found, config, spec, median, sizes[-1], len(pairs))
    advice += _crossing(images, pairs)
    advice += [*doubts(images, found), *_faint(images, found, scaling), *_beyond(images, found, scaling)]
    advice += value_notes(measured, images.ids, scaling)
    return Inspection(
        n_images=len(images),
        n_looked_at=len(found.seen) + len(odd) + len(unreadable),
        formats=dict(Counter(one.header.format for one in found.seen).most_common()),
        holds=str(found.kind),
        bands=found.kind.bands,
        stored_as=found.kind.stored_as,
        smallest=sizes[0],
        median=median,
        largest=sizes[-1],
        low=_rounded(np.nanmin([one.low for one in found.seen], axis=0)),
        high=_rounded(np.nanmax([one.high for one in found.seen], axis=0)),
        scaling=scaling,
        mean=_rounded(mean),
        std=_rounded(std),
        labels=None if images.labels is None else dict(Counter(images.labels_given()).most_common()),
        n_groups=None if images.groups is None else len(set(images.groups)),
        source=images.note,
        n_unreadable=len(unreadable),
        unreadable=tuple(unreadable[:_LISTED]),
        n_odd=len(odd),
        odd=tuple(odd[:_LISTED]),
        n_duplicates=len(pairs),
        duplicates=tuple((images.ids[a], images.ids[b]) for a, b in pairs[:_LISTED]),
        domain=domain,
        domain_because=because,
        advice=tuple(advice),
    )


def near_duplicates(found: Scan) -> list[tuple[int, int]]:
    """Pairs of sampled images (indices) whose difference hashes are nearly equal."""
    bits = np.array([one.fingerprint for one in found.seen])
    signs = np.where(bits, 1, -1).astype(np.int16)
    apart = (bits.shape[1] - signs @ signs.T) // 2
    # The hash of an image with a few smooth patches is meaningless: nearly all of its bits are equal.
    telling = np.abs(signs.sum(axis=1)) < 0.9 * bits.shape[1]
    first, second = np.nonzero(np.triu((apart <= _SAME_BITS) & telling[:, None] & telling[None, :], k=1))
    return [(found.seen[a].index, found.seen[b].index) for a, b in zip(first, second, strict=True)]


def _suggest_domain(found: Scan, mean: Sequence[float]) -> tuple[Domain, str]:
    """Guess the domain from formats, bands and colours."""
    headers = [one.header for one in found.seen]
    if any(header.format == "DICOM" for header in headers):
        return "radiology", "DICOM files"
    if found.kind.bands > 3 or found.kind.bands == 2:
        return "multispectral", f"{found.kind.bands} bands"
    if any(header.format == "SLIDE" for header in headers):
        return "histology", "whole slides"
    if any(header.nodata is not None for header in headers):
        return ("multispectral" if found.kind.bands > 1 else "satellite"), "a no-data value, as in geographic rasters"
    if found.kind.bands == 1 or _is_grey(found):
        degrees = PRESETS["radiology"]["rotation_degrees"]
        return "microscopy", f"grey images; for radiographs use `radiology`: no flips, turns of at most {degrees:g}°"
    red, green, blue = mean
    if red - green > 0.06 and blue - green > 0.04:
        return "histology", "mostly pink and purple, as in stained tissue"
    return "general", "formats and colours suggest nothing more specific"


def _is_grey(found: Scan) -> bool:
    return all((one.values == one.values[:, :1]).all() for one in found.seen)


def _advice(
    images: ImageList,
    found: Scan,
    config: AdaptConfig,
    spec: Preprocess,
    median: tuple[int, int],
    largest: tuple[int, int],
    n_duplicates: int,
) -> list[str]:
    advice = []
    if len(images) < FEW_IMAGES:
        advice.append(f"{counted(len(images), 'image')} are very few to train and to measure on")
    if config.tile is None:
        advice += _unseen(found, largest, config.image_size, spec)
    if min(median) < _SMALL_SIDE < config.image_size:
        advice.append(f"images are {median[0]} × {median[1]} pixels: image_size={_SMALL_SIDE} trains faster")
    if n_duplicates and images.groups is None:
        advice.append(
            f"{n_duplicates} pairs of near-duplicates among {len(found.seen)} images: say which belong together "
            "(group), or else held-out images have siblings in training and the verdict is optimistic"
        )
    if images.groups is not None and len(set(images.groups)) == 1:
        advice.append(
            "all images are one group, which cannot be held out as a whole: held-out images have siblings in training and the "
            "verdict is optimistic; say which belong together (group)"
        )
    unread, looked_at = len(found.unreadable), len(found.seen) + len(found.odd) + len(found.unreadable)
    if exceeds(unread, looked_at, most := config.most_skipped):
        advice.append(
            f"{unread / looked_at:.1%} of the images cannot be read, and adapt stops above {100 * most:g} %: repair or remove them, or allow more with "
            "most_skipped=SHARE"
        )
    if images.labels is None:
        advice.append(
            "without labels there can be no verdict: a few hundred labelled images suffice (in class folders, or with labels=FILE, which need not name the others)"
        )
    return advice


def _unseen(found: Scan, largest: tuple[int, int], size: int, spec: Preprocess) -> list[str]:
    """What the model would not see of large images, or else of long ones, and what to do; empty if there are none."""
    if min(largest) > _TILE_ABOVE * size:
        return [
            f"images of up to {largest[0]} × {largest[1]} pixels would be shrunk to {size}: cut them into tiles, tile={2 * size}"
        ]
    return unseen_ends(found, spec)


def _crossing(images: ImageList, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Advice on near-duplicates with different labels, in different groups, or on both sides of the split."""
    by: list[tuple[Sequence[Any] | None, str]] = [
        (images.labels, "have different labels: one of the two is wrong, or they cannot be told apart"),
        (
            images.groups,
            "are in different groups: unless they are put in one, held-out images have siblings in training",
        ),
        (
            None if images.held_out is None else images.held_out.tolist(),
            "lie on both sides of the split: held-out images have siblings in training, and the verdict is optimistic",
        ),
    ]
    advice = []
    for values, words in by:
        apart = [
            (a, b)
            for a, b in pairs
            if values is not None and None not in (values[a], values[b]) and values[a] != values[b]
        ]
        if apart:
            a, b = apart[0]
            example = f"e.g. {images.ids[a]} ~ {images.ids[b]}"
            advice.append(f"{len(apart)} of {counted(len(pairs), 'pair')} of near-duplicates, {example}, {words}")
    return advice


def _faint(images: ImageList, found: Scan, scaling: Scaling | None) -> list[str]:
    """Images that would be nearly a single grey once scaled: of another modality, or in other units."""
    if scaling is None:
        return []
    range_C = np.asarray(scaling.high) - np.asarray(scaling.low)
    faint = [one for one in found.seen if np.nanmax((one.high - one.low) / range_C) < _FAINT]
    if not faint:
        return []
    return [
        f"less than {_FAINT:.0%} of the value range is used by {counted(len(faint), 'image')}, e.g. "
        f"{images.ids[faint[0].index]}: is it of the same kind as the others?"
    ]


def _beyond(images: ImageList, found: Scan, scaling: Scaling | None) -> list[str]:
    """Images not looked at by training whose values lie beyond the range that it would measure."""
    if scaling is None or not scaling.measured:
        return []
    low, high, looked_at = np.asarray(scaling.low), np.asarray(scaling.high), set(sampled(images).tolist())
    beyond = [one for one in found.seen if one.index not in looked_at and ((one.low < low) | (one.high > high)).any()]
    if not beyond:
        return []
    return [
        f"{counted(len(beyond), 'image')}, e.g. {images.ids[beyond[0].index]}, hold values outside the range that training would "
        f"measure on a sample of {len(looked_at)}, and may be refused: set the range with value_range=LOW:HIGH"
    ]


def _rounded(values: ArrayLike) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in np.ravel(values))
