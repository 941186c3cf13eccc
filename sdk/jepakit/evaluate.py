"""Did adaptation help? Arrays in, numbers and a plain verdict out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._frozen import Frozen
from jepakit._groups import in_cells, numbered
from jepakit._messages import first_few
from jepakit.probes import KNNProbe, LinearProbe

_RESAMPLES = 2000
_RULE_OF_THREE = 3.0
"""What happened to none of N images may still happen to 3 in N of all (95 %)."""
_STUDENT_WIDENING = 1.21
"""A spread that is known from n groups alone widens the interval by 1 + this / (n - 1): (z² + 1) / 4 at 95 %."""
_PLAUSIBLE_GROUP_LOSS = 0.3
"""How much accuracy a group that adaptation harms may plausibly lose."""
_NAMED = 3
NO_LABELS = (
    "without labels nobody can tell whether adaptation helped; put a few hundred images into class folders "
    "and compare start and adapted embeddings with a linear probe before you switch"
)
_SCORES = {
    "linear": "linear probe",
    "knn": "k-NN",
    "linear_balanced": "linear, balanced",
    "knn_balanced": "k-NN, balanced",
}
SAME_WITHIN = 0.01
FEWEST_PER_CLASS = 3
"""Held-out images of a class, or groups where there are some. A class of fewer is left out of the verdict."""


class Scores(Frozen):
    """Accuracy, 0 to 1, of probes fitted on training images and judged on held-out ones."""

    linear: float
    linear_balanced: float
    knn: float
    knn_balanced: float


class Verdict(Frozen):
    """Which embeddings to keep.

    difference  after minus before, in balanced accuracy (mean of linear probe and k-NN), -1 to 1
    low, high   its 95 % interval, by paired bootstrap over the N held-out images, or over whole groups where there are
                some; at least 3 / N to either side, more where classes differ in size

    A harmed group that happens not to be held out cannot show. By the rule of three, up to 3/G of all groups may be harmed
    without one of them among the G held out. "same" is said only if that could shift the result by at most SAME_WITHIN:
    from 90 groups of equal size, assuming that a harmed group loses 0.3. "better" and "worse" rest on what was seen, by the
    interval alone.
    """

    word: Literal["better", "same", "worse", "cannot tell"]
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


class Comparison(Frozen):
    """Before and after adaptation, on images never trained on. Scores are None without labels. Print it for a table.

    n_train     images that the probes were fitted on
    n_held_out  images that the scores and the verdict are about, without those of classes that the verdict leaves out
    """

    before: Scores | None
    after: Scores | None
    verdict: Verdict
    n_train: int
    n_held_out: int

    def __str__(self) -> str:
        """The scores as a table, where there are some, then the verdict."""
        if self.before is None or self.after is None:
            return str(self.verdict)
        table = [
            f"{words:<16} {getattr(self.before, score):>6.1%}  {getattr(self.after, score):>6.1%}"
            for score, words in _SCORES.items()
        ]
        return "\n".join(["                 before   after   (held-out images)", *table, str(self.verdict)])


class Measurement(NamedTuple):
    """`scores`, and per held-out image whether the linear probe and the k-NN were right, bool [2, N]."""

    scores: Scores
    right: NDArray[np.bool_]


def measure(
    train: NDArray[np.float32],
    train_labels: ArrayLike,
    held_out: NDArray[np.float32],
    held_out_labels: ArrayLike,
    *,
    train_groups: ArrayLike | None = None,
) -> Measurement:
    """Fit a linear probe and a k-NN on `train` [N, D], judge them on `held_out` [M, D].

    train_groups  a name for each training image: the linear probe's folds keep a group on one side
    """
    truth = np.asarray(held_out_labels)
    linear = LinearProbe().fit(train, train_labels, groups=train_groups).predict(held_out) == truth
    knn = KNNProbe().fit(train, train_labels).predict(held_out) == truth
    return _measurement(np.stack([linear, knn]), truth)


def _measurement(right: NDArray[np.bool_], truth: NDArray[np.str_]) -> Measurement:
    linear, knn = right
    scores = Scores(
        linear=linear.mean(),
        linear_balanced=_balanced(linear, truth),
        knn=knn.mean(),
        knn_balanced=_balanced(knn, truth),
    )
    return Measurement(scores, right)


def compare(
    before: Measurement,
    after: Measurement,
    held_out_labels: ArrayLike,
    *,
    n_train: int,
    groups: ArrayLike | None = None,
    train_labels: ArrayLike | None = None,
) -> Comparison:
    """Judge `after` against `before`, both measured on the same held-out images in the same order.

    groups        a name for each held-out image: images of one group (a patient, a scene) are not independent, so they are
                  resampled together, and few groups cannot show that nothing changes. None: every image is its own group.
    train_labels  those of the images that the probes were fitted on; None: these were of the held-out images' classes

    Classes of fewer than FEWEST_PER_CLASS held-out images (groups), and those that the probes were not fitted on, are named
    and left out, as long as two others remain. Otherwise the verdict is "cannot tell": the recall of one class is no accuracy.
    """
    truth = np.asarray(held_out_labels)
    fitted = truth if train_labels is None else np.asarray(train_labels)
    group_of = numbered(groups, len(truth))
    can_judge, is_judged, left_out = _choose_classes(truth, fitted, group_of, "images" if groups is None else "groups")
    if not is_judged.all():
        truth, group_of = truth[is_judged], group_of[is_judged]
        before, after = (_measurement(measured.right[:, is_judged], truth) for measured in (before, after))
    gain = (after.right.astype(np.float64) - before.right).mean(axis=0)
    difference, low, high = _bootstrap(gain, truth, group_of)
    if can_judge:
        n_groups, needed = len(np.unique(group_of)), _groups_to_call_it_the_same(truth, group_of)
        verdict = _judge(difference, low, high, left_out, n_groups, needed)
    else:
        verdict = _too_few(difference, np.unique(truth), left_out)
    return Comparison(before=before.scores, after=after.scores, verdict=verdict, n_train=n_train, n_held_out=len(truth))


def no_labels(n_train: int, n_held_out: int, reason: str = NO_LABELS) -> Comparison:
    """The comparison where labels are missing or of no use: measures without labels rise in harmful runs too."""
    return Comparison(
        before=None,
        after=None,
        verdict=Verdict(word="cannot tell", reason=reason),
        n_train=n_train,
        n_held_out=n_held_out,
    )


class _LeftOut(NamedTuple):
    """Classes that cannot be judged, with the number of their held-out images (groups, if `unit` says so)."""

    few: dict[str, int]
    unfitted: dict[str, int]
    unit: str

    def __str__(self) -> str:
        text = f"; classes of fewer than {FEWEST_PER_CLASS} held-out {self.unit} are left out: {_some(self.few)}"
        more = f"; classes without images to fit probes on are left out: {_some(self.unfitted)}"
        return (text if self.few else "") + (more if self.unfitted else "")


class _Choice(NamedTuple):
    """Whether two classes can be judged, bool [N] of the held-out images that are, and the classes left out.

    Where fewer than two can, nothing is left out of the images.
    """

    can_judge: bool
    is_judged: NDArray[np.bool_]
    left_out: _LeftOut


def _choose_classes(
    truth: NDArray[np.str_], fitted: NDArray[np.str_], group_of: NDArray[np.intp], unit: str
) -> _Choice:
    """The classes to judge, of the held-out images' labels `truth` [N] and the labels `fitted` that the probes have seen."""
    names = np.union1d(truth, fitted)
    class_of = np.searchsorted(names, truth)
    sizes = np.bincount(np.unique(np.stack([class_of, group_of]), axis=1)[0], minlength=len(names))
    is_fitted, is_few = np.isin(names, fitted), sizes < FEWEST_PER_CLASS
    enough = is_fitted & ~is_few
    can_judge = bool(enough.sum() >= 2)
    left_out = _LeftOut(_counts(names, sizes, is_few), _counts(names, sizes, ~is_fitted & ~is_few), unit)
    return _Choice(can_judge, enough[class_of] if can_judge else np.ones(len(truth), bool), left_out)


def _judge(difference: float, low: float, high: float, left_out: _LeftOut, n_groups: int, needed: int) -> Verdict:
    unit = left_out.unit
    over = " over groups" if unit == "groups" else ""
    points = f"{100 * difference:+.1f} points (95 % interval{over} {100 * low:+.1f} to {100 * high:+.1f})"
    word: Literal["better", "same", "worse", "cannot tell"]
    within = low >= -SAME_WITHIN and high <= SAME_WITHIN
    if low > 0:
        word, advice = "better", "keep the adapted backbone"
    elif high < 0:
        word, advice = "worse", "keep the original (`jepakit export RUN --which start`)"
    elif within and n_groups >= needed:
        word, advice = "same", "either will do; the original is the simpler choice"
    elif within:
        word, advice = "cannot tell", (
            f"{n_groups} groups are too few to call it the same, as the groups that it harms may all be missing among them: "
            f"label images of more groups, until about {needed} are held out"
        )  # fmt: skip
    else:
        more = "label more images" if unit == "images" else "label images of more groups"
        word, advice = "cannot tell", f"the interval holds 0: {more}, or train longer, before you switch"
    return Verdict(word=word, reason=f"{points}; {advice}{left_out}", difference=difference, low=low, high=high)


def _too_few(difference: float, held_out: NDArray[np.str_], left_out: _LeftOut) -> Verdict:
    """One or two images a class say nothing about their spread, and one class nothing about telling it from another."""
    few, unfitted, unit = left_out
    alone = f"only class {str(held_out[0])!r} is held out; " if len(held_out) == 1 else ""
    fewer = f", and these have fewer: {_some(few)}" if few else ""
    none = f"; these have no images to fit probes on: {_some(unfitted)}" if unfitted else ""
    reason = (
        f"{alone}two classes of {FEWEST_PER_CLASS} held-out {unit} are the least to judge by{fewer}{none}: "
        f"label {'more images' if unit == 'images' else 'images of more groups'}"
    )
    return Verdict(word="cannot tell", reason=reason, difference=difference)


def _counts(names: NDArray[np.str_], sizes: NDArray[np.intp], chosen: NDArray[np.bool_]) -> dict[str, int]:
    return {str(name): int(size) for name, size in zip(names[chosen], sizes[chosen], strict=True)}


def _some(few: dict[str, int]) -> str:
    """The first names with their numbers."""
    words = [f"{name!r} ({size})" for name, size in few.items()]
    return first_few(words, _NAMED)


def _balanced(right: NDArray[np.bool_], truth: NDArray[np.str_]) -> float:
    return float(np.mean([right[truth == name].mean() for name in np.unique(truth)]))


def _groups_to_call_it_the_same(truth: NDArray[np.str_], group_of: NDArray[np.intp]) -> int:
    """How many groups like these it takes until those that may be missing could shift the result by SAME_WITHIN at most.

    More where some groups hold most of the images.
    """
    counts = in_cells(group_of, np.unique(truth, return_inverse=True)[1], np.ones(len(truth)))
    weights = (counts / counts.sum(axis=0)).mean(axis=1)
    unevenness = np.count_nonzero(weights) * np.square(weights).sum()
    return round(float(unevenness) * _RULE_OF_THREE * _PLAUSIBLE_GROUP_LOSS / SAME_WITHIN)


def _bootstrap(
    gain: NDArray[np.float64], truth: NDArray[np.str_], group_of: NDArray[np.intp]
) -> tuple[float, float, float]:
    """Class-balanced mean of `gain` [N] and its 95 % interval: (mean, low, high).

    Whole groups (single images, where there are no groups) are resampled, within each class, or all together if a group
    spans classes: its gains are then correlated. The plain bootstrap is too narrow for small n, so

    1. each class's spread is scaled by √(n / (n - 1));
    2. where groups hold several images, also by 1 + 1.21 / (n - 1), Student's t to first order;
    3. the interval is never narrower than the rule of three.

    With no true difference the plain bootstrap says "better" in 15 of 100 runs at 3 images a class, the corrected one in at
    most 8 (2 to 10 classes of 3 to 30 images); over 8 to 60 groups, each moved by chance, in 2 to 8.
    """
    random = np.random.default_rng(0)
    class_of = np.unique(truth, return_inverse=True)[1]
    counts, sums = in_cells(group_of, class_of, np.ones(len(gain))), in_cells(group_of, class_of, gain)
    images, n_classes = counts.sum(axis=0), counts.shape[1]
    difference = float((sums.sum(axis=0) / images).mean())
    a_group_spans_classes = (counts > 0).sum(axis=1).max() > 1
    drawn_together = [list(range(n_classes))] if a_group_spans_classes else [[column] for column in range(n_classes)]
    deviations = [_deviations(counts[:, columns], sums[:, columns], random) for columns in drawn_together]
    low, high = difference + np.quantile(np.concatenate(deviations).mean(axis=0), [0.025, 0.975])
    least = _RULE_OF_THREE * sum((1 / images).tolist()) / n_classes**2
    return difference, max(-1.0, min(low, difference - least)), min(1.0, max(high, difference + least))


def _deviations(
    counts: NDArray[np.float64], sums: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    """How far each class's mean over resampled groups lies from its own, unbiased in variance, [classes, resamples].

    counts, sums  images and their gains, [groups, classes]; groups without images are not drawn, and a class that a
                  resample misses does not deviate in it
    """
    present = counts.any(axis=1)
    counts, sums, n = counts[present], sums[present], int(present.sum())
    drawn = random.integers(0, n, (_RESAMPLES, n)) + n * np.arange(_RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=n * _RESAMPLES).reshape(_RESAMPLES, n).astype(np.float64)
    images, mean = times @ counts, sums.sum(axis=0) / counts.sum(axis=0)
    means = np.divide(times @ sums, images, out=np.tile(mean, (_RESAMPLES, 1)), where=images > 0)
    groups = (counts > 0).sum(axis=0)
    factor = np.sqrt(groups / np.maximum(1, groups - 1))
    if counts.sum() > n:
        factor *= 1 + _STUDENT_WIDENING / np.maximum(1, groups - 1)
    deviations: NDArray[np.float64] = ((means - mean) * factor).T
    return deviations
