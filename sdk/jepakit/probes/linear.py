"""`LinearProbe`: multinomial logistic regression."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._checks import is_number, is_whole
from jepakit._groups import assign_folds, groups_of_class, image_of, numbered
from jepakit._progress import Steps
from jepakit._vectors import AT_A_TIME, blocks
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError
from jepakit.probes.given import Floats, check_class_weight
from jepakit.probes.logistic import cross_entropy, fit_logistic, softmax
from jepakit.probes.probe import Probe

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# A dimension is constant if its standard deviation is below this share of its largest value, or of most dimensions'.
_ROUNDING, _ROUNDING_OF_ALL = 1e-4, 1e-6


class LinearProbe(Probe):
    """Multinomial logistic regression with an L2 penalty on standardised vectors.

    C             inverse of the penalty's strength, as in scikit-learn. None chooses from 0.001 … 10 by stratified
                  cross-validation on the training vectors: the best balanced accuracy, ties going to the lowest
                  cross-entropy. A group counts for its commonest class; without groups, each image is one. There are 5
                  folds, or fewer: as many as the commonest class has groups, or as there are groups if no class has
                  two; a rarer class is in only as many folds as it has groups. C is 1.0 if fewer than two classes have
                  two groups: cross-validation could not choose
    seed          random seed of the folds, 0 or more
    class_weight  as in scikit-learn: "balanced" gives every class the same weight in the fit, so that a vector weighs
                  N / (K · vectors of its class); None gives every vector the same weight

    Once fitted, for vectors of D numbers and K classes:

    classes_          [K], sorted, of the labels' own type
    coef_             float64 [K, D], a row per class, also for two classes (where scikit-learn has one row)
    intercept_        float64 [K]
    mean_, std_       float64 [D]: `coef_` applies to (vectors - mean_) / std_
    C_                the C that was given or chosen
    cv_balanced_accuracy_  balanced accuracy of the chosen C in the cross-validation, 0 to 1; None if C was given or no
                      fold could tell. As the best of five it is slightly optimistic. A vector counts only if its
                      fold's probe was fitted on its class
    model_id_         id of the vector space; None if fitted on plain arrays
    """

    kind = "linear"
    coef_: Floats
    intercept_: Floats
    mean_: Floats
    std_: Floats
    C_: float
    cv_balanced_accuracy_: float | None

    def __init__(
        self, *, C: float | None = None, seed: int = 0, class_weight: Literal["balanced"] | None = None
    ) -> None:
        self.C = C
        self.seed = seed
        self.class_weight = class_weight

    def fit(self, X: Embeddings | ArrayLike, y: ArrayLike | None = None, *, groups: ArrayLike | None = None) -> Self:
        """Fit on `Embeddings` with labels, or on vectors [N, D] and labels [N].

        groups  the name of each vector's group (a patient, a scene), [N]; a group stays in one fold. None: if `X` is
                `Embeddings`, the tiles and frames of an image form a group

        Raises ConfigError for a wrong C, seed or class_weight; DataError without labels, for a single class, for numbers that
        are not finite, or for groups that do not fit.
        """
        vectors, classes, targets = self._examples(X, y)
        if groups is None and isinstance(X, Embeddings):
            groups = tuple(map(image_of, X.ids))
        group_of = numbered(groups, len(vectors))
        if isinstance(X, Embeddings):  # by name, so that the same images give the same probe in any order
            order = sorted(range(len(X)), key=X.ids.__getitem__)
            vectors, targets, group_of = vectors[order], targets[order], numbered(group_of[order], len(order))
        C, self.cv_balanced_accuracy_ = self._choose_c(vectors, targets, group_of) if self.C is None else (self.C, None)
        mean, std = vectors.mean(axis=0), _safe_std(vectors)
        weights = fit_logistic(_standardized(vectors, mean, std), targets, C, importance=self._importance(targets))
        self._keep(X, vectors, classes)
        self.C_, self.mean_, self.std_, self.coef_, self.intercept_ = C, mean, std, weights[:-1].T, weights[-1]
        return self

    @property
    def n_features_in_(self) -> int:
        return len(self.mean_)

    def _shares(self, vectors: Floats) -> Floats:
        return softmax(_standardized(vectors, self.mean_, self.std_) @ self.coef_.T + self.intercept_)

    def _choose_c(
        self, vectors: Floats, targets: NDArray[np.intp], groups: NDArray[np.intp]
    ) -> tuple[float, float | None]:
        """The chosen C and its balanced accuracy in cross-validation."""
        n_classes = int(targets.max()) + 1
        spread = groups_of_class(groups, targets, n_classes)
        if (spread >= 2).sum() < 2:
            return 1.0, None
        fold_of = assign_folds(groups, targets, 5, np.random.default_rng(self.seed))
        n_folds = int(fold_of.max()) + 1
        right, missed = np.zeros((len(C_GRID), n_classes), np.intp), np.zeros(len(C_GRID))
        n_judged = np.zeros(n_classes, np.intp)
        with Steps(n_folds * len(C_GRID), what="fit", progress=len(vectors) > AT_A_TIME) as bar:
            for fold in range(n_folds):
                held_out = fold_of == fold
                train, test = vectors[~held_out], vectors[held_out]
                of_train, truth = targets[~held_out], targets[held_out]
                mean, std = train.mean(axis=0), _safe_std(train)
                train, test = _standardized(train, mean, std), _standardized(test, mean, std)
                fitted = np.isin(truth, of_train)
                n_judged += np.bincount(truth[fitted], minlength=n_classes)
                weights, importance = None, self._importance(of_train)
                for i, C in enumerate(C_GRID):
                    weights = fit_logistic(
                        train, of_train, C, importance=importance, start=weights, n_classes=n_classes
                    )
                    is_right, of_own = _tested(weights, test, truth)
                    right[i] += np.bincount(truth[is_right], minlength=n_classes)
                    # The low probability of a class that the fold was not fitted on says nothing about C.
                    missed[i] += of_own[fitted].sum()
                    bar.update(fold * len(C_GRID) + i + 1)
        # Rounded, as equal sums may differ in the last bit.
        balanced = (right / np.bincount(targets)).mean(axis=1).round(9)
        best = int(np.where(balanced == balanced.max(), missed, np.inf).argmin())
        judged = n_judged > 0
        return C_GRID[best], float((right[best, judged] / n_judged[judged]).mean())

    def _check_params(self) -> None:
        if self.C is not None and (not is_number(self.C) or not 0 < self.C < np.inf):
            raise ConfigError(f"C = {self.C!r}: give a number above 0, or None to choose it by cross-validation")
        if not is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"seed = {self.seed!r}: give a whole number, 0 or more")
        check_class_weight(self.class_weight)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "coef": self.coef_.T,
            "intercept": self.intercept_,
            "mean": self.mean_,
            "std": self.std_,
            "C": np.array(self.C_),
            "cv_balanced_accuracy": np.array(
                np.nan if self.cv_balanced_accuracy_ is None else self.cv_balanced_accuracy_
            ),
        }

    def _restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.coef_, self.intercept_ = arrays["coef"].T, arrays["intercept"]
        self.mean_, self.std_, self.C_ = arrays["mean"], arrays["std"], float(arrays["C"].item())
        judged = float(arrays.get("cv_balanced_accuracy", np.array(np.nan)).item())
        self.cv_balanced_accuracy_ = None if np.isnan(judged) else judged
        shape = (len(self.classes_), len(self.mean_))
        if self.coef_.shape != shape or self.intercept_.shape != shape[:1] or self.std_.shape != self.mean_.shape:
            raise ValueError("its arrays do not fit together")


def _tested(weights: Floats, vectors: Floats, truth: NDArray[np.intp]) -> tuple[NDArray[np.bool_], Floats]:
    """Whether logistic weights are right about each standardised vector, and its cross-entropy, [N] each."""
    is_right, of_own = np.empty(len(vectors), np.bool_), np.empty(len(vectors))
    for block in blocks(len(vectors), AT_A_TIME):
        logits = vectors[block] @ weights[:-1] + weights[-1]
        is_right[block] = logits.argmax(axis=1) == truth[block]
        of_own[block] = cross_entropy(logits, truth[block])
    return is_right, of_own


def _standardized(vectors: Floats, mean: Floats, std: Floats) -> Floats:
    """(vectors - mean) / std, with one array of their size at a time."""
    result: Floats = vectors - mean
    result /= std
    return result


def _safe_std(vectors: Floats) -> Floats:
    """The divisor of each of D dimensions, [D]: its standard deviation or, if constant, a large value of the others.

    Varying by no more than float32's rounding counts as constant: division would blow it up, and other providers round
    differently. Rounding is judged against a value that nine in ten dimensions stay below, so that a single huge one,
    such as a file size appended to an embedding, does not make the others look constant.
    """
    std, peaks = vectors.std(axis=0), np.maximum(vectors.max(axis=0), -vectors.min(axis=0))
    largest = np.quantile(peaks[peaks > 0], 0.9, method="lower") if peaks.any() else 0.0
    constant = std <= np.maximum(_ROUNDING * peaks, _ROUNDING_OF_ALL * largest)
    return np.where(constant, largest or 1.0, std)
