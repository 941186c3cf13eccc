"""Which images: folders, globs, files and lists of them become one sorted `ImageList`."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepakit.errors import DataError
from jepakit.images import SUFFIXES

LabelRule = Literal["auto", "folder", "none"]

MIN_CLASSES, MAX_CLASSES, MIN_IMAGES_PER_CLASS = 2, 50, 10
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True)
class ImageList:
    """Files in a stable order. `ids` are paths relative to the source; `labels` is None without labels.

    `note` says in words what was assumed about labels.
    """

    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...] | None
    note: str

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """A fingerprint of names and sizes, to notice that a resumed run meets other data."""
        digest = hashlib.sha256()
        for name, path in zip(self.ids, self.paths, strict=True):
            digest.update(os.fsencode(name) + f"\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


def list_images(source: str | Path | Sequence[str | Path], labels: LabelRule = "auto") -> ImageList:
    """List the images of a folder (recursive), a glob, a file (sorted by name), or a list of paths (in its own order).

    labels  "auto": the first-level folders are classes if all images lie in 2 to 50 of them with at least 10
            images each; "folder": they are classes, whatever their number; "none": no labels.

    Hidden files are passed over. Raises DataError when there is nothing to read.
    """
    root, paths = _find(source)
    if not paths:
        raise DataError(f"{source} holds no images (looked for {', '.join(sorted(SUFFIXES))}, in subfolders too)")
    ids = tuple(path.relative_to(root).as_posix() if root else path.as_posix() for path in paths)
    found, note = _labels(ids, labels) if root else (None, "no labels: a list of files has no class folders")
    return ImageList(tuple(paths), ids, found, note)


@dataclass(frozen=True)
class Gathered:
    """What `embed` was given, flattened: paths, bytes, arrays or Pillow images, with ids and labels."""

    items: list[Any]
    ids: tuple[str, ...]
    labels: tuple[str, ...] | None


def gather(images: Any, labels: LabelRule) -> Gathered:
    """Flatten the argument of `embed`: a folder, glob or path, one image in memory, or a list of either.

    A folder gives labels by the rule (see `list_images`); with `folder`, images outside class folders mean no
    labels here, since embedding needs none. Images in memory are named by their place: "0", "1", …
    """
    if isinstance(images, str | Path):
        listed = list_images(images, "none")
        found = None
        if Path(images).is_dir() and (labels == "auto" or all("/" in name for name in listed.ids)):
            found, _ = _labels(listed.ids, labels)
        return Gathered(list(listed.paths), listed.ids, found)
    items = list(images) if _is_collection(images) else [images]
    if not items:
        raise DataError("no images were given")
    ids = tuple(str(item) if isinstance(item, str | Path) else str(place) for place, item in enumerate(items))
    return Gathered([Path(item) if isinstance(item, str) else item for item in items], ids, None)


def _is_collection(images: Any) -> bool:
    """Whether `images` holds several images: a list, a generator, or a stack of arrays [N, H, W, C]."""
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return isinstance(images, Iterable) and not isinstance(images, bytes | bytearray | memoryview)


def _find(source: str | Path | Sequence[str | Path]) -> tuple[Path | None, list[Path]]:
    if not isinstance(source, str | Path):
        paths = [Path(item) for item in source]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]} does not exist ({len(missing)} of {len(paths)} files are missing)")
        return None, paths
    path = Path(source)
    if path.is_dir():
        return path, sorted(_walk(path))
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(str(source)):
        return None, sorted(
            Path(name)
            for name in glob.glob(str(source), recursive=True)
            if _is_image(Path(name).name) and Path(name).is_file()
        )
    raise DataError(f"{path} does not exist: give a folder of images, a glob in quotes, or a file")


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Image files below `folder`; links are followed, but never back into a folder they are in."""
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in found:
        if entry.is_dir():
            yield from _walk(Path(entry.path), above | {real})
        elif _is_image(entry.name) and entry.is_file():
            yield Path(entry.path)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (hot loop)


def _labels(ids: Sequence[str], rule: LabelRule) -> tuple[tuple[str, ...] | None, str]:
    if rule == "none":
        return None, "no labels, as asked"
    tops = [name.split("/", 1)[0] if "/" in name else None for name in ids]
    classes = Counter(tops)
    if None in classes:
        if rule == "folder":
            raise DataError(f"{ids[tops.index(None)]} lies in no class folder: move it into one, or use labels none")
        return None, "no labels: images lie outside class folders"
    names = sorted(str(name) for name in classes)
    if {name.lower() for name in names} <= _SPLIT_NAMES and len(names) > 1:
        raise DataError(
            f"the folders {', '.join(names)} look like splits, not classes: name one of them, or use labels none"
        )
    if rule == "auto":
        fewest = min(classes.values())
        if not MIN_CLASSES <= len(classes) <= MAX_CLASSES:
            return (
                None,
                f"no labels: {len(classes)} first-level folders (classes are {MIN_CLASSES} to {MAX_CLASSES})",
            )
        if fewest < MIN_IMAGES_PER_CLASS:
            return (
                None,
                f"no labels: a folder holds {fewest} images (classes have {MIN_IMAGES_PER_CLASS} or more)",
            )
    return tuple(
        str(top) for top in tops
    ), f"labels: {len(names)} folders are classes ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"
