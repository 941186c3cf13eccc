"""Files on disk: which names are images, the files of a folder in order, and the store that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

from jepakit._threads import in_threads
from jepakit.embeddings import is_embeddings
from jepakit.readers import DICOM_HEAD, ImageSource, begins_as_dicom
from jepakit.sources.aside import CACHED, is_own_folder, is_system_folder
from jepakit.sources.store import SAMPLE_BYTES, stamp_of

_DICOM = frozenset({".dcm", ".dicom", ".ima"})
SUFFIXES = _DICOM | {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".svs", ".ndpi", ".scn",
}  # fmt: skip
_FILE, _FOLDER, _NOWHERE, _OTHER = range(4)


@dataclass(frozen=True)
class Files:
    """Files as names below one folder: for a million files, whole paths would take most of the memory."""

    root: str
    names: Sequence[str]
    in_memory: ClassVar[bool] = False
    most_threads: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> ImageSource:
        return Path(self.root, self.names[index])

    def stamp(self, index: int) -> str | None:
        return stamp_of(os.path.join(self.root, self.names[index]))  # noqa: PTH118 (root may be empty)

    def fingerprint(self, index: int) -> bytes:
        try:
            with Path(self.root, self.names[index]).open("rb") as file:
                return b"%d\0" % os.fstat(file.fileno()).st_size + file.read(SAMPLE_BYTES)
        except OSError:
            return b"unreadable"


def suffix(name: str) -> str:
    """The last suffix in lower case, with its dot, or an empty string."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (hot loop)


def is_image(name: str) -> bool:
    """Whether a name, folders included, is a visible image by its suffix."""
    return suffix(name) in SUFFIXES and not name.endswith(CACHED) and not is_hidden(name)


def has_no_suffix(name: str) -> bool:
    """Whether a name has no suffix. The last number of a UID, as in DICOM names like 1.2.840.….17, is not a suffix."""
    last = suffix(name)
    return not last or last[1:].isdigit()


def dicom_among(root: str, names: Sequence[str]) -> set[str]:
    """Those of `names` that have no suffix and begin like a DICOM file."""

    def is_one(name: str) -> bool:
        try:
            with Path(root, name).open("rb") as file:
                return begins_as_dicom(file.read(DICOM_HEAD))
        except OSError:
            return False

    return _those(is_one, [name for name in names if may_be_bare_dicom(name)], "files without a suffix")


def embeddings_among(root: str, names: Sequence[str]) -> set[str]:
    """Those of `names` that are saved embeddings, not images."""
    asked = [name for name in names if suffix(name) == ".npz"]
    return _those(lambda name: is_embeddings(os.path.join(root, name)), asked, "saved embeddings")  # noqa: PTH118


def _those(is_one: Callable[[str], bool], names: Sequence[str], what: str) -> set[str]:
    """Those of `names` for which `is_one`, called in threads, is true."""
    answers = in_threads(is_one, names, what)
    return {name for name, answer in zip(names, answers, strict=True) if answer}


def may_be_bare_dicom(name: str) -> bool:
    """Whether a file may be DICOM by its first bytes: it has no suffix, and is not a DICOMDIR, which lists others."""
    return has_no_suffix(name) and name.rpartition("/")[2].upper() != "DICOMDIR"


def is_dicom(name: str) -> bool:
    """Whether a name has a suffix of DICOM files."""
    return suffix(name) in _DICOM


def may_be_dicom(name: str) -> bool:
    """Whether a file listed as an image may be DICOM: it has a suffix of DICOM files, or none of any image."""
    return is_dicom(name) or suffix(name) not in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether any part of a name begins with a dot, as in the files that macOS adds, or is a system's folder."""
    return any((part.startswith(".") and part not in (".", "..")) or is_system_folder(part) for part in name.split("/"))


@dataclass
class Listing:
    """The visible files below a folder; names are relative to it."""

    folder: str
    names: list[str] = field(default_factory=list)
    """Files and broken links, sorted folder by folder."""
    links: set[str] = field(default_factory=set)
    """Those of the names that are links."""
    broken: set[str] = field(default_factory=set)
    """Those of the links that are broken."""
    repeats: int = 0
    """Number of folders left out because they are listed under another name."""
    system: list[str] = field(default_factory=list)
    """System folders left out, such as a NAS's thumbnails."""

    def once(self, names: Sequence[str]) -> list[str]:
        """`names` with each file once: without links to another of the names, or to the target of an earlier link."""
        linked = self.links.intersection(names)
        if not linked:
            return list(names)
        first: dict[str, str] = {}
        target = _resolver()
        for name in names:
            if name in linked:
                # A broken link may lead round in a loop.
                real = os.path.realpath if name in self.broken else target
                first.setdefault(real(os.path.join(self.folder, name)), name)  # noqa: PTH118
        real_folder = cache(os.path.realpath)
        for name in names:
            if name not in linked:
                inside, base = os.path.split(os.path.join(self.folder, name))  # noqa: PTH118 (hot loop)
                first.pop(os.path.join(real_folder(inside), base), None)  # noqa: PTH118
        left_out = linked.difference(first.values())
        return [name for name in names if name not in left_out]


def _resolver() -> Callable[[str], str]:
    """An `os.path.realpath` for paths that exist, which looks at each folder on their way once."""

    def resolve(path: str, start: str) -> str:
        if path.startswith("/"):
            start = "/"
        for part in path.split("/"):
            if part == "..":
                start = os.path.dirname(start)  # noqa: PTH120
            elif part not in ("", "."):
                start = follow(os.path.join(start, part))  # noqa: PTH118
        return start

    @cache
    def follow(path: str) -> str:
        try:
            target = os.readlink(path)  # noqa: PTH115
        except OSError:
            return path
        return resolve(target, os.path.dirname(path))  # noqa: PTH120

    here = os.path.realpath("")
    return lambda path: resolve(path, here)


def walk(folder: str) -> Listing:
    """List the visible files below `folder`; system folders and what jepakit wrote are left out.

    Links are followed, except to a folder that is listed already: it keeps its own name in `folder`, else that of the
    first link to it. Costs one stat per folder and link but none per file: the listing tells folders from files, and a
    million stats over a network take an hour. Raises OSError.
    """
    listing = Listing(folder)
    seen: set[tuple[int, int]] = set()
    linked = _visit(listing, "", seen, frozenset())
    followed = bool(linked)
    while linked:
        linked = [deeper for inside in linked for deeper in _visit(listing, inside, seen)]
    if followed:
        # Sort folder by folder: the end of a name comes before any character, although "/" sorts after "-" and ".".
        listing.names.sort(key=lambda name: name.replace("/", "\0"))
    return listing


def _visit(
    listing: Listing, inside: str, seen: set[tuple[int, int]], above: frozenset[tuple[int, int]] | None = None
) -> list[str]:
    """Add the files of a folder, and of its real subfolders, to the listing; returns the linked folders, for later.

    A folder reached by a link is skipped if it is in `seen`. Any other is skipped only if it is in `above`, the folders
    around it: elsewhere, a number seen before means a second mount, or a file system whose numbers are not unique.
    """
    here = os.path.join(listing.folder, inside)  # noqa: PTH118 (hot loop)
    status = os.stat(here)  # noqa: PTH116
    place = (status.st_dev, status.st_ino)
    if place in (seen if above is None else above):
        listing.repeats += 1
        return []
    seen.add(place)
    deeper = None if above is None else above | {place}
    with os.scandir(here) as entries:
        found = sorted((entry.name, _kind(entry), entry.is_symlink()) for entry in entries if entry.name[0] != ".")
    if is_own_folder(name for name, kind, _ in found if kind == _FILE):
        return []
    linked = []
    for base, kind, is_link in found:
        name = inside + base
        if kind == _FOLDER and is_system_folder(base):
            listing.system.append(name)
        elif kind == _FOLDER and is_link:
            linked.append(f"{name}/")
        elif kind == _FOLDER:
            linked += _visit(listing, f"{name}/", seen, deeper)
        elif kind != _OTHER and not base.endswith(CACHED):
            listing.names.append(name)
            if is_link:
                listing.links.add(name)
            if kind == _NOWHERE:
                listing.broken.add(name)
    return linked


def _kind(entry: os.DirEntry[str]) -> int:
    """The kind of an entry, or of its link target; devices and the like are _OTHER."""
    if entry.is_dir():
        return _FOLDER
    if entry.is_file():
        return _FILE
    return _NOWHERE if not os.path.exists(entry.path) else _OTHER  # noqa: PTH110


def not_files(root: str, names: Sequence[str]) -> list[str]:
    """Those of `names` (relative to `root`) that are not files, found by listing their folders, as `walk` does."""
    folders: dict[str, set[str]] = {}
    suspects = []
    for name in names:
        folder, base = os.path.split(os.path.join(root, name))  # noqa: PTH118 (hot loop)
        if folder not in folders:
            folders[folder] = _files_of(folder or ".")
        if base not in folders[folder]:
            suspects.append(name)
    # The name may still be right if the file system ignores case.
    return [name for name in suspects if not Path(root, name).is_file()]


def _files_of(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        # ValueError: a name with a null byte.
        return set()
