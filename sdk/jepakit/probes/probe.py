"""What both kinds of probe share: scikit-learn's estimator interface, in numpy alone.

Hyper-parameters are stored untouched by `__init__`, `fit` returns self, learned values end in `_`, and
`get_params`/`set_params` let scikit-learn's tools clone a probe. A probe remembers the vector space it was
fitted on and refuses vectors of another. Files are safetensors: no pickle.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._files import as_path, written
from jepakit._progress import Steps
from jepakit._vectors import AT_A_TIME, blocks
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError, DataError, SpaceError
from jepakit.probes.given import (
    Floats,
    Labels,
    columns_of,
    digests_of,
    is_text,
    labels_of,
    refuse_measurements,
    some,
    space_of,
    vectors_of,
)
from jepakit.probes.report import ProbeReport

HEADER = "jepakit_probe"
"""The entry of a file's metadata that says what its arrays are."""


class Probe(ABC):
    kind: ClassVar[str]
    _estimator_type: ClassVar = "classifier"
    """For scikit-learn before 1.6, which would not stratify its folds without it."""
    class_weight: Literal["balanced"] | None
    classes_: Labels
    model_id_: str | None
    feature_names_in_: NDArray[Any]
    """[D], the names of the columns of a DataFrame that it was fitted on; other probes have no such attribute."""
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

    def get_metadata_routing(self) -> Any:
        """What scikit-learn may pass on to a probe where its metadata routing is enabled: nothing."""
        from sklearn.utils.metadata_routing import MetadataRequest

        requests = MetadataRequest(owner=self)
        requests.score.add_request(param="sample_weight", alias=None)  # pipelines ask whether it is wanted
        return requests

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
        """Accuracy, 0 to 1. Vectors of classes that this probe does not know count as wrong, as in a fold of a grid search;
        `evaluate` raises if there are no others.

        Raises DataError for text where the classes are numbers, and the reverse.
        """
        _, right, truth = self._judged(X, y)
        if is_text(truth) != is_text(self.classes_):
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
        n_fitted_on = int(np.isin(digests_of(vectors), self.fitted_on_).sum())
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
            "classes_dtype": None if is_text(self.classes_) else self.classes_.dtype.str,
            "model_id": self.model_id_,
            **({"columns": self.feature_names_in_.tolist()} if hasattr(self, "feature_names_in_") else {}),
        }
        # In one entry: safetensors writes several in any order, and the same probe must give the same bytes.
        metadata = {HEADER: json.dumps(header, sort_keys=True, default=_plain_number)}
        path = as_path(path, "path")
        learned = {**self._arrays(), "fitted_on": self.fitted_on_}
        arrays = {name: np.ascontiguousarray(value) for name, value in learned.items()}
        with written(path) as file:
            file.write(save(arrays, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises DataError for another file or another kind of probe."""
        from jepakit.probes.saved import load_probe

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
        truth = labels_of(X, y, len(vectors))
        if not len(truth):
            raise DataError("no vectors to evaluate on")
        return vectors, self._predicted(vectors) == truth, truth

    def _knows_none_of(self, truth: Labels) -> DataError:
        return DataError(
            f"none of the labels is a class of this probe: the labels are {some(truth)}, its classes are {some(self.classes_)}"
        )

    def _examples(self, X: Embeddings | ArrayLike, y: ArrayLike | None) -> tuple[Floats, Labels, NDArray[np.intp]]:
        """Vectors, classes, and each vector's class as an index; nothing is stored on the probe yet (`_keep`)."""
        self._check_params()
        vectors = vectors_of(X)
        classes, targets = np.unique(labels_of(X, y, len(vectors)), return_inverse=True)
        if len(classes) < 2:
            raise DataError(f"a probe needs two classes or more, the labels hold {classes.tolist()}")
        refuse_measurements(classes, len(vectors))
        return vectors, classes, targets

    def _keep(self, X: Embeddings | ArrayLike, vectors: Floats, classes: Labels) -> None:
        """Store what the probe was fitted on."""
        self.classes_, self.model_id_, self.fitted_on_ = classes, space_of(X), digests_of(vectors)
        vars(self).pop("feature_names_in_", None)
        if (names := columns_of(X)) is not None:
            self.feature_names_in_ = names

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
        vectors = vectors_of(X)
        if vectors.shape[1] != self.n_features_in_:
            raise SpaceError(
                f"this probe takes vectors of {self.n_features_in_} numbers, these have {vectors.shape[1]}"
            )
        names, known = columns_of(X), getattr(self, "feature_names_in_", None)
        if names is not None and known is not None and (moved := np.flatnonzero(names != known)).size:
            raise DataError(
                f"column {moved[0]} is {names[moved[0]]!r}, but {known[moved[0]]!r} in the vectors that this probe was fitted on: give "
                "the same columns in the same order (frame[probe.feature_names_in_])"
            )
        return vectors


def _plain_number(value: Any) -> Any:
    """Convert a numpy scalar, as grid searches set them, for JSON."""
    return value.item()
