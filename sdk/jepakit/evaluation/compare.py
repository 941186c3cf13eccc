"""Decide which of two models to keep, from their embeddings of the same labelled images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jepakit._groups import copies, image_of, merged, numbered
from jepakit._messages import counted, first_few
from jepakit.bundles.comparison import Comparison, Verdict
from jepakit.embeddings import Embeddings
from jepakit.errors import DataError
from jepakit.evaluation.evaluate import Advice, can_cross_measure, cross_measure, judge

_NAMES = ("first", "second")


def compare(
    first: Embeddings, second: Embeddings, *, groups: ArrayLike | None = None, names: tuple[str, str] | None = None
) -> Comparison:
    """Judge `second` against `first`, two models' embeddings of the same labelled images, in any order.

    groups  the name of each image's group (patient, slide or scene), in the order of `first`; folds never split one,
            and the interval is over groups. None: the tiles and frames of an image form a group
    names   what to call the two in the result [first, second]

    Images to which both models give the vector of another one are copies of it, and count as one group with it.
    Each image is judged by probes fitted on the others, in five folds; docs/verdict.md explains the interval. Print the
    result for a table. Use images that neither model was trained on.

    Raises DataError if the two do not hold the same images with the same labels, if there are no labels, if a vector is not
    finite, or if `groups` or `names` do not fit.
    """
    for given in (first, second):
        if not isinstance(given, Embeddings):
            raise DataError(
                f"{str(given)[:60]!r} is of type {type(given).__name__}: give embeddings, from load(BUNDLE).embed(IMAGES) or Embeddings.load(FILE)"
            )
    if names is not None and not (isinstance(names, list | tuple) and len(names) == 2):
        raise DataError(f"names = {names!r}: give two names, of the first and the second model")
    if not len(first):
        raise DataError("there are no embeddings to compare")
    # Sorted by id: folds are drawn by row, and the order given must not matter.
    order = sorted(range(len(first)), key=first.ids.__getitem__)
    if groups is not None:
        groups = numbered(groups, len(first))[order]
    first = first[order]
    second = second[_places(first.ids, second.ids)]
    if first.labels is None or second.labels is None:
        which = "the first" if first.labels is None else "the second"
        raise DataError(
            f"{which} embeddings have no labels, and models are compared on labelled images: embed images with labels"
        )
    for name, one, other in zip(first.ids, first.labels, second.labels, strict=True):
        if one != other:
            raise DataError(
                f"{name} is labelled {one!r} in the first embeddings and {other!r} in the second: embed it again"
            )
    if groups is None and (images := tuple(map(image_of, first.ids))) != first.ids:
        groups = images
    labels = np.array(first.labels)
    same = copies(np.hstack([first.vectors, second.vectors]))
    if n_copies := len(same) - len(np.unique(same)):
        groups = merged(numbered(groups, len(same)), same)
    measured_before, measured_after = (cross_measure(which.vectors, labels, groups=groups) for which in (first, second))
    judged = judge(measured_before, measured_after, labels, n_train=len(labels), groups=groups, advice=_advice(names))
    judged = judged.model_copy(update={"names": names or _NAMES})
    if not can_cross_measure(labels, groups=groups):
        judged = _unmeasured(judged)
    if n_copies:
        judged = judged.noting(f"copies of an image count as one with it ({counted(n_copies, 'image')})")
    return judged


def _unmeasured(judged: Comparison) -> Comparison:
    """The comparison without scores and difference, as not all folds could be fitted."""
    few = "without one of the folds of groups, a single class is left to fit on: label images of more groups"
    reason = judged.verdict.reason if judged.verdict.low is None else few
    return judged.model_copy(
        update={"before": None, "after": None, "verdict": Verdict(word="cannot tell", reason=reason)}
    )


def _advice(names: tuple[str, str] | None) -> Advice:
    first, second = names or [f"the {name}" for name in _NAMES]
    return Advice(better=f"keep {second}", worse=f"keep {first}", same="either will do", undecided=" before you switch")


def _places(wanted: Sequence[str], ids: Sequence[str]) -> list[int]:
    """The index in `ids` of each of the `wanted`; DataError unless both name the same images, each once."""
    place_of = {name: place for place, name in enumerate(ids)}
    if alone := sorted(place_of.keys() ^ set(wanted)):
        raise DataError(
            f"these are not embeddings of the same images: {first_few(alone, 3)} "
            f"{'is' if len(alone) == 1 else 'are'} in only one of them; embed the same images with both models"
        )
    if not len(wanted) == len(ids) == len(place_of):
        raise DataError(
            f"{len(wanted):,} and {len(ids):,} embeddings are of {counted(len(place_of), 'image')}, some of them twice: embed each "
            "image once"
        )
    return [place_of[name] for name in wanted]
