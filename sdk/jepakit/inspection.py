"""The report of `jepakit inspect`: what the trainer would see of the images, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, ConfigDict

from jepakit._frozen import Frozen, Printed
from jepakit._messages import counted, first_few
from jepakit._one_line import one_line
from jepakit.bundles.manifest import Scaling
from jepakit.config import Domain


def printable(text: str) -> str:
    """`text` with bytes that are not UTF-8, as in some file names, escaped: JSON cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


AS_ASKED = "as requested"
"""The reason for a domain that the user has named."""
Text = Annotated[str, AfterValidator(printable)]


class Named(Frozen):
    """An image and a remark about it."""

    id: Text
    what: Text


class Inspection(Frozen, Printed):
    """The report of `jepakit inspect`; lists hold the first 20 entries, the counts beside them cover all.

    n_looked_at               images of the sample that was opened; all below is about these
    formats                   how many are of each file format
    holds, bands, stored_as   what most hold, in words; their bands; numpy's name of the files' dtype
    smallest, median, largest (width, height) in pixels
    low, high                 per band, what the values lie between, in the files' units
    scaling                   how training would map values to 0 … 1; None for 8-bit data
    mean, std                 per band, of the values so mapped
    labels                    images by label; None without labels
    source                    the images that were given, in words
    unreadable, odd           images that cannot be read, or are of another kind than most, each with a remark
    duplicates                pairs of ids of images that are nearly the same
    domain, domain_because    the one that was asked for, else a guess, and why
    advice                    what to do, in words
    sheet                     the contact sheet that was written
    """

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
        return "\n".join(map(one_line, _lines(self)))


def _lines(seen: Inspection) -> list[str]:
    (w0, h0), (w1, h1), (w2, h2) = seen.smallest, seen.median, seen.largest
    sizes = f"{w1} × {h1}" if seen.smallest == seen.largest else f"{w0} × {h0} to {w2} × {h2}, median {w1} × {h1}"
    lines = [
        f"images      {seen.n_images} ({seen.n_looked_at} looked at): {', '.join(f'{n} {name}' for name, n in seen.formats.items())}",
        f"pixels      {seen.holds}",
        f"sizes       {sizes}",
        *_value_lines(seen),
        f"source      {seen.source}" + (f" {_format_counts(seen.labels)}" if seen.labels else ""),
        *([f"groups      {seen.n_groups}"] if seen.n_groups is not None else []),
        f"duplicates  {counted(seen.n_duplicates, 'near-duplicate pair')}"
        + (" among those looked at" if seen.n_looked_at < seen.n_images else "")
        + (f", e.g. {' ~ '.join(seen.duplicates[0])}" if seen.duplicates else ""),
    ]
    for title, count, named in (("unreadable", seen.n_unreadable, seen.unreadable), ("odd ones", seen.n_odd, seen.odd)):
        lines += [f"{title:<11} {count}"] if count else []
        lines += [f"            {one.what if one.id in one.what else f'{one.id}: {one.what}'}" for one in named]
    guess = "" if seen.domain_because == AS_ASKED else "?"
    lines.append(f"domain      {seen.domain}{guess} ({seen.domain_because})")
    lines += [f"advice      {words}" for words in seen.advice]
    lines += [f"picture     {seen.sheet}"] if seen.sheet else []
    return lines


def _value_lines(seen: Inspection) -> list[str]:
    if seen.scaling is None:
        return [f"values      mean {_format_values(seen.mean)}, std {_format_values(seen.std)} (of 0 … 1)"]
    how = "measured" if seen.scaling.measured else "as requested"
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
