"""What makes one doubt that the images are what is meant: told by `inspect` and before training, never refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jepakit._groups import image_of
from jepakit._messages import counted
from jepakit.sources import ImageList
from jepakit_training.scan import Scan

_SHARDS = (".tar", ".zip")


def doubts(images: ImageList, found: Scan) -> list[str]:
    """A line for each doubt about the images, by their names and by the sample that was looked at."""
    names = list(dict.fromkeys(map(image_of, images.ids)))
    return _ungrouped_folders(images, names)


def _ungrouped_folders(images: ImageList, names: Sequence[str]) -> list[str]:
    """Labelled images in more folders than there are classes, of which each may be a patient, are not grouped."""
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
        "scene, keep it together (--group folder), or else held-out images have siblings in training and the verdict is optimistic"
    ]
