"""Checks of the vectors and labels that users give probes, as arrays or as `Embeddings`."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepakit._checks import refuse_masked
from jepakit._groups import as_given
from jepakit._messages import first_few, lines_of, plain_text
from jepakit.embeddings import Embeddings
from jepakit.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Labels = NDArray[Any]
_FEW = 30
"""Fewer labels than this may all differ by chance, as in a fold of a grid search."""


def vectors_of(X: Embeddings | ArrayLike) -> Floats:
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


def columns_of(X: object) -> NDArray[Any] | None:
    """The names of a DataFrame's columns, [D], if all are text (scikit-learn's rule); None for other vectors."""
    columns = getattr(X, "columns", None)
    if columns is None or not all(isinstance(name, str) for name in columns):
        return None
    return np.array(list(columns), dtype=object)


def digests_of(vectors: Floats) -> NDArray[np.uint64]:
    """A digest of each vector, sorted, [N]: tells whether a given vector is among these."""
    rows = np.ascontiguousarray(vectors)
    return np.sort([int.from_bytes(blake2b(row, digest_size=8).digest(), "little") for row in rows]).astype(np.uint64)


def space_of(X: Embeddings | ArrayLike) -> str | None:
    return X.model_id if isinstance(X, Embeddings) else None


def labels_of(X: Embeddings | ArrayLike, y: ArrayLike | Sequence[str] | None, count: int) -> Labels:
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
        raise DataError(
            f"the labels cannot be read as an array: give one label for each vector ({lines_of(error)[0]})"
        ) from None
    if labels.shape != (count,):
        raise DataError(f"{count} vectors, but labels of shape {list(labels.shape)}")
    for place, label in enumerate(as_given(y, labels)):
        if not isinstance(label, str | Real | np.bool_) or label != label:
            raise DataError(
                f"label {label!r} of vector {place} is neither text nor a number: name its class, or leave the vector out"
            )
        if isinstance(label, str) and str(label) != plain_text(label):
            raise DataError(
                f"label {label!r} of vector {place} is a member of an enum, for which numpy takes the member's name, cut short: give "
                "its text ([label.value for label in labels])"
            )
        if isinstance(label, float | np.floating) and not float(label).is_integer():
            raise DataError(
                f"label {label!r} of vector {place} is a measurement, not a class: a probe tells classes apart, so divide the "
                "range into classes (numpy.digitize, pandas.cut)"
            )
    return np.array(labels.tolist()) if labels.dtype == object else labels


def refuse_measurements(classes: Labels, count: int) -> None:
    """Raise DataError for text, as from a table, that stands for measurements: mostly not whole, and mostly different."""
    if not is_text(classes) or count < _FEW or 2 * len(classes) <= count:
        return
    try:
        numbers = classes.astype(np.float64)
    except ValueError:  # names
        return
    if np.isfinite(numbers).all() and 2 * (places := np.flatnonzero(numbers % 1)).size > len(classes):
        raise DataError(
            f"{count} labels, of which {len(classes)} differ, such as {str(classes[places[0]])!r}, are measurements, not classes: a probe tells "
            "classes apart, so divide the range into classes (numpy.digitize, pandas.cut), or, if they are names, put a letter before them"
        )


def is_text(labels: Labels) -> bool:
    return labels.dtype.kind in "UT"


def some(labels: Labels) -> str:
    """The first few distinct labels, as Python writes them."""
    return first_few(list(map(repr, np.unique(labels).tolist())), 3)


def check_class_weight(given: object) -> None:
    if given is not None and not (isinstance(given, str) and given == "balanced"):
        raise ConfigError(f"class_weight = {given!r}: give 'balanced' or None")
