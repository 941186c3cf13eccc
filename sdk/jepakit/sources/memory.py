"""Images in memory: a sequence or a map-style dataset of arrays, Pillow images, bytes or paths."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jepakit._files import with_home
from jepakit._messages import counted
from jepakit._progress import track
from jepakit.errors import DataError, ImageError
from jepakit.readers import EncodedSource, ImageSource
from jepakit.sources.store import Found, stamp_of

_IN_MEMORY = "a sequence in memory"
_WANTED = "an array [H, W] or [H, W, C], a Pillow image, a file's bytes or a path"


@dataclass(frozen=True)
class Items:
    """The caller's own sequence or dataset; an item is asked for only when its image is."""

    items: Any
    in_memory: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> ImageSource:
        try:
            item = self.items[index]
        except Exception as error:
            raise ImageError(
                f"image {index} cannot be read from the {_kind(self.items)} ({error})", code="unreadable"
            ) from error
        image, _ = _split(item)
        if not is_one_image(image):
            raise ImageError(f"image {index} is of type {_kind(image)}: wanted {_WANTED}", code="unsupported_format")
        if isinstance(image, str | Path):
            return Path(with_home(image))
        return bytes(image) if isinstance(image, bytearray | memoryview) else image

    def stamp(self, index: int) -> str | None:
        # Asking a dataset for an item would decode it; a list gives it for nothing.
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
    """The images of a sequence or dataset, named by their place; paths among them keep their names.

    Items that are (image, label, …) bring labels: from `.targets` where the dataset has it, else by going through it
    once; `.classes` names them. Neither is used where a `target_transform` makes other labels of them. Raises DataError
    when the first item is no image.
    """
    try:
        first, label = _split(items[0])
    except Exception as error:
        raise DataError(f"the {_kind(items)} has no item 0 ({type(error).__name__}: {error}): give a list") from None
    if not is_one_image(first):
        hint = ": leave ToTensor out of its transform" if _kind(first) == "Tensor" else ""
        raise DataError(f"the first item is of type {_kind(first)}{hint}; wanted {_WANTED}, or (image, label)")
    ids = tuple(map(str, range(len(items))))
    if isinstance(items, list):
        ids = tuple(
            Path(item).as_posix() if isinstance(item, str | Path) else place
            for place, item in zip(ids, items, strict=True)
        )
    store = Items(items)
    if label is None or not with_labels:
        return Found(store, ids, kind=_IN_MEMORY)
    labels = None if _label(label, None) is None else _labels(items)
    if labels is None:
        return Found(
            store, ids, kind=_IN_MEMORY, label_note=f"no labels: targets of type {_kind(label)} are no classes"
        )
    return Found(
        store, ids, labels=labels, label_note=f"labels: {counted(len(set(labels)), 'class')} from the {_kind(items)}"
    )


def is_one_image(value: Any) -> bool:
    """Whether a value is what a reader takes."""
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3)
    # Whoever holds a Pillow image has loaded Pillow: no need to import it here.
    pillow = sys.modules.get("PIL.Image")
    return isinstance(value, EncodedSource) or (pillow is not None and isinstance(value, pillow.Image))


def _split(item: Any) -> tuple[Any, Any]:
    """(image, label) of an item; the label is None where it has none."""
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _labels(items: Any) -> tuple[str, ...] | None:
    targets: Any = getattr(items, "targets", None)
    classes: Any = getattr(items, "classes", None)
    if getattr(items, "target_transform", None) is not None:
        targets = classes = None
    if not isinstance(targets, Sized) or len(targets) != len(items):
        targets = [_split(items[place])[1] for place in track(range(len(items)), "labels")]
    labels = [_label(target, classes) for target in targets]
    return None if None in labels else tuple(str(label) for label in labels)


def _label(target: Any, classes: Any) -> str | None:
    if hasattr(target, "item") and getattr(target, "ndim", 0) == 0:
        target = target.item()
    if isinstance(target, str):
        return sys.intern(str(target))
    if not isinstance(target, int):
        return None
    named = isinstance(classes, list | tuple) and 0 <= target < len(classes)
    return sys.intern(str(classes[target] if named else target))


def _kind(value: Any) -> str:
    return type(value).__name__
