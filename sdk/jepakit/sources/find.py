"""From the one `images` argument to the images it names: all kinds of sources are told apart here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jepakit._files import reason_of, with_home
from jepakit._messages import counted, joined
from jepakit.errors import DataError
from jepakit.sources.aside import system_folders_passed_over, without_aside
from jepakit.sources.files import SUFFIXES, Files, dicom_among, embeddings_among, is_image, not_files, suffix, walk
from jepakit.sources.manifest import find_in_manifest
from jepakit.sources.memory import are_labelled_files, find_in_memory, is_one_image, read_labels
from jepakit.sources.passed import links_passed_over, passed_over
from jepakit.sources.store import Found, repeated
from jepakit.sources.table import TABLES
from jepakit.sources.tars import find_in_tars
from jepakit.sources.zips import find_in_zips

LISTED = "a list of files"
_ARCHIVES = (".tar", ".zip")
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_KINDS = "a folder of images, a glob in quotes, a manifest (.csv, .parquet), an archive (.tar, .zip) or an image file"


def find(images: Any, *, with_labels: bool, with_groups: bool, with_splits: bool, may_be_gone: bool = False) -> Found:
    """The images that `images` names. Labels, groups and splits that have to be read are read only if asked for.

    may_be_gone  whether files of a list may be missing; the error is then raised when they are read

    Raises DataError when the source is of an unknown kind, does not exist, or holds no images.
    """
    if isinstance(images, str | Path):
        return _find_at(with_home(images), with_labels=with_labels, with_groups=with_groups, with_splits=with_splits)
    if hasattr(images, "read"):
        raise DataError(f"images of type {type(images).__name__}: give an open file's path, or its bytes (.read())")
    images = as_list(images)
    if hasattr(images, "__dataframe__"):  # pandas, polars
        raise DataError(
            f"images of type {type(images).__name__}: give its column of paths, or zip(frame['path'], frame['label'])"
        )
    if isinstance(images, np.ndarray) and images.ndim in (2, 3):
        raise DataError(
            f"images of type ndarray, {list(images.shape)}: give [N, H, W, C] (of grey images: array[..., None]), or a "
            "list of arrays"
        )
    if not _is_sequence(images):
        raise DataError(
            f"images of type {type(images).__name__}: give {_KINDS}, a list of image "
            "files, or anything with a length and images by number"
        )
    if len(images) == 0:
        raise DataError("no images were given")
    if isinstance(images, list | tuple) and all(isinstance(item, str | Path) for item in images):
        return _find_listed(images, with_labels=with_labels, may_be_gone=may_be_gone)
    if are_labelled_files(images):
        return _find_labelled(images, with_labels=with_labels, may_be_gone=may_be_gone)
    return find_in_memory(list(images) if isinstance(images, tuple) else images, with_labels=with_labels)


def as_list(images: Any) -> Any:
    """A column of a table or an iterator as a list; anything else as it is."""
    if hasattr(images, "to_pylist"):  # a column of pyarrow
        return images.to_pylist()
    return list(images) if isinstance(images, Iterator) or _is_column(images) else images


def _is_column(images: Any) -> bool:
    """Whether it is a column of a data frame (a pandas Series' `[0]` is the row labelled 0, not the first) or an array of paths."""
    if isinstance(images, np.ndarray):
        return images.ndim == 1 and images.dtype.kind in "OUT"
    return hasattr(images, "to_numpy") and len(getattr(images, "shape", ())) == 1


def _is_sequence(images: Any) -> bool:
    if is_one_image(images) or isinstance(images, Mapping):
        return False
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return hasattr(images, "__len__") and hasattr(images, "__getitem__")


def _find_at(source: str, *, with_labels: bool, with_groups: bool, with_splits: bool) -> Found:
    path = Path(source)
    if not source:
        raise DataError(f"images = '': give {_KINDS}")
    try:
        is_folder = path.is_dir()
    except OSError as error:  # name too long, or a folder without permission
        raise DataError(f"images = {source[:200]!r}: {reason_of(error)}; give {_KINDS}, or a file's bytes") from None
    if is_folder:
        return _find_in_folder(source, with_labels=with_labels)
    if path.is_file():
        if suffix(source) in TABLES:
            return find_in_manifest(source, with_labels=with_labels, with_groups=with_groups, with_splits=with_splits)
        if _is_archive(source):
            return _find_in_archives([source], with_labels=with_labels)
        return Found(Files(str(path.parent), (path.name,)), (path.name,), kind="a single file")
    if glob.has_magic(source):
        return _find_matching(source, with_labels=with_labels)
    if "://" in source:
        raise DataError(f"{source} is a URL: images are read from disk only, so download them and give {_KINDS}")
    raise DataError(f"{source} does not exist: give {_KINDS}")


def _find_in_folder(folder: str, *, with_labels: bool) -> Found:
    names, archives, others, lost = [], [], [], []
    try:
        listing = walk(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be listed ({reason_of(error)})") from None
    saved = embeddings_among(folder, listing.names)
    for name in listing.names:
        if suffix(name) in SUFFIXES and name not in saved:
            names.append(name)
        elif _is_archive(name):
            archives.append(name)
        elif name in listing.broken:
            lost.append(name)
        else:
            others.append(name)
    if bare := dicom_among(folder, others):
        others = [name for name in others if name not in bare]
        images = bare.union(names)
        names = [name for name in listing.names if name in images]
    wanted = names or archives
    once = listing.once(wanted)
    repeats = listing.repeats + len(wanted) - len(once)
    note = joined(passed_over(others), links_passed_over(repeats, lost), system_folders_passed_over(listing.system))
    if names:
        ids = tuple(once)
        return Found(Files(folder, ids), ids, folders=ids, note=joined(_beside(archives), note))
    if archives:
        paths = [os.path.join(folder, name) for name in once]  # noqa: PTH118
        found = _find_in_archives(paths, with_labels=with_labels, folder=folder)
        return replace(found, note=joined(found.note, note))
    raise _nothing(folder, note)


def _find_matching(pattern: str, *, with_labels: bool) -> Found:
    matches = sorted(
        (Path(name).as_posix() for name in glob.glob(pattern, recursive=True)), key=lambda name: name.split("/")
    )
    # Files in hidden folders are wanted if the pattern itself names the folders.
    strangers = set(not_files("", matches))
    there, system = without_aside([name for name in matches if name not in strangers], pattern)
    files = _once(there)
    left_out = joined(links_passed_over(len(there) - len(files), []), system_folders_passed_over(system))
    archives = [name for name in files if _is_archive(name)]
    others = [name for name in files if suffix(name) not in SUFFIXES and not _is_archive(name)]
    bare = dicom_among("", others)
    others = [name for name in others if name not in bare]
    saved = embeddings_among("", files)
    ids = tuple(name for name in files if name in bare or (is_image(name.rpartition("/")[2]) and name not in saved))
    if ids:
        return Found(
            Files("", ids),
            ids,
            kind="a glob",
            label_note="no labels: a glob has no class folders",
            note=joined(_beside(archives), passed_over(others), left_out),
        )
    if archives:
        return _find_in_archives(archives, with_labels=with_labels)
    raise _nothing(pattern, joined(passed_over(others), left_out))


def _once(files: Sequence[str]) -> list[str]:
    """Each file under its shortest name, if linked folders give it several: `**` follows a loop of them forty times."""
    real_folder = cache(os.path.realpath)
    shortest: dict[str, str] = {}
    for name in sorted(files, key=lambda name: name.count("/")):
        folder, base = os.path.split(name)
        shortest.setdefault(os.path.join(real_folder(folder), base), name)  # noqa: PTH118 (hot loop)
    kept = set(shortest.values())
    return [name for name in files if name in kept]


def _find_listed(listed: Sequence[str | Path], *, with_labels: bool, may_be_gone: bool) -> Found:
    """The files of a list. Their ids are the paths as given, so that a table of labels or groups can name them the same way."""
    paths = [with_home(item) for item in listed]
    missing = [] if may_be_gone else not_files("", paths)
    if missing:
        what = "does not exist"
        if Path(missing[0]).is_dir():
            what = "is a folder: give its images, or the folder by itself"
        elif glob.has_magic(missing[0]):
            what = "is not a file: give a glob by itself, not in a list"
        raise DataError(f"{missing[0]} {what} ({len(missing)} of {len(paths)} files are missing)")
    archives = [path for path in paths if _is_archive(path)]
    if archives and len(archives) == len(paths):
        if (twice := repeated(paths)) is not None:
            raise DataError(f"the list names {twice} more than once: give each archive once")
        return _find_in_archives(paths, with_labels=with_labels)
    strange = archives or [path for path in paths if suffix(path) in TABLES]
    if strange:
        raise DataError(f"{strange[0]} is in a list of image files: give it by itself, or in a list of its own kind")
    return Found(Files("", paths), tuple(os.fspath(item) for item in listed), kind=LISTED)


def _find_labelled(pairs: Sequence[tuple[str | Path, Any]], *, with_labels: bool, may_be_gone: bool) -> Found:
    """The files of a list of (path, label)."""
    found = _find_listed([path for path, _ in pairs], with_labels=False, may_be_gone=may_be_gone)
    if found.kind != LISTED:
        raise DataError(f"{pairs[0][0]} is an archive, and has a label beside it: give archives without labels")
    if not with_labels:
        return found
    labels, note = read_labels([label for _, label in pairs], of="list")
    return replace(found, labels=labels, label_note=note)


def _find_in_archives(paths: Sequence[str], *, with_labels: bool, folder: str | None = None) -> Found:
    zips = [path for path in paths if suffix(path) == ".zip"]
    if zips and len(zips) < len(paths):
        raise DataError(
            f"{zips[0]} and {counted(len(paths) - 1, 'other')} mix .zip and .tar: give archives of one kind"
        )
    if zips:
        found = find_in_zips(zips, whole=folder is None and len(zips) == 1)
    else:
        found = find_in_tars(paths, with_labels=with_labels)
    if not found.ids:
        raise _nothing(paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", found.note)
    if folder is None:
        return found
    return replace(found, note=joined(f"the source: {counted(len(paths), 'archive')} in {folder}", found.note))


def _is_archive(name: str) -> bool:
    return name.lower().endswith((*_ARCHIVES, *_COMPRESSED_TARS))


def _beside(archives: Sequence[str]) -> str:
    return f"{counted(len(archives), 'archive')} beside the images passed over" if archives else ""


def _nothing(source: str, note: str = "") -> DataError:
    looked_for = ", ".join(sorted({*SUFFIXES, *_ARCHIVES}))
    return DataError(joined(f"{source} holds no images (looked for {looked_for}, in subfolders too)", note))
