"""Did adaptation help? Arrays in, numbers and a plain verdict out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from jepakit.probes import KNNProbe, LinearProbe

_RESAMPLES = 2000
_UNSEEN = 3.0
"""Rule of three: what happened to none of N images may still happen to 3 of N (95 %). No interval is narrower."""
NO_LABELS = (
    "without labels nobody can tell whether adaptation helped; put a few hundred images into class folders "
    "and compare start and adapted embeddings with a linear probe before you switch"
)
SAME_WITHIN = 0.01
FEWEST_PER_CLASS = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scores(_Frozen):
    """Accuracy, 0 to 1, of probes fitted on training images and judged on held-out ones."""

    linear: float
    linear_balanced: float
    knn: float
    knn_balanced: float


class Verdict(_Frozen):
    """Which embeddings to keep.

    difference  after minus before, in balanced accuracy (mean of linear probe and k-NN), -1 to 1
    low, high   its 95 % interval, by paired bootstrap over the held-out images; at least 3 / N to either side
    """

    word: Literal["better", "same", "worse", "cannot tell"]
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


class Comparison(_Frozen):
    """Before and after adaptation, on images never trained on. Scores are None without labels."""

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
) -> Measurement:
    """Fit a linear probe and a k-NN on `train` [N, D], judge them on `held_out` [M, D]."""
    truth = np.asarray(held_out_labels)
    linear = LinearProbe().fit(train, train_labels).predict(held_out) == truth
    knn = KNNProbe().fit(train, train_labels).predict(held_out) == truth
    scores = Scores(
        linear=linear.mean(),
        linear_balanced=_balanced(linear, truth),
        knn=knn.mean(),
        knn_balanced=_balanced(knn, truth),
    )
    return Measurement(scores, np.stack([linear, knn]))


def compare(before: Measurement, after: Measurement, held_out_labels: ArrayLike, *, n_train: int) -> Comparison:
    """Judge `after` against `before`, both measured on the same held-out images in the same order."""
    truth = np.asarray(held_out_labels)
    gain = (after.right.astype(np.float64) - before.right).mean(axis=0)
    difference, low, high = _bootstrap(gain, truth)
    fewest = int(np.unique(truth, return_counts=True)[1].min())
    verdict = _judge(difference, low, high) if fewest >= FEWEST_PER_CLASS else _too_few(fewest, difference)
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


def _judge(difference: float, low: float, high: float) -> Verdict:
    points = f"{100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    word: Literal["better", "same", "worse", "cannot tell"]
    if low > 0:
        word, advice = "better", "keep the adapted backbone"
    elif high < 0:
        word, advice = "worse", "keep the original (`jepakit export RUN --which start`)"
    elif low >= -SAME_WITHIN and high <= SAME_WITHIN:
        word, advice = "same", "either will do; the original is the simpler choice"
    else:
        word, advice = (
            "cannot tell",
            "the interval holds 0: label more images, or train longer, before you switch",
        )
    return Verdict(word=word, reason=f"{points}; {advice}", difference=difference, low=low, high=high)


def _too_few(fewest: int, difference: float) -> Verdict:
    """Resampling one or two images a class says nothing of their spread."""
    reason = f"a class has {fewest} held-out images, {FEWEST_PER_CLASS} is the least to judge by: label more images"
    return Verdict(word="cannot tell", reason=reason, difference=difference)


def _balanced(right: NDArray[np.bool_], truth: NDArray[np.str_]) -> float:
    return float(np.mean([right[truth == name].mean() for name in np.unique(truth)]))


def _bootstrap(gain: NDArray[np.float64], truth: NDArray[np.str_]) -> tuple[float, float, float]:
    """Class-balanced mean of `gain` [N] and its 95 % interval, resampling images within each class.

    Resampling alone says "better" of 15 in 100 pairs that are alike on 3 images a class. Each class's spread is taken
    as of n - 1 images, and the rule of three is the least: at most 8 in 100 then, over 2 to 10 classes of 3 to 30.
    """
    random = np.random.default_rng(0)
    by_class = [gain[truth == name] for name in np.unique(truth)]
    difference = float(np.mean([values.mean() for values in by_class]))
    strays = np.mean([_strays(values, random) for values in by_class], axis=0)
    low, high = difference + np.quantile(strays, [0.025, 0.975])
    least = _UNSEEN * sum(1 / len(values) for values in by_class) / len(by_class) ** 2
    return difference, max(-1.0, min(low, difference - least)), min(1.0, max(high, difference + least))


def _strays(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """How far the mean of resampled `values` [n] strays from theirs, unbiased in variance, [resamples]."""
    means = values[random.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    strays: NDArray[np.float64] = (means - values.mean()) * np.sqrt(len(values) / max(1, len(values) - 1))
    return strays
