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
_UNSEEN = 3.0
"""Rule of three: what happened to none of N images may still happen to 3 of N (95 %). No interval is narrower."""
_STUDENT = 1.21
"""A spread known from n groups alone widens the interval by 1 + this / (n - 1): Student's t to first order, (z² + 1) / 4."""
_SWING = 0.3
"""How far a group that adaptation harms may plausibly fall."""
_NAMED = 3
NO_LABELS = (
    "without labels nobody can tell whether adaptation helped; put a few hundred images into class folders "
    "and compare start and adapted embeddings with a linear probe before you switch"
)
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
    low, high   its 95 % interval, by paired bootstrap over the N held-out images (where there are groups: over those, as
                wholes); at least 3 / N to either side, more where classes differ in size

    The interval knows nothing of what none of the groups shows: 3 in G may fall by 0.3 and all be missing among G. "same"
    therefore needs so many groups that these would make no more than SAME_WITHIN: 90 of even weight. "better" and "worse"
    rest on what was seen, by the interval alone.
    """

    word: Literal["better", "same", "worse", "cannot tell"]
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


class Comparison(Frozen):
    """Before and after adaptation, on images never trained on. Scores are None without labels.

    n_train     images that the probes were fitted on
    n_held_out  images that scores and verdict speak of: without those of classes that the verdict leaves out
    """

    before: Scores | None
    after: Scores | None
    verdict: Verdict
    n_train: int
    n_held_out: int


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

    groups        a name for each held-out image: images of one group (a patient, a scene) are no independent witnesses,
                  and are resampled together, and few groups cannot show that nothing changes. None: every image is its own.
    train_labels  those of the images that the probes were fitted on; None: they are of the held-out images' classes

    Classes of fewer than FEWEST_PER_CLASS held-out images (groups), or of none to fit on, are left out and named, where two
    others are left. Where they are not, nobody can tell: one class's recall is no accuracy.
    """
    truth = np.asarray(held_out_labels)
    fitted = truth if train_labels is None else np.asarray(train_labels)
    group_of = numbered(groups, len(truth))
    unit = "images" if groups is None else "groups"
    names = np.union1d(truth, fitted)
    class_of = np.searchsorted(names, truth)
    sizes = np.bincount(np.unique(np.stack([class_of, group_of]), axis=1)[0], minlength=len(names))
    is_fitted, is_few = np.isin(names, fitted), sizes < FEWEST_PER_CLASS
    enough = is_fitted & ~is_few
    left_out = _LeftOut(_counts(names, sizes, is_few), _counts(names, sizes, ~is_fitted & ~is_few), unit)
    can_judge = enough.sum() >= 2
    if can_judge and not enough.all():
        judged = enough[class_of]
        truth, group_of = truth[judged], group_of[judged]
        before, after = (_measurement(measured.right[:, judged], truth) for measured in (before, after))
    gain = (after.right.astype(np.float64) - before.right).mean(axis=0)
    difference, low, high = _bootstrap(gain, truth, group_of)
    if can_judge:
        n_groups, needed = len(np.unique(group_of)), _groups_to_call_it_the_same(truth, group_of)
        verdict = _judge(difference, low, high, left_out, n_groups, needed)
    else:
        verdict = _too_few(difference, np.unique(truth), left_out)
    return Comparison(before=before.scores, after=after.scores, verdict=verdict, n_train=n_train, n_held_out=len(truth))


def no_labels(n_train: int, n_held_out: int, reason: str = NO_LABELS) -> Comparison:
    """The honest comparison without labels that serve: label-free signals rise in harmful runs too."""
    return Comparison(
        before=None,
        after=None,
        verdict=Verdict(word="cannot tell", reason=reason),
        n_train=n_train,
        n_held_out=n_held_out,
    )


class _LeftOut(NamedTuple):
    """Classes that cannot be judged, with their held-out images (groups, if `unit` says so)."""

    few: dict[str, int]
    unfitted: dict[str, int]
    unit: str

    def __str__(self) -> str:
        text = f"; classes of fewer than {FEWEST_PER_CLASS} held-out {self.unit} are left out: {_some(self.few)}"
        more = f"; classes without images to fit probes on are left out: {_some(self.unfitted)}"
        return (text if self.few else "") + (more if self.unfitted else "")


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
            f"{n_groups} groups are too few to call it the same, as all that it harms may be missing among them: label "
            f"images of more, until about {needed} are held out"
        )  # fmt: skip
    else:
        more = "label more images" if unit == "images" else "label images of more groups"
        word, advice = "cannot tell", f"the interval holds 0: {more}, or train longer, before you switch"
    return Verdict(word=word, reason=f"{points}; {advice}{left_out}", difference=difference, low=low, high=high)


def _too_few(difference: float, held_out: NDArray[np.str_], left_out: _LeftOut) -> Verdict:
    """Resampling one or two images a class says nothing of their spread, and one class nothing of telling it from another."""
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
    """How many groups like these make what may be missing among them small: more where some have most of the images."""
    counts = in_cells(group_of, np.unique(truth, return_inverse=True)[1], np.ones(len(truth)))
    weights = (counts / counts.sum(axis=0)).mean(axis=1)
    unevenness = np.count_nonzero(weights) * np.square(weights).sum()
    return round(float(unevenness) * _UNSEEN * _SWING / SAME_WITHIN)


def _bootstrap(
    gain: NDArray[np.float64], truth: NDArray[np.str_], group_of: NDArray[np.intp]
) -> tuple[float, float, float]:
    """Class-balanced mean of `gain` [N] and its 95 % interval, resampling whole groups (one-image ones: images).

    Groups are drawn within each class; all together where one has images of several classes, whose gains then hang
    together. Resampling alone says "better" of 15 in 100 pairs that are alike on 3 images a class. Each class's spread
    is taken as of n - 1 groups, and the rule of three is the least: at most 8 in 100 then, over 2 to 10 classes of 3 to 30;
    over 8 to 60 groups, each moved by chance, 2 to 8.
    """
    random = np.random.default_rng(0)
    class_of = np.unique(truth, return_inverse=True)[1]
    counts, sums = in_cells(group_of, class_of, np.ones(len(gain))), in_cells(group_of, class_of, gain)
    images, n_classes = counts.sum(axis=0), counts.shape[1]
    difference = float((sums.sum(axis=0) / images).mean())
    if (counts > 0).sum(axis=1).max() == 1:
        parts = [[column] for column in range(n_classes)]
    else:
        parts = [list(range(n_classes))]
    strays = [_strays(counts[:, columns], sums[:, columns], random) for columns in parts]
    low, high = difference + np.quantile(np.concatenate(strays).mean(axis=0), [0.025, 0.975])
    least = _UNSEEN * sum((1 / images).tolist()) / n_classes**2
    return difference, max(-1.0, min(low, difference - least)), min(1.0, max(high, difference + least))


def _strays(counts: NDArray[np.float64], sums: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """How far each class's mean over resampled groups strays from its own, unbiased in variance, [classes, resamples].

    counts, sums  images and their gains, [groups, classes]; groups without images are not drawn, and a class that a
                  resample misses does not stray in it
    """
    present = counts.any(axis=1)
    counts, sums, n = counts[present], sums[present], int(present.sum())
    drawn = random.integers(0, n, (_RESAMPLES, n)) + n * np.arange(_RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=n * _RESAMPLES).reshape(_RESAMPLES, n).astype(np.float64)
    images, mean = times @ counts, sums.sum(axis=0) / counts.sum(axis=0)
    means = np.divide(times @ sums, images, out=np.tile(mean, (_RESAMPLES, 1)), where=images > 0)
    groups = (counts > 0).sum(axis=0)
    wider = np.sqrt(groups / np.maximum(1, groups - 1))
    if counts.sum() > n:
        wider *= 1 + _STUDENT / np.maximum(1, groups - 1)
    strays: NDArray[np.float64] = ((means - mean) * wider).T
    return strays
