"""What folder names suggest: which may be classes, and which are splits, patients, wrappers, or hold masks of other images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_SPLIT = frozenset({
    "train", "training", "trainset", "val", "valid", "validation", "test", "testing", "testset", "dev", "eval", "evaluation",
    "holdout", "heldout", "fold", "folds",
})  # fmt: skip
"""Words in the names of splits, such as `train2017`, `images_test`, `fold3`: these names have no words but these and `_PICTURES`."""
PLAIN_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Names of splits that no class has."""
_PICTURES = frozenset({
    "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "jpeg", "jpegs", "jpg", "jpgs", "png", "pngs",
    "tif", "tiff", "rgb", "bit", "raw", "original", "originals", "input", "inputs", "scan", "scans", "left", "right",
    "set", "data", "dataset",
})  # fmt: skip
"""Words in the names of folders with images of any class, such as `JPEGImages`, `originals`, `leftImg8bit`: these have no others."""
BESIDE = frozenset({
    "mask", "masks", "label", "labels", "annotation", "annotations", "groundtruth", "truth", "gt", "seg", "segs", "segm",
    "segmentation", "segmentations", "thumb", "thumbs", "thumbnail", "thumbnails", "preview", "previews",
})  # fmt: skip
"""Words in the names of folders of masks and the like, such as `masks`, `gtFine`, beside a folder named by `_PICTURES` or `train`.
Beside other folders they may be classes: a defect `label`, faces with `mask` and `no_mask`."""
_NEVER_A_CLASS = frozenset({"ground_truth", "groundtruth", "annotations", "thumbnails"})
"""Whole names of such folders, whatever lies beside them."""
_GROUP = re.compile(
    r"(patient|pat|subject|subj|sub|participant|donor|case|specimen|animal|mouse|slide|scene|plate|session|ses|study)[ _.-]?\d+"
    r"|[A-P](0[1-9]|1\d|2[0-4])",  # the wells of a plate
    re.I,
)
_WORD = re.compile(r"[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+")


def wrapper(names: Sequence[str]) -> str:
    """The path, ending in "/", of the single folders that enclose all folders of images, such as the one folder in a ZIP.

    Empty if there are several folders at the top; a folder that holds images itself wraps nothing.
    """
    around = _folder_of(os.path.commonprefix([min(names), max(names)]))  # noqa: RUF071 (cut at a "/")
    holds_images = any(name.find("/", len(around)) < 0 for name in names)
    return _folder_of(around[:-1]) if holds_images else around


def splits(folders: Sequence[str]) -> list[str]:
    """Those of the folders, two or more, that are named like parts of a data set."""
    found = [name for name in folders if _is_split(_words(name))]
    return found if len(found) > 1 else []


def companions(folders: Sequence[str]) -> list[str]:
    """Those of several folders that seem to hold masks, thumbnails or the like of the images in the others."""
    if len(folders) < 2:
        return []
    words = {name: _words(name) for name in folders}
    with_pictures = any(each <= _PICTURES | {"train", "training"} for each in words.values() if each)
    beside = [
        name for name, each in words.items() if (with_pictures and each & BESIDE) or name.lower() in _NEVER_A_CLASS
    ]
    return beside if len(beside) < len(folders) else []


def are_groups(folders: Sequence[str]) -> bool:
    """Whether all folders are named like a patient, a slide or another thing of which each has a number: `sub-01`."""
    return all(map(_GROUP.fullmatch, folders))


def _is_split(words: frozenset[str]) -> bool:
    return bool(words & _SPLIT) and words <= _SPLIT | _PICTURES


def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(name) if len(word) > 1 or not word.isascii())


def _folder_of(path: str) -> str:
    return path[: path.rfind("/") + 1]
