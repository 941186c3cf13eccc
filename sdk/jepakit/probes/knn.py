"""`KNNProbe`: k nearest neighbours."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._checks import is_whole
from jepakit._vectors import unit_length
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError
from jepakit.probes.given import Floats, check_class_weight
from jepakit.probes.probe import Probe

_TEMPERATURE = 0.07
_PAIRS = 1 << 24
"""Most similarities computed at a time; each takes 16 bytes, including its sort index."""


class KNNProbe(Probe):
    """k nearest neighbours by cosine similarity, each voting with weight exp(similarity / 0.07) (as DINO does).

    k             number of neighbours; with fewer training vectors, all of them vote. If several tie for k-th place, which of them
                  votes depends on their order
    class_weight  "balanced" divides each vote by how many training vectors its class has; None leaves votes as they are

    Once fitted, on N vectors of D numbers and K classes:

    classes_   [K], sorted, of the labels' own type
    vectors_   float32 [N, D], of length 1
    targets_   int [N], the index of each vector's class in `classes_`
    model_id_  id of the vector space; None if fitted on plain arrays
    """

    kind = "knn"
    vectors_: NDArray[np.float32]
    targets_: NDArray[np.intp]

    def __init__(self, *, k: int = 20, class_weight: Literal["balanced"] | None = None) -> None:
        self.k = k
        self.class_weight = class_weight

    def fit(self, X: Embeddings | ArrayLike, y: ArrayLike | None = None) -> Self:
        """Remember `Embeddings` with labels, or vectors [N, D] and labels [N].

        Raises ConfigError for a wrong k or class_weight, DataError without labels, for a single class or for numbers that are
        not finite.
        """
        vectors, classes, targets = self._examples(X, y)
        self._keep(X, vectors, classes)
        self.vectors_, self.targets_ = unit_length(vectors).astype(np.float32), targets
        return self

    @property
    def n_features_in_(self) -> int:
        return int(self.vectors_.shape[1])

    def _shares(self, vectors: Floats) -> Floats:
        self._check_params()  # k may have been set since `fit` and, unlike C, is used here
        queries = unit_length(vectors).astype(np.float32)
        k = min(self.k, len(self.vectors_))
        step = min(1024, max(1, _PAIRS // len(self.vectors_)))
        shares = [self._votes(queries[start : start + step], k) for start in range(0, len(queries), step)]
        return np.concatenate(shares) if shares else np.zeros((0, len(self.classes_)))

    def _votes(self, queries: NDArray[np.float32], k: int) -> Floats:
        away = -queries @ self.vectors_.T
        nearest = np.argpartition(away, k - 1, axis=1)[:, :k]
        weights = np.exp((-np.take_along_axis(away, nearest, axis=1) - 1) / _TEMPERATURE).astype(np.float64)
        weights *= self._importance(self.targets_)[nearest]
        votes = np.zeros((len(queries), len(self.classes_)))
        np.add.at(votes, (np.arange(len(queries))[:, None], self.targets_[nearest]), weights)
        shares: Floats = votes / votes.sum(axis=1, keepdims=True)
        return shares

    def _check_params(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ConfigError(f"k = {self.k!r}: give a whole number of neighbours, 1 or more")
        check_class_weight(self.class_weight)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"vectors": self.vectors_, "targets": self.targets_}

    def _restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.vectors_, self.targets_ = arrays["vectors"], arrays["targets"]
        fits = self.vectors_.ndim == 2 and self.targets_.shape == (len(self.vectors_),) and len(self.vectors_)
        if not fits or not 0 <= self.targets_.min() <= self.targets_.max() < len(self.classes_):
            raise ValueError("its arrays do not fit together")
