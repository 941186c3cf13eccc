"""Files on disk: which names are images, a folder's files in order, and the store that reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

from jepakit._threads import in_threads
from jepakit.bundle import MANIFEST, WEIGHTS
from jepakit.readers import ImageSource
from jepakit.sources.store import SAMPLE_BYTES, stamp_of

_DICOM = frozenset({".dcm", ".dicom", ".ima"})
SUFFIXES = _DICOM | {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".svs", ".ndpi", ".scn",
}  # fmt: skip
DICOM_HEAD = 132
"""Bytes: a preamble that may hold anything, and the four letters that tell."""
_FILE, _FOLDER, _NOWHERE, _OTHER = range(4)


@dataclass(frozen=True)
class Files:
    """Files as names below one folder: with a million of them, whole paths would be most of the memory."""

    root: str
    names: Sequence[str]
    in_memory: ClassVar[bool] = False

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
    return suffix(name) in SUFFIXES and not is_hidden(name)


def has_no_suffix(name: str) -> bool:
    """Whether a name ends in none; of 1.2.840.….17, the UID by which a DICOM file is often named, the last number is none."""
    last = suffix(name)
    return not last or last[1:].isdigit()


def begins_as_dicom(head: bytes) -> bool:
    """Whether the first `DICOM_HEAD` bytes of a file are those of a DICOM file (PS3.10, 7.1)."""
    return head[DICOM_HEAD - 4 : DICOM_HEAD] == b"DICM"


def dicom_among(root: str, names: Sequence[str]) -> set[str]:
    """Those of `names` without a suffix that begin as DICOM does."""

    def is_one(name: str) -> bool:
        try:
            with Path(root, name).open("rb") as file:
                return begins_as_dicom(file.read(DICOM_HEAD))
        except OSError:
            return False

    asked = [name for name in names if may_be_bare_dicom(name)]
    answers = in_threads(is_one, asked, "files without a suffix")
    return {name for name, answer in zip(asked, answers, strict=True) if answer}


def may_be_bare_dicom(name: str) -> bool:
    """Whether a file's first bytes may be those of DICOM: it has no suffix, and is no DICOMDIR, which lists others."""
    return has_no_suffix(name) and name.rpartition("/")[2].upper() != "DICOMDIR"


def is_dicom(name: str) -> bool:
    """Whether a name is that of a DICOM file by its suffix."""
    return suffix(name) in _DICOM


def may_be_dicom(name: str) -> bool:
    """Whether a file that is listed as an image may be DICOM: by its suffix, or having none of an image."""
    return is_dicom(name) or suffix(name) not in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a part of a name begins with a dot, as those that a Mac writes beside its files."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


@dataclass
class Listing:
    """What is visible below a folder; names are relative to it."""

    folder: str
    names: list[str] = field(default_factory=list)
    """Files, and links that lead nowhere, sorted folder by folder."""
    links: set[str] = field(default_factory=set)
    """Those of them that are links."""
    broken: set[str] = field(default_factory=set)
    """Those of the links that lead nowhere."""
    repeats: int = 0
    """Folders left out since they are listed under another name."""

    def once(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that name a file first: links to another of them, or to what an earlier one leads to, are left out."""
        linked = self.links.intersection(names)
        if not linked:
            return list(names)
        first: dict[str, str] = {}
        for name in names:
            if name in linked:
                first.setdefault(os.path.realpath(os.path.join(self.folder, name)), name)  # noqa: PTH118
        real_folder = cache(os.path.realpath)
        for name in names:
            if name not in linked:
                inside, base = os.path.split(os.path.join(self.folder, name))  # noqa: PTH118 (hot loop)
                first.pop(os.path.join(real_folder(inside), base), None)  # noqa: PTH118
        left_out = linked.difference(first.values())
        return [name for name in names if name not in left_out]


def walk(folder: str) -> Listing:
    """List the visible files below `folder`; bundles are left out.

    Links are followed, but to no folder that is listed: it keeps the name under which it lies in `folder`, else the first of
    the links to it. One stat a folder and a link, none a file: the listing itself says what is a folder, and over a network
    a million stats take an hour. Raises OSError.
    """
    listing = Listing(folder)
    seen: set[tuple[int, int]] = set()
    linked = _visit(listing, "", seen, frozenset())
    followed = bool(linked)
    while linked:
        linked = [deeper for inside in linked for deeper in _visit(listing, inside, seen)]
    if followed:
        # In the order of each folder's names: the end of one comes before every character, "/" behind "-" and ".".
        listing.names.sort(key=lambda name: name.replace("/", "\0"))
    return listing


def _visit(
    listing: Listing, inside: str, seen: set[tuple[int, int]], above: frozenset[tuple[int, int]] | None = None
) -> list[str]:
    """Add the files of a folder and those in it that are no links to the listing; the linked folders, for later.

    A folder in `seen` is left out where a link leads there. Without one (`above`: the folders that it lies in) a number that
    was seen is a second mount, or one of those that not every file system gives once.
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
    if sum(kind == _FILE and name in (MANIFEST, WEIGHTS) for name, kind, _ in found) == 2:
        return []  # its golden.npz is no image of the user's
    linked = []
    for base, kind, is_link in found:
        name = inside + base
        if kind == _FOLDER and is_link:
            linked.append(f"{name}/")
        elif kind == _FOLDER:
            linked += _visit(listing, f"{name}/", seen, deeper)
        elif kind != _OTHER:
            listing.names.append(name)
            if is_link:
                listing.links.add(name)
            if kind == _NOWHERE:
                listing.broken.add(name)
    return linked


def _kind(entry: os.DirEntry[str]) -> int:
    """What an entry is, or leads to; devices and the like are _OTHER."""
    if entry.is_dir():
        return _FOLDER
    if entry.is_file():
        return _FILE
    return _NOWHERE if not os.path.exists(entry.path) else _OTHER  # noqa: PTH110


def not_files(root: str, names: Sequence[str]) -> list[str]:
    """Those of `names` (relative to `root`) that are no files; found by listing their folders, as `walk` does."""
    folders: dict[str, set[str]] = {}
    suspects = []
    for name in names:
        folder, base = os.path.split(os.path.join(root, name))  # noqa: PTH118 (hot loop)
        if folder not in folders:
            folders[folder] = _files_of(folder or ".")
        if base not in folders[folder]:
            suspects.append(name)
    # The name may still be right where the file system ignores case.
    return [name for name in suspects if not Path(root, name).is_file()]


def _files_of(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        # ValueError: a name with a null byte.
        return set()
