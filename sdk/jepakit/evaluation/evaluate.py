"""Did adaptation help? Arrays in, numbers and a plain verdict out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._groups import Cells, assign_folds, codes, dealt_out, groups_of_class, main_class, numbered
from jepakit._messages import counted, first_few
from jepakit._progress import Steps, shown
from jepakit.bundles.comparison import Comparison, Scores, Verdict, Word
from jepakit.evaluation.interval import (
    NORMAL_95,
    RULE_OF_THREE,
    balanced,
    bootstrap,
    covariance,
    scaled,
    student,
    variance_of_fits,
    widened,
)
from jepakit.probes import KNNProbe, LinearProbe

_LEFT_OUT = 10
"""Parts of the images to fit on, left out one at a time."""
_FOLDS = 5
_FEW = 1.25
"""If over this many times as many groups of a class are held out as fitted on, the verdict accounts for the choice of the latter."""
_PLAUSIBLE_GROUP_LOSS = 0.3
"""The accuracy that a group harmed by adaptation may plausibly lose."""
_NAMED = 3
NO_LABELS = (
    "without labels there is no way to tell whether adaptation helped; put a few hundred images into class folders, export the "
    "start and the result, and let `jepakit compare` judge them on these images before you switch"
)
SAME_WITHIN = 0.01
FEWEST_PER_CLASS = 3
"""Held-out images (groups, if there are any) of a class; classes with fewer are left out of the verdict."""


class Advice(NamedTuple):
    """What to do after each verdict, in words; `undecided` completes a sentence that says what to label."""

    better: str
    worse: str
    same: str
    undecided: str


_AFTER_ADAPTATION = Advice(
    better="keep the adapted backbone",
    worse="keep the original (`jepakit export RUN --which start`)",
    same="either will do; the original is the simpler choice",
    undecided=", or train longer, before you switch",
)


class Refits(NamedTuple):
    """The probes fitted again, each time without one part of the images to fit on.

    right     whether they were right, bool [parts, 2, N]. Parts without which a single class would remain are not left
              out; if there are no others, it is empty, and nothing can be told
    left_out  which of the held-out images lie in the part left out, bool [parts, N]: none, unless they are also fitted on
    """

    right: NDArray[np.bool_]
    left_out: NDArray[np.bool_]


class Measurement(NamedTuple):
    """`scores`, and for each held-out image whether the linear probe and the k-NN were right, bool [2, N].

    refits  None if there are enough images to fit on (`measure`)
    """

    scores: Scores
    right: NDArray[np.bool_]
    refits: Refits | None = None


def measure(
    train: NDArray[np.float32],
    train_labels: ArrayLike,
    held_out: NDArray[np.float32],
    held_out_labels: ArrayLike,
    *,
    train_groups: ArrayLike | None = None,
    held_out_groups: ArrayLike | None = None,
) -> Measurement:
    """Fit a linear probe and a k-NN on `train` [N, D], evaluate them on `held_out` [M, D]; all classes weigh the same.

    train_groups     the group name of each training image: the linear probe's folds do not split groups
    held_out_groups  the same for held-out images. If more groups (images, without groups) are held out than fitted
                     on, over all or of a class, the probes are refitted without each tenth of the latter in turn, as
                     `judge` then needs
    """
    labels, truth = np.asarray(train_labels), np.asarray(held_out_labels)
    group_of = numbered(train_groups, len(train))
    linear, knn = _fitted(train, labels, group_of)
    refits = None
    if _fits_on_few(labels, group_of, truth, numbered(held_out_groups, len(truth))):
        parts = [
            _right(_fitted(train[kept], labels[kept], group_of[kept], linear.C_), held_out, truth)
            for kept in _leaving_out(labels, group_of)
        ]
        again = np.array(parts, np.bool_).reshape(-1, 2, len(truth))
        refits = Refits(again, np.zeros((len(again), len(truth)), np.bool_))
    return _measurement(_right((linear, knn), held_out, truth), truth, refits)


def _fitted(
    vectors: NDArray[np.float32], labels: NDArray[np.str_], group_of: NDArray[np.intp], strength: float | None = None
) -> tuple[LinearProbe, KNNProbe]:
    """A linear probe (its C chosen if None) and a k-NN to which all classes weigh the same, as in balanced accuracy.

    Fitted with the classes' own weights, both would hardly ever predict a rare class, before as after.
    """
    linear = LinearProbe(C=strength, class_weight="balanced").fit(vectors, labels, groups=group_of)
    return linear, KNNProbe(class_weight="balanced").fit(vectors, labels)


def _fits_on_few(
    labels: NDArray[np.str_], group_of: NDArray[np.intp], truth: NDArray[np.str_], held_out_group_of: NDArray[np.intp]
) -> bool:
    """Whether more groups are held out than fitted on, over all or, beyond chance and rounding, of a class that is judged."""
    if held_out_group_of.max() > group_of.max():
        return True
    names = np.union1d(labels, truth)
    fitted = groups_of_class(group_of, np.searchsorted(names, labels), len(names))
    held_out = groups_of_class(held_out_group_of, np.searchsorted(names, truth), len(names))
    return bool(((held_out > _FEW * fitted) & (fitted > 0) & (held_out >= FEWEST_PER_CLASS)).any())


def cross_measure(vectors: NDArray[np.float32], labels: ArrayLike, *, groups: ArrayLike | None = None) -> Measurement:
    """Evaluate a linear probe and a k-NN on labelled `vectors` [N, D] by cross-validation in five folds.

    groups  the group name of each image: no group is split between folds

    Each image is both evaluated on and fitted on, so the probes are refitted without each tenth of the images in turn,
    as `judge` needs: 180 fits of a linear probe, with progress shown. If a single class is left to fit on, that class is
    predicted.
    """
    truth = np.asarray(labels)
    group_of = numbered(groups, len(truth))
    fold = _folds(truth, group_of)
    stays = [np.ones(len(truth), bool), *_leaving_out(truth, group_of)]
    right = np.empty((len(stays), 2, len(truth)), np.bool_)
    numbers = np.unique(fold)
    with Steps(len(numbers) * len(stays), what="probe") as bar, shown(progress=False):
        for turn, judged in enumerate(fold == number for number in numbers):
            strength = None  # chosen with all images to fit on
            for part, stay in enumerate(stays):
                fit = stay & ~judged
                right[part][:, judged], strength = _right_of_refit(vectors, truth, fit, judged, group_of, strength)
                bar.update(turn * len(stays) + part + 1)
    return _measurement(right[0], truth, Refits(right[1:], ~np.array(stays[1:], np.bool_).reshape(-1, len(truth))))


def can_cross_measure(labels: ArrayLike, *, groups: ArrayLike | None = None) -> bool:
    """Whether every probe that `cross_measure` fits on four fifths has two classes to tell apart."""
    truth = np.asarray(labels)
    fold = _folds(truth, numbered(groups, len(truth)))
    return all(len(np.unique(truth[fold != number])) > 1 for number in np.unique(fold))


def _folds(truth: NDArray[np.str_], group_of: NDArray[np.intp]) -> NDArray[np.intp]:
    return assign_folds(group_of, codes(truth), _FOLDS, np.random.default_rng(0))


def _right(
    probes: tuple[LinearProbe, KNNProbe], vectors: NDArray[np.float32], truth: NDArray[np.str_]
) -> NDArray[np.bool_]:
    """Whether each probe is right about each vector, bool [2, N]."""
    return np.stack([probe.predict(vectors) == truth for probe in probes])


def _right_of_refit(
    vectors: NDArray[np.float32],
    truth: NDArray[np.str_],
    fit: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    group_of: NDArray[np.intp],
    strength: float | None,
) -> tuple[NDArray[np.bool_], float | None]:
    """Whether probes fitted on `fit` are right about `judged`, bool [2, N], and the linear one's C (chosen if None)."""
    classes = np.unique(truth[fit])
    if len(classes) < 2:
        return np.tile(np.isin(truth[judged], classes), (2, 1)), strength
    probes = _fitted(vectors[fit], truth[fit], group_of[fit], strength)
    return _right(probes, vectors[judged], truth[judged]), probes[0].C_


def _leaving_out(labels: NDArray[np.str_], group_of: NDArray[np.intp]) -> list[NDArray[np.bool_]]:
    """For each part of the groups, which images stay when it is left out, bool [N]; only if two classes remain."""
    classes = codes(labels)
    class_of_group = main_class(group_of, classes)
    order = np.lexsort((np.random.default_rng(0).permutation(len(class_of_group)), class_of_group))
    part_of_group = dealt_out(order, _LEFT_OUT)
    kept = [part_of_group[group_of] != part for part in np.unique(part_of_group)]
    return [stay for stay in kept if len(np.unique(classes[stay])) > 1]


def _measurement(right: NDArray[np.bool_], truth: NDArray[np.str_], refits: Refits | None) -> Measurement:
    linear, knn = right
    scores = Scores(
        linear=linear.mean(),
        linear_balanced=balanced(linear, truth),
        knn=knn.mean(),
        knn_balanced=balanced(knn, truth),
    )
    return Measurement(scores, right, refits)


def _only(measured: Measurement, chosen: NDArray[np.bool_], truth: NDArray[np.str_]) -> Measurement:
    """The measurement restricted to the `chosen` held-out images, with labels `truth`."""
    refits = measured.refits and Refits(*(array[..., chosen] for array in measured.refits))
    return _measurement(measured.right[:, chosen], truth, refits)


def judge(
    before: Measurement,
    after: Measurement,
    held_out_labels: ArrayLike,
    *,
    n_train: int,
    groups: ArrayLike | None = None,
    train_labels: ArrayLike | None = None,
    advice: Advice = _AFTER_ADAPTATION,
) -> Comparison:
    """Judge `after` against `before`, both measured on the same held-out images in the same order.

    groups        the group name of each held-out image: images of one group (a patient, a scene) are not independent,
                  so they are resampled together, and few groups cannot show that nothing changes. None: each image is
                  its own group
    advice        what the verdict's reason recommends
    train_labels  labels of the images that the probes were fitted on; None: the same classes as the held-out images

    Classes with fewer than FEWEST_PER_CLASS held-out images (groups), and those that the probes were not fitted on, are
    named and left out as long as two others remain. Otherwise the verdict is "cannot tell": the recall of a single
    class is not an accuracy.
    """
    truth = np.asarray(held_out_labels)
    fitted = truth if train_labels is None else np.asarray(train_labels)
    group_of = numbered(groups, len(truth))
    classes = _choose_classes(truth, fitted, group_of)
    if not classes.is_judged.all():
        truth, group_of = truth[classes.is_judged], group_of[classes.is_judged]
        before, after = (_only(measured, classes.is_judged, truth) for measured in (before, after))
    intervals = [_interval(before, after, truth, group_of, probes) for probes in ([0, 1], [0], [1])]
    result = _Result(
        *intervals[0], len(np.unique(group_of)), _groups_to_call_it_the_same(truth, group_of), tuple(intervals[1:])
    )
    by_group = groups is not None
    if classes.can_judge:
        reason = _describe_result(result, classes, advice, by_group=by_group)
        verdict = Verdict(
            word=result.word,
            reason=reason,
            difference=result.difference,
            low=result.low,
            high=result.high,
            n_groups=_fewest_groups(truth, group_of) if by_group else None,
        )
    else:
        reason = _describe_too_few(np.unique(truth).tolist(), classes, by_group=by_group)
        verdict = Verdict(word="cannot tell", reason=reason, difference=result.difference)
    return Comparison(before=before.scores, after=after.scores, verdict=verdict, n_train=n_train, n_held_out=len(truth))


def _interval(
    before: Measurement, after: Measurement, truth: NDArray[np.str_], group_of: NDArray[np.intp], probes: list[int]
) -> tuple[float, float, float]:
    """The difference in balanced accuracy, as a mean over `probes` (0 is linear, 1 k-NN), and its 95 % interval."""
    gain = (after.right[probes].astype(np.float64) - before.right[probes]).mean(axis=0)
    interval = bootstrap(gain, truth, group_of)
    if before.refits is None or after.refits is None:
        return interval
    gains = (after.refits.right[:, probes].astype(np.float64) - before.refits.right[:, probes]).mean(axis=1)
    variance = variance_of_fits(gains, truth, group_of) + 2 * covariance(gain, gains, after.refits.left_out, truth)
    return widened(interval, max(0.0, variance) * float(student(len(gains) - 1)) ** 2)


def judge_best(name: str, verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on the best of several adaptations of one start, all judged on the same held-out images.

    name      what the best is called
    verdicts  on all of them, the best's first

    The best of several may be the best by chance, so the interval is widened to hold for all of them at once (Bonferroni).
    """
    best, n = verdicts[0], len(verdicts)
    if n == 1 or best.difference is None or best.low is None or best.high is None:
        return best
    z = NormalDist().inv_cdf(1 - 0.025 / n)
    wider = z / NORMAL_95
    if best.n_groups is not None:
        wider *= float(student(best.n_groups - 1, z) / student(best.n_groups - 1))
    _, low, high = scaled((best.difference, best.low, best.high), wider)
    word: Word = "cannot tell"
    if best.word == "cannot tell" and not low <= 0 <= high:
        todo = "but its linear probe and its k-NN disagree, as its own report says: keep the one that does better with the probe you will use"
    elif low > 0:
        word, todo = "better", f"keep {name}"
    elif high < 0:
        word, todo = "worse", "even that is worse than the original: keep that (`jepakit export RUN --which start`)"
    elif best.word == "same" and low >= -SAME_WITHIN and high <= SAME_WITHIN:
        word, todo = "same", _AFTER_ADAPTATION.same
    else:
        todo = "this may be chance: label more images, or train longer, before you switch"
    reason = (
        f"{100 * best.difference:+.1f} points for {name}, the best of {n} (95 % interval that holds for all of them, "
        f"{100 * low:+.1f} to {100 * high:+.1f}); {todo}"
    )
    return Verdict(word=word, reason=reason, difference=best.difference, low=low, high=high, n_groups=best.n_groups)


def no_labels(n_train: int, n_held_out: int, reason: str = NO_LABELS) -> Comparison:
    """The comparison if labels are missing or unusable; measures that need none do not replace them, as they rise in harmful runs, too."""
    return Comparison(
        before=None,
        after=None,
        verdict=Verdict(word="cannot tell", reason=reason),
        n_train=n_train,
        n_held_out=n_held_out,
    )


class _Classes(NamedTuple):
    """Which classes can be judged.

    can_judge  whether there are at least two
    is_judged  bool [N], the held-out images of those classes; all images if fewer than two classes can be judged
    few        the classes with too few held-out images (groups, if there are any), and how many each has
    unfitted   the classes that the probes were not fitted on, and how many held-out images (groups) each has
    """

    can_judge: bool
    is_judged: NDArray[np.bool_]
    few: dict[str, int]
    unfitted: dict[str, int]


def _choose_classes(truth: NDArray[np.str_], fitted: NDArray[np.str_], group_of: NDArray[np.intp]) -> _Classes:
    """The classes to judge: `truth` [N] are the labels of held-out images, `fitted` those that the probes have seen."""
    names = np.union1d(truth, fitted)
    class_of = np.searchsorted(names, truth)
    sizes = groups_of_class(group_of, class_of, len(names))
    is_fitted, is_few = np.isin(names, fitted), sizes < FEWEST_PER_CLASS
    enough = is_fitted & ~is_few
    can_judge = bool(enough.sum() >= 2)
    is_judged = enough[class_of] if can_judge else np.ones(len(truth), bool)
    return _Classes(can_judge, is_judged, _counts(names, sizes, is_few), _counts(names, sizes, ~is_fitted & ~is_few))


class _Result(NamedTuple):
    """The difference and its 95 % interval, the number of groups, the number needed for the verdict "same", and the
    differences and intervals of the linear probe and the k-NN by themselves."""

    difference: float
    low: float
    high: float
    n_groups: int
    n_needed: int
    of_each: tuple[tuple[float, float, float], ...]

    @property
    def is_contradicted(self) -> bool:
        """Whether one of the probes, beyond its own interval, moves the other way than both together."""
        lowest, highest = min(high for _, _, high in self.of_each), max(low for _, low, _ in self.of_each)
        return (self.difference >= 0 and lowest < 0) or (self.difference <= 0 and highest > 0)

    @property
    def is_small(self) -> bool:
        return self.low >= -SAME_WITHIN and self.high <= SAME_WITHIN

    @property
    def word(self) -> Word:
        if self.is_contradicted:
            return "cannot tell"
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "same" if self.is_small and self.n_groups >= self.n_needed else "cannot tell"


def _describe_result(result: _Result, classes: _Classes, advice: Advice, *, by_group: bool) -> str:
    if result.is_contradicted:
        (linear, *of_linear), (knn, *of_knn) = ([f"{100 * number:+.1f}" for number in each] for each in result.of_each)
        todo = (
            f"but the linear probe changes by {linear} ({' to '.join(of_linear)}) and k-NN by {knn} ({' to '.join(of_knn)}): keep the one "
            "that does better with the probe you will use"
        )
    elif result.word == "better":
        todo = advice.better
    elif result.word == "worse":
        todo = advice.worse
    elif result.word == "same":
        todo = advice.same
    elif result.is_small:
        todo = (
            f"{result.n_groups} groups are too few to call it the same, because they may not include any of the groups that it "
            f"harms: label images of more groups, until about {result.n_needed} are held out"
        )
    else:
        todo = f"the interval includes 0: {_label_more(by_group)}{advice.undecided}"
    interval = f"{100 * result.low:+.1f} to {100 * result.high:+.1f}"
    over, unit = (f" over {counted(result.n_groups, 'group')}", "groups") if by_group else ("", "images")
    reason = f"{100 * result.difference:+.1f} points (95 % interval{over} {interval}); {todo}"
    if classes.few:
        reason += f"; classes with fewer than {FEWEST_PER_CLASS} held-out {unit} are left out: {_some(classes.few)}"
    if classes.unfitted:
        reason += f"; classes without images to fit probes on are left out: {_some(classes.unfitted)}"
    return reason


def _describe_too_few(held_out: list[str], classes: _Classes, *, by_group: bool) -> str:
    """Why there is no verdict: one or two images per class show no spread, and a single class cannot be judged."""
    unit = "groups" if by_group else "images"
    reason = f"a verdict needs at least two classes with {FEWEST_PER_CLASS} held-out {unit} each"
    if len(held_out) == 1:
        reason = f"only class {held_out[0]!r} is held out; {reason}"
    if classes.few:
        reason += f", but these have fewer: {_some(classes.few)}"
    if classes.unfitted:
        reason += f"; these have no images to fit probes on: {_some(classes.unfitted)}"
    return f"{reason}: {_label_more(by_group)}"


def _label_more(by_group: bool) -> str:
    return "label images of more groups" if by_group else "label more images"


def _counts(names: NDArray[np.str_], sizes: NDArray[np.intp], chosen: NDArray[np.bool_]) -> dict[str, int]:
    return {str(name): int(size) for name, size in zip(names[chosen], sizes[chosen], strict=True)}


def _some(few: dict[str, int]) -> str:
    """The first few names with their counts."""
    words = [f"{name!r} ({size})" for name, size in few.items()]
    return first_few(words, _NAMED)


def _fewest_groups(truth: NDArray[np.str_], group_of: NDArray[np.intp]) -> int:
    """How many groups the class with the fewest has."""
    return int(np.bincount(Cells.of(group_of, codes(truth)).classes).min())


def _groups_to_call_it_the_same(truth: NDArray[np.str_], group_of: NDArray[np.intp]) -> int:
    """How many groups like these are needed for unseen harmed groups to shift the result by at most SAME_WITHIN.

    More if some groups hold most of the images.
    """
    cells = Cells.of(group_of, codes(truth))
    images = cells.images_of_class()
    weights = np.bincount(cells.groups, cells.counts / images[cells.classes]) / len(images)
    unevenness = np.count_nonzero(weights) * np.square(weights).sum()
    return round(float(unevenness) * RULE_OF_THREE * _PLAUSIBLE_GROUP_LOSS / SAME_WITHIN)
