"""Files on disk: which names are images, a folder's files in order, and the store that reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jepakit.bundle import MANIFEST, WEIGHTS
from jepakit.readers import ImageSource
from jepakit.sources.store import SAMPLE_BYTES, stamp_of

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".dcm", ".npy", ".npz", ".svs", ".ndpi", ".scn"}
)


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
    return suffix(name) in SUFFIXES and not any(
        part.startswith(".") and part not in (".", "..") for part in name.split("/")
    )


def walk(folder: str, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Names of the visible files below `folder`, relative to it, sorted folder by folder; bundles are left out.

    Links are followed, but never back into a folder they are in. One stat a folder and none a file: the
    listing itself says what is a folder, and over a network a million stats take an hour. Raises OSError.
    """
    here = os.path.join(folder, inside)  # noqa: PTH118 (hot loop)
    status = os.stat(here)  # noqa: PTH116
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    with os.scandir(here) as entries:
        found = sorted(
            (entry.name, entry.is_dir())
            for entry in entries
            if entry.name[0] != "." and (entry.is_dir() or entry.is_file())
        )
    if (MANIFEST, False) in found and (WEIGHTS, False) in found:
        return  # its golden.npz is no image of the user's
    for name, is_folder in found:
        if is_folder:
            yield from walk(folder, f"{inside}{name}/", above | {place})
        else:
            yield inside + name


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
