"""Groups: images that belong together, such as the tiles of one slide."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._checks import refuse_masked
from jepakit.errors import DataError

_PIECE = re.compile(r"(#frame=\d+)?(#\d+(,\d+){3})?$")


def image_of(piece_id: str) -> str:
    """The id of the image that a tile or a frame was cut from; for a whole image, its own id."""
    return _PIECE.sub("", piece_id) if "#" in piece_id else piece_id


def numbered(groups: ArrayLike | None, count: int) -> NDArray[np.intp]:
    """Each image's group as a number, [count], in order of first appearance. None: each image is its own group.

    Raises DataError unless there is one name for each image.
    """
    if groups is None:
        return np.arange(count)
    if isinstance(groups, list | tuple) and len(groups) == count and all(isinstance(name, str) for name in groups):
        names = list(groups)  # an array would give each name the space of the longest
    else:
        names = _names(groups, count)
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], np.intp)


def _names(groups: ArrayLike, count: int) -> list[Any]:
    refuse_masked("the groups", groups)
    try:
        array = np.asarray(groups)
    except ValueError:
        raise DataError(f"the groups are lists of different lengths: give a name for each of {count} images") from None
    if array.shape != (count,):
        raise DataError(f"{count} images, but groups of shape {list(array.shape)}: give a name for each image")
    for place, name in enumerate(as_given(groups, array)):
        if name is None or name != name:
            raise DataError(f"image {place} has no group ({name}): name one, its own where it stands alone")
    names: list[Any] = array.tolist()
    return names


def as_given(names: Any, array: NDArray[Any]) -> Iterable[Any]:
    """The values to search for missing names: an array of text would turn NaN into the ordinary name "nan"."""
    return names if array.dtype.kind == "U" and isinstance(names, list | tuple) else array


def merged(groups: NDArray[np.intp], others: NDArray[np.intp]) -> NDArray[np.intp]:
    """The groups that are left when all images that share one of `groups`, or one of `others`, belong together, [N]."""
    joint = groups
    while True:
        last = joint
        for by in (groups, others):
            least = np.full(by.max() + 1, joint.max())
            np.minimum.at(least, by, joint)
            joint = least[by]
        if np.array_equal(joint, last):
            return codes(joint)


def codes(names: ArrayLike) -> NDArray[np.intp]:
    """Each name's index among the sorted distinct names, [N]."""
    if isinstance(names, list | tuple):  # an array would give each name the space of the longest
        number = {name: place for place, name in enumerate(sorted(set(names)))}
        return np.fromiter(map(number.__getitem__, names), np.intp, len(names))
    numbers: NDArray[np.intp] = np.unique(np.asarray(names), return_inverse=True)[1]
    return numbers


def copies(vectors: NDArray[np.float32]) -> NDArray[np.intp]:
    """A number for each image, [N], the same for equal vectors [N, D]: one image under several names, or blank ones."""
    numbers: NDArray[np.intp] = np.unique(vectors, axis=0, return_inverse=True)[1].ravel()
    return numbers


class Cells(NamedTuple):
    """The pairs of a group and a class that have images, sorted by class, then by group.

    groups, classes, counts  each cell's group, class and number of images, [cells]
    of_image                 each image's cell, [N]
    """

    groups: NDArray[np.intp]
    classes: NDArray[np.intp]
    counts: NDArray[np.intp]
    of_image: NDArray[np.intp]

    @classmethod
    def of(cls, groups: NDArray[np.intp], classes: NDArray[np.intp]) -> Cells:
        """The cells of images, given each one's group and class, [N]."""
        n_groups = groups.max() + 1
        pairs, of_image, counts = np.unique(classes * n_groups + groups, return_inverse=True, return_counts=True)
        return cls(pairs % n_groups, pairs // n_groups, counts, of_image)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of `values` [N] in each cell, [cells]."""
        return np.bincount(self.of_image, values).astype(np.float64)

    def images_of_class(self) -> NDArray[np.float64]:
        """The number of images of each class, [classes]."""
        return np.bincount(self.classes, self.counts).astype(np.float64)


def groups_of_class(groups: NDArray[np.intp], classes: NDArray[np.intp], n_classes: int) -> NDArray[np.intp]:
    """In how many groups there are images of each class, [n_classes]."""
    counts: NDArray[np.intp] = np.bincount(np.unique(groups * n_classes + classes) % n_classes, minlength=n_classes)
    return counts


def main_class(groups: NDArray[np.intp], classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """The commonest class among each group's images, [groups]; ties go to the first class."""
    cells, counts = np.unique(groups * (classes.max() + 1) + classes, return_counts=True)
    group_of_cell, class_of_cell = np.divmod(cells, classes.max() + 1)
    rising = np.lexsort((-class_of_cell, counts))
    main = np.zeros(groups.max() + 1, np.intp)
    main[group_of_cell[rising]] = class_of_cell[rising]  # the last one assigned stays
    return main


def assign_folds(
    groups: NDArray[np.intp], classes: NDArray[np.intp], n_folds: int, random: np.random.Generator | None = None
) -> NDArray[np.intp]:
    """Each image's fold, [N]: groups stay whole and are dealt out in turn, class by class; `random` shuffles them.

    There are at most `n_folds`, and as many as the commonest class has groups if that is fewer: in more, folds would not
    hold every class. Where no class has two, there are as many as groups.
    """
    class_of_group = main_class(groups, classes)
    members = [np.flatnonzero(class_of_group == name) for name in np.unique(class_of_group)]
    most = max(map(len, members))
    n_folds = min(n_folds, most if most > 1 else len(members))
    order = np.concatenate(members if random is None else [random.permutation(alike) for alike in members])
    return dealt_out(order, n_folds)[groups]


def dealt_out(by_class: NDArray[np.intp], n_parts: int) -> NDArray[np.intp]:
    """The part of each group, [groups]: groups in this order, class after class, go to each part in turn.

    Counting continues across classes; otherwise classes with a single group would all fall into the first part.
    """
    part_of_group = np.empty(len(by_class), np.intp)
    part_of_group[by_class] = np.arange(len(by_class)) % n_parts
    return part_of_group
