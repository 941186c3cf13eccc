"""Signs that the images may not be what the user meant: reported by `inspect` and before training, never refused."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from jepakit._groups import image_of
from jepakit._messages import counted, first_few
from jepakit.bundles.manifest import Preprocess
from jepakit.sources import ImageList
from jepakit.sources.layout import BESIDE
from jepakit_training.data.scan import Scan

_SHARDS = (".tar", ".zip")
_COMPANION = re.compile(rf"[ _.-](ground_truth|{'|'.join(BESIDE)})$", re.I)
_CHANNEL = re.compile(r"[ _.-](w\d|ch\d+|b\d{1,2}a?|red|green|blue|yellow|nir|dapi)$", re.I)
_MOST_COMPANIONS = 0.2
_LONG, _MOST_LONG = 2, 0.05
"""The ratio of an image's sides above which most of it goes unseen, and the share of such images up to which nothing is said."""


def doubts(images: ImageList, found: Scan) -> list[str]:
    """A line for each doubt about the images, by their names and by the sample that was looked at."""
    names = list(dict.fromkeys(map(image_of, images.ids)))
    return [
        *_ungrouped_folders(images, names),
        *_companions(names),
        *_several_contents(images, found),
        *_doubtful_pixels(images, found),
    ]


def unseen_ends(found: Scan, spec: Preprocess) -> list[str]:
    """What a model that is fed by `spec` does not see of long images, and what to do; empty if it sees all, or few are long."""
    if spec.resize == "squash" or spec.tile is not None:
        return []
    long = [one.size for one in found.seen if max(one.size) > _LONG * min(one.size)]
    if len(long) <= _MOST_LONG * len(found.seen):
        return []
    width, height = sorted(long, key=lambda size: max(size) / min(size))[len(long) // 2]
    return [
        f"{len(long)} of {len(found.seen)} images are long, such as {width} × {height}, of which the model sees the middle "
        f"{min(width, height) / max(width, height):.0%}: resize=squash shows it all of them, distorted; or cut them into tiles, "
        f"tile={min(width, height)}"
    ]


def _ungrouped_folders(images: ImageList, names: Sequence[str]) -> list[str]:
    """A doubt if labelled images are not grouped, but lie in more folders than there are classes: each may be a patient."""
    grouped = images.groups is not None and set(images.groups) != set(names)  # tiles are grouped by image at least
    if images.labels is None or images.held_out is not None or grouped:
        return []
    folders = Counter(name.rpartition("/")[0] for name in names)
    if len(folders) <= len(set(images.labels_given() or ())) or len(names) < 2 * len(folders):
        return []
    folder, count = folders.most_common(1)[0]
    if folder.endswith(_SHARDS):
        return []
    return [
        f"the images lie in {len(folders):,} folders, e.g. {folder} ({counted(count, 'image')}): if a folder holds one patient, part or "
        "scene, keep it together (group=folder), or else held-out images have siblings in training and the verdict is optimistic"
    ]


def _companions(names: Sequence[str]) -> list[str]:
    """Files that are named as another image's mask or preview, or as one channel of several."""
    by_stem = {os.path.splitext(name)[0]: name for name in names}  # noqa: PTH122 (hot loop)
    beside: dict[str, str] = {}
    channels: dict[str, list[str]] = defaultdict(list)
    for stem, name in by_stem.items():
        if (of := _COMPANION.sub("", stem)) != stem and of in by_stem:
            beside[name] = by_stem[of]
        elif (of := _CHANNEL.sub("", stem)) != stem:
            channels[of].append(name)
    beside |= {other: first for first, *others in channels.values() for other in others}
    if len(beside) <= _MOST_COMPANIONS * len(names):
        return []
    companion, image = next(iter(beside.items()))
    return [
        f"{len(beside):,} of {len(names):,} images are named as companions of others, e.g. {companion} beside {image}: if they are masks, "
        "previews or single channels, name the images that are meant, by a glob or in a manifest; put channels together as bands of a file"
    ]


def _several_contents(images: ImageList, found: Scan) -> list[str]:
    """DICOM images of several modalities, or localizers and secondary captures among them."""
    known = [one for one in (*found.seen, *found.odd) if one.header.content]
    counts = Counter(one.header.content for one in known).most_common()
    if len(counts) < 2:
        return []
    rarest = next(one for one in known if one.header.content == counts[-1][0])
    each = first_few([f"{count:,} {content}" for content, count in counts], 6)
    return [
        f"the DICOM images are of several kinds ({each}; {images.ids[rarest.index]} is {rarest.header.content}): leave out those that are not "
        "meant, by folder or in a manifest, or they are trained on as well"
    ]


def _doubtful_pixels(images: ImageList, found: Scan) -> list[str]:
    """What the readers were in doubt about, each with the first image."""
    doubtful = [one for one in found.seen if one.doubt]
    first = {one.doubt: images.ids[one.index] for one in reversed(doubtful)}
    counts = Counter(one.doubt for one in doubtful)
    return [
        f"of {counted(count, 'image')} of {len(found.seen):,} looked at, e.g. {first[doubt]}, {doubt}"
        for doubt, count in counts.items()
    ]
