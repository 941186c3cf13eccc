"""What the trainer would see of a folder, before anything is trained: counts, kinds, values, doubts, advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, ConfigDict

from jepakit._frozen import Frozen
from jepakit._messages import counted, first_few
from jepakit.bundle import Scaling
from jepakit.config import Domain, ValueRange
from jepakit.scan import Scan, outlier_notes, window_notes
from jepakit.sources import ImageList

SAMPLE = 1024
_LISTED = 20
_SAME_BITS = 10  # of 256: photographs of the same part differ by less, other images by 60 and more
_TILE_ABOVE = 4
_SMALL_SIDE = 96
_FAINT = 0.02


def printable(text: str) -> str:
    """`text` with those bytes of a file's name written out that are not UTF-8, which JSON cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


Text = Annotated[str, AfterValidator(printable)]


class Named(Frozen):
    """An image, and what is to be said of it."""

    id: Text
    what: Text


class Inspection(Frozen):
    """The report of `jepakit inspect`; lists hold the first 20, the counts beside them all."""

    model_config = ConfigDict(allow_inf_nan=False)

    n_images: int
    n_looked_at: int
    formats: dict[str, int]
    holds: str
    bands: int
    stored_as: str
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scaling: Scaling | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: dict[Text, int] | None
    n_groups: int | None
    source: Text
    n_unreadable: int
    unreadable: tuple[Named, ...]
    n_odd: int
    odd: tuple[Named, ...]
    n_duplicates: int
    duplicates: tuple[tuple[Text, Text], ...]
    domain: Domain
    domain_because: str
    advice: tuple[Text, ...]
    sheet: Text | None = None

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def report(images: ImageList, found: Scan, *, image_size: int, tile: int | None, value_range: ValueRange) -> Inspection:
    """Put a scan's findings, near-duplicates and advice together."""
    sizes = sorted((one.size for one in found.seen), key=lambda size: size[0] * size[1])
    median = sizes[len(sizes) // 2]
    scaling = found.scaling(value_range)
    mean, std = found.statistics(scaling)
    domain, because = _suggest_domain(found, mean)
    pairs = near_duplicates(found)
    odd = [Named(id=images.ids[one.index], what=f"holds {one.kind}") for one in found.odd]
    unreadable = [Named(id=images.ids[index], what=reason) for index, reason in found.unreadable]
    advice = _advice(images, found, median, sizes[-1], len(pairs), image_size, tile)
    advice += [*_faint(images, found, scaling), *outlier_notes(found, images.ids), *window_notes(found, scaling)]
    return Inspection(
        n_images=len(images), n_looked_at=len(found.seen) + len(odd) + len(unreadable),
        formats=dict(Counter(one.header.format for one in found.seen).most_common()),
        holds=str(found.kind), bands=found.kind.bands, stored_as=found.kind.stored_as,
        smallest=sizes[0], median=median, largest=sizes[-1],
        low=_rounded(np.nanmin([one.low for one in found.seen], axis=0)),
        high=_rounded(np.nanmax([one.high for one in found.seen], axis=0)),
        scaling=scaling, mean=_rounded(mean), std=_rounded(std),
        labels=None if images.labels is None else dict(Counter(images.labels_given()).most_common()),
        n_groups=None if images.groups is None else len(set(images.groups)), source=images.note,
        n_unreadable=len(unreadable), unreadable=tuple(unreadable[:_LISTED]),
        n_odd=len(odd), odd=tuple(odd[:_LISTED]),
        n_duplicates=len(pairs), duplicates=tuple((images.ids[a], images.ids[b]) for a, b in pairs[:_LISTED]),
        domain=domain, domain_because=because,
        advice=tuple(advice),
    )  # fmt: skip


def near_duplicates(found: Scan) -> list[tuple[int, int]]:
    """Pairs of sampled images (indices) whose difference hashes are all but equal."""
    bits = np.array([one.fingerprint for one in found.seen])
    signs = np.where(bits, 1, -1).astype(np.int16)
    apart = (bits.shape[1] - signs @ signs.T) // 2
    # An image of a few smooth patches has a hash that says nothing: its bits are nearly all alike.
    telling = np.abs(signs.sum(axis=1)) < 0.9 * bits.shape[1]
    first, second = np.nonzero(np.triu((apart <= _SAME_BITS) & telling[:, None] & telling[None, :], k=1))
    return [(found.seen[a].index, found.seen[b].index) for a, b in zip(first, second, strict=True)]


def _suggest_domain(found: Scan, mean: Sequence[float]) -> tuple[Domain, str]:
    """A guess from formats, bands and colours."""
    headers = [one.header for one in found.seen]
    if any(header.format == "DICOM" for header in headers):
        return "radiology", "DICOM files"
    if found.kind.bands > 3 or found.kind.bands == 2:
        return "multispectral", f"{found.kind.bands} bands"
    if any(header.format == "SLIDE" for header in headers):
        return "histology", "whole slides"
    if any(header.nodata is not None for header in headers):
        return (
            "multispectral" if found.kind.bands > 1 else "satellite"
        ), "a no-data value, as rasters of the earth have"
    if found.kind.bands == 1 or _is_grey(found):
        return "microscopy", "grey images; radiographs want `radiology`, which mirrors and turns them little"
    red, green, blue = mean
    if red - green > 0.06 and blue - green > 0.04:
        return "histology", "pink and purple prevail, as in stained tissue"
    return "general", "nothing in formats or colours says more"


def _is_grey(found: Scan) -> bool:
    return all((one.values == one.values[:, :1]).all() for one in found.seen)


def _advice(
    images: ImageList, found: Scan, median: tuple[int, int], largest: tuple[int, int], n_duplicates: int,
    image_size: int, tile: int | None,
) -> list[str]:  # fmt: skip
    advice = []
    if tile is None and min(largest) > _TILE_ABOVE * image_size:
        advice.append(
            f"images of up to {largest[0]} × {largest[1]} pixels would be shrunk to {image_size}: cut them, --tile {2 * image_size}"
        )
    if min(median) < _SMALL_SIDE < image_size:
        advice.append(f"images are {median[0]} × {median[1]} pixels: --image-size {_SMALL_SIDE} trains faster")
    if n_duplicates and images.groups is None:
        advice.append(
            f"{n_duplicates} pairs of near-duplicates among {len(found.seen)} images: name what belongs together "
            "(--group), or held-out images have siblings in training and the verdict is optimistic"
        )
    if images.labels is None:
        advice.append(
            "without labels no verdict can be given: a few hundred labelled images suffice (class folders, or --labels FILE, which need not name the others)"
        )
    frames = max(one.header.frames for one in found.seen)
    if frames > 1:
        advice.append(f"files hold up to {frames} frames: choose one, or --frame each")
    return advice


def _faint(images: ImageList, found: Scan, scaling: Scaling | None) -> list[str]:
    """Images that would be all but one grey once scaled: of another modality, or in other units."""
    if scaling is None:
        return []
    range_C = np.asarray(scaling.high) - np.asarray(scaling.low)
    faint = [one for one in found.seen if np.nanmax((one.high - one.low) / range_C) < _FAINT]
    if not faint:
        return []
    return [
        f"less than {_FAINT:.0%} of the value range is used by {counted(len(faint), 'image')}, e.g. "
        f"{images.ids[faint[0].index]}: of the same kind as the others?"
    ]


def _lines(seen: Inspection) -> list[str]:
    (w0, h0), (w1, h1), (w2, h2) = seen.smallest, seen.median, seen.largest
    sizes = f"{w1} × {h1}" if seen.smallest == seen.largest else f"{w0} × {h0} to {w2} × {h2}, median {w1} × {h1}"
    lines = [
        f"images      {seen.n_images} ({seen.n_looked_at} looked at): {', '.join(f'{n} {name}' for name, n in seen.formats.items())}",
        f"hold        {seen.holds}",
        f"sizes       {sizes}",
        *_value_lines(seen),
        f"source      {seen.source}" + (f" {_format_counts(seen.labels)}" if seen.labels else ""),
        *([f"groups      {seen.n_groups}"] if seen.n_groups is not None else []),
        f"duplicates  {seen.n_duplicates} near-duplicate pairs"
        + (f", e.g. {' ~ '.join(seen.duplicates[0])}" if seen.duplicates else ""),
    ]
    for title, count, named in (("unreadable", seen.n_unreadable, seen.unreadable), ("odd ones", seen.n_odd, seen.odd)):
        lines += [f"{title:<11} {count}"] if count else []
        lines += [f"            {one.what if one.id in one.what else f'{one.id}: {one.what}'}" for one in named]
    lines.append(f"domain      {seen.domain}? ({seen.domain_because})")
    lines += [f"advice      {words}" for words in seen.advice]
    lines += [f"picture     {seen.sheet}"] if seen.sheet else []
    return lines


def _value_lines(seen: Inspection) -> list[str]:
    if seen.scaling is None:
        return [f"values      mean {_format_values(seen.mean)}, std {_format_values(seen.std)} (of 0 … 1)"]
    how = "measured" if seen.scaling.measured else "as asked"
    return [
        f"values      band {band + 1}: {low:g} … {high:g} → 0 … 1 ({how}), mean {mean:.3f}, std {std:.3f}"
        for band, (low, high, mean, std) in enumerate(
            zip(seen.scaling.low, seen.scaling.high, seen.mean, seen.std, strict=True)
        )
    ]


def _format_counts(labels: dict[str, int]) -> str:
    return f"({first_few([f'{name} {count}' for name, count in labels.items()], 8)})"


def _format_values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
