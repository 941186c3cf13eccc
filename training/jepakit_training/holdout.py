"""Held-out images, which are never trained on: the start and the result are measured on them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._checks import FEWEST_IMAGES, check_enough
from jepakit._groups import codes, main_class
from jepakit._messages import counted
from jepakit.backbones.backbone import provenance_behind
from jepakit.bundles.manifest import Provenance
from jepakit.config import AdaptConfig
from jepakit.errors import DataError
from jepakit.evaluation.evaluate import FEWEST_PER_CLASS
from jepakit.sources import ImageList, evenly_spread
from jepakit_training.randomness import derive_seed

ENOUGH_GROUPS = 120
"""Held-out groups needed for the verdict "same": 90 of equal weight, and a third more as groups are uneven."""
_OF_EACH_CLASS = 20
"""Images per class that a probe, and a k-NN of as many neighbours, need; an evenly spread sample may hold one or none
of a rare class."""


class Split(NamedTuple):
    """Indices of the images to train on, and of those never trained on."""

    train: NDArray[np.intp]
    held_out: NDArray[np.intp]


class Caveat(NamedTuple):
    """What makes a verdict optimistic: `warning` before the run, `kept` with the verdict, which names no file or group."""

    warning: str
    kept: str


def hold_out(config: AdaptConfig, images: ImageList) -> tuple[Split, list[Caveat]]:
    """The training and held-out images, with what makes the verdict optimistic; DataError if too few."""
    check_enough(len(images))
    parts, caveats = _chosen_parts(config, images)
    if len(parts.train) < FEWEST_IMAGES // 2 or not len(parts.held_out):
        raise DataError(
            f"{len(parts.train)} images would train and {len(parts.held_out)} are held out: {FEWEST_IMAGES // 2} and 1 are the fewest possible; "
            "check the split column, the groups, or the labels"
        )
    return parts, [*caveats, *_of_the_start(config, images)]


def _chosen_parts(config: AdaptConfig, images: ImageList) -> tuple[Split, list[Caveat]]:
    """Held-out images: those named by the manifest, else a share of the labelled ones (of all, without labels) and of
    their whole groups, from each stratum in proportion."""
    groups, caveats = images.groups, []
    if images.held_out is not None:
        parts = Split(np.flatnonzero(~images.held_out), np.flatnonzero(images.held_out))
        if groups is not None and (both := {groups[i] for i in parts.train} & {groups[i] for i in parts.held_out}):
            told = f"{counted(len(both), 'group')} {'is' if len(both) == 1 else 'are'} on both sides of the manifest's split"
            caveats.append(
                Caveat(f"warning: {told}, e.g. {min(both)}: the verdict is optimistic", f"optimistic, as {told}")
            )
        return parts, caveats
    judges = images.judges()
    if _are_one_group(judges, groups):
        which = "images" if len(judges) == len(images) else "labelled images"
        told = f"all {which} are one group, which cannot be held out whole: held-out images have siblings in training"
        caveats.append(Caveat(f"warning: {told}, and the verdict is optimistic", f"optimistic, as {told}"))
        groups = None
    parts = split(
        len(judges),
        images.strata(),
        groups=None if groups is None else [groups[place] for place in judges],
        share=config.held_out,
        most=config.measure_on,
        seed=config.seed,
        enough_groups=0 if images.labels is None else ENOUGH_GROUPS,
    )
    return _with_siblings(judges[parts.held_out], groups, len(images)), caveats


def _are_one_group(places: NDArray[np.intp], groups: Sequence[str] | None) -> bool:
    return groups is not None and len({groups[place] for place in places}) == 1


def _with_siblings(held_out: NDArray[np.intp], groups: Sequence[str] | None, count: int) -> Split:
    """The split of `count` images that holds out these and all others of their groups."""
    is_held_out = np.zeros(count, bool)
    is_held_out[held_out] = True
    if groups is not None:
        names = {groups[place] for place in held_out}
        is_held_out |= np.array([group in names for group in groups])
    return Split(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))


def split(
    count: int,
    strata: Sequence[str] | None,
    *,
    share: float,
    most: int,
    seed: int,
    groups: Sequence[str] | None = None,
    enough_groups: int = 0,
) -> Split:
    """Hold out `share` of the images, from each stratum in proportion.

    With many images fewer are held out: `most`, or about what `enough_groups` groups hold if that is more. At least one
    group of each stratum is held out, and as many as the verdict needs for a class if these are at most a third of the
    stratum's groups. A stratum with a single group stays in training.

    strata         the stratum of each image, e.g. its class; None: all are one stratum
    groups         the group of each image: a group (a patient, a scene) is held out whole or not at all, and belongs to
                   the stratum of most of its images; None: every image is its own group
    enough_groups  over all strata, divided equally among them; ignored without groups
    """
    random = np.random.default_rng(derive_seed(seed, "split"))
    group_of = np.arange(count) if groups is None else codes(groups)
    stratum_of = np.zeros(count, np.intp) if strata is None else codes(strata)
    sizes = np.bincount(group_of)
    stratum_of_group = main_class(group_of, stratum_of)
    lone = np.bincount(stratum_of_group)[stratum_of_group] == 1
    if 2 * sizes[lone].sum() > count:  # too many to keep in training: treat them as one stratum
        stratum_of_group[lone] = -1
    chosen = np.zeros(len(sizes), bool)
    names, n_groups = np.unique(stratum_of_group, return_counts=True)
    enough = 0.0 if groups is None else enough_groups / max(1, int(np.count_nonzero(n_groups > 1)))
    for stratum in names:
        members = random.permutation(np.flatnonzero(stratum_of_group == stratum))
        can_judge = stratum >= 0 and len(members) >= 3 * FEWEST_PER_CLASS
        if len(members) > 1:
            part = min(share, max(most / count, enough / len(members)))
            chosen[_near_share(members, sizes, part, FEWEST_PER_CLASS if can_judge else 1)] = True
    held_out = chosen[group_of]
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))


def _near_share(groups: NDArray[np.intp], sizes: NDArray[np.intp], share: float, fewest: int) -> list[int]:
    """The groups to hold out: in order, each that brings the held-out images closer to `share`; then the smallest others, until
    there are `fewest` groups."""
    wanted, taken, chosen = round(share * sizes[groups].sum()), 0, []
    for group in groups.tolist():
        if taken + sizes[group] / 2 <= wanted:
            chosen.append(group)
            taken += int(sizes[group])
    if len(chosen) < fewest:
        others = groups[~np.isin(groups, chosen)]
        chosen += others[np.argsort(sizes[others], kind="stable")][: fewest - len(chosen)].tolist()
    return chosen


def _of_the_start(config: AdaptConfig, images: ImageList) -> list[Caveat]:
    """A caveat if the start weights may have been trained on images that are held out here."""
    if images.held_out is not None or _held_out_alike(provenance_behind(config.weights), config, images):
        return []
    told = "trained in a run whose held-out images may be others"
    return [
        Caveat(
            f"warning: {config.weights} was {told}: where it has seen those held out here, the verdict is optimistic; name them "
            "in a manifest's split column to keep them apart in every run",
            f"maybe optimistic, as the start was {told}",
        )
    ]


def _held_out_alike(provenance: Provenance | None, config: AdaptConfig, images: ImageList) -> bool:
    """Whether every run behind some start weights held out the same images as this one."""
    if provenance is None:
        return True
    chosen = ("seed", "held_out", "measure_on")
    alike = provenance.steps == 0 or (
        provenance.data_digest == images.digest()
        and all(provenance.config.get(name) == getattr(config, name) for name in chosen)
    )
    return alike and _held_out_alike(provenance.start, config, images)


@dataclass
class MeasuringSet:
    """The images to measure on: those with `is_fit` (they may be trained on) centre the embedding and, if labelled, fit
    the probes; the others are held out to evaluate on.

    `labels` and `groups` are None if there are none; the entry in `labels` of an unlabelled image has no meaning.
    `n_unmeasured` is the number of classes that there was no room for.
    """

    indices: NDArray[np.intp]
    is_fit: NDArray[np.bool_]
    is_labelled: NDArray[np.bool_]
    labels: NDArray[np.str_] | None
    groups: NDArray[np.str_] | None
    n_unmeasured: int = 0

    @classmethod
    def choose(cls, images: ImageList, split: Split, most: int) -> MeasuringSet:
        """At most `most` images of each part, evenly spread over groups if there are any, rare classes first.

        There may be more held-out images if the verdict needs them for a class. More classes than `most` are measured
        on some of them. In a partly labelled set only labelled images are held out, and unlabelled images to fit on fill
        the places that labelled ones leave.
        """
        judges = images.judges()
        labels = None if images.labels is None else np.array([label or "" for label in images.labels])
        # If all images are one group, it is on both sides, as the plan warns: then each image counts as its own group.
        alone = images.groups is None or _are_one_group(judges, images.groups)
        groups = None if alone else images.groups
        group_of = None if groups is None else codes(groups)
        n_unmeasured = 0
        if labels is not None:
            judges, n_unmeasured = _of_some_classes(judges, labels, split, most)
        train, others = _divide(split.train, judges)
        fit = _spread_over_classes(train, labels, group_of, most, least=0)
        rest = _spread_over_classes(others, None, group_of, most - len(fit), least=0)
        fit = np.sort(np.concatenate([fit, rest]))
        held_out, others = _divide(split.held_out, judges)
        held_out = held_out if len(held_out) else others
        held_out = _spread_over_classes(held_out, labels, group_of, most, least=FEWEST_PER_CLASS)
        chosen = np.concatenate([fit, held_out])
        return cls(
            chosen,
            np.arange(len(chosen)) < len(fit),
            np.zeros(len(chosen), bool) if labels is None else np.isin(chosen, judges),
            None if labels is None else labels[chosen],
            None if groups is None else np.array([groups[index] for index in chosen]),
            n_unmeasured,
        )

    def only(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> MeasuringSet:
        """A subset, e.g. the images that could be read."""
        labels, groups = (None if names is None else names[kept] for names in (self.labels, self.groups))
        return replace(
            self,
            indices=self.indices[kept],
            is_fit=self.is_fit[kept],
            is_labelled=self.is_labelled[kept],
            labels=labels,
            groups=groups,
        )


def _of_some_classes(
    judges: NDArray[np.intp], labels: NDArray[np.str_], split: Split, most: int
) -> tuple[NDArray[np.intp], int]:
    """Those of `judges` whose classes are measured, and the number of other classes.

    These are all classes or, if there are more than `most`, as many of those on both sides of the split as leave enough
    images of each to fit on, evenly spread.
    """
    n_classes = len(np.unique(labels[judges]))
    train, held_out = (labels[np.intersect1d(part, judges)] for part in split)
    on_both = np.intersect1d(train, held_out)
    if n_classes <= most or len(on_both) < 2:
        return judges, 0
    measured = on_both[evenly_spread(len(on_both), most // FEWEST_PER_CLASS)]
    return judges[np.isin(labels[judges], measured)], n_classes - len(measured)


def _divide(part: NDArray[np.intp], judges: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Those of `part` that are among `judges`, and the others."""
    is_judge = np.isin(part, judges)
    return part[is_judge], part[~is_judge]


def _spread_over_classes(
    part: NDArray[np.intp], labels: NDArray[np.str_] | None, group_of: NDArray[np.intp] | None, most: int, *, least: int
) -> NDArray[np.intp]:
    """At most `most` of the indices in `part`: up to _OF_EACH_CLASS per class if there is room, the rest regardless of
    class.

    group_of  the group of every image; None: no groups
    least     how many of every class to take, even beyond `most`
    """
    if len(part) <= most:
        return part
    group_of = None if group_of is None else group_of[part]
    taken = np.empty(0, np.intp)
    if labels is not None:
        names, class_of = np.unique(labels[part], return_inverse=True)
        each = max(least, min(_OF_EACH_CLASS, most // len(names)))
        members = (np.flatnonzero(class_of == number) for number in range(len(names)))
        taken = np.concatenate([_spread_over_groups(places, group_of, each) for places in members])
    others = np.delete(np.arange(len(part)), taken)
    rest = _spread_over_groups(others, group_of, max(0, most - len(taken)))
    chosen: NDArray[np.intp] = part[np.sort(np.concatenate([taken, rest]))]
    return chosen


def _spread_over_groups(places: NDArray[np.intp], group_of: NDArray[np.intp] | None, most: int) -> NDArray[np.intp]:
    """At most `most` of the places, evenly spread, with equally many from each group, or all that it has.

    group_of  the group of every possible place; None: no groups
    """
    if group_of is None or not len(places):
        return places[evenly_spread(len(places), most)]
    numbers, sizes = np.unique(group_of[places], return_inverse=True, return_counts=True)[1:]
    each = bisect_right(range(1, most + 1), most, key=lambda each: int(np.minimum(sizes, each).sum()))
    quotas = np.minimum(sizes, each)
    larger = np.flatnonzero(sizes > each)
    quotas[larger[evenly_spread(len(larger), most - int(quotas.sum()))]] += 1
    of_group = np.split(places[np.argsort(numbers, kind="stable")], np.cumsum(sizes)[:-1])
    chosen = [one[evenly_spread(len(one), quota)] for one, quota in zip(of_group, quotas, strict=True) if quota]
    return np.concatenate([places[:0], *chosen])
