"""Probes on frozen embeddings: scikit-learn's estimator interface, in numpy alone.

Hyper-parameters are stored untouched by `__init__`, `fit` returns self, learned values end in `_`, and
`get_params`/`set_params` let scikit-learn's tools clone a probe. A probe remembers the vector space it was
fitted on and refuses vectors of another. Files are safetensors: no pickle.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._checks import is_number, is_whole, refuse_masked
from jepakit._files import as_path, written
from jepakit._frozen import Printed
from jepakit._groups import as_given, assign_folds, groups_of_class, image_of, numbered
from jepakit._logistic import cross_entropy, fit_logistic, softmax
from jepakit._messages import first_few, lines_of
from jepakit._one_line import one_line
from jepakit._progress import Steps
from jepakit._vectors import AT_A_TIME, blocks, unit_length
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError, DataError, SpaceError

Floats = NDArray[np.float64]
Labels = NDArray[Any]

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# A dimension with a smaller deviation is constant: relative to its own largest value, and to that of most dimensions.
_ROUNDING, _ROUNDING_OF_ALL = 1e-4, 1e-6
_KNN_TEMPERATURE = 0.07
_KNN_PAIRS = 1 << 24
"""Most similarities computed at a time; each takes 16 bytes, including its sort index."""


@dataclass(frozen=True)
class ProbeReport(Printed):
    """How well a probe does. Accuracies are shares, 0 to 1; `balanced_accuracy` is the mean over classes.

    per_class    each class's accuracy, by its name
    n            vectors it was evaluated on
    n_fitted_on  how many of them equal a vector it was fitted on: results there say nothing about new images
    n_per_class  how many of them are of each class
    unknown      classes of the images that the probe does not know, so that it cannot be right about them
    """

    accuracy: float
    balanced_accuracy: float
    per_class: dict[str, float]
    n: int
    n_fitted_on: int = 0
    n_per_class: dict[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        whole, balanced = _percent(self.accuracy), _percent(self.balanced_accuracy)
        lines = [f"accuracy {whole}   balanced {balanced}   on {self.n} images"]
        if self.n_fitted_on:
            lines.append(
                f"warning: the probe was fitted on the vectors of {self.n_fitted_on} of these {self.n} images, so new ones will do "
                "worse: evaluate on others"
            )
        if self.unknown:
            n_unknown = sum(self.n_per_class[name] for name in self.unknown)
            lines.append(
                f"warning: {n_unknown} of these {self.n} images are of classes that the probe does not know, and count as wrong: "
                f"{one_line(first_few(self.unknown, 3))}"
            )
        names = {name: one_line(name) for name in self.per_class}
        width = max(map(len, names.values()))
        lines += [
            f"  {names[name]:<{width}}  {_percent(value):>6}{self._of(name, value)}"
            for name, value in self.per_class.items()
        ]
        return "\n".join(lines)

    def _of(self, name: str, share: float) -> str:
        """How many vectors of a class are right, of how many."""
        n = self.n_per_class.get(name, 0)
        return f"  ({round(share * n)} of {n})" if n else ""


def _percent(share: float) -> str:
    """A share in per cent, which is 100.0 % only if nothing is wrong."""
    return f"{min(share, 0.999 if share < 1 else 1.0):.1%}"


class _Probe(ABC):
    kind: ClassVar[str]
    class_weight: Literal["balanced"] | None
    classes_: Labels
    model_id_: str | None
    fitted_on_: NDArray[np.uint64]
    """[N], a digest of each vector it was fitted on."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The hyper-parameters by name (scikit-learn's contract)."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Set hyper-parameters by name (scikit-learn's contract)."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ConfigError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    @abstractmethod
    def fit(self, X: Embeddings | ArrayLike, y: ArrayLike | None = None) -> Self:
        """Fit on `Embeddings` with labels, or on vectors [N, D] and labels [N]."""

    def predict(self, X: Embeddings | ArrayLike) -> Labels:
        """The most probable class of each vector, [N], with the dtype of `classes_`.

        Like the other methods that take vectors, raises SpaceError for vectors of another model or length, and
        DataError before `fit` or for anything but finite numbers [N, D].
        """
        return self._predicted(self._checked(X))

    def predict_proba(self, X: Embeddings | ArrayLike) -> Floats:
        """Class probabilities (for k-NN, shares of the votes), float64 [N, classes], in the order of `classes_`."""
        return self._shares(self._checked(X))

    def score(self, X: Embeddings | ArrayLike, y: ArrayLike | None = None) -> float:
        """Accuracy, 0 to 1. A class that this probe does not know counts as missed, as in a fold of a grid search; if such
        are all, `evaluate` raises.

        Raises DataError for text where the classes are numbers, and the reverse.
        """
        _, right, truth = self._judged(X, y)
        if _is_text(truth) != _is_text(self.classes_):
            raise self._knows_none_of(truth)
        return float(right.mean())

    def evaluate(self, X: Embeddings | ArrayLike, y: ArrayLike | None = None) -> ProbeReport:
        """Accuracy, balanced accuracy and each class's accuracy on labelled vectors.

        Raises DataError when no label is a class of this probe: "1" is not 1, and "Cat" is not "cat".
        """
        vectors, right, truth = self._judged(X, y)
        names, class_of, counts = np.unique(truth, return_inverse=True, return_counts=True)
        unknown = sorted(set(names.tolist()).difference(self.classes_.tolist()), key=str)
        if len(unknown) == len(names):
            raise self._knows_none_of(truth)
        shares = np.bincount(class_of, right) / counts
        per_class = dict(zip(map(str, names), shares.tolist(), strict=True))
        balanced = float(np.mean(list(per_class.values())))
        n_fitted_on = int(np.isin(_digests(vectors), self.fitted_on_).sum())
        return ProbeReport(
            float(right.mean()),
            balanced,
            per_class,
            len(truth),
            n_fitted_on,
            dict(zip(per_class, counts.tolist(), strict=True)),
            tuple(map(str, unknown)),
        )

    def _importance(self, targets: NDArray[np.intp]) -> Floats:
        """The weight of each training vector, by its class's index in `targets`, [N]."""
        if self.class_weight is None:
            return np.ones(len(targets))
        counts = np.bincount(targets)
        importance: Floats = len(targets) / (np.count_nonzero(counts) * counts[targets])
        return importance

    def save(self, path: str | Path) -> None:
        """Write the fitted probe to one safetensors file; DataError before `fit`, WriteError if it cannot be written.

        The file holds a digest of each training vector: anyone with an image and the model can tell whether the probe
        was fitted on it.
        """
        from safetensors.numpy import save

        self._check_fitted()
        header = {
            "kind": self.kind,
            "params": self.get_params(),
            "classes": self.classes_.tolist(),
            "classes_dtype": None if _is_text(self.classes_) else self.classes_.dtype.str,
            "model_id": self.model_id_,
        }
        # In one entry: safetensors writes several in any order, and the same probe is to be the same bytes.
        metadata = {_HEADER: json.dumps(header, sort_keys=True, default=_plain_number)}
        path = as_path(path, "path")
        learned = {**self._arrays(), "fitted_on": self.fitted_on_}
        arrays = {name: np.ascontiguousarray(value) for name, value in learned.items()}
        with written(path) as file:
            file.write(save(arrays, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises DataError for another file or another kind of probe."""
        probe = load_probe(path)
        if not isinstance(probe, cls):
            raise DataError(f"{path} holds a {type(probe).__name__}, not a {cls.__name__}")
        return probe

    @abstractmethod
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The learned arrays by name, as `save` writes them."""

    @abstractmethod
    def _restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Restore what `_arrays` returned. Raises KeyError or ValueError for any other arrays."""

    @property
    @abstractmethod
    def n_features_in_(self) -> int:
        """Length of the vectors it was fitted on (scikit-learn's name)."""

    @abstractmethod
    def _shares(self, vectors: Floats) -> Floats:
        """`predict_proba` for vectors that have been checked."""

    def _predicted(self, vectors: Floats) -> Labels:
        places = np.empty(len(vectors), np.intp)
        with Steps(len(vectors), what="predict", progress=len(vectors) > AT_A_TIME) as bar:
            for block in blocks(len(vectors), AT_A_TIME):
                places[block] = self._shares(vectors[block]).argmax(axis=1)
                bar.update(block.stop)
        result: Labels = self.classes_[places]
        return result

    def _judged(self, X: Embeddings | ArrayLike, y: ArrayLike | None) -> tuple[Floats, NDArray[np.bool_], Labels]:
        """The vectors, whether the probe is right about each of them, and the labels."""
        vectors = self._checked(X)
        truth = _labels_of(X, y, len(vectors))
        if not len(truth):
            raise DataError("no vectors to evaluate on")
        return vectors, self._predicted(vectors) == truth, truth

    def _knows_none_of(self, truth: Labels) -> DataError:
        return DataError(
            f"none of the labels is a class of this probe: the labels are {_some(truth)}, its classes are {_some(self.classes_)}"
        )

    def _examples(self, X: Embeddings | ArrayLike, y: ArrayLike | None) -> tuple[Floats, Labels, NDArray[np.intp]]:
        """Vectors, classes, and each vector's class as an index; nothing is stored on the probe yet."""
        self._check_params()
        vectors = _vectors_of(X)
        classes, targets = np.unique(_labels_of(X, y, len(vectors)), return_inverse=True)
        if len(classes) < 2:
            raise DataError(f"a probe needs two classes or more, the labels hold {classes.tolist()}")
        return vectors, classes, targets

    @abstractmethod
    def _check_params(self) -> None:
        """Raise ConfigError for a hyper-parameter with a wrong value."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise DataError(f"this {type(self).__name__} is not fitted: call fit first")

    def _checked(self, X: Embeddings | ArrayLike) -> Floats:
        self._check_fitted()
        if isinstance(X, Embeddings) and self.model_id_ is not None and self.model_id_ != X.model_id:
            raise SpaceError(
                f"this probe was fitted on vectors of model {self.model_id_}, these are of {X.model_id}: "
                "fit it again, or embed with the model it was fitted on"
            )
        vectors = _vectors_of(X)
        if vectors.shape[1] != self.n_features_in_:
            raise SpaceError(
                f"this probe takes vectors of {self.n_features_in_} numbers, these have {vectors.shape[1]}"
            )
        return vectors


class LinearProbe(_Probe):
    """Multinomial logistic regression with an L2 penalty on standardised vectors.

    C             inverse of the penalty's strength, as in scikit-learn. None chooses from 0.001 … 10 by stratified
                  cross-validation on the training vectors: the best balanced accuracy, ties going to the lowest
                  cross-entropy. There are 5 folds, or as many as the commonest class has groups (images, without
                  groups; a group counts for its commonest class) if that is fewer, or as many as groups where no class
                  has two; a rarer class is in only as many folds as it has groups. 1.0 if fewer than two classes have
                  two groups, as no fold could tell
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
        self.classes_, self.model_id_, self.fitted_on_, self.C_ = classes, _space_of(X), _digests(vectors), C
        self.mean_, self.std_, self.coef_, self.intercept_ = mean, std, weights[:-1].T, weights[-1]
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
        _check_class_weight(self.class_weight)

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


class KNNProbe(_Probe):
    """k nearest neighbours by cosine similarity, each voting with weight exp(similarity / 0.07) (as DINO does).

    k             number of neighbours; with fewer training vectors, all of them vote. Ties for k-th place are decided by order
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
        self.classes_, self.model_id_, self.fitted_on_ = classes, _space_of(X), _digests(vectors)
        self.vectors_, self.targets_ = unit_length(vectors).astype(np.float32), targets
        return self

    @property
    def n_features_in_(self) -> int:
        return int(self.vectors_.shape[1])

    def _shares(self, vectors: Floats) -> Floats:
        self._check_params()  # unlike C, k is used here
        queries = unit_length(vectors).astype(np.float32)
        k = min(self.k, len(self.vectors_))
        step = min(1024, max(1, _KNN_PAIRS // len(self.vectors_)))
        shares = [self._votes(queries[start : start + step], k) for start in range(0, len(queries), step)]
        return np.concatenate(shares) if shares else np.zeros((0, len(self.classes_)))

    def _votes(self, queries: NDArray[np.float32], k: int) -> Floats:
        away = -queries @ self.vectors_.T
        nearest = np.argpartition(away, k - 1, axis=1)[:, :k]
        weights = np.exp((-np.take_along_axis(away, nearest, axis=1) - 1) / _KNN_TEMPERATURE).astype(np.float64)
        weights *= self._importance(self.targets_)[nearest]
        votes = np.zeros((len(queries), len(self.classes_)))
        np.add.at(votes, (np.arange(len(queries))[:, None], self.targets_[nearest]), weights)
        shares: Floats = votes / votes.sum(axis=1, keepdims=True)
        return shares

    def _check_params(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ConfigError(f"k = {self.k!r}: give a whole number of neighbours, 1 or more")
        _check_class_weight(self.class_weight)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"vectors": self.vectors_, "targets": self.targets_}

    def _restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.vectors_, self.targets_ = arrays["vectors"], arrays["targets"]
        fits = self.vectors_.ndim == 2 and self.targets_.shape == (len(self.vectors_),) and len(self.vectors_)
        if not fits or not 0 <= self.targets_.min() <= self.targets_.max() < len(self.classes_):
            raise ValueError("its arrays do not fit together")


def _check_class_weight(given: object) -> None:
    if given is not None and not (isinstance(given, str) and given == "balanced"):
        raise ConfigError(f"class_weight = {given!r}: give 'balanced' or None")


_KINDS: dict[str, type[LinearProbe] | type[KNNProbe]] = {"linear": LinearProbe, "knn": KNNProbe}


def load_probe(path: str | Path) -> LinearProbe | KNNProbe:
    """Read a saved probe of either kind; raises DataError for a file that is missing or not a probe."""
    from safetensors import SafetensorError, safe_open

    path = as_path(path, "path")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        kind, params = header["kind"], header["params"]
        unknown = _unknown(kind, header)
        if not unknown:
            probe = _KINDS[kind](**params)
            probe.classes_, probe.model_id_ = _stored_classes(header), _stored_space(header)
            probe.fitted_on_ = arrays.pop("fitted_on")
            probe._restore(arrays)
            if not (strange := arrays.keys() - probe._arrays().keys()):
                return probe
            unknown = f"a {type(probe).__name__} with {min(strange)[:40]!r}"
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: make it with probe.save or `jepakit probe fit`") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError, OSError):
        raise DataError(
            f"{path} is not a saved probe: make one with probe.save or `jepakit probe fit … --out FILE.safetensors`"
        ) from None
    raise DataError(f"{path} holds {unknown}, unknown to this jepakit: upgrade jepakit, or fit the probe again")


_HEADER = "jepakit_probe"
"""The entry of a file's metadata that says what its arrays are."""
_HEADER_FIELDS = ("kind", "params", "classes", "classes_dtype", "model_id")


def is_probe(path: Path) -> bool:
    """Whether a file is a saved probe, of this version or another, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return _HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _unknown(kind: str, header: dict[str, Any]) -> str:
    """What a saved probe has that this version cannot read, in words; empty if nothing."""
    if kind not in _KINDS:
        return f"a probe of kind {kind[:40]!r}"
    strange = [f"the parameter {name[:40]!r}" for name in header["params"] if name not in _KINDS[kind]().get_params()]
    strange += [repr(name[:40]) for name in header if name not in _HEADER_FIELDS]
    if not strange:
        try:
            _KINDS[kind](**header["params"])._check_params()
        except ConfigError as error:
            strange = [str(error).partition(":")[0]]
    return f"a {_KINDS[kind].__name__} with {strange[0]}" if strange else ""


def _stored_classes(header: dict[str, Any]) -> Labels:
    """The classes as they were."""
    dtype = header["classes_dtype"]
    if dtype is not None and np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"classes of dtype {dtype}")
    return np.array(header["classes"], dtype)


def _stored_space(header: dict[str, Any]) -> str | None:
    """The model_id of the vectors; None if they were not embeddings."""
    model_id = header["model_id"]
    if model_id is None or isinstance(model_id, str):
        return model_id
    raise TypeError(f"a model_id of type {type(model_id).__name__}")


def _plain_number(value: Any) -> Any:
    """Convert a numpy scalar, as grid searches set them, for JSON."""
    return value.item()


def _vectors_of(X: Embeddings | ArrayLike) -> Floats:
    if isinstance(X, str | Path):
        raise DataError(f"{str(X)!r} is a path: give Embeddings.load({str(X)!r})")
    refuse_masked("the vectors", X)
    try:
        vectors = np.asarray(X.vectors if isinstance(X, Embeddings) else X, dtype=np.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"the vectors are not an array of numbers: give one [N, D] ({lines_of(error)[0]})") from None
    if vectors.ndim != 2:
        raise DataError(f"the vectors are an array of shape {list(vectors.shape)}: give one [N, D]")
    if not np.isfinite(vectors).all():
        raise DataError("the vectors hold NaN or infinite numbers: leave those vectors out")
    return vectors


def _digests(vectors: Floats) -> NDArray[np.uint64]:
    """A digest of each vector, sorted, [N]: tells whether a given vector is among these."""
    rows = np.ascontiguousarray(vectors)
    return np.sort([int.from_bytes(blake2b(row, digest_size=8).digest(), "little") for row in rows]).astype(np.uint64)


def _space_of(X: Embeddings | ArrayLike) -> str | None:
    return X.model_id if isinstance(X, Embeddings) else None


def _labels_of(X: Embeddings | ArrayLike, y: ArrayLike | Sequence[str] | None, count: int) -> Labels:
    if y is None and isinstance(X, Embeddings):
        y = X.labels
    if y is None:
        raise DataError(
            "no labels: embed a folder with one subfolder per class, or with labels from a CSV file, or pass y"
        )
    refuse_masked("the labels", y)
    try:
        labels = np.asarray(y)
    except ValueError:
        raise DataError(
            f"the labels are lists of different lengths: give one label for each of {count} vectors"
        ) from None
    except (TypeError, RuntimeError) as error:  # a tensor on a GPU
        raise DataError(f"the labels are no array: give one label for each vector ({lines_of(error)[0]})") from None
    if labels.shape != (count,):
        raise DataError(f"{count} vectors, but labels of shape {list(labels.shape)}")
    for place, label in enumerate(as_given(y, labels)):
        if not isinstance(label, str | Real | np.bool_) or label != label:
            raise DataError(
                f"label {label!r} of vector {place} is neither text nor a number: name its class, or leave the vector out"
            )
        if isinstance(label, float | np.floating) and not float(label).is_integer():
            raise DataError(
                f"label {label!r} of vector {place} is a measurement, not a class: a probe tells classes apart, so divide the "
                "range into classes (numpy.digitize, pandas.cut)"
            )
    return np.array(labels.tolist()) if labels.dtype == object else labels


def _is_text(labels: Labels) -> bool:
    return labels.dtype.kind in "UT"


def _some(labels: Labels) -> str:
    """The first few distinct labels, as Python writes them."""
    return first_few(list(map(repr, np.unique(labels).tolist())), 3)


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
