"""`Embeddings`: vectors with the id of their space, the ids of their images and, if known, labels."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from numbers import Integral
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from jepakit._checks import is_whole, refuse_masked
from jepakit._files import as_path, reason_of, written
from jepakit._messages import counted, lines_of, plain_text
from jepakit._vectors import most_similar
from jepakit.errors import ConfigError, DataError, SpaceError

_MOST_INFLATED, _SMALL = 100, 16 << 20


def is_embeddings(path: str) -> bool:
    """Whether `Embeddings.save` wrote a file. Only .npz files are opened."""
    return path.endswith(".npz") and holds_embeddings(path)


def holds_embeddings(path: str | Path) -> bool:
    """Whether `Embeddings.save` wrote a file, judged by the names of its arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"vectors.npy", "model_id.npy", "ids.npy"} <= set(archive.namelist())
    except Exception:  # zipfile fails on damage in many ways; the error is reported when the file is read
        return False


@dataclass(frozen=True, eq=False, init=False)
class Embeddings:
    """Embeddings of a set of images, in the images' order. `==` means identity: compare `vectors` and `ids` instead.

    vectors   float32 [N, D]
    model_id  id of the vector space (16 hex digits); only vectors of the same space can be compared
    ids       N names, relative paths for files
    labels    N class names, or None
    """

    vectors: NDArray[np.float32]
    model_id: str
    ids: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    def __init__(
        self,
        vectors: ArrayLike,
        model_id: str,
        ids: Iterable[str | os.PathLike[str] | int | np.integer[Any]],
        labels: Iterable[str] | None = None,
    ) -> None:
        """Take floats [N, D] of any precision, and N ids and labels; DataError if they do not fit together."""
        if not isinstance(model_id, str):
            raise DataError(f"model_id = {model_id!r}: give the text that names the model, such as its model_id")
        for name, words in (("ids", ids), ("labels", () if labels is None else labels)):
            if isinstance(words, str):
                raise DataError(f"{name} = {words[:40]!r}: give one for each vector, not a single text")
            if not isinstance(words, Iterable):
                raise DataError(f"{name} = {words!r}: give one for each vector")
        # Tuples, since a pandas Series is indexed by its own labels and an array has no truth value.
        names, classes = tuple(map(_id, ids)), None if labels is None else tuple(labels)
        refuse_masked("the vectors", vectors)
        try:
            array = np.asarray(vectors)
        except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, a tensor on a GPU
            raise DataError(
                f"vectors of type {type(vectors).__name__}: give floats [N, D] ({lines_of(error)[0]})"
            ) from None
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
            raise DataError(
                f"vectors {list(array.shape)} of {array.dtype}: give floats [N, D], a row for each image (astype, reshape; "
                "for a column of lists, numpy.stack(column))"
            )
        if len(array) != len(names) or (classes is not None and len(classes) != len(names)):
            raise DataError(
                f"embeddings do not fit together: vectors {list(array.shape)} of {array.dtype}, {len(names)} ids, "
                f"{'no' if classes is None else len(classes)} labels"
            )
        for place, label in enumerate(classes or ()):
            if not isinstance(label, str):
                raise DataError(
                    f"labels[{place}] = {label!r}: a label is the name of a class: give text, or no labels at all"
                )
        texts = None if classes is None else tuple(map(plain_text, classes))
        vars(self).update(vectors=array.astype(np.float32, copy=False), model_id=model_id, ids=names, labels=texts)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(
        self, which: slice | Sequence[int] | Sequence[bool] | NDArray[Any] | tuple[NDArray[Any], EllipsisType]
    ) -> Embeddings:
        """Select by slice, boolean mask or indices; ids and labels follow. For one vector use `vectors[index]`.

        Raises DataError for a mask of the wrong length or an index out of range, TypeError for a single index.
        """
        if isinstance(which, tuple) and len(which) == 2 and which[1] is ...:
            which = which[0]  # how scikit-learn selects rows of an array
        try:
            places = np.arange(len(self))[list(which) if isinstance(which, tuple) else which]
        except IndexError as error:
            if isinstance(which, str) or any(isinstance(place, str) for place in np.ravel(np.asarray(which, object))):
                raise DataError(
                    "embeddings are taken by place, not by id: give a mask, such as [id in wanted for id in these.ids]"
                ) from None
            raise DataError(
                f"{error}: of {len(self)} embeddings, take a slice, a mask of {len(self)}, or places below {len(self)}"
            ) from None
        if places.ndim != 1:
            raise TypeError(
                "embeddings are taken by a slice, a boolean mask [N] or places [n]: for one vector use `.vectors[place]`"
            )
        chosen = places.tolist()
        labels = None if self.labels is None else tuple(self.labels[place] for place in chosen)
        return Embeddings(self.vectors[places], self.model_id, tuple(self.ids[place] for place in chosen), labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors, (N, D)."""
        return self.vectors.shape

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The vectors: numpy and scikit-learn take embeddings for the array [N, D]."""
        return np.array(self.vectors, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        count, width = self.vectors.shape
        labels = "no labels" if self.labels is None else f"labels of {len(set(self.labels))} classes"
        return f"<Embeddings: {count} vectors of {width} numbers, model_id={self.model_id!r}, {labels}>"

    def nearest(self, queries: Embeddings | None = None, k: int = 5) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the k vectors of this set most similar to each of Q queries, by exhaustive search.

        queries  None: this set's own N vectors, each of which does not find itself

        Returns indices, int64 [Q, k], and cosines, float32 [Q, k], the most similar first; ties go to the lower index.
        Raises SpaceError for queries of another model, DataError for numbers that are not finite, and ConfigError unless k is
        1 to N (N - 1 without queries).
        """
        self._check_finite()
        if queries is None:
            return self._nearest_others(k)
        if not isinstance(queries, Embeddings):
            raise DataError(
                f"queries of type {type(queries).__name__}: give embeddings from `embed`, or some of these (embeddings[[7]])"
            )
        if queries.model_id != self.model_id or queries.vectors.shape[1] != self.vectors.shape[1]:
            raise SpaceError(
                f"these are vectors of model {self.model_id} ({self.vectors.shape[1]} numbers), the queries of "
                f"{queries.model_id} ({queries.vectors.shape[1]}): embed both with one model"
            )
        queries._check_finite()
        return most_similar(queries.vectors, self.vectors, _checked_k(k, len(self), "vectors"))

    def _check_finite(self) -> None:
        """Raise DataError unless all numbers are finite: nothing is near a vector that is not."""
        if len(bad := np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))):
            raise DataError(
                f"{counted(len(bad), 'vector')} with NaN or infinite numbers, the first that of {self.ids[bad[0]]}: leave "
                "them out (embeddings[mask])"
            )

    def _nearest_others(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if len(self) < 2:
            raise DataError(f"{counted(len(self), 'vector')} only: there are no others to find, so give queries")
        k = _checked_k(k, len(self) - 1, "others")
        places, cosines = most_similar(self.vectors, self.vectors, k + 1)
        others = places != np.arange(len(self))[:, None]
        others[others.all(axis=1), -1] = False  # a vector with many equals may not have found itself: drop the last
        return places[others].reshape(-1, k), cosines[others].reshape(-1, k)

    @classmethod
    def concatenate(cls, parts: Iterable[Embeddings]) -> Embeddings:
        """All vectors of several embeddings of one model, in their order. Ids stay as they are, even if two are equal.

        Raises SpaceError for vectors of different models, DataError if only some of the parts have labels.
        """
        if isinstance(parts, Embeddings) or not (given := tuple(parts)):
            raise DataError("give a list of one or more embeddings")
        for place, part in enumerate(given):
            if not isinstance(part, Embeddings):
                raise DataError(f"part {place} is of type {type(part).__name__}: give embeddings")
            given[0]._check_joins(part, place)
        return cls(
            np.concatenate([part.vectors for part in given]),
            given[0].model_id,
            chain.from_iterable(part.ids for part in given),
            None if given[0].labels is None else chain.from_iterable(part.labels or () for part in given),
        )

    def _check_joins(self, part: Embeddings, place: int) -> None:
        """Raise unless another part can be appended to this one, the first."""
        if part.model_id != self.model_id or part.vectors.shape[1] != self.vectors.shape[1]:
            raise SpaceError(
                f"part 0 holds vectors of model {self.model_id} ({self.vectors.shape[1]} numbers), part {place} of "
                f"{part.model_id} ({part.vectors.shape[1]}): embed both with one model"
            )
        if (part.labels is None) != (self.labels is None):
            with_labels, without = (0, place) if part.labels is None else (place, 0)
            raise DataError(
                f"part {with_labels} has labels, part {without} has none: give it labels, or take them from all "
                "(dataclasses.replace(part, labels=…))"
            )

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file atomically: plain arrays, no pickle. Raises WriteError if it cannot be written."""
        path = as_path(path, "path")
        arrays: dict[str, NDArray[Any]] = {
            "vectors": self.vectors,
            "model_id": np.array(self.model_id),
            **_packed("ids", self.ids),
        }
        if self.labels is not None:
            arrays |= _packed("labels", self.labels)
        with written(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """Read what `save` wrote; raises DataError for any other file."""
        path = as_path(path, "path")
        try:
            with path.open("rb") as file:
                _refuse_bomb(file)
                with np.load(file, allow_pickle=False) as arrays:
                    return cls(
                        vectors=arrays["vectors"],
                        model_id=str(arrays["model_id"]),
                        ids=_unpacked(arrays, "ids"),
                        labels=_unpacked(arrays, "labels") if "labels" in arrays else None,
                    )
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: make it with `jepakit embed … --out {path}`") from None
        except DataError as error:
            raise DataError(f"{path} is not a file of embeddings: {error}") from None
        except KeyError as error:
            raise DataError(f"{path} is not a file of embeddings: {error.args[0]}") from None
        except OSError as error:
            raise DataError(f"{path} is not a file of embeddings ({reason_of(error)})") from None
        except Exception:  # a damaged archive can raise anything, in numpy's words
            raise DataError(
                f"{path} is not a file of embeddings: make one with `jepakit embed … --out FILE.npz`"
            ) from None


def _refuse_bomb(file: BinaryIO) -> None:
    """Raise DataError for an archive that inflates to far more than a file of vectors does; `save` compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        inflated = sum(member.file_size for member in archive.infolist())
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if inflated > max(_SMALL, _MOST_INFLATED * size):
        raise DataError(f"its {size:,} bytes inflate to {inflated:,}, over {_MOST_INFLATED} times as many")


def _id(name: object) -> str:
    """An image's id as text; a path or a number becomes text."""
    if isinstance(name, str):
        return plain_text(name)
    if isinstance(name, os.PathLike | Integral):
        return str(name)
    raise DataError(f"id {name!r}: an id is the name of an image: give text, a path or a number")


def _checked_k(k: int, most: int, what: str) -> int:
    if not most:
        raise DataError(f"there are no {what} to search: embed some images first")
    if not is_whole(k) or not 1 <= k <= most:
        raise ConfigError(f"k = {k!r}: give a whole number, 1 to {most}, which is how many {what} there are")
    return int(k)


def _packed(name: str, words: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Strings as two arrays: `name`, the UTF-8 bytes of all words (uint8); `name_ends`, where each ends (int64 [N]).

    numpy's own string arrays give every word the space of the longest, at four bytes a character.
    """
    encoded = [str(word).encode("utf-8", "surrogatepass") for word in words]
    ends = np.cumsum([len(word) for word in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_ends": ends}


def _unpacked(arrays: Mapping[str, NDArray[Any]], name: str) -> tuple[str, ...]:
    """Undo `_packed`, or read the single string array that earlier versions wrote. DataError if the ends do not fit."""
    if f"{name}_ends" not in arrays:
        return tuple(arrays[name].tolist())
    data, bounds = arrays[name].tobytes(), [0, *arrays[f"{name}_ends"].tolist()]
    if bounds != sorted(bounds) or bounds[-1] != len(data):
        raise DataError(f"{name} and {name}_ends do not fit together")
    return tuple(data[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(bounds))
