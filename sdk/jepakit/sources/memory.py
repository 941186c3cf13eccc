"""Images in memory: a sequence or a map-style dataset of arrays, Pillow images, bytes or paths."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jepakit._files import with_home
from jepakit._messages import counted, first_few
from jepakit._progress import track
from jepakit.errors import DataError, ImageError
from jepakit.readers import EncodedSource, ImageSource
from jepakit.sources.store import Found, stamp_of

_IN_MEMORY = "a sequence in memory"
_WANTED = "an array [H, W] or [H, W, C], a Pillow image, a file's bytes or a path"


@dataclass(frozen=True)
class Items:
    """The caller's own sequence or dataset; items are fetched only when their images are needed."""

    items: Any
    in_memory: ClassVar[bool] = True

    @property
    def most_threads(self) -> int:
        # A dataset may be bound to its caller's thread, as a database connection is; a list may hold the same image twice.
        return 1 if isinstance(self.items, list | np.ndarray) else 0

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> ImageSource:
        try:
            item = self.items[index]
        except Exception as error:
            raise ImageError(
                f"image {index} cannot be read from the {_kind(self.items)} ({type(error).__name__}: {error})",
                code="unreadable",
            ) from error
        image, _ = _split(item)
        if not is_one_image(image):
            raise ImageError(f"image {index} is of type {_kind(image)}: give {_WANTED}", code="unsupported_format")
        if isinstance(image, str | Path):
            return Path(with_home(image))
        return bytes(image) if isinstance(image, bytearray | memoryview) else image

    def stamp(self, index: int) -> str | None:
        # Fetching an item would decode it in a dataset; in a list it is free.
        item = _split(self.items[index])[0] if isinstance(self.items, list) else None
        return stamp_of(with_home(item)) if isinstance(item, str | Path) else None

    def fingerprint(self, index: int) -> bytes:
        try:
            image = self.image(index)
            if isinstance(image, bytes):
                return hashlib.sha256(image).digest()
            if isinstance(image, str | Path):
                return bytes(Path(image))
            pixels = np.ascontiguousarray(image)
        except (ImageError, OSError):
            return b"unreadable"
        return f"{pixels.dtype}{pixels.shape}".encode() + hashlib.sha256(pixels.tobytes()).digest()


def find_in_memory(items: Any, *, with_labels: bool) -> Found:
    """The images of a sequence or dataset, named by index; paths among them keep their names.

    Labels of items (image, label, …) come from the dataset's `.targets` if it has them, else from one pass over it;
    `.classes` names them. Neither is used if a `target_transform` changes the labels. Raises DataError when the first
    item is not an image.
    """
    try:
        item = items[0]
        first, label = _split(item)
    except Exception as error:
        raise DataError(f"the {_kind(items)} has no item 0 ({type(error).__name__}: {error}): give a list") from None
    if not is_one_image(first):
        hint = _hint(first)
        raise DataError(f"the first item is of type {_kind(first)}{hint}; give {_WANTED}, or (image, label)")
    ids = tuple(map(str, range(len(items))))
    if isinstance(items, list):
        ids = tuple(
            os.fspath(item) if isinstance(item, str | Path) else place for place, item in zip(ids, items, strict=True)
        )
    if not with_labels or not any(map(_has_label, items if isinstance(items, list) else [item])):
        return Found(Items(items), ids, kind=_IN_MEMORY)
    # If the first item's target cannot be a label, do not decode all the others.
    targets, classes = ([label], None) if _is_strange(label) else _targets(items)
    labels, note = read_labels(targets, classes, of=_kind(items))
    return Found(Items(items), ids, kind=_IN_MEMORY, labels=labels, label_note=note)


def _hint(item: Any) -> str:
    """What to do about the first item of a dataset that gives no images."""
    if _kind(item) == "Tensor":
        return ": leave ToTensor out of its transform"
    if isinstance(item, Mapping):
        names = [name for name in item if is_one_image(item[name])] or ["image"]
        return f" ({first_few(list(map(repr, item)), 5)}): give its columns, such as zip(data[{names[0]!r}], data['label'])"
    return ""


def is_one_image(value: Any) -> bool:
    """Whether a value is an image that a reader takes."""
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3)
    # A Pillow image cannot exist without Pillow having been imported, so it is not imported here.
    pillow = sys.modules.get("PIL.Image")
    return isinstance(value, EncodedSource) or (pillow is not None and isinstance(value, pillow.Image))


def are_labelled_files(items: Any) -> bool:
    """Whether it is a list of (path, label)."""
    return isinstance(items, list | tuple) and all(
        _has_label(item) and len(item) == 2 and isinstance(item[0], str | Path) for item in items
    )


def read_labels(targets: Sequence[Any], classes: Any = None, *, of: str) -> tuple[tuple[str | None, ...] | None, str]:
    """Targets as labels, and a note on them; None for a missing target (None, or NaN as in a data frame).

    classes  names for targets that are numbers
    of       the type of their container, for the note
    """
    labels = tuple(_label(target, classes) for target in targets)
    for label, target in zip(labels, targets, strict=True):
        if label is None and _is_strange(target):
            return None, f"no labels: targets of type {_kind(target)} are no classes"
    if set(labels) == {None}:
        return None, f"no labels: the {of} gives no target"
    return labels, f"labels: {counted(len(set(labels) - {None}), 'class')} from the {of}"


def _split(item: Any) -> tuple[Any, Any]:
    """(image, label) of an item; the label is None if it has none."""
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _has_label(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) > 1


def _targets(items: Any) -> tuple[Sequence[Any], Any]:
    """Each item's target, and the names for targets that are numbers."""
    targets, classes = _described(items)
    if targets is None:
        targets = [_split(items[place])[1] for place in track(range(len(items)), "labels")]
    return targets, classes


def _described(items: Any) -> tuple[Sequence[Any] | None, Any]:
    """`.targets` and `.classes` of a dataset, or of the one that it is a part of; None for what it does not have."""
    # A subset cannot exist without torch having been imported. A subclass may give other labels.
    torch_data: Any = sys.modules.get("torch.utils.data")
    if torch_data is not None and type(items) is torch_data.Subset:
        of_all, classes = _described(items.dataset)
        return None if of_all is None else [of_all[place] for place in items.indices], classes
    if getattr(items, "target_transform", None) is not None:
        return None, None
    targets: Any = getattr(items, "targets", None)
    is_of_all = isinstance(targets, Sized) and len(targets) == len(items)
    return list(targets) if is_of_all else None, getattr(items, "classes", None)


def _is_strange(target: Any) -> bool:
    """Whether a target is present but cannot be a class."""
    plain = _plain(target)
    missing = plain is None or _kind(plain) in ("NAType", "NaTType") or (isinstance(plain, float) and math.isnan(plain))
    return not missing and not isinstance(plain, str) and _label(plain, None) is None


def _label(target: Any, classes: Any) -> str | None:
    """The target's name; None if missing or not a class. Whole floats count: a column with gaps holds floats."""
    target = _plain(target)
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    if isinstance(target, str):
        return sys.intern(str(target)) or None
    if not isinstance(target, int):
        return None
    named = isinstance(classes, list | tuple | np.ndarray) and 0 <= target < len(classes)
    return sys.intern(str(classes[target] if named else target))


def _plain(target: Any) -> Any:
    """A numpy scalar or one-element tensor as a plain Python value; None for a masked entry of an array."""
    if target is np.ma.masked:
        return None
    return target.item() if hasattr(target, "item") and getattr(target, "ndim", 0) == 0 else target


def _kind(value: Any) -> str:
    return type(value).__name__
